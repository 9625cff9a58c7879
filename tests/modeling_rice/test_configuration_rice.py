"""Defaults, presets, round trips and refusals of the configuration."""

import dataclasses
import math

import pytest
import torch
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPVisionConfig,
    ResNetConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
)

from modeling_rice import RiceConfig, RiceModel


def test_defaults_are_the_published_model():
    config = RiceConfig()
    vision = config.vision_config
    assert (vision.model_type, vision.hidden_size, vision.num_hidden_layers) == ("clip_vision_model", 768, 12)
    assert (vision.num_attention_heads, vision.image_size, vision.patch_size) == (12, 224, 32)
    assert (config.projection_dim, config.decoder_hidden_size, config.decoder_num_heads) == (512, 512, 8)
    assert config.use_decoder and config.use_reconstruction and config.decoder_num_self_layers == 1
    assert config.text_embed_dim is None and config.fusion_weight is None and config.fused_text_weight is None
    assert config.mask_padded_frames and not config.reconstruction_softmax_over_padding
    assert (config.logit_scale_init_value, config.learn_logit_scale) == (100.0, False)
    assert (config.matching_negatives, config.num_hard_negatives) == ("hardest", 3)
    assert config.contrastive_loss == "infonce" and config.logit_scale_max == 100.0
    assert config.contrastive_targets == config.matching_targets == "masked"
    weights = (config.contrastive_loss_weight, config.matching_loss_weight, config.reconstruction_loss_weight)
    assert weights == (1.0, 1.0, 0.05)
    assert config.num_patches == 49 and config.accepts_patch_mask


def test_presets_are_the_published_variants():
    older, newer = RiceConfig.from_preset("clip4clip"), RiceConfig.from_preset("mmf")
    assert not older.mask_padded_frames and older.normalize_frames and older.decoder_max_position_embeddings == 77
    assert newer.decoder_hidden_size == 768 and newer.decoder_token_source == "raw"
    assert newer.matching_score == "cosine" and newer.matching_scale == 10.0
    assert newer.decoder_output_projection and not newer.decoder_normalize_key_value
    assert not newer.decoder_position_embeddings and not newer.normalize_frames
    assert newer.learn_logit_scale and newer.logit_scale_init_value == 16.0
    assert newer.reconstruction_softmax_over_padding and newer.reconstruction_loss_weight == 1.0
    assert newer.logit_scale_max is None
    for config in (older, newer):
        assert config.contrastive_targets == config.matching_targets == "diagonal"
    assert RiceConfig.from_preset("mmf", matching_scale=3.0).matching_scale == 3.0
    with pytest.raises(ValueError, match="Unknown preset 'clip'; choose one of 'clip4clip', 'mmf'"):
        RiceConfig.from_preset("clip")


@pytest.mark.parametrize(
    "vision",
    [ViTConfig(hidden_size=48, num_attention_heads=4), SwinConfig(embed_dim=24), CLIPVisionConfig(patch_size=16)],
)
def test_save_and_load_keep_every_field(tmp_path, vision):
    config = RiceConfig(
        vision_config=vision,
        vision_pooling="mean",
        projection_dim=64,
        decoder_max_position_embeddings=50,
        text_embed_dim=5,
        fusion_weight=0.25,
        fused_text_weight=10,
        alignment_weight=1,
        ranking="alignment",
        matching_negatives="all",
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is RiceConfig and type(loaded.vision_config) is type(vision)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert (loaded.fusion_weight, loaded.fused_text_weight) == (0.25, 10)
    assert (loaded.alignment_weight, loaded.ranking) == (1, "alignment")
    assert loaded.vision_config.to_dict() == config.vision_config.to_dict()


def test_vision_config_may_be_a_dictionary_or_a_two_tower_config():
    as_dict = RiceConfig(vision_config={"model_type": "vit", "hidden_size": 64, "num_attention_heads": 4})
    assert as_dict.vision_config.model_type == "vit" and as_dict.vision_hidden_size == 64
    untyped = RiceConfig(vision_config={"hidden_size": 64, "num_attention_heads": 4})
    assert untyped.vision_config.model_type == "clip_vision_model"
    two_towers = RiceConfig(vision_config=CLIPConfig(vision_config={"hidden_size": 64, "num_attention_heads": 4}))
    assert two_towers.vision_config.model_type == "clip_vision_model" and two_towers.vision_hidden_size == 64


def test_encoders_that_would_return_tuples(make_batch):
    text = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "return_dict": False}
    vision = CLIPVisionConfig(
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
        **{"image_size": 32, "patch_size": 8, "return_dict": False},
    )
    model = RiceModel(RiceConfig(vision_config=vision, text_config=text)).eval()
    assert model(**make_batch(), title_input_ids=torch.ones(5, 3, dtype=torch.long)).loss.isfinite()


