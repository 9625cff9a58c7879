"""Every family of vision encoders: what the dry run finds is what the encoder gives, or one sentence says why not."""

import copy

import pytest
import torch
from transformers import AutoConfig

from modeling_rice import RiceConfig, RiceModel, encoders_rice
from modeling_rice.encoders_rice import build_encoder, encoder_inputs, find_layout, last_states

TOKENS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}
STAGES = {"hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1]}
WINDOWS = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 2]}

# Name -> settings of a tiny encoder, (width, grid, prefix tokens) of its output, width of its pooler.
FAST = {
    "clip_vision_model": (TOKENS, (32, (4, 4), 1), 32),
    "siglip_vision_model": (TOKENS, (32, (4, 4), 0), 32),
    "siglip2_vision_model": ({**TOKENS, "image_size": None, "num_patches": 16}, (32, (4, 4), 0), 32),
    "deit": (TOKENS, (32, (4, 4), 2), 32),
    "swin": ({**WINDOWS, "window_size": 4}, (32, (4, 4), 0), 32),
    "resnet": ({**STAGES, "embedding_size": 8}, (32, (7, 7), 0), 32),
    "altclip_vision_model": (TOKENS, (32, (4, 4), 1), 32),
    "dinov3_convnext": ({**STAGES, "image_size": 64}, (32, (2, 2), 1), 32),
}
SLOW = {
    "vit": (TOKENS, (32, (4, 4), 1), 32),
    "dinov2": (TOKENS, (32, (4, 4), 1), 32),
    "dinov2_with_registers": ({**TOKENS, "num_register_tokens": 4}, (32, (4, 4), 5), 32),
    "dinov3_vit": ({**TOKENS, "num_register_tokens": 4}, (32, (4, 4), 5), 32),
    "chinese_clip_vision_model": (TOKENS, (32, (4, 4), 1), 32),
    "metaclip_2_vision_model": (TOKENS, (32, (4, 4), 1), 32),
    "blip_vision_model": (TOKENS, (32, (4, 4), 1), 32),
    "beit": (TOKENS, (32, (4, 4), 1), 32),
    "data2vec-vision": (TOKENS, (32, (4, 4), 1), None),
    "aimv2_vision_model": (TOKENS, (32, (4, 4), 0), 32),
    "vit_msn": (TOKENS, (32, (4, 4), 1), None),
    "ijepa": (TOKENS, (32, (4, 4), 0), None),
    "vitdet": (TOKENS, (32, (4, 4), 0), None),
    "swinv2": ({**WINDOWS, "window_size": 4}, (32, (4, 4), 0), 32),
    "maskformer-swin": ({**WINDOWS, "window_size": 4}, (32, (4, 4), 0), 32),
    "hiera": (
        {
            "image_size": [64, 64],
            "embed_dim": 8,
            "num_heads": [1, 1, 2, 2],
            "depths": [1, 1, 1, 1],
        },
        (64, (2, 2), 0),
        64,
    ),
    "convnext": ({**STAGES, "image_size": 64}, (32, (2, 2), 0), 32),
    "convnextv2": ({**STAGES, "image_size": 64}, (32, (2, 2), 0), 32),
    "regnet": ({**STAGES, "embedding_size": 8, "groups_width": 8}, (32, (7, 7), 0), 32),
    "bit": ({**STAGES, "embedding_size": 8, "num_groups": 4}, (32, (7, 7), 0), 32),
    "mobilenet_v1": ({"image_size": 64, "depth_multiplier": 0.25}, (256, (2, 2), 0), 256),
    "mobilenet_v2": ({"image_size": 64, "depth_multiplier": 0.25}, (1280, (2, 2), 0), 1280),
    "mobilevit": (
        {
            "image_size": 64,
            "hidden_sizes": [16, 16, 16],
            "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32],
            "num_attention_heads": 2,
        },
        (32, (2, 2), 0),
        32,
    ),
    "mobilevitv2": ({"image_size": 64, "width_multiplier": 0.5}, (256, (2, 2), 0), 256),
    "efficientnet": (
        {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
        (320, (2, 2), 0),
        320,
    ),
    "cvt": ({"embed_dim": [8, 16, 32], "depth": [1, 2, 3], "num_heads": [1, 1, 2]}, (32, (14, 14), 0), None),
    "pvt": ({**STAGES, "image_size": 64, "num_attention_heads": [1, 2, 2, 2]}, (32, (2, 2), 1), None),
    "pvt_v2": ({**STAGES, "image_size": 64, "num_attention_heads": [1, 2, 2, 2]}, (32, (2, 2), 0), None),
    "poolformer": (STAGES, (32, (7, 7), 0), None),
    "focalnet": ({"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1]}, (64, (2, 2), 0), 64),
    "levit": (
        {
            "image_size": 128,
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [1, 2, 3],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        (48, (2, 2), 0),
        48,
    ),
    "segformer": (
        {"image_size": 64, **STAGES},
        (32, (2, 2), 0),
        None,
    ),
    "hgnet_v2": ({}, (2048, (7, 7), 0), None),
    "rt_detr_resnet": ({**STAGES, "embedding_size": 8, "layer_type": "basic"}, (32, (7, 7), 0), None),
    "lw_detr_vit": ({**TOKENS, "window_block_indices": [0], "num_windows": 4}, (32, (4, 4), 0), None),
}
TIMM = {
    "tf_efficientnet_lite0": ((1280, (7, 7), 0), 1280),
    "vit_tiny_patch16_224": ((192, (14, 14), 1), 192),
    "swin_tiny_patch4_window7_224": ((768, (7, 7), 0), 768),
    "vit_pe_core_tiny_patch16_384": ((192, (24, 24), 1), 192),
    "vit_base_patch16_siglip_gap_224": ((768, (14, 14), 0), 768),
    "vit_small_patch14_reg4_dinov2": ((384, (37, 37), 5), 384),
}


def check(config, expected, pooler_width):
    layout = find_layout(config)
    found = (layout.patches.width, layout.patches.grid, layout.patches.num_prefix_tokens)
    assert found == expected and layout.pooler_width == pooler_width
    # The shapes found are those of a real run, whatever the batch.
    encoder = build_encoder(config).eval()
    with torch.no_grad():
        output = encoder(**encoder_inputs(torch.rand(2, 3, *layout.image_size), layout.cut_to))
    tokens = layout.patches.tokens(last_states(output))
    assert tokens.shape == (2, layout.patches.num_prefix_tokens + layout.patches.num_patches, layout.patches.width)
    assert torch.isfinite(tokens).all()


def check_model(config, tmp_path):
    """A model on the encoder encodes, matches and trains, and is the same once saved and loaded."""
    settings = {"projection_dim": 16, "decoder_num_heads": 4, "num_hard_negatives": 2, "decoder_dropout": 0.0}
    model = RiceModel(RiceConfig(vision_config=config, **settings))
    pictures = torch.randn(3, 3, *model.layout.image_size)
    batch = {"pixel_values": pictures, "pixel_values_videos": torch.stack([pictures, pictures.flip(-1)], dim=1)}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()(**batch).loss.backward()
    optimizer.step()
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert model.visual_projection.weight.grad.abs().sum() > 0
    encoders = [weight.grad for weight in model.vision_model.parameters() if weight.grad is not None]
    assert any(gradient.abs().sum() > 0 for gradient in encoders)
    model.eval().save_pretrained(tmp_path)
    loaded = RiceModel.from_pretrained(tmp_path).eval()
    assert loaded.fingerprint() == model.fingerprint()
    scores = []
    for each in (model, loaded):
        gallery = each.encode_gallery(pictures)
        clips = each.encode_clips(batch["pixel_values_videos"])
        assert gallery.embeds.shape == clips.embeds.shape == (3, 16)
        scores.append((gallery.embeds, each.similarity(clips, gallery), each.match(clips, gallery)))
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=0)
    assert all(score.isfinite().all() for score in scores[0])


@pytest.mark.parametrize("name", FAST)
def test_families(name, tmp_path):
    settings, *expected = FAST[name]
    config = AutoConfig.for_model(name, **settings)
    check(config, *expected)
    check_model(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_families(name, tmp_path):
    settings, *expected = SLOW[name]
    config = AutoConfig.for_model(name, **settings)
    check(config, *expected)
    check_model(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TIMM)
def test_networks_of_timm(architecture, tmp_path):
    pytest.importorskip("timm")
    config = AutoConfig.for_model("timm_wrapper", architecture=architecture)
    check(config, *TIMM[architecture])
    if find_layout(config).image_size[0] <= 224:
        check_model(config, tmp_path)


@pytest.mark.slow
def test_the_width_of_a_stage_does_not_depend_on_the_axis_order():
    pytest.importorskip("timm")
    layout = find_layout(AutoConfig.for_model("timm_wrapper", architecture="swin_tiny_patch4_window7_224"))
    assert layout.patches.order == "channels_last" and layout.hidden[-1].order == "channels_first"
    assert [(stage.width, stage.grid[0]) for stage in layout.hidden] == [(96, 56), (192, 28), (384, 14), (768, 7)]
    assert layout.fine_layer == 2


def test_stages_and_picture_sizes_of_a_timm_network():
    pytest.importorskip("timm")
    settings = {"input_size": [3, 64, 64], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config = AutoConfig.for_model("timm_wrapper", architecture="tf_efficientnet_lite0", pretrained_cfg=settings)
    layout = find_layout(config)
    assert layout.image_size == (64, 64) and layout.patches.grid == (2, 2)
    assert layout.image_mean == (0.1, 0.2, 0.3) and layout.image_std == (0.4, 0.5, 0.6)
    assert [(stage.width, stage.grid[0]) for stage in layout.hidden] == [
        (16, 32),
        (24, 16),
        (40, 8),
        (112, 4),
        (320, 2),
    ]
    assert layout.fine_layer == 3


def test_an_encoder_with_one_grid_uses_its_last_layer():
    layout = find_layout(AutoConfig.for_model("clip_vision_model", **TOKENS))
    assert len(layout.hidden) == 3 and layout.hidden[-1] == layout.patches and layout.fine_layer == 2
    assert layout.has_class_token and layout.image_mean is None


def test_pictures_wider_than_high():
    layout = find_layout(AutoConfig.for_model("vitdet", **{**TOKENS, "image_size": [32, 64]}))
    assert layout.image_size == (32, 64) and layout.patches.grid == (2, 4)


def test_siglip2_sees_patches_in_the_order_of_its_own_processor():
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    config = AutoConfig.for_model("siglip2_vision_model", **FAST["siglip2_vision_model"][0])
    picture = torch.rand(1, 3, 32, 48)
    inputs = encoder_inputs(picture, find_layout(config).cut_to)
    expected = convert_image_to_patches(picture[0], 16)
    torch.testing.assert_close(inputs["pixel_values"][0], expected.reshape(6, -1))
    assert inputs["spatial_shapes"].tolist() == [[2, 3]]


def test_probing_does_not_change_the_config():
    config = AutoConfig.for_model("clip_vision_model", **TOKENS)
    before = copy.deepcopy(config.to_dict())
    find_layout(config)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    "name, settings, skips",
    [
        ("clip_vision_model", TOKENS, True),
        ("altclip_vision_model", TOKENS, True),
        ("chinese_clip_vision_model", TOKENS, True),
        ("metaclip_2_vision_model", TOKENS, True),
        ("siglip_vision_model", TOKENS, False),
        ("blip_vision_model", TOKENS, False),
        ("vit", TOKENS, False),
    ],
)
def test_encoders_whose_last_hidden_state_lacks_the_final_norm(name, settings, skips):
    assert find_layout(AutoConfig.for_model(name, **settings)).skips_final_norm == skips


def test_layers_are_counted_from_either_end():
    layout = find_layout(AutoConfig.for_model("swin", **FAST["swin"][0]))
    assert [patches.grid[0] for patches in layout.hidden] == [16, 8, 4, 4]
    assert layout.at(None) is layout.patches and layout.at(-4) is layout.at(0) is layout.hidden[0]
    with pytest.raises(
        ValueError, match=r"^`vision_feature_layer=4` is not a hidden .*; the encoder has 0, 1, 2, 3\.$"
    ):
        layout.at(4)


def test_encoders_of_stages_take_pictures_of_any_size():
    sizes = {name: find_layout(AutoConfig.for_model(name, **FAST[name][0])).takes_one_size for name in FAST}
    assert [name for name, one_size in sizes.items() if not one_size] == ["swin", "resnet", "dinov3_convnext"]


@pytest.mark.parametrize(
    "name, settings, reason",
    [
        ("vit_mae", TOKENS, "drops patches at random"),
        ("timesformer", TOKENS, "not enough values to unpack"),
        (
            "bert",
            {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1},
            "it takes input_ids, not images",
        ),
        ("pvt", {**STAGES, "num_attention_heads": [1, 2, 5, 8]}, "hidden size .32. is not a multiple of the number"),
        ("yolos", {**TOKENS, "image_size": [64, 64]}, "117 tokens are not a grid of patches of a 64 x 64 image"),
        # Never built: it would take 27 GB.
        ("llama", {}, "it takes input_ids, not images"),
        ("pe_video_encoder", {}, "it takes pixel_values_videos, not images"),
        ("clvp_encoder", {}, "transformers has no vision model for it"),
    ],
)
def test_unsupported_encoders_are_refused_in_one_sentence(name, settings, reason):
    if name == "pe_video_encoder":
        pytest.importorskip("timm")
    sentence = rf"^The vision model '{name}' cannot be RICE's encoder \(.*{reason}.*\); choose another\.$"
    config = AutoConfig.for_model(name, **settings)
    with pytest.raises(ValueError, match=sentence):
        find_layout(config)
    # Of a model with a vision part that part is taken.
    if not hasattr(config, "vision_config"):
        with pytest.raises(ValueError, match=sentence):
            RiceConfig(vision_config=config)


def test_an_encoder_without_meta_support_is_probed_on_the_meta_device_too():
    """As from_pretrained does, which builds its model on the meta device."""
    encoders_rice._find_layout.cache_clear()
    settings, (width, *_), _ = SLOW["lw_detr_vit"]
    with torch.device("meta"):
        assert find_layout(AutoConfig.for_model("lw_detr_vit", **settings)).patches.width == width


def test_the_origin_of_weights_does_not_affect_probing():
    config = AutoConfig.for_model("clip_vision_model", **TOKENS)
    layout = find_layout(config)
    config.dtype, config.architectures, config.name_or_path = "bfloat16", ["CLIPVisionModel"], "folder"
    assert find_layout(config) is layout
