"""What RiceModel promises about frames, masks, encoders, gradients, precision and saved folders."""

import inspect
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    DINOv3ViTConfig,
    ResNetConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_rice import RiceConfig, RiceModel, RiceOutput
from modeling_rice.configuration_rice import PATCH_MASK_ENCODERS
from processing_rice import build_processor, train_tokenizer

_FLAT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
_RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
ENCODERS = {
    "clip": (CLIPVisionConfig(**_FLAT), {}, 17),
    "clip, mean": (CLIPVisionConfig(**_FLAT), {"vision_pooling": "mean"}, 17),
    "clip, pooler": (CLIPVisionConfig(**_FLAT), {"vision_pooling": "pooler"}, 17),
    "vit": (ViTConfig(**_FLAT), {}, 17),
    "dinov2": (Dinov2Config(**{k: v for k, v in _FLAT.items() if k != "intermediate_size"}), {}, 17),
    "dinov3_vit": (DINOv3ViTConfig(**_FLAT, num_register_tokens=3), {}, 17),
    "siglip, mean": (SiglipVisionConfig(**_FLAT), {"vision_pooling": "mean"}, 17),
    "siglip, pooler": (SiglipVisionConfig(**_FLAT), {"vision_pooling": "pooler"}, 17),
    "swin": (SwinConfig(**_SWIN), {"vision_pooling": "mean", "decoder_max_position_embeddings": 17}, 17),
    "resnet": (ResNetConfig(**_RESNET), {"vision_pooling": "mean", "decoder_position_embeddings": False}, 17),
}
MASKABLE = [name for name, (config, _, _) in ENCODERS.items() if config.model_type in PATCH_MASK_ENCODERS]


@pytest.fixture
def encoder_model(make_model):
    def make(name: str, **overrides) -> RiceModel:
        config, settings, _ = ENCODERS[name]
        return make_model(vision_config=type(config)(**config.to_diff_dict()), **settings, **overrides)

    return make


def video_inputs(batch):
    return {name: batch[name] for name in ("pixel_values_videos", "frame_mask", "patch_mask") if name in batch}


def test_maskable_encoders_are_all_tested():
    assert {ENCODERS[name][0].model_type for name in MASKABLE} == set(PATCH_MASK_ENCODERS)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_embeds_matches_and_trains(encoder_model, make_batch, name):
    model, batch = encoder_model(name), make_batch(4)
    num_tokens = ENCODERS[name][2]
    images = model.get_image_features(batch["pixel_values"])
    clips = model.get_video_features(**video_inputs(batch))
    assert images.last_hidden_state.shape == (4, num_tokens, 16)
    assert clips.last_hidden_state.shape == (4, 3, num_tokens, 16)
    for features in (images, clips):
        torch.testing.assert_close(features.pooler_output.norm(dim=1), torch.ones(4))
    output = model(**batch)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    trained = [p for n, p in model.vision_model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert len(trained) > 5
    scores = model.match(model.encode_clips(**video_inputs(batch)), model.encode_gallery(batch["pixel_values"]))
    assert scores.std() > 0


@pytest.mark.parametrize("name", MASKABLE)
def test_masked_patches_do_not_reach_the_embedding(encoder_model, make_batch, name):
    model, batch = encoder_model(name), make_batch(2, frames=2)
    batch["frame_mask"] = torch.ones(2, 2, dtype=torch.bool)
    keep = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    keep[..., 1:3, :2] = True
    inside = keep.repeat_interleave(8, dim=-2).repeat_interleave(8, dim=-1)[:, :, None]
    batch["patch_mask"] = keep.flatten(2)

    def embed(pixels):
        return model.get_video_features(pixels, batch["frame_mask"], batch["patch_mask"]).pooler_output

    pixels = batch["pixel_values_videos"]
    noise = torch.randn_like(pixels)
    original = embed(pixels)
    # SigLIP's attention pooling looks at every patch; the others must not.
    if name != "siglip, pooler":
        torch.testing.assert_close(embed(torch.where(inside, pixels, noise)), original, rtol=1e-4, atol=1e-5)
    assert (embed(torch.where(inside, noise, pixels)) - original).abs().max() > 1e-3
    unmasked = model.get_video_features(pixels, batch["frame_mask"]).pooler_output
    assert (unmasked - original).abs().max() > 1e-3


@pytest.mark.parametrize("name", MASKABLE)
def test_masks_mean_the_same_to_sdpa_and_eager(encoder_model, make_batch, name):
    model, batch = encoder_model(name), make_batch(3, patch_mask=True)
    model.set_attn_implementation("sdpa")
    sdpa = model.get_video_features(**video_inputs(batch)).pooler_output
    model.set_attn_implementation("eager")
    eager = model.get_video_features(**video_inputs(batch)).pooler_output
    torch.testing.assert_close(eager, sdpa, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in MASKABLE])
