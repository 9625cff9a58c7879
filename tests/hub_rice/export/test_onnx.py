"""What is exported computes what the model computes, for any number of images, clips and frames."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from hub_rice.repository import published_files
from modeling_rice import RiceConfig, RiceModel
from processing_rice import build_processor, train_tokenizer

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)

from hub_rice.export import onnx_export  # noqa: E402
from hub_rice.export.onnx_model import OnnxRice  # noqa: E402
from hub_rice.export.towers import pack, unpack  # noqa: E402
from hub_rice.publish import add_onnx  # noqa: E402
from modeling_rice.scoring_rice import ranked_scores  # noqa: E402
from rice_cli import main  # noqa: E402

CLIP = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
CLIP |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


def save(folder, **settings):
    """A model whose weights are large enough to matter everywhere, and its processor for three frames."""
    torch.manual_seed(0)
    model = RiceModel(RiceConfig(projection_dim=16, decoder_num_heads=2, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale" and parameter.dim() > 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor = build_processor(train_tokenizer(["a red mug", "blue shoe"] * 20), 32, 16, 3)
    processor.save_pretrained(folder)
    return model.eval(), processor


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Model, processor, its folder with `onnx` in it, and the figures of `--evaluate`."""
    from data_rice.mini_lpr4m import render_mini_lpr4m

    sizes = {"num_train_lives": 2, "num_test_lives": 1, "products_per_live": 5, "clips_per_product": 2}
    data = tmp_path_factory.mktemp("data") / "mini"
    render_mini_lpr4m(data, **sizes, num_frames=3, image_size=32, num_workers=1, progress=False)
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    model, processor = save(folder, vision_config=CLIP)
    words = ["export", folder, folder / "onnx", "--int8", "--evaluate", "mini_lpr4m", "--data_dir", data]
    assert main([str(word) for word in words]) == 0
    return model, processor, folder, json.loads((folder / "onnx" / "recall.json").read_text())


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory):
    """A model without decoder on a ResNet, whose frames are pooled by learnt weights, and its export."""
    folder = tmp_path_factory.mktemp("resnet")
    settings = {"vision_config": RESNET, "vision_pooling": "mean", "use_decoder": False, "normalize_frames": False}
    settings |= {"temporal_pooling": "attention", "frame_consensus_scale": 2.0}
    model, processor = save(folder, **settings)
    add_onnx(model, processor, folder, wanted=True)
    return model, processor, folder


@pytest.fixture
def inputs(exported):
    """Shop images, and clips of three frames, one and two."""
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (40, 30, 3), dtype=np.uint8)) for _ in range(5)]
    return exported[1](images=pictures), exported[1](videos=[pictures[:3], pictures[:1], pictures[2:4]])


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_galleries_clips_and_scores_are_those_of_the_model(exported, inputs):
    model, onnx = exported[0], OnnxRice(exported[2] / "onnx")
    images, videos = inputs
    gallery, clips = onnx.encode_gallery(**images, batch_size=2), onnx.encode_clips(**videos, batch_size=2)
    expected, expected_clips = model.encode_gallery(**images), model.encode_clips(**videos)
    for name in ("embeds", "states"):
        assert_close(getattr(gallery, name), getattr(expected, name))
    assert_close(clips.embeds, expected_clips.embeds)
    assert torch.equal(clips.mask, expected_clips.mask)
    for name in ("keys", "values"):
        real = clips.mask[..., None]
        assert_close(getattr(clips, name) * real, getattr(expected_clips, name) * real)
    assert_close(onnx.match(clips, gallery), model.match(expected_clips, expected))
    assert_close(onnx.similarity(clips, gallery), model.similarity(expected_clips, expected))
    # What one of them encoded, the other may score.
    assert_close(model.match(clips, gallery), onnx.match(expected_clips, expected))


