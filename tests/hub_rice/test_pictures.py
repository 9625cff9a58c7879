"""Pictures equal those of the encoder's own image processor, as images and as frames."""

import json

import pytest
import torch
import transformers
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from hub_rice.pictures import follow_encoder
from modeling_rice import RiceConfig
from processing_rice import build_processor, train_tokenizer

TOKENS = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}
SIDE = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
PROCESSORS = {
    "CLIPImageProcessor": SIDE,
    "BitImageProcessor": SIDE,
    "MobileNetV2ImageProcessor": {**SIDE, "size": {"shortest_edge": 80}},
    "ViTImageProcessor": {"size": {"height": 64, "width": 64}, "resample": 2},
    "SiglipImageProcessor": {"size": {"height": 64, "width": 64}},
    "DINOv3ViTImageProcessor": {"size": {"height": 64, "width": 64}},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 64}, "crop_pct": 0.875},
    "PoolFormerImageProcessor": {**SIDE, "crop_pct": 0.9},
    "LevitImageProcessor": SIDE,
}


def picture(height=90, width=150):
    noise = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    return to_pil_image(torch.nn.functional.interpolate(noise, (height, width), mode="bicubic")[0].clamp(0, 1))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a text"] * 20)


@pytest.fixture
def follow(tokenizer, tmp_path):
    """A function that saves an encoder's files and returns a processor that follows them, and what was assumed."""

    def run(config=None, image_size=None, files=None, **settings):
        config = RiceConfig(vision_config=config or {"model_type": "vit", **TOKENS}, **settings)
        config.vision_config.save_pretrained(tmp_path)
        if files is not None:
            files.save_pretrained(tmp_path)
        processor = build_processor(tokenizer, 64, config.mask_patch_size)
        return processor, follow_encoder(processor, str(tmp_path), config, image_size)

    return run


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_and_frames_are_those_of_the_image_processor(follow, name):
    theirs = getattr(transformers, name)(**PROCESSORS[name])
    processor, assumed = follow(files=theirs)
    assert assumed is None
    for each in (picture(), picture(150, 90)):
        expected = torch.as_tensor(theirs(each, return_tensors="pt")["pixel_values"])
        inputs = processor(images=[each], videos=[[each]])
        assert inputs["pixel_values"].shape == (1, 3, 64, 64)
        # A grey level is 1 / 255 divided by a deviation of at least a fifth.
        torch.testing.assert_close(inputs["pixel_values"], expected, rtol=0, atol=0.04)
        torch.testing.assert_close(inputs["pixel_values_videos"][0], expected, rtol=0, atol=0.04)


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_a_timm_network_states_its_pictures_in_its_config(follow, mode):
    pytest.importorskip("timm")
    told = {"input_size": [3, 64, 64], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.875}
    told |= {"crop_mode": mode, "interpolation": "bilinear"}
    vision = {"model_type": "timm_wrapper", "architecture": "tf_efficientnet_lite0", "pretrained_cfg": told}
    processor, assumed = follow(vision)
    assert assumed is None
    expected = {"shortest_edge": 73} if mode == "center" else {"height": 73, "width": 73}
    for part in (processor.image_processor, processor.video_processor):
        assert (list(part.image_mean), list(part.image_std)) == (told["mean"], told["std"])
        assert {side: pixels for side, pixels in dict(part.size).items() if pixels} == expected
        assert part.do_center_crop and part.crop_size["height"] == 64 and int(part.resample) == Image.BILINEAR


def test_the_picture_settings_beside_a_timm_encoder_are_read(follow):
    pytest.importorskip("timm")
    vision = {"model_type": "timm_wrapper", "architecture": "tf_efficientnet_lite0"}
    theirs = transformers.CLIPImageProcessor(**SIDE, image_mean=[0.1] * 3, image_std=[0.2] * 3)
    processor, _ = follow(vision, files=theirs)
    part = processor.video_processor
    assert list(part.image_mean) == [0.1] * 3 and part.crop_size["height"] == 64


def test_missing_picture_settings_are_reported(follow):
    processor, assumed = follow()
    assert "has no image processor: images are stretched to 64 x 64 pixels, and normalised as for CLIP." in assumed
    assert processor(images=[picture()])["pixel_values"].shape[-2:] == (64, 64)


@pytest.mark.parametrize("content", ['{"size": ', "[1]", '{"size": "x"}', '{"size": {"height": -3, "width": 4}}'])
def test_a_damaged_file_is_not_ignored(follow, tmp_path, content):
    """transformers says the same of a file that is damaged as of one that is missing."""
    content = content.replace('{"size', '{"image_processor_type": "ViTImageProcessor", "size')
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json.*(restore the file|save it again)\."):
        follow()


def test_pictures_have_the_shape_that_an_encoder_was_made_for(follow):
    shape = {"model_type": "vit", **TOKENS, "image_size": [32, 64]}
    processor, assumed = follow(shape)
    assert "images are stretched to 32 x 64 pixels" in assumed
    inputs = processor(images=[picture()], videos=[[picture()]])
    assert inputs["pixel_values"].shape[-2:] == inputs["pixel_values_videos"].shape[-2:] == (32, 64)


def test_unsupported_picture_settings_are_reported(follow):
    _, assumed = follow(files=transformers.MobileViTImageProcessor(**SIDE))
    assert "MobileViTImageProcessor has a step that RICE's processor does not reproduce" in assumed


def test_another_size_keeps_the_aspect_ratio(follow):
    vision = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    theirs = transformers.BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    processor, assumed = follow(vision, 112, theirs, use_decoder=False)
    assert assumed is None
    for part in (processor.image_processor, processor.video_processor):
        assert part.size["shortest_edge"] == 128 and part.crop_size["height"] == part.crop_size["width"] == 112
    # Of 28 x 28 patches of 224 pixels.
    assert processor.video_processor.patch_size == 8


def test_boxes_follow_the_crop(follow):
    """Frames of 150 x 90 become 106 x 64, of which 21 columns are cut off on either side."""
    processor, _ = follow(files=transformers.CLIPImageProcessor(**SIDE))
    frames = [picture(90, 150)] * 4
    width = 106
    boxes = [
        [(21 + 16) / width, 0.0, (21 + 31) / width, 15 / 64],
        [(21 + 48) / width, 48 / 64, 1.0, 1.0],
        # Cut off: as of a frame without a box, all patches are kept.
        [0.0, 0.0, 15 / width, 1.0],
        None,
    ]
    mask = processor(videos=[frames], boxes=[boxes], box_iou_threshold=0.2)["patch_mask"][0]
    assert mask[0].nonzero().flatten().tolist() == [1]
    assert mask[1].nonzero().flatten().tolist() == [15]
    assert mask[2].all() and mask[3].all()


def test_picture_settings_are_saved_with_the_processor(follow, tmp_path):
    processor, _ = follow(files=transformers.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875))
    processor.save_pretrained(tmp_path / "saved")
    loaded = type(processor).from_pretrained(tmp_path / "saved")
    inputs = [each(images=[picture()], videos=[[picture()]]) for each in (processor, loaded)]
    for name in ("pixel_values", "pixel_values_videos"):
        assert torch.equal(inputs[0][name], inputs[1][name])
    assert json.loads((tmp_path / "saved" / "processor_config.json").read_text())["video_processor"]["do_center_crop"]