def test_other_encoders_refuse_a_patch_mask(encoder_model, make_batch, name):
    model, batch = encoder_model(name), make_batch(2, patch_mask=True)
    with pytest.raises(ValueError, match="take no attention mask"):
        model.get_video_features(**video_inputs(batch))


def test_a_patch_mask_of_another_grid_is_refused(make_model, make_batch):
    batch = make_batch(2)
    with pytest.raises(ValueError, match="9 patches per frame, but the encoder has 16"):
        make_model().get_video_features(
            batch["pixel_values_videos"], batch["frame_mask"], torch.ones(2, 3, 9, dtype=torch.bool)
        )


@pytest.mark.parametrize("name", ["dinov2", "dinov3_vit", "clip"])
def test_pictures_of_another_size_are_refused(encoder_model, name):
    """Encoders that interpolate positions would take them, and their patches be mistaken for register tokens."""
    with pytest.raises(ValueError, match="48"):
        encoder_model(name).get_image_features(torch.randn(1, 3, 48, 48))


def test_packed_frames_equal_each_frame_alone(make_model, make_batch):
    model, batch = make_model(), make_batch(4)
    encoded = model.get_video_features(**video_inputs(batch))
    for i in range(4):
        for t in range(3):
            frame = batch["pixel_values_videos"][i, t][None]
            if batch["frame_mask"][i, t]:
                alone = model.get_image_features(frame).last_hidden_state[0]
                torch.testing.assert_close(encoded.last_hidden_state[i, t], alone, rtol=1e-4, atol=1e-5)
            else:
                assert not encoded.last_hidden_state[i, t].any()


