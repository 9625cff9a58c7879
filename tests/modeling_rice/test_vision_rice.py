"""Use of an encoder's output: the global feature, the layer of the patches, and frozen encoders."""

import pytest
import torch
from transformers import AutoConfig

from modeling_rice import RiceConfig, RiceModel
from modeling_rice.vision_rice import EncoderStates

SWIN = {
    "model_type": "swin",
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1, 1],
    "num_heads": [1, 2, 2],
    "window_size": 2,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
POOLFORMER = {"model_type": "poolformer", "hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1]}
LAYERS = {
    "swin": {"vision_config": SWIN, "vision_feature_layer": 1},
    "raw": {"vision_config": SWIN, "vision_feature_layer": 1, "decoder_token_source": "raw"},
    "clip": {"vision_feature_layer": -2},
}


def plain(model, pictures, layer):
    """Tokens and features of a model with a chosen layer, step by step."""
    output = model.vision_model(pictures, output_hidden_states=True)
    clip = model.config.vision_config.model_type == "clip_vision_model"
    feature = output.last_hidden_state[:, 0] if clip else output.pooler_output
    projected = model.visual_projection(model.vision_model.post_layernorm(feature) if clip else feature)
    patches = output.hidden_states[layer][:, 1:] if clip else output.hidden_states[layer]
    patches = model.patch_projection.linear(model.patch_projection.norm(patches))
    first = feature if model.config.decoder_token_source == "raw" else projected
    return torch.cat([first[:, None], patches], dim=1), projected


@pytest.mark.parametrize("name", LAYERS)
def test_patches_of_a_chosen_layer_have_a_projection_of_their_own(make_model, make_batch, name):
    model, batch = make_model(**LAYERS[name]), make_batch()
    images = model.get_image_features(batch["pixel_values"])
    with torch.no_grad():
        tokens, features = plain(model, batch["pixel_values"], LAYERS[name]["vision_feature_layer"])
    torch.testing.assert_close(images.last_hidden_state, tokens)
    torch.testing.assert_close(images.pooler_output, torch.nn.functional.normalize(features, dim=-1))
    assert tokens.shape == (5, 1 + model.config.num_patches, model.config.decoder_hidden_size)


def test_every_part_works_on_a_chosen_layer(make_model, make_batch):
    model, batch = make_model(**LAYERS["swin"]), make_batch()
    assert model.config.num_patches == 16 and model.config.mask_patch_size == 8
    output = model.train()(**batch)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.patch_projection.parameters())
    assert len({"reconstruction_loss", "matching_loss"} & output.keys()) == 2
    model.eval()
    assert model.attention_maps(**batch).shape == (5, 17, 3, 16)
    assert model.reconstruction_maps(**batch).shape == (5, 16, 3, 16)


def test_a_patch_mask_follows_the_layer_it_applies_to(make_model, make_batch):
    settings = {"vision_pooling": "mean", "patch_mask_pooling": True, "vision_feature_layer": 1}
    model, frames = make_model(vision_config=SWIN, **settings), make_batch()["pixel_values"]
    mask = torch.zeros(5, 16, dtype=torch.bool)
    mask[:, [0, 1, 5]] = True
    encoded = model.encode_frames(frames, mask)
    # The patches of 8 pixels that the decoder sees are taken or left as they are.
    assert torch.equal(encoded.token_mask[:, 1:], mask)
    # The global feature is of the output's four patches: three quarters of the first are kept, nothing of the others.
    with torch.no_grad():
        patches = model.vision_model(frames).last_hidden_state
        torch.testing.assert_close(encoded.features, model.visual_projection(patches[:, 0]))


def test_a_learnt_saliency_weighs_the_last_patches_whatever_the_decoder_sees(make_model, make_batch):
    settings = {"vision_pooling": "mean", "patch_saliency": "learned", "vision_feature_layer": 0}
    model, frames = make_model(vision_config=SWIN, **settings), make_batch()["pixel_values"]
    with torch.no_grad():
        patches = model.vision_model(frames).last_hidden_state
        weights = model.patch_saliency(patches)[..., None]
        expected = model.visual_projection((weights * patches).sum(1) / weights.sum(1))
        torch.testing.assert_close(model.encode_frames(frames).features, expected)