@pytest.mark.parametrize("images, frames", [(1, 1), (3, 6)])
def test_any_number_of_images_and_frames(exported, images, frames):
    model, onnx = exported[0], OnnxRice(exported[2] / "onnx")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, 32, 32, generator=generator)
    videos = torch.randn(2, frames, 3, 32, 32, generator=generator)
    scores = onnx.match(onnx.encode_clips(videos), onnx.encode_gallery(pixels))
    assert_close(scores, model.match(model.encode_clips(videos), model.encode_gallery(pixels)))
    assert_close(onnx.encode_clips(videos[:1]).embeds, model.encode_clips(videos[:1]).embeds)


def test_convolutions_without_a_decoder(convolutional, inputs):
    model, onnx = convolutional[0], OnnxRice(convolutional[2] / "onnx")
    gallery, clips = onnx.encode_gallery(**inputs[0]), onnx.encode_clips(**inputs[1])
    assert_close(gallery.embeds, model.encode_gallery(**inputs[0]).embeds)
    assert_close(clips.embeds, model.encode_clips(**inputs[1]).embeds)
    assert gallery.states is None and not onnx.config.use_decoder
    with pytest.raises(ValueError, match="no matching decoder"):
        onnx.match(clips, gallery)
    with pytest.raises(FileNotFoundError, match="export again with --int8"):
        OnnxRice(convolutional[2] / "onnx", int8=True)


def test_an_alignment_is_exported_with_its_patches(tmp_path, inputs):
    settings = {"vision_config": CLIP, "use_decoder": False, "alignment_weight": 1.0, "alignment_rank": 6}
    model, processor = save(tmp_path, **settings, vision_feature_layer=1)
    model.fit_alignment([inputs[0]["pixel_values"]], [inputs[1]["pixel_values_videos"].flatten(0, 1)])
    add_onnx(model, processor, tmp_path, wanted=True)
    onnx = OnnxRice(tmp_path / "onnx")
    gallery, clips = onnx.encode_gallery(**inputs[0], batch_size=2), onnx.encode_clips(**inputs[1], batch_size=2)
    expected = model.encode_gallery(**inputs[0]), model.encode_clips(**inputs[1])
    assert_close(gallery.embeds, expected[0].embeds)
    assert_close(clips.embeds, expected[1].embeds)
    assert torch.equal(clips.patch_mask, expected[1].patch_mask) and gallery.patches.dtype == torch.float16
    torch.testing.assert_close(onnx.align(clips, gallery), model.align(*expected[::-1]), atol=1e-3, rtol=0)
    # By the same kind of score as the model.
    torch.testing.assert_close(
        ranked_scores(onnx, clips, gallery)[0], ranked_scores(model, *expected[::-1])[0], atol=1e-2, rtol=0
    )
    with pytest.raises(ValueError, match="no matching decoder"):
        onnx.match(clips, gallery)


def test_int8_is_near_and_not_mixed_with_the_original(exported, inputs):
    model, quantised = exported[0], OnnxRice(exported[2] / "onnx", int8=True)
    gallery, expected = quantised.encode_gallery(**inputs[0]), model.encode_gallery(**inputs[0])
    cosines = (gallery.embeds * expected.embeds).sum(dim=1)
    assert 0.98 < cosines.min() < 1 - 1e-6
    with pytest.raises(ValueError, match="encoded by another model"):
        model.match(model.encode_clips(**inputs[1]), gallery)


def test_evaluation_compares_torch_onnx_and_int8(exported):
    scores = exported[3]["scores"]
    assert exported[3]["num_queries"] == 5
    for kind in ("embedding", "matching"):
        assert scores[f"onnx, {kind}"] == scores[f"torch, {kind}"]
        assert 0 <= scores[f"int8, {kind}"]["R@1"] <= scores[f"int8, {kind}"]["R@5"] == 1