@pytest.mark.parametrize("normalize", [True, False])
def test_clip_embedding_is_the_mean_of_its_real_frames(make_model, make_batch, normalize):
    model, batch = make_model(normalize_frames=normalize, use_decoder=False), make_batch(4)
    actual = model.get_video_features(**video_inputs(batch)).pooler_output
    for i in range(4):
        frames = batch["pixel_values_videos"][i][batch["frame_mask"][i]]
        states = model.vision_model(frames).last_hidden_state[:, 0]
        features = model.visual_projection(model.vision_model.post_layernorm(states))
        if normalize:
            features = features / features.norm(dim=1, keepdim=True)
        mean = features.mean(dim=0)
        torch.testing.assert_close(actual[i], mean / mean.norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", [None, "mmf"])
def test_content_of_padded_frames_never_matters(make_model, make_batch, preset):
    model, batch = make_model(preset), make_batch(4)
    output = model(**batch)
    batch["pixel_values_videos"][~batch["frame_mask"]] = torch.nan
    poisoned = model(**batch)
    assert torch.equal(poisoned.loss, output.loss)
    assert torch.equal(poisoned.video_embeds, output.video_embeds)
    poisoned.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_padding_that_is_counted_reaches_the_decoder_but_not_the_embedding(make_model, make_batch):
    batch = make_batch(4, patch_mask=True)
    noisy = {**batch, "pixel_values_videos": batch["pixel_values_videos"].clone()}
    noisy["pixel_values_videos"][~batch["frame_mask"]] += 5.0
    for counted in (True, False):
        model = make_model(mask_padded_frames=not counted)
        before, after = model(**batch, return_loss=False), model(**noisy, return_loss=False)
        torch.testing.assert_close(before.video_embeds, after.video_embeds)
        assert torch.equal(before.matching_logits, after.matching_logits) != counted


def test_more_padding_changes_nothing(make_model, make_batch):
    model, batch = make_model(), make_batch(3)
    longer = {
        "pixel_values_videos": torch.nn.functional.pad(batch["pixel_values_videos"], (0, 0) * 3 + (0, 4)),
        "frame_mask": torch.nn.functional.pad(batch["frame_mask"], (0, 4)),
    }
    gallery = model.encode_gallery(batch["pixel_values"])
    short, long = model.encode_clips(**video_inputs(batch)), model.encode_clips(**longer)
    torch.testing.assert_close(short.embeds, long.embeds, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.match(short, gallery), model.match(long, gallery), rtol=1e-4, atol=1e-5)


def test_without_a_frame_mask_every_frame_is_real(make_model, make_batch):
    model, videos = make_model(), make_batch(3)["pixel_values_videos"]
    everything = model.encode_clips(videos, torch.ones(3, 3, dtype=torch.bool))
    assert torch.equal(model.encode_clips(videos).embeds, everything.embeds)
    assert torch.equal(model.encode_clips(videos).mask, everything.mask)
    as_integers = model.encode_clips(videos, torch.tensor([[1, 0, 0]] * 3))
    torch.testing.assert_close(as_integers.embeds, model.encode_clips(videos[:, :1]).embeds)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda batch: batch.update(pixel_values_videos=batch["pixel_values_videos"][0]),
            r"must be \(B, T, 3, H, W\)",
        ),
        (
            lambda batch: batch.update(frame_mask=batch["frame_mask"][:, :2]),
            r"`frame_mask` must be \(B, T\) = \(4, 3\)",
        ),
        (
            lambda batch: batch.update(patch_mask=torch.ones(4, 2, 16)),
            r"`patch_mask` must be \(B, T, P\) with \(B, T\) = \(4, 3\)",
        ),
        (
            lambda batch: batch.update(pixel_values=batch["pixel_values"][:3]),
            "There are 3 images and 4 clips; give one clip per",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(make_model, make_batch, change, message):
    batch = make_batch(4)
    change(batch)
    with pytest.raises(ValueError, match=message):
        make_model()(**batch)


def test_nothing_to_encode_is_refused(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="nothing to encode"):
        model.encode_gallery(torch.zeros(0, 3, 32, 32))
    with pytest.raises(ValueError, match="nothing to encode"):
        model.encode_clips(torch.zeros(0, 3, 3, 32, 32))


def test_feature_methods_return_what_transformers_expects(make_model, make_batch):
    model, batch = make_model(), make_batch(2)
    assert isinstance(model.get_image_features(batch["pixel_values"]), BaseModelOutputWithPooling)
    assert isinstance(model.get_video_features(**video_inputs(batch)), BaseModelOutputWithPooling)
    for method in (RiceModel.get_image_features, RiceModel.get_video_features):
        assert inspect.signature(method).return_annotation is BaseModelOutputWithPooling
    assert inspect.signature(RiceModel.forward).return_annotation is RiceOutput
    assert "last_hidden_state" not in RiceOutput.__dataclass_fields__


def test_forward_output_fits_together(make_model, make_batch):
    model, batch = make_model(logit_scale_init_value=7.0, matching_loss_weight=0.5), make_batch(5)
    output = model(**batch)
    torch.testing.assert_close(output.logits_per_image, 7.0 * output.image_embeds @ output.video_embeds.T)
    assert torch.equal(output.logits_per_video, output.logits_per_image.T)
    assert output.matching_logits.shape == output.matching_indices.shape == (5, 4)
    total = output.contrastive_loss + 0.5 * output.matching_loss + 0.05 * output.reconstruction_loss
    torch.testing.assert_close(output.loss, total)
    every_pair = model(**batch, return_loss=False)
    assert every_pair.loss is None and every_pair.contrastive_loss is None
    torch.testing.assert_close(
        every_pair.matching_logits.T.gather(1, output.matching_indices), output.matching_logits, rtol=1e-4, atol=1e-3
    )


def test_unequal_numbers_of_images_and_clips_can_be_scored(make_model, make_batch):
    model, batch = make_model(), make_batch(4)
    batch["pixel_values"] = batch["pixel_values"][:2]
    output = model(**batch, return_loss=False)
    assert output.logits_per_image.shape == (2, 4)
    assert output.logits_per_video.shape == output.matching_logits.shape == (4, 2)


def test_parts_can_be_left_out(make_model, make_batch):
    batch = make_batch(4)
    only_icl = make_model(use_decoder=False)
    output = only_icl(**batch)
    assert output.matching_loss is None and output.reconstruction_loss is None
    assert torch.equal(output.loss, output.contrastive_loss)
    assert not [name for name in only_icl.state_dict() if "decoder" in name or "reconstruction" in name]
    without_pfr = make_model(use_reconstruction=False)(**batch)
    assert without_pfr.matching_loss is not None and without_pfr.reconstruction_loss is None


def test_a_batch_too_small_for_hard_negatives_is_refused(make_model, make_batch):
    with pytest.raises(ValueError, match="global batch of at least 4, got 3"):
        make_model()(**make_batch(3))
    assert make_model(matching_negatives="all")(**make_batch(3)).loss.isfinite()


def test_pairs_of_one_product_are_not_negatives(make_model, make_batch):
    model = make_model(matching_negatives="all", use_reconstruction=False)
    batch = make_batch(4)
    for name in ("pixel_values", "pixel_values_videos", "frame_mask"):
        batch[name][3] = batch[name][0]
    repeated = model(**batch, product_ids=torch.tensor([9, 2, 3, 9]))
    alone = model(**{name: tensor[:3] for name, tensor in batch.items()})
    # Pair 3 equals pair 0: its loss counts twice, and it is one more negative of the others, but none of pair 0.
    twice = torch.zeros(3, 3, dtype=torch.float64)
    twice[1:, 0] = math.log(2)

    def per_pair(logits):
        logits = logits.double()
        by_image, by_clip = (logits + twice).logsumexp(1), (logits + twice.T).logsumexp(0)
        return ((by_image + by_clip) / 2 - logits.diagonal())[[0, 1, 2, 0]].mean().float()

    torch.testing.assert_close(repeated.contrastive_loss, per_pair(alone.logits_per_image), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(repeated.matching_loss, per_pair(alone.matching_logits), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("detach", [False, True])
def test_detached_matching_trains_the_decoder_only(make_model, make_batch, detach):
    model = make_model(detach_matching_features=detach)
    output = model(**make_batch(4))
    (output.matching_loss + output.reconstruction_loss).backward()
    reached = [n for n, p in model.vision_model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert bool(reached) != detach
    assert (model.visual_projection.weight.grad is None) == detach
    assert model.decoder.cross_layer.attention.v_proj.weight.grad.abs().max() > 0
    model.zero_grad()
    model(**make_batch(4)).contrastive_loss.backward()
    assert model.visual_projection.weight.grad.abs().max() > 0


def test_logit_scale_is_learned_on_request_only(make_model, make_batch):
    for learn in (False, True):
        model = make_model(learn_logit_scale=learn, logit_scale_init_value=20.0)
        model(**make_batch(4)).loss.backward()
        assert (model.logit_scale.grad is not None) == learn
        torch.testing.assert_close(model.logit_scale.exp(), torch.tensor(20.0))


@pytest.mark.parametrize("saved_as", [True, False])
@pytest.mark.parametrize("learn", [True, False])
def test_a_loaded_logit_scale_is_learned_on_request_only(make_model, make_batch, tmp_path, saved_as, learn):
    """Loading turns on the gradient of every parameter."""
    saved = make_model(learn_logit_scale=saved_as, logit_scale_init_value=20.0)
    with torch.no_grad():
        saved.logit_scale.fill_(math.log(30.0))
    saved.save_pretrained(tmp_path)
    model = RiceModel.from_pretrained(tmp_path, learn_logit_scale=learn).train()
    assert model.logit_scale.exp().item() == pytest.approx(30.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(**make_batch(5), return_loss=True).loss.backward()
    optimizer.step()
    assert (abs(model.logit_scale.exp().item() - 30.0) > 1e-4) == learn


def test_gradient_checkpointing_changes_no_gradient(make_model, make_batch):
    model, batch = make_model(decoder_dropout=0.0), make_batch(4, patch_mask=True)
    model.train()
    gradients, calls = [], []
    for layer in model.vision_model.encoder.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        calls.clear()
        model(**batch).loss.backward()
        gradients.append((len(calls), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert gradients[1][0] == 2 * gradients[0][0]
    torch.testing.assert_close(gradients[1][1], gradients[0][1])


@pytest.mark.parametrize("preset", ["clip4clip", "mmf"])
@pytest.mark.parametrize("negatives", ["hardest", "all"])
def test_bfloat16_model_works(make_model, make_batch, preset, negatives):
    batch = make_batch(4, patch_mask=preset == "clip4clip")
    full = make_model(preset, matching_negatives=negatives, logit_scale_init_value=5.0)
    half = make_model(preset, matching_negatives=negatives, logit_scale_init_value=5.0, dtype=torch.bfloat16)
    output = half(**batch)
    output.loss.backward()
    assert half.visual_projection.weight.grad.isfinite().all()
    for name in ("loss", "contrastive_loss", "matching_loss", "reconstruction_loss", "matching_logits"):
        assert output[name].dtype == torch.float32, name
    assert half(**batch, return_loss=False).matching_logits.dtype == torch.float32
    assert (full(**batch).image_embeds - output.image_embeds.float()).abs().max() < 0.1
    gallery, clips = half.encode_gallery(batch["pixel_values"]), half.encode_clips(**video_inputs(batch))
    assert gallery.embeds.dtype == clips.embeds.dtype == torch.float32, "normalised in single precision"
    assert gallery.states.dtype == clips.keys.dtype == torch.bfloat16
    assert half.match(clips, gallery).dtype == half.similarity(clips, gallery).dtype == torch.float32


def test_autocast_keeps_contrastive_logits_in_single_precision(make_model, make_batch):
    batch = make_batch(4)
    model = make_model(logit_scale_init_value=100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    expected = 100.0 * output.image_embeds @ output.video_embeds.T
    assert output.logits_per_image.dtype == torch.float32
    torch.testing.assert_close(output.logits_per_image, expected, rtol=1e-4, atol=1e-4)


def test_a_clip_without_a_real_frame_is_refused(make_model, make_batch):
    batch = make_batch(3)
    batch["frame_mask"] = batch["frame_mask"].clone()
    batch["frame_mask"][1] = False
    with pytest.raises(ValueError, match="Clip 1 .*no real frame"):
        make_model()(**batch)


def test_encoding_in_training_mode_is_refused(make_model, make_batch):
    model, batch = make_model(decoder_dropout=0.1).train(), make_batch(3)
    with pytest.raises(ValueError, match="encode_gallery.*eval"):
        model.encode_gallery(batch["pixel_values"])
    with pytest.raises(ValueError, match="encode_clips.*eval"):
        model.encode_clips(**video_inputs(batch))
    for maps in (model.attention_maps, model.reconstruction_maps):
        with pytest.raises(ValueError, match=f"`{maps.__name__}` needs the model in eval mode"):
            maps(**batch)


@pytest.mark.parametrize("preset", ["clip4clip", "mmf"])
@pytest.mark.parametrize("negatives", ["hardest", "all"])
def test_autocast_trains(make_model, make_batch, preset, negatives):
    batch = make_batch(4, patch_mask=preset == "clip4clip")
    model = make_model(preset, matching_negatives=negatives, logit_scale_init_value=5.0, decoder_dropout=0.0)
    exact = model(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.train()(**batch)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert (output.contrastive_loss - exact.contrastive_loss).abs() < 0.1 * exact.contrastive_loss.abs() + 0.1


def test_similarity_is_the_cosine(make_model, make_batch):
    model, batch = make_model(), make_batch(3)
    clips, gallery = model.encode_clips(**video_inputs(batch)), model.encode_gallery(batch["pixel_values"])
    similarity = model.similarity(clips, gallery)
    expected = torch.nn.functional.cosine_similarity(clips.embeds[:, None], gallery.embeds[None], dim=-1)
    torch.testing.assert_close(similarity, expected)
    assert not clips.embeds.requires_grad and not gallery.states.requires_grad


def test_batch_size_of_encoding_changes_nothing(make_model, make_batch):
    model, batch = make_model(), make_batch(5)
    whole, parts = (model.encode_gallery(batch["pixel_values"], batch_size=n) for n in (None, 2))
    torch.testing.assert_close(whole.embeds, parts.embeds)
    torch.testing.assert_close(whole.states, parts.states, rtol=1e-4, atol=1e-5)
    whole, parts = (model.encode_clips(**video_inputs(batch), batch_size=n) for n in (None, 2))
    torch.testing.assert_close(whole.keys, parts.keys, rtol=1e-4, atol=1e-5)
    assert torch.equal(whole.mask, parts.mask)


def test_new_models_start_as_documented(make_config):
    model = RiceModel(make_config(logit_scale_init_value=30.0, initializer_range=0.01))
    torch.testing.assert_close(model.logit_scale.exp(), torch.tensor(30.0))
    assert 0.005 < model.decoder.cross_layer.attention.q_proj.weight.std() < 0.02
    assert model.vision_model.embeddings.class_embedding.abs().max() > 0


_EMBED = """
import sys, torch
torch.set_num_threads(1)
if {blocked}:
    sys.modules["modeling_rice"] = sys.modules["processing_rice"] = None
else:
    sys.path.insert(0, {repository!r})
    import modeling_rice, processing_rice
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor
options = {{"trust_remote_code": True}} if {blocked} else {{}}
model = AutoModel.from_pretrained({folder!r}, **options).eval()
processor = AutoProcessor.from_pretrained({folder!r}, **options)
pictures = [Image.open(path).convert("RGB") for path in {pictures!r}]
boxes = [[[0, 0, 0.5, 0.5], None, None], [None] * 2]
inputs = processor(images=pictures[:2], videos=[pictures, pictures[1:]], boxes=boxes)
texts = processor(titles=["a red cup"], asr=["", "buy this cup"])
gallery = model.encode_gallery(**inputs)
clips = model.encode_clips(**inputs)
save_file({{
    "images": gallery.embeds, "clips": clips.embeds, "scores": model.match(clips, gallery),
    "titles": texts["title_input_ids"], "asr": texts["asr_input_ids"],
}}, {output!r})
print(type(model).__module__)
"""


@pytest.fixture
def published(tmp_path, make_model):
    """A folder with model and processor, three pictures, and what they give in this process."""
    pictures = []
    for i, size in enumerate([(40, 30), (32, 32), (31, 60)]):
        pictures.append(tmp_path / f"{i}.png")
        Image.effect_noise(size, 90).convert("RGB").save(pictures[-1])
    model = make_model("clip4clip")
    tokenizer = train_tokenizer(["a red cup", "buy this blue cup", "a green dress"], vocab_size=400)
    processor = build_processor(tokenizer, image_size=32, patch_size=8, num_frames=4)
    folder = tmp_path / "published"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    opened = [Image.open(path).convert("RGB") for path in pictures]
    inputs = processor(
        images=opened[:2], videos=[opened, opened[1:]], boxes=[[[0, 0, 0.5, 0.5], None, None], [None] * 2]
    )
    texts = processor(titles=["a red cup"], asr=["", "buy this cup"])
    gallery, clips = model.encode_gallery(**inputs), model.encode_clips(**inputs)
    expected = {
        "images": gallery.embeds,
        "clips": clips.embeds,
        "scores": model.match(clips, gallery),
        "titles": texts["title_input_ids"],
        "asr": texts["asr_input_ids"],
    }
    return folder, [str(path) for path in pictures], expected


@pytest.mark.parametrize("blocked", [False, True], ids=["imported", "trust_remote_code"])
def test_a_fresh_process_gives_bit_equal_results(published, tmp_path, blocked):
    folder, pictures, expected = published
    repository = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    output = tmp_path / "output.safetensors"
    code = _EMBED.format(
        blocked=blocked, repository=repository, folder=str(folder), pictures=pictures, output=str(output)
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf_home"), "OMP_NUM_THREADS": "1"}
    work = tmp_path / "elsewhere"
    work.mkdir()
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=work, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip().startswith("transformers_modules" if blocked else "modeling_rice")
    actual = load_file(output)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_round_trip_keeps_parameters_and_settings(make_model, tmp_path):
    model = make_model("mmf", fusion_weight=0.3)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is RiceModel and not loaded.training
    assert loaded.config.fusion_weight == 0.3 and loaded.config.matching_score == "cosine"
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "rice" and config["architectures"] == ["RiceModel"]


def test_a_half_written_checkpoint_does_not_load_silently(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(Exception, match="(?i)incomplete|safetensor|metadata"):
        AutoModel.from_pretrained(tmp_path)


def test_loading_reports_missing_parameters(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("decoder.head.score.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"decoder.head.score.weight"}


def test_a_default_config_builds_without_weights():
    with torch.device("meta"):
        model = RiceModel(RiceConfig())
    assert model.decoder.position_embedding.weight.shape == (50, 512)
    assert model.decoder.cross_layer.mlp.fc1.weight.shape == (2048, 512)
    assert model.visual_projection.weight.shape == (512, 768)


def test_misspelt_arguments_are_refused(make_model, make_batch):
    model, batch = make_model(), make_batch()
    clip = {"pixel_values_videos": batch["pixel_values_videos"]}
    for method, inputs in (
        (model.encode_gallery, {"pixel_values": batch["pixel_values"]}),
        (model.get_image_features, {"pixel_values": batch["pixel_values"]}),
        (model.encode_clips, clip),
        (model.get_video_features, clip),
        (model, batch),
    ):
        with pytest.raises(TypeError, match="takes no argument 'patch_masks', 'text'; a batch holds pixel_values, "):
            method(**inputs, patch_masks=None, text=["a cup"])


def test_each_encode_method_accepts_a_whole_batch(make_model, make_batch):
    model, batch = make_model(), make_batch(patch_mask=True, product_ids=[0, 1, 2, 3, 4])
    ids = torch.ones(5, 3, dtype=torch.long)
    batch |= {f"{kind}_{name}": ids for kind in ("title", "asr") for name in ("input_ids", "attention_mask")}
    gallery, clips = model.encode_gallery(**batch), model.encode_clips(**batch)
    assert torch.equal(gallery.embeds, model.encode_gallery(batch["pixel_values"]).embeds)
    output = model(**batch)
    torch.testing.assert_close(output.video_embeds, clips.embeds)
