"""In which precision a model computes, and encoders in their fastest form."""

import argparse
import copy
from pathlib import Path

import pytest
import torch
from transformers import ResNetConfig

from hub_rice.convolutions import speed_up
from hub_rice.precision import PRECISIONS, add_precision, choose_precision, computes_bf16, in_precision, precision_of
from modeling_rice import RiceConfig, RiceModel

FLAGS = "flags\t\t: fpu avx2 avx512f {}\n"


@pytest.mark.parametrize(
    ("lines", "computes"),
    [
        (FLAGS.format("avx512_bf16"), True),
        (FLAGS.format("amx_tile amx_bf16"), True),
        (FLAGS.format("avx512_vnni"), False),
        ("Features : bf16 asimd\n", False),
        ("", False),
        (None, False),
    ],
)
def test_auto_is_bf16_if_the_cpu_supports_it(monkeypatch, lines, computes):
    def read_text(self):
        assert str(self) == "/proc/cpuinfo"
        if lines is None:
            raise FileNotFoundError
        return lines

    monkeypatch.setattr(Path, "read_text", read_text)
    computes_bf16.cache_clear()
    try:
        assert computes_bf16("cpu") == computes
        assert choose_precision("auto", torch.device("cpu")) == ("bf16" if computes else "fp32")
        # What is named is what it is.
        chosen = [choose_precision(name, torch.device("cpu")) for name in PRECISIONS]
        assert chosen == ["fp32", "bf16", "fp16"]
    finally:
        computes_bf16.cache_clear()
    assert not computes_bf16("mps")


def test_auto_on_a_gpu_asks_the_gpu(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        computes_bf16.cache_clear()
        assert choose_precision("auto", torch.device("cuda:1")) == ("bf16" if native else "fp32")
    computes_bf16.cache_clear()


def test_other_precisions_are_refused(capsys):
    parser = argparse.ArgumentParser()
    add_precision(parser)
    assert parser.parse_args([]).precision == "auto"
    with pytest.raises(SystemExit):
        parser.parse_args(["--precision", "int8"])
    assert "invalid choice: 'int8'" in capsys.readouterr().err


@pytest.fixture
def convolutional():
    """A small model with a ResNet whose batch norms have seen something."""
    torch.manual_seed(0)
    vision = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_channels=3, layer_type="basic"
    )  # fmt: skip
    model = RiceModel(RiceConfig(vision_config=vision, projection_dim=16, use_decoder=False))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
    return model.eval()


def test_folded_batch_norms_keep_outputs_and_fingerprint(convolutional):
    pictures = torch.randn(3, 3, 64, 64)
    expected, name = convolutional.encode_gallery(pictures), convolutional.fingerprint()
    count = sum(isinstance(module, torch.nn.BatchNorm2d) for module in convolutional.modules())
    assert speed_up(convolutional) == count > 4
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in convolutional.modules())
    found = convolutional.encode_gallery(pictures)
    torch.testing.assert_close(found.embeds, expected.embeds, atol=1e-5, rtol=0)
    assert convolutional.fingerprint() == found.model_fingerprint == name


def test_norms_that_do_not_follow_their_convolution_are_not_folded(convolutional):
    # Registered behind each other, and called the other way round.
    for module in convolutional.modules():
        if hasattr(module, "convolution") and hasattr(module, "normalization"):
            conv, norm = module.convolution, module.normalization
            if conv.in_channels == conv.out_channels == norm.num_features:
                module.forward = lambda x, layer=module: layer.convolution(layer.normalization(x))
    pictures = torch.randn(2, 3, 64, 64)
    expected = convolutional.encode_gallery(pictures).embeds
    assert speed_up(convolutional) == 0
    torch.testing.assert_close(convolutional.encode_gallery(pictures).embeds, expected, atol=1e-5, rtol=0)


def test_an_encoder_without_batch_norms_is_unchanged(tiny_checkpoint):
    model = RiceModel.from_pretrained(tiny_checkpoint)
    before = copy.deepcopy(model.state_dict())
    assert speed_up(model) == 0 and model._settled is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_precision_keeps_the_fingerprint_and_nearly_the_encodings(convolutional):
    pictures = torch.randn(3, 3, 64, 64)
    expected = convolutional.encode_gallery(pictures)
    for name, limit in (("bf16", 0.05), ("fp16", 0.01), ("fp32", 0.0)):
        model = in_precision(copy.deepcopy(convolutional), name)
        assert precision_of(model) == name
        found = model.encode_gallery(pictures)
        assert (found.embeds - expected.embeds).abs().max() <= limit
        assert found.model_fingerprint == expected.model_fingerprint
