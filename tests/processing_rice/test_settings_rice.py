"""Settings of one call, compared call by call with processors of transformers; those without effect are refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPProcessor,
    LlavaOnevisionVideoProcessor,
    SiglipImageProcessor,
    SiglipProcessor,
)

from processing_rice import RicePillowImageProcessor, RiceProcessor, RiceVideoProcessor, build_processor

SQUARE = {"height": 32, "width": 32}

# What acts on pictures, whether they are a shop's images or the frames of a clip.
PICTURE_SETTINGS = [
    {},
    {"size": 48},
    {"size": {"height": 20, "width": 28}},
    {"size": (20, 28)},
    {"do_resize": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"do_rescale": False},
    {"rescale_factor": 1 / 127.5},
    {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1.0]},
    {"image_mean": 0.5, "image_std": 0.5},
    {"resample": 0},
    {"resample": Image.Resampling.BILINEAR},
    {"do_center_crop": True, "crop_size": 16},
    {"do_center_crop": True, "crop_size": {"height": 9, "width": 15}},
    {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": 20},
    {"data_format": "channels_first"},
    {"input_data_format": "channels_last"},
    {"device": "cpu"},
    {"return_tensors": "np"},
]


@pytest.fixture
def picture(make_picture):
    return make_picture(40, 64)


def as_array(values):
    return np.asarray(values[0] if isinstance(values, list) else values, dtype=np.float64)


@pytest.mark.parametrize("settings", PICTURE_SETTINGS, ids=str)
@pytest.mark.parametrize(
    "image_class, processor_class", [(CLIPImageProcessor, CLIPProcessor), (SiglipImageProcessor, SiglipProcessor)]
)
def test_images_like_other_image_processors(tokenizer, picture, image_class, processor_class, settings):
    image_processor = image_class(size=SQUARE, do_center_crop=False, default_to_square=True)
    ours = RiceProcessor(image_processor, RiceVideoProcessor(size=SQUARE, num_frames=4), tokenizer)
    theirs = processor_class(image_processor, tokenizer)
    expected = theirs(images=[picture], **({"return_tensors": "pt"} | settings))["pixel_values"]
    for call in (settings, {"images_kwargs": settings}):
        pixels = ours(images=[picture], **call)["pixel_values"]
        assert type(pixels) is type(expected) and np.array_equal(pixels, expected)
    direct = ours.image_processor(picture, **({"return_tensors": "pt"} | settings))["pixel_values"]
    assert np.array_equal(direct, expected)


@pytest.mark.parametrize("settings", [*PICTURE_SETTINGS, {"num_frames": 2}], ids=str)
def test_clips_like_another_video_processor(tokenizer, make_picture, settings):
    ours = RiceVideoProcessor(size=SQUARE, num_frames=3)
    theirs = LlavaOnevisionVideoProcessor(
        size=SQUARE,
        image_mean=ours.image_mean,
        image_std=ours.image_std,
        do_sample_frames=False,
        default_to_square=True,
    )
    processor = RiceProcessor(SiglipImageProcessor(default_to_square=True), ours, tokenizer)
    clip = np.stack([make_picture(40, 64, seed=i) for i in range(3)])
    # Which frames are taken is this project's own rule.
    taken = clip[[0, 1]] if "num_frames" in settings else clip
    others = {name: value for name, value in settings.items() if name != "num_frames"}
    expected = theirs(taken, **({"return_tensors": "pt"} | others))["pixel_values_videos"]
    for call in (
        lambda: ours([clip], **({"return_tensors": "pt"} | settings)),
        lambda: processor(videos=[clip], **settings),
        lambda: processor(videos=[clip], videos_kwargs=settings),
    ):
        pixels = call()["pixel_values_videos"]
        assert type(pixels) is type(expected)
        np.testing.assert_allclose(pixels, expected, rtol=0, atol=2e-6 * max(1, np.abs(as_array(expected)).max()))


@pytest.mark.parametrize("settings", PICTURE_SETTINGS, ids=str)
@pytest.mark.parametrize("backend", ["torchvision", "pillow"])
def test_one_setting_applies_to_images_and_clips(tokenizer, picture, backend, settings):
    processor = build_processor(tokenizer, image_size=32, patch_size=8, resize_backend=backend)
    both = processor(images=[picture], videos=[[picture, picture]], **settings)
    images, frames = as_array(both["pixel_values"]), as_array(both["pixel_values_videos"])[0]
    np.testing.assert_allclose(frames, np.stack([images[0]] * 2), rtol=0, atol=2e-6 * max(1, np.abs(images).max()))
    floats = processor(images=[picture / 255], videos=[[picture / 255]], **settings)
    if settings.get("do_rescale", True):
        # Bytes are rounded once more than floats, by half a grey level.
        slack = 1.1 / 255 / 0.25 * 255 * settings.get("rescale_factor", 1 / 255)
        np.testing.assert_allclose(as_array(floats["pixel_values"]), images, rtol=0, atol=slack)
        np.testing.assert_allclose(as_array(floats["pixel_values_videos"])[0], images, rtol=0, atol=slack)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding": "max_length", "max_length": 12},
        {"padding": "max_length"},
        {"padding": True, "max_length": 5, "truncation": True},
        {"max_length": 5},
        {"truncation": False},
        {"truncation": "do_not_truncate"},
        {"add_special_tokens": False},
        {"padding_side": "left"},
        {"pad_to_multiple_of": 8},
        {"return_token_type_ids": True},
        {"return_special_tokens_mask": True},
        {"return_length": True},
        {"return_attention_mask": False},
        {"return_tensors": "np"},
    ],
    ids=str,
)
def test_texts_like_another_processor(processor, settings):
    texts = ["a red cup", "buy this blue cup " * 3]
    theirs = CLIPProcessor(processor.image_processor, processor.tokenizer)
    expected = dict(theirs(text=texts, **({"padding": True, "truncation": True, "return_tensors": "pt"} | settings)))
    if not settings.get("return_token_type_ids"):
        expected.pop("token_type_ids", None)
    for kind, prefix in (("text", ""), ("titles", "title_")):
        for call in (settings, {"text_kwargs": settings}):
            ours = processor(**{kind: texts}, **call)
            assert set(ours) == {prefix + name for name in expected}
            for name, values in expected.items():
                assert type(ours[prefix + name]) is type(values) and np.array_equal(ours[prefix + name], values)


def test_asr_is_complete_without_truncation(processor, tokenizer):
    spoken = "buy this blue cup " * 60
    for truncation in (False, "do_not_truncate"):
        ids = processor(asr=[spoken], truncation=truncation)["asr_input_ids"]
        assert ids.tolist() == tokenizer([spoken], truncation=False)["input_ids"]


def test_padding_acts_on_clips_and_texts(processor, make_picture):
    inputs = processor(videos=[[make_picture()]], asr=["a cup"], padding="max_length", max_length=12)
    assert inputs["pixel_values_videos"].shape[1] == 4 and inputs["asr_input_ids"].shape == (1, 12)
    apart = processor(videos=[[make_picture()]], asr=["a cup"], videos_kwargs={"padding": "max_length"})
    assert apart["pixel_values_videos"].shape[1] == 4 and apart["asr_input_ids"].shape[1] < 12


def test_common_settings_act_on_everything(processor, make_picture):
    inputs = processor(
        images=make_picture(), videos=[make_picture()], titles=["a"], common_kwargs={"return_tensors": "np"}
    )
    assert all(isinstance(values, np.ndarray) for values in inputs.values())
    assert processor(titles=["a"], images_kwargs=None, common_kwargs=None)["title_input_ids"].shape[0] == 1
    wide = processor(images=make_picture(), videos=[make_picture()], common_kwargs={"size": SQUARE | {"width": 48}})
    assert wide["pixel_values"].shape[-2:] == wide["pixel_values_videos"].shape[-2:] == (32, 48)


@pytest.mark.parametrize("backend", ["torchvision", "pillow"])
def test_outputs_are_on_the_device(tokenizer, make_picture, backend):
    processor = build_processor(tokenizer, image_size=32, patch_size=8, resize_backend=backend)
    arguments = {"images": [make_picture(), make_picture() / 255], "videos": [[make_picture()]], "boxes": [[None]]}
    inputs = processor(**arguments, device="meta")
    assert all(values.device.type == "meta" for values in inputs.values())
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)
    alone = RicePillowImageProcessor(size=SQUARE)(make_picture(), device="meta", return_tensors="pt")
    assert alone["pixel_values"].device.type == "meta"


def test_ambiguous_channel_axes(processor, make_picture):
    square = make_picture(3, 40)
    last = processor(images=[square], videos=[[square]], input_data_format="channels_last")
    first = processor(images=[square.transpose(2, 0, 1)], videos=[[square.transpose(2, 0, 1)]])
    assert torch.equal(last["pixel_values"], first["pixel_values"])
    assert torch.equal(last["pixel_values_videos"], first["pixel_values_videos"])
    assert not torch.equal(processor(images=[square])["pixel_values"], last["pixel_values"])
    with pytest.raises(ValueError, match=r"Image 0 has shape \(24, 40, 3\), which does not fit `input_data_format`"):
        processor(images=[make_picture()], input_data_format="channels_first")


@pytest.mark.parametrize(
    "settings, grid, kept",
    [
        # The box is the frame's left half and upper half.
        ({}, (4, 4), (slice(0, 2), slice(0, 2))),
        ({"size": {"height": 16, "width": 48}}, (2, 6), (slice(0, 1), slice(0, 3))),
        ({"size": 64}, (8, 8), (slice(0, 4), slice(0, 4))),
        ({"patch_size": 16}, (2, 2), (slice(0, 1), slice(0, 1))),
        # 32 x 32 without 8 pixels on each side: the box ends at 8 of 16.
        ({"do_center_crop": True, "crop_size": 16}, (2, 2), (slice(0, 1), slice(0, 1))),
        # A frame of 24 x 40 as it is, and its middle: 20 - 12 of 16 pixels, and 12 - 4 of 16.
        ({"do_resize": False}, (3, 5), (slice(0, 2), slice(0, 3))),
        ({"do_resize": False, "do_center_crop": True, "crop_size": 16}, (2, 2), (slice(0, 1), slice(0, 1))),
        # 24 x 40 becomes 48 x 80, of which 32 x 32 are kept, from (8, 24): the box ends at 16 of 32 both ways.
        ({"size": {"shortest_edge": 48}, "do_center_crop": True, "crop_size": 32}, (4, 4), (slice(0, 2), slice(0, 2))),
    ],
    ids=str,
)
def test_boxes_follow_the_size_of_the_call(processor, make_picture, settings, grid, kept):
    frames = [make_picture(), make_picture()]
    inputs = processor(videos=[frames], boxes=[[[0, 0, 0.5, 0.5], None]], box_iou_threshold=0.05, **settings)
    expected = torch.zeros(grid, dtype=torch.bool)
    expected[kept] = True
    assert inputs["patch_mask"][0, 0].reshape(grid).tolist() == expected.tolist()
    assert inputs["patch_mask"][0, 1].all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"images": 1, "num_frames": 3}, "`num_frames` is a setting for videos, and there is none in this call"),
        ({"titles": 1, "size": 3}, "`size` is a setting for images or videos, and there is none in this call"),
        ({"images": 1, "add_special_tokens": False}, "`add_special_tokens` is a setting for text"),
        ({"images": 1, "images_kwargs": {"sise": 3}}, "Unknown argument 'sise' in `images_kwargs`"),
        ({"videos": 1, "videos_kwargs": {"max_length": 3}}, "Unknown argument 'max_length' in `videos_kwargs`"),
        ({"images": 1, "common_kwargs": {"sise": 3}}, "Unknown argument 'sise' in `common_kwargs`"),
        ({"images": 1, "audio": 3}, "Unknown argument 'audio'"),
        ({"videos": 1, "boxes": [[None]], "videos_kwargs": {"boxes": [[None]]}}, "`boxes` was given twice"),
        ({"images": 1, "size": 3, "images_kwargs": {"size": 4}}, "size was passed two times"),
        ({"images": 1, "data_format": "channels_last"}, '`data_format` must be "channels_first"'),
        ({"images": 1, "do_convert_rgb": False}, "`do_convert_rgb=False` is not supported"),
        ({"images": 1, "image_seq_length": 3}, "`image_seq_length` has no effect"),
        ({"images": 1, "resample": 4}, r"`resample` must be one of 0 \(nearest\), .*, got 4"),
        ({"images": 1, "resample": 99}, "`resample` must be one of"),
        ({"images": 1, "image_mean": [0.5, 0.5]}, "`image_mean` must be one number, or one per colour channel"),
        ({"images": 1, "size": -3}, "`size` must be at least 1 pixel, got -3"),
        ({"images": 1, "size": 0}, "`size` must be at least 1 pixel, got 0"),
        ({"images": 1, "size": {"height": 0, "width": 3}}, "`size` must be at least 1 pixel"),
        ({"images": 1, "size": "a"}, "`size` must be of one of the types int, .*, got 'a'"),
        ({"images": 1, "do_resize": "no"}, "`do_resize` must be of one of the types bool, None, got 'no'"),
        ({"images": 1, "device": "toaster"}, "`device` must name a device of torch, got 'toaster'"),
        ({"images": 1, "videos": 1, "fps": 2}, "`fps` is not supported"),
        ({"images": 1, "videos": 1, "do_pad": True}, "`do_pad` is not supported"),
        ({"videos": 1, "return_metadata": True}, "`return_metadata` is not supported"),
        ({"titles": 1, "return_overflowing_tokens": True}, "`return_overflowing_tokens` has no meaning"),
        ({"images": 1, "image_std": 0.0}, "`image_std` must be finite and above 0, got 0.0"),
        ({"images": 1, "image_std": [0.5, float("nan"), 0.5]}, "`image_std` must be finite and above 0, got"),
        ({"images": 1, "image_mean": float("inf")}, "`image_mean` must be finite, got inf"),
        ({"videos": 1, "rescale_factor": 0.0}, "`rescale_factor` must be finite and above 0, got 0.0"),
        ({"images": 1, "resample": 2.0}, "`resample` must be one of .*, got 2.0"),
        ({"images": 1, "input_data_format": "HWC"}, '`input_data_format` must be "channels_first" or "channels_last"'),
        ({"images": 1, "size": {"width": 3}}, r"`size` must be a number of pixels, or name .*, got \{'width': 3\}"),
        ({"images": 1, "size": {"longest_edge": 3}}, "`size` must be a number of pixels, or name"),
        ({"images": 1, "images_kwargs": 5}, "`images_kwargs` must be a dictionary of settings, got 5"),
        ({"images": 1, "common_kwargs": "size"}, "`common_kwargs` must be a dictionary of settings, got 'size'"),
        ({"videos": 1, "fps": 0}, "`fps` is not supported"),
        ({"videos": 1, "patch_size": 0}, "`patch_size` must be at least 1 pixel, got 0"),
        ({"videos": 1, "box_iou_threshold": 2}, "`box_iou_threshold` must be in 0..1, got 2"),
        ({"videos": 1, "box_iou_threshold": float("nan")}, "`box_iou_threshold` must be in 0..1, got nan"),
        ({"videos": 1, "num_frames": "2"}, "`num_frames` must be of one of the types int, None, got '2'"),
        (
            {"titles": 1, "max_length": 2},
            "`max_length` must be at least 3 tokens, since the tokenizer adds 2",
        ),
        ({"titles": 1, "max_length": 0, "add_special_tokens": False}, "`max_length` must be at least 1 tokens, got 0"),
        ({"titles": 1, "pad_to_multiple_of": 0}, "`pad_to_multiple_of` must be at least 1 tokens, got 0"),
        ({"titles": 1, "truncation": "only_second"}, '`truncation="only_second"` has no effect'),
        ({"titles": 1, "text_pair": "a"}, "`text_pair` has no meaning"),
        ({"titles": 1, "max_length": "a"}, "`max_length` must be of one of the types int, None, got 'a'"),
    ],
    ids=str,
)
def test_settings_without_effect_are_refused_by_name(processor, make_picture, settings, message):
    stand_ins = {"images": [make_picture()], "videos": [[make_picture()]], "titles": ["a cup"]}
    arguments = {name: stand_ins.get(name, value) for name, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_wrong_types_of_settings_are_refused_in_one_sentence(processor, make_picture):
    with pytest.raises(ValueError) as error:
        processor(images=[make_picture()], size=3.5)
    assert str(error.value) == (
        "`size` must be of one of the types int, list[int], tuple[int, ...], dict[str, int], None, got 3.5."
    )
    boxes = [[[0, 0, 0.5, 0.5]]]
    whole = processor(videos=[[make_picture()]], boxes=boxes, box_iou_threshold=0)
    assert whole["patch_mask"].all()


def test_settings_of_loading_act_on_everything(processor, make_picture, tmp_path):
    processor.save_pretrained(tmp_path)
    arguments = {"images": [make_picture()], "videos": [[make_picture()]], "boxes": [[None]], "titles": ["a red cup"]}
    for size in (48, {"height": 48, "width": 48}):
        inputs = AutoProcessor.from_pretrained(tmp_path, size=size, max_length=5)(**arguments)
        assert inputs["pixel_values"].shape == (1, 3, 48, 48) and inputs["patch_mask"].shape == (1, 1, 36)
        torch.testing.assert_close(inputs["pixel_values"], inputs["pixel_values_videos"][:, 0], rtol=0, atol=1e-5)
        assert inputs["title_input_ids"].shape == (1, 5)
    raw = AutoProcessor.from_pretrained(tmp_path, do_normalize=False, do_rescale=False)(**arguments)
    assert raw["pixel_values"].max() > 10 and raw["pixel_values_videos"].max() > 10
    with pytest.raises(ValueError, match="`fps` is not supported"):
        AutoProcessor.from_pretrained(tmp_path, fps=2)(**arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize_backend": "pil"}, '`resize_backend` must be "torchvision" or "pillow", got'),
        ({"image_size": 0}, "`size` must be at least 1 pixel"),
        ({"num_frames": 0}, "`num_frames` must be at least 1, got 0"),
        ({"patch_size": 0}, "`patch_size` must be at least 1 pixel, got 0"),
    ],
)
def test_a_processor_that_could_process_no_clip_is_not_built(tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        build_processor(tokenizer, **settings)