def test_sizes_follow_the_encoder():
    vision = SwinConfig(embed_dim=24, depths=[1, 1], num_heads=[2, 2])
    swin = RiceConfig(vision_config=vision, vision_pooling="mean", use_decoder=False)
    assert swin.vision_hidden_size == 48 and swin.num_patches == 28**2 and not swin.accepts_patch_mask
    resnet = RiceConfig(vision_config=ResNetConfig(hidden_sizes=[8, 40]), vision_pooling="mean", use_decoder=False)
    assert resnet.vision_hidden_size == 40 and resnet.num_patches == 28**2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"decoder_num_heads": 7}, "width 512 .* must be a multiple of `decoder_num_heads=7`"),
        ({"decoder_token_source": "raw", "decoder_num_heads": 10}, "width 768"),
        ({"decoder_num_heads": 0}, "`decoder_num_heads` must be at least 1, got 0"),
        ({"decoder_num_heads": 1}, "needs `decoder_num_heads >= 2`"),
        ({"projection_dim": 0}, "`projection_dim` must be at least 1"),
        ({"num_hard_negatives": 0}, "`num_hard_negatives` must be at least 1"),
        ({"decoder_num_self_layers": -1}, "`decoder_num_self_layers` must be 0 or more"),
        ({"logit_scale_init_value": 0.0}, "`logit_scale_init_value` must be above 0"),
        ({"matching_scale": -1.0}, "`matching_scale` must be above 0"),
        ({"reconstruction_softmax_over_padding": True}, "needs `reconstruction_softmax=True`"),
        ({"vision_config": SwinConfig(), "vision_pooling": "cls"}, "'swin' has no class token"),
        ({"vision_config": SiglipVisionConfig(), "vision_pooling": "cls"}, "'siglip_vision_model' has no class token"),
        ({"decoder_hidden_act": "quickgelu"}, "`decoder_hidden_act='quickgelu'`"),
        ({"decoder_dropout": 1.5}, "`decoder_dropout` must be in 0..1"),
        ({"matching_targets": "multi_positive"}, 'needs `matching_negatives="all"`'),
        ({"learn_logit_scale": True, "logit_scale_max": 50.0}, "for a learnt scale, at least"),
        ({"logit_scale_max": 0.0}, "`logit_scale_max` must be above 0, got 0.0"),
        ({"decoder_intermediate_size": 0}, "`decoder_intermediate_size` must be at least 1, got 0"),
        ({"decoder_max_position_embeddings": 0}, "`decoder_max_position_embeddings` must be at least 1"),
        ({"text_embed_dim": 0}, "`text_embed_dim` must be at least 1"),
        ({"decoder_layer_norm_eps": -1e-5}, "`decoder_layer_norm_eps` must be 0 or more"),
        ({"initializer_range": -0.02}, "`initializer_range` must be 0 or more"),
        ({"contrastive_loss_weight": -1.0}, "`contrastive_loss_weight` must be 0 or more, got -1.0"),
        ({"text_loss_weight": -1}, "`text_loss_weight` must be 0 or more, got -1"),
        ({"fusion_weight": 0}, "`fusion_weight` must be above 0, got 0"),
        ({"alignment_weight": -1.0}, "`alignment_weight` must be 0 or more, got -1.0"),
        ({"use_decoder": False, "ranking": "matching"}, "`ranking='matching'` needs `use_decoder=True`"),
        ({"ranking": "alignment"}, "`ranking='alignment'` needs an `alignment_weight`"),
        ({"ranking": "fused"}, "`ranking='fused'` needs a `fusion_weight`"),
        ({"use_decoder": False, "fusion_weight": 1.0, "ranking": "fused"}, "`ranking='fused'` needs"),
    ],
)
def test_bad_combinations_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RiceConfig(**settings)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(value):
    numbers = [field.name for field in dataclasses.fields(RiceConfig) if "float" in str(field.type)]
    assert len(numbers) > 20
    for name in numbers:
        with pytest.raises(ValueError, match=f"`{name}` must be a finite number, got {value}"):
            RiceConfig(**{name: value})


@pytest.mark.parametrize(
    "field, value", [("matching_negatives", "some"), ("vision_pooling", "max"), ("projection_dim", "x")]
)
def test_values_of_the_wrong_kind_are_refused(field, value):
    with pytest.raises(Exception, match=field):
        RiceConfig(**{field: value})


def test_positions_are_as_many_as_the_encoder_has_patches():
    vision = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    settings = {"vision_config": vision, "vision_pooling": "mean", "projection_dim": 16}
    assert RiceModel(RiceConfig(**settings)).decoder.position_embedding.weight.shape == (17, 16)
    assert RiceModel(RiceConfig(**settings, decoder_position_embeddings=False)).decoder.position_embedding is None
    told = RiceModel(RiceConfig(**settings, decoder_max_position_embeddings=20))
    assert told.decoder.position_embedding.weight.shape == (20, 16)


def test_a_checkpoint_saved_before_text_had_a_weight_of_its_own_has_none():
    settings = RiceConfig(text_embed_dim=5, text_score_weight=0.5, fusion_weight=0.25).to_dict()
    del settings["fused_text_weight"]
    loaded = RiceConfig.from_dict(settings)
    assert loaded.fused_text_weight is None and loaded.fusion_weight == 0.25