def test_the_description_is_that_of_the_files(exported):
    import onnxruntime

    folder, processor = exported[2] / "onnx", exported[1]
    about = json.loads((folder / "onnx.json").read_text())
    assert about["model_fingerprint"] == exported[0].fingerprint()
    assert set(about["parts"]) == {"encoder", "image", "video", "pairs"}
    for part in about["parts"].values():
        session = onnxruntime.InferenceSession(str(folder / part["file"]))
        for described, found in ((part["inputs"], session.get_inputs()), (part["outputs"], session.get_outputs())):
            assert [(item["name"], item["shape"]) for item in described] == [(item.name, item.shape) for item in found]
        assert part["max_difference"] < 1e-4 < part["int8_max_difference"] < 0.5
    assert about["parts"]["pairs"]["inputs"][3] == {"name": "mask", "dtype": "bool", "shape": ["clips", "tokens"]}
    # A plain program that follows the description gets the processor's pixels.
    settings = about["preprocessing"]
    picture = Image.effect_noise((32, 32), 90).convert("RGB")
    pixels = np.asarray(picture, dtype=np.float32) * settings["rescale_factor"]
    pixels = (pixels - settings["image_mean"]) / settings["image_std"]
    assert settings["size"] == {"height": 32, "width": 32} and settings["num_frames"] == 3
    assert_close(
        torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1), processor(images=picture)["pixel_values"][0]
    )


def test_packing_leaves_padding_out_and_unpacking_puts_it_back():
    videos = torch.arange(12.0).reshape(2, 3, 1, 1, 2)
    mask = torch.tensor([[True, False, True], [True, False, False]])
    frames, index, kept = pack(videos, mask)
    assert frames.flatten(1).tolist() == [[0, 1], [4, 5], [6, 7]]
    assert [index[i, mask[i]].tolist() for i in range(2)] == [[0, 1], [2]] and torch.equal(kept, mask)
    assert unpack(frames.flatten(2), mask).tolist() == [[[0, 1], [0, 0], [4, 5]], [[6, 7], [0, 0], [0, 0]]]
    with pytest.raises(ValueError, match="Clip 1 of the batch has no real frame"):
        pack(videos, torch.tensor([[True] * 3, [False] * 3]))


def test_boxes_are_refused(exported, inputs):
    with pytest.raises(ValueError, match="takes no boxes"):
        OnnxRice(exported[2] / "onnx").encode_clips(**inputs[1], patch_mask=torch.ones(3, 3, 4, dtype=torch.bool))


def test_publishing_includes_only_the_export_of_these_weights(exported, tmp_path):
    model, processor, folder, _ = exported
    names = published_files(folder).keys()
    assert {"onnx/image.onnx", "onnx/pairs_int8.onnx", "onnx/onnx.json"} < names
    before = (folder / "onnx" / "onnx.json").stat().st_mtime_ns
    add_onnx(model, processor, folder, wanted=True)
    assert (folder / "onnx" / "onnx.json").stat().st_mtime_ns == before
    copy = shutil.copytree(folder, tmp_path / "copy")
    about = json.loads((copy / "onnx" / "onnx.json").read_text())
    (copy / "onnx" / "onnx.json").write_text(json.dumps({**about, "model_fingerprint": "0" * 32}))
    with pytest.raises(ValueError, match="was exported from other weights: remove it, or run `rice export"):
        add_onnx(model, processor, copy, wanted=False)


def test_a_graph_that_differs_is_refused(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_write_graph", lambda *_: None)
    monkeypatch.setattr(onnx_export, "difference", lambda *_: float("nan"))
    with pytest.raises(ValueError, match="differs from torch by nan, more than 1e-04"):
        onnx_export.export(exported[0], exported[1], tmp_path / "onnx", quiet=True)
    with pytest.raises(FileNotFoundError, match="has no onnx.json: write it with `rice export"):
        OnnxRice(tmp_path / "onnx")


@pytest.mark.parametrize("content", [None, "{}"])
def test_export_refuses_folders_that_are_not_checkpoints(content, tmp_path, capsys):
    folder = tmp_path / "model"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(content)
    with pytest.raises(SystemExit) as end:
        main(["export", str(folder), str(tmp_path / "onnx")])
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2 and len(message.splitlines()) == 1
    assert ("there is no folder" if content is None else "model.safetensors is missing") in message
