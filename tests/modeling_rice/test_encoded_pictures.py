"""Encoded pictures stand for pictures in every method of the model."""

import pytest
import torch

from modeling_rice import RiceConfig, RiceModel

CLIP = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
CLIP |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}
COMMON = {"projection_dim": 16, "decoder_num_heads": 4, "decoder_dropout": 0.0}
SETTINGS = {
    "clip": {"vision_config": CLIP},
    "clip_raw": {"vision_config": CLIP, "decoder_token_source": "raw"},
    "clip_inner": {"vision_config": CLIP, "vision_feature_layer": 1},
    "clip_no_decoder": {"vision_config": CLIP, "use_decoder": False},
    "clip_aligned": {"vision_config": CLIP, "use_decoder": False, "alignment_weight": 1.0, "vision_feature_layer": 1},
    "resnet": {"vision_config": RESNET, "vision_pooling": "mean", "decoder_position_embeddings": False},
    "resnet_saliency": {
        "vision_config": RESNET,
        "vision_pooling": "mean",
        "decoder_position_embeddings": False,
        "patch_saliency": "learned",
        "vision_feature_layer": 1,
    },
}


@pytest.fixture
def make():
    def make(name: str) -> RiceModel:
        torch.manual_seed(0)
        return RiceModel(RiceConfig(**COMMON, **SETTINGS[name])).eval()

    return make


def batch(side: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(4, 3, side, side, generator=generator),
        "pixel_values_videos": torch.randn(4, 2, 3, side, side, generator=generator),
        "frame_mask": torch.tensor([[True, True], [True, False]] * 2),
    }


def encoded(model: RiceModel, pictures: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    videos = pictures["pixel_values_videos"]
    with torch.no_grad():
        rows = model.encode_pictures(videos.flatten(0, 1)).unflatten(0, videos.shape[:2])
        return pictures | {
            "pixel_values": model.encode_pictures(pictures["pixel_values"]),
            "pixel_values_videos": rows,
        }


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_scores_and_gradients_are_equal(make, name):
    results = []
    for is_encoded in (False, True):
        model = make(name)
        model.vision_model.requires_grad_(False)
        inputs = encoded(model, batch()) if is_encoded else batch()
        output = model(**inputs)
        output.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        clips, gallery = model.encode_clips(**inputs), model.encode_gallery(**inputs)
        aligned = None if model.alignment is None else model.align(clips, gallery)
        results.append([output.loss, output.matching_logits, model.similarity(clips, gallery), aligned, *gradients])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other)


def test_pictures_of_another_size_than_the_native_one(make):
    model = make("resnet_saliency")
    pictures = batch(64)
    torch.testing.assert_close(model(**encoded(model, pictures)).loss, model(**pictures).loss)


def test_rows_hold_what_the_model_uses(make):
    shapes = {name: make(name).kept_states for name in SETTINGS}
    assert shapes["clip_no_decoder"] == {"features": (32,)}
    assert shapes["clip"] == {"features": (32,), "patches": (16, 32)}
    # A picture of 224 pixels, which is this encoder's own size, at strides 4 and 8.
    assert shapes["resnet_saliency"] == {"features": (16,), "patches": (56 * 56, 8), "last_patches": (28 * 28, 16)}
    assert encoded(make("clip"), batch())["pixel_values"].shape == (4, 32 + 16 * 32)


@pytest.mark.parametrize("width", [33, 32 + 32])
def test_rows_of_another_model_are_refused(make, width):
    model = make("clip_no_decoder")
    with pytest.raises(ValueError, match=f"have {width} numbers each, which do not match the states of this model"):
        model.get_image_features(torch.zeros(2, width))


def test_dropout_comes_before_the_projection():
    torch.manual_seed(0)
    model = RiceModel(RiceConfig(**COMMON, **SETTINGS["clip_no_decoder"], projection_dropout=0.5))
    rows = torch.rand(1, 32)
    with torch.no_grad():
        model.visual_projection.weight.copy_(torch.eye(16, 32))
        trained, plain = (model.train(mode)._project(rows)[0] for mode in (True, False))
    assert torch.equal(plain, model.vision_model.post_layernorm(rows)[0, :16])
    kept = trained != 0
    assert 0 < kept.sum() < 16
    assert torch.equal(trained[kept], 2 * plain[kept])


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_dropout_is_a_share(value):
    with pytest.raises(ValueError, match=r"`projection_dropout` must be in 0..1 \(1 excluded\)"):
        RiceConfig(**COMMON, **SETTINGS["clip"], projection_dropout=value)
