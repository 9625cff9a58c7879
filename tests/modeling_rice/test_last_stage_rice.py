"""An encoder's last stage by itself gives what the whole encoder gives, in every family that has one."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, ViTConfig

from modeling_rice.encoders_rice import PatchLayout, build_encoder, encoder_inputs, find_layout, last_states
from modeling_rice.last_stage_rice import find_last_stage
from tests.modeling_rice.test_encoders_rice import FAST, SLOW

# Hidden states that are none of its own, or windows that are no pictures.
REFUSED = {"maskformer-swin": "is missing or is not a grid of patches", "lw_detr_vit": "cannot run on its own"}


def build(name: str, settings: dict):
    config = AutoConfig.for_model(name, **settings)
    torch.manual_seed(0)
    return build_encoder(config).eval(), find_layout(config)


def check(encoder, layout):
    stage = find_last_stage(encoder, layout)
    inputs = encoder_inputs(torch.rand(3, 3, *layout.image_size), layout.cut_to)
    with stage.recorded(encoder) as entered:
        whole = encoder(**inputs)
    with torch.no_grad():
        expected = last_states(whole)
    apart = stage.run(encoder, entered[0].detach(), layout)
    torch.testing.assert_close(last_states(apart), expected, rtol=1e-4, atol=1e-5)
    last_states(apart).square().sum().backward()
    trained = {name for name, weight in encoder.named_parameters() if weight.grad is not None}
    assert trained and all(stage.owns(name) for name in trained)
    assert any(weight.ndim > 1 for name, weight in encoder.named_parameters() if name in trained)
    assert any(not stage.owns(name) for name, _ in encoder.named_parameters())
    return stage


@pytest.mark.parametrize("name", FAST)
def test_families(name):
    check(*build(name, FAST[name][0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SLOW if name not in REFUSED])
def test_more_families(name):
    check(*build(name, SLOW[name][0]))


@pytest.mark.parametrize("name", REFUSED)
def test_encoders_without_a_last_stage_are_refused(name):
    with pytest.raises(ValueError, match=f"The last stage of the vision model '{name}'.*{REFUSED[name]}"):
        find_last_stage(*build(name, SLOW[name][0]))


@pytest.mark.parametrize("name", ["test_efficientnet.r160_in1k", "test_resnet.r160_in1k", "test_vit.r160_in1k"])
def test_networks_of_timm(name):
    pytest.importorskip("timm")
    check(*build("timm_wrapper", {"architecture": name, "num_classes": 0}))


def test_the_last_stage_includes_the_layers_after_it():
    stage = find_last_stage(*build("vit", SLOW["vit"][0]))
    assert (stage.layer, stage.entry) == (1, "layers.1")
    assert stage.owns("layernorm.weight") and stage.owns("layers.1") and not stage.owns("layers.10.weight")
    stage = find_last_stage(*build("resnet", FAST["resnet"][0]))
    assert (stage.layer, stage.entry) == (3, "encoder.stages.3")
    assert stage.entering == PatchLayout(32, (14, 14), 0, "channels_first")


def test_shared_position_embeddings_are_kept():
    assert len(check(*build("dinov3_vit", SLOW["dinov3_vit"][0])).constants) == 2


def test_stages_that_need_more_than_the_states_are_refused():
    """A block that is told of the picture, beside its patches."""
    encoder, layout = build("vit", SLOW["vit"][0])

    class Told(nn.Module):
        def __init__(self, block, encoder):
            super().__init__()
            self.block, self.brightness = block, None
            encoder.register_forward_pre_hook(self.look, with_kwargs=True)

        def look(self, module, args, kwargs):
            self.brightness = kwargs["pixel_values"].mean(dim=(1, 2, 3))[:, None, None]

        def forward(self, states, *args, **kwargs):
            return self.block(states, *args, **kwargs) + self.brightness

    encoder.layers[1] = Told(encoder.layers[1], encoder)
    with pytest.raises(ValueError, match="'vit' cannot run on its own"):
        find_last_stage(encoder, layout)


def test_pictures_of_another_size():
    encoder, layout = build("resnet", FAST["resnet"][0])
    stage = find_last_stage(encoder, layout)
    pixels = torch.rand(2, 3, 96, 96)
    with torch.no_grad(), stage.recorded(encoder) as entered:
        expected = encoder(pixels).last_hidden_state
    torch.testing.assert_close(
        stage.run(encoder, entered[0], layout).last_hidden_state, expected, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="7 tokens are not a grid of patches"):
        stage.run(encoder, entered[0][:, :7], layout)


def test_the_encoder_is_left_unchanged():
    encoder, layout = build("vit", SLOW["vit"][0])
    # One part is frozen, which the search must not undo.
    encoder.train().layers[0].eval()
    modes = [module.training for module in encoder.modules()]
    hooks = sum(len(module._forward_pre_hooks) for module in encoder.modules())
    stage = find_last_stage(encoder, layout)
    stage.run(encoder, torch.rand(2, 17, 32), layout)
    assert [module.training for module in encoder.modules()] == modes
    assert not any(weight.is_meta for weight in encoder.parameters())
    assert sum(len(module._forward_pre_hooks) for module in encoder.modules()) == hooks
    assert isinstance(encoder.config, ViTConfig)
