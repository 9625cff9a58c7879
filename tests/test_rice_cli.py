"""The `rice` command: verbs, one-sentence errors, and conversion to a folder the Auto classes load."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

import modeling_rice  # noqa: F401
import processing_rice  # noqa: F401
from rice_cli import main

REPOSITORY = Path(__file__).resolve().parents[1]
FIXTURES = REPOSITORY / "tests" / "fixtures" / "reference"


def read_weights(*names):
    """Official weights of the recordings: see `pack` in tests/fixtures/trim_reference.py."""
    weights = {}
    for name in names:
        with np.load(FIXTURES / f"{name}.npz") as file:
            for key in file.files:
                if key.startswith("weights/"):
                    rotated = file[key].T.copy().view(">u4")[:, 0].astype(np.uint32)
                    array = ((rotated >> 1) | (rotated << 31)).view(np.float32).reshape(file[f"shape/{key}"])
                    weights[key.removeprefix("weights/")] = torch.from_numpy(array)
    return weights


@pytest.fixture(scope="module")
def newer_weights():
    return read_weights("mmf_tiny_encoder", "mmf_tiny_decoder")


@pytest.fixture(scope="module")
def older_weights(newer_weights):
    """The older layout has the same encoder under another prefix."""
    return {
        key.replace("image_encoder.model.", "clip.visual."): value
        for key, value in newer_weights.items()
        if key.startswith("image_encoder.")
    }


@pytest.fixture
def frames():
    return [np.random.default_rng(seed).integers(0, 256, (30, 50, 3), dtype=np.uint8) for seed in range(3)]


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def fails(capsys, *arguments):
    """The sentence of a command that is refused."""
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    assert error.value.code == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    return message


def test_convert_writes_model_and_processor(newer_weights, frames, tmp_path, capsys):
    save_file(newer_weights, tmp_path / "official.safetensors")
    run("convert", tmp_path / "official.safetensors", tmp_path / "rice")
    assert "encoder, decoder, reconstruction head" in capsys.readouterr().out

    model, processor = (cls.from_pretrained(tmp_path / "rice") for cls in (AutoModel, AutoProcessor))
    model.eval()
    clips = model.encode_clips(**processor(videos=[frames], asr=["看看这款"]))
    gallery = model.encode_gallery(**processor(images=frames[:2], titles=["red cup", ""]))
    assert model.match(clips, gallery).shape == model.similarity(clips, gallery).shape == (1, 2)


@pytest.mark.parametrize("layout, resample, side", [("older", 3, 40), ("newer", 2, 45)])
def test_the_processor_follows_model_and_code_base(layout, resample, side, request, tmp_path):
    torch.save({"model": request.getfixturevalue(f"{layout}_weights")}, tmp_path / "official.pth")
    run("convert", tmp_path / "official.pth", tmp_path / "rice")
    processor = AutoProcessor.from_pretrained(tmp_path / "rice")
    assert (processor.video_processor.num_frames, processor.video_processor.patch_size) == (10, 8)
    for part in (processor.image_processor, processor.video_processor):
        assert (part.size["height"], part.size["width"], int(part.resample)) == (side, side, resample)
        assert part.do_center_crop == (layout == "newer")
        assert not part.do_center_crop or part.crop_size["height"] == part.crop_size["width"] == 40


def test_both_views_of_a_picture_become_the_same_pixels(newer_weights, frames, tmp_path):
    save_file(newer_weights, tmp_path / "official.safetensors")
    run("convert", tmp_path / "official.safetensors", tmp_path / "rice")
    processor = AutoProcessor.from_pretrained(tmp_path / "rice")
    image = processor(images=[frames[0]])["pixel_values"]
    clip = processor(videos=[frames[:1]])["pixel_values_videos"][:, 0]
    torch.testing.assert_close(image, clip, atol=1e-5, rtol=0)
    # The official code resizes with Pillow, which is at most one grey level away.
    mean, std = (np.array(getattr(processor.video_processor, name)) for name in ("image_mean", "image_std"))
    resized = np.asarray(Image.fromarray(frames[0]).resize((45, 45), Image.BILINEAR), dtype=np.float64)[2:42, 2:42]
    assert np.abs(clip[0].permute(1, 2, 0).numpy() * std + mean - resized / 255).max() < 1.01 / 255


def test_conversion_refuses_in_one_sentence(newer_weights, tmp_path, capsys):
    checkpoint = tmp_path / "official.safetensors"
    assert "no checkpoint file" in fails(capsys, "convert", checkpoint, tmp_path / "rice")
    save_file({"some.weight": torch.zeros(1)}, checkpoint)
    assert "neither official layout" in fails(capsys, "convert", checkpoint, tmp_path / "rice")
    save_file({k: v for k, v in newer_weights.items() if "ln_post" not in k}, checkpoint)
    assert "ln_post" in fails(capsys, "convert", checkpoint, tmp_path / "rice")
    (tmp_path / "broken.pth").write_text("no checkpoint")
    assert "cannot be read" in fails(capsys, "convert", tmp_path / "broken.pth", tmp_path / "rice")
    assert not (tmp_path / "rice").exists()


def test_an_output_folder_in_use_is_not_changed(newer_weights, tmp_path, capsys):
    save_file(newer_weights, tmp_path / "official.safetensors")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    for output in (tmp_path / "mine", tmp_path / "mine" / "config.json"):
        assert "already exists; name a new" in fails(capsys, "convert", tmp_path / "official.safetensors", output)
    assert json.loads((tmp_path / "mine" / "config.json").read_text()) == {}


def test_help_and_unknown_verbs(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0 and "convert" in capsys.readouterr().out
    for arguments in ([], ["transmogrify"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2 and "convert" in capsys.readouterr().err or not arguments


def test_help_does_not_load_torch():
    code = "import sys, rice_cli as cli; cli.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