@pytest.mark.parametrize(
    "settings",
    [
        *LAYERS.values(),
        {},
        {"decoder_token_source": "raw"},
        {"use_decoder": False},
        {"vision_config": SWIN, "vision_feature_layer": 1, "use_decoder": False},
        {"vision_config": SWIN, "vision_pooling": "mean", "patch_saliency": "learned", "vision_feature_layer": 0},
    ],
)
def test_a_frozen_encoder_runs_once(make_model, make_batch, settings):
    """Kept states give what pictures give, gradients included, and only what a learnt saliency needs is kept."""
    model, frames = make_model(**settings), make_batch()["pixel_values"]
    model.vision_model.requires_grad_(False)
    with torch.no_grad():
        states = model._encoder_output(frames)
        expected = model.encode_frames(frames)
    kept = EncoderStates(*(tensor.clone() for tensor in states))
    tokens, features = model._from_states(kept, is_clip=True)
    torch.testing.assert_close(features, expected.features, rtol=0, atol=0)
    torch.testing.assert_close(tokens, expected.tokens, rtol=0, atol=0)
    if model.patch_saliency is None and model.decoder is not None:
        assert torch.equal(model._from_states(kept._replace(last_patches=None), is_clip=True)[1], features)
    (tokens.sum() + features.sum()).backward()
    assert model.visual_projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "vision, pooling",
    [(None, "cls"), (SIGLIP, "pooler"), (SWIN, "pooler"), (POOLFORMER, "mean")],
    ids=["clip", "siglip", "swin", "poolformer"],
)
def test_the_global_feature_is_that_of_the_encoder(vision, pooling):
    config = RiceConfig(vision_config=vision)
    assert config.vision_pooling is None and config.feature_pooling == pooling
    assert config.to_dict()["vision_pooling"] is None


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"vision_config": POOLFORMER, "vision_pooling": "cls"}, "'poolformer' has no class token; .*=\"mean\"`"),
        ({"vision_config": POOLFORMER, "vision_pooling": "pooler"}, "'poolformer' has no pooler; .*=\"mean\"`"),
        ({"vision_config": SIGLIP, "vision_pooling": "cls"}, 'set `vision_pooling="pooler" or "mean"`'),
        ({"vision_config": {"model_type": "vit_mae"}}, "'vit_mae' cannot be RICE's encoder .it drops patches"),
        ({"vision_config": {"model_type": "yolos"}}, "tokens are not a grid of patches"),
        ({"vision_feature_layer": 13}, "`vision_feature_layer=13` is not a hidden state .* has 0, 1, .*, 12"),
        ({"vision_feature_layer": -14}, "`vision_feature_layer=-14` is not a hidden state"),
    ],
)
def test_missing_encoder_outputs_are_refused_at_construction(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        RiceConfig(**settings)
    assert str(caught.value).count(". ") == 0


def test_positions_are_those_of_the_patches_that_the_decoder_sees():
    vision = AutoConfig.for_model(**SWIN)
    settings = {"vision_config": vision, "projection_dim": 16, "decoder_num_heads": 4}
    for layer, patches in ((None, 4), (0, 64), (1, 16)):
        model = RiceModel(RiceConfig(**settings, vision_feature_layer=layer))
        assert model.decoder.position_embedding.weight.shape == (1 + patches, 16)


def test_pictures_of_another_size_if_the_encoder_accepts_them(make_model):
    model = make_model(vision_config=SWIN, decoder_position_embeddings=False)
    assert model.get_image_features(torch.rand(1, 3, 48, 48)).last_hidden_state.shape[1] == 1 + 9
    with pytest.raises(ValueError, match=r"are \(48, 48\) pixels, but the encoder takes \(32, 32\)"):
        make_model().get_image_features(torch.rand(1, 3, 48, 48))


@pytest.mark.parametrize("choice", ["sdpa", "eager", None])
def test_an_encoder_uses_a_supported_attention_back_end(tmp_path, choice):
    settings = {"projection_dim": 16, "decoder_num_heads": 4}
    RiceModel(RiceConfig(vision_config=POOLFORMER, **settings)).save_pretrained(tmp_path)
    model = RiceModel.from_pretrained(tmp_path, **({} if choice is None else {"attn_implementation": choice}))
    attentions = model.decoder.cross_layer.attention.config, model.vision_model.config
    assert [config._attn_implementation for config in attentions] == [choice or "sdpa", "eager"]
    for other in ("eager", "sdpa"):
        model.set_attn_implementation(other)
        assert [config._attn_implementation for config in attentions] == [other, "eager"]
    with pytest.raises((ValueError, ImportError), match="Flash"):
        model.set_attn_implementation("flash_attention_2")


@pytest.mark.parametrize("vision", [None, POOLFORMER])
def test_activations_are_recomputed_if_the_encoder_supports_it(make_model, make_batch, vision):
    model = make_model(**({} if vision is None else {"vision_config": vision})).train()
    assert model.supports_gradient_checkpointing == (vision is None)
    if vision is not None:
        with pytest.raises(ValueError, match="does not support"):
            model.gradient_checkpointing_enable()
        return
    calls = []
    for layer in (*model.decoder.self_layers, model.decoder.cross_layer):
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    counts = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        calls.clear()
        model(**make_batch()).loss.backward()
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0]


def test_a_timm_network_uses_its_own_checkpointing():
    pytest.importorskip("timm")
    settings = {"input_size": [3, 64, 64]}
    vision = {"model_type": "timm_wrapper", "architecture": "tf_efficientnet_lite0", "pretrained_cfg": settings}
    model = RiceModel(RiceConfig(vision_config=vision, use_decoder=False))
    model.gradient_checkpointing_enable()
    assert model.vision_model.timm_model.grad_checkpointing and model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.vision_model.timm_model.grad_checkpointing and not model.is_gradient_checkpointing


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("modeling_rice.encoders_rice.is_timm_available", lambda: False)
    vision = {"model_type": "timm_wrapper", "architecture": "resnet18"}
    with pytest.raises(ValueError, match=r"needs the package timm: pip install 'rice-retrieval\[encoder\]'"):
        RiceConfig(vision_config=vision)
