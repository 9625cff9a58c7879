"""Parity with both official code bases on the recordings that come with the repository (tests/fixtures/reference)."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation_rice.recall import recall_at_k
from modeling_rice.convert_rice_original_to_hf import convert_original_checkpoint
from modeling_rice.vision_rice import EncoderStates
from processing_rice import RiceVideoProcessor, boxes_to_patch_mask, sample_frame_indices
from processing_rice.sampling_rice import drop_last_frames

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "reference"
TOLERANCE = 1e-4
CLIP4CLIP_VARIANTS = ("icl_pmd_pfr", "icl_pmd_pfr_ipd")


def read(name):
    """A packed file as tensors: see `pack` in tests/fixtures/trim_reference.py."""
    tensors = {}
    with np.load(FOLDER / f"{name}.npz") as file:
        for key in file.files:
            if key.startswith("shape/"):
                continue
            array = file[key]
            if f"shape/{key}" in file.files:
                rotated = array.T.copy().view(">u4")[:, 0].astype(np.uint32)
                array = ((rotated >> 1) | (rotated << 31)).view(np.float32).reshape(file[f"shape/{key}"])
            tensors[key] = torch.from_numpy(array)
    return tensors


def read_json(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def weights_of(tensors):
    return {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}


def outputs_of(tensors, variant):
    prefix = f"outputs/{variant}/"
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def assert_close(name, actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE, f"{name}: {error:.1e} of the maximum"


def assert_gradient_norms(model, recorded, rules, zero=()):
    """Query, key and value are one packed matrix in the official blocks, so squares of norms are summed by name."""
    squares = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            squares[name] = squares.get(name, 0.0) + parameter.grad.double().square().sum()
    assert recorded.keys() <= squares.keys(), f"no gradient for {recorded.keys() - squares.keys()}"
    for name in recorded.keys() - set(zero):
        assert_close(f"gradient norm of {name}", squares[name].sqrt(), recorded[name])


_BLOCK = [
    (r"\.(self_attn|attention)\.[qkv]_proj\.(weight|bias)", r".attn.in_proj_\2"),
    (r"\.(self_attn|attention)\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
]
_CLIP4CLIP = [
    (r"decoder\.cross_layer\.attention\.q_proj\.", "cross.transformer.cross_attention.attn.query."),
    (r"decoder\.cross_layer\.attention\.k_proj\.", "cross.transformer.cross_attention.attn.key."),
    (r"decoder\.cross_layer\.attention\.v_proj\.", "cross.transformer.cross_attention.attn.value."),
    *_BLOCK,
    (r"decoder\.cross_layer\.", "cross.transformer.cross_attention."),
    (r"decoder\.self_layers\.", "cross.transformer.resblocks."),
    (r"decoder\.position_embedding\.", "cross.embeddings.position_embeddings."),
    (r"decoder\.head\.layer_norm\.", "cross.pooler.ln_pool."),
    (r"decoder\.head\.dense\.", "cross.pooler.dense."),
    (r"decoder\.head\.score\.", "similarity_dense."),
    (r"reconstruction_head\.conv1\.", "recons_weights.conv.0."),
    (r"reconstruction_head\.conv2\.", "recons_weights.conv.2."),
]
_MMF = [
    *_BLOCK,
    (r"vision_model\.embeddings\.class_embedding", "image_encoder.model.class_embedding"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "image_encoder.model.positional_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.", "image_encoder.model.conv1."),
    (r"vision_model\.pre_layrnorm\.", "image_encoder.model.ln_pre."),
    (r"vision_model\.post_layernorm\.", "image_encoder.model.ln_post."),
    (r"visual_projection\.weight", "image_encoder.model.proj"),
    (r"vision_model\.encoder\.layers\.", "image_encoder.model.transformer.resblocks."),
    (r"decoder\.cross_layer\.", "transformer.transformer.transformer.layers.1."),
    (r"decoder\.self_layers\.0\.", "transformer.transformer.transformer.layers.0."),
    (r"decoder\.head\.layer_norm\.", "transformer.transformer.pooler.layer_norm."),
    (r"decoder\.head\.dense\.", "transformer.transformer.pooler.dense."),
    (r"decoder\.head\.score\.", "transformer.heads.vim."),
    (r"reconstruction_head\.conv1\.", "transformer.heads.rec.0."),
    (r"reconstruction_head\.conv2\.", "transformer.heads.rec.2."),
]
# Mathematically zero, recorded as rounding noise: softmax does not see a constant.
_ZERO_GRADIENT = ("similarity_dense.bias", "cross.transformer.cross_attention.attn.key.bias")


def stand_in_encoder(width):
    """Weights of a one-block encoder, since those of the older recording's are left out."""
    shapes = {
        "class_embedding": (width,),
        "positional_embedding": (10, width),
        "conv1.weight": (width, 3, 16, 16),
        "proj": (width, width),
    }
    for name in ("ln_pre", "ln_post", "transformer.resblocks.0.ln_1", "transformer.resblocks.0.ln_2"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, out, into in (("mlp.c_fc", 4, 1), ("mlp.c_proj", 1, 4), ("attn.out_proj", 1, 1)):
        name = f"transformer.resblocks.0.{name}"
        shapes |= {f"{name}.weight": (out * width, into * width), f"{name}.bias": (out * width,)}
    name = "transformer.resblocks.0.attn.in_proj"
    shapes |= {f"{name}_weight": (3 * width, width), f"{name}_bias": (3 * width,)}
    return {f"clip.visual.{name}": torch.zeros(shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module", params=CLIP4CLIP_VARIANTS)
def clip4clip(request):
    """
    The older code's model with recorded tokens in place of its encoder: they are handed in as if they were pictures.
    """
    tensors = read("clip4clip_tiny")
    model = convert_original_checkpoint(weights_of(tensors) | stand_in_encoder(width=64))
    model._encoder_output = lambda tokens, patch_mask=None: EncoderStates(tokens[:, 0, 0], tokens[:, 0, 1:], None)
    model._from_states = lambda states, patch_mask=None, is_clip=False: (
        torch.cat([states.features[:, None], states.patches], dim=1),
        states.features,
    )
    inputs = {
        "pixel_values": tensors["inputs/image_tokens"][:, None],
        "pixel_values_videos": tensors[f"inputs/{request.param}/video_tokens"][:, :, None],
        "frame_mask": tensors["inputs/video_mask"].bool(),
    }
    if request.param.endswith("ipd"):
        inputs["patch_mask"] = tensors["inputs/patch_mask"][:, :, 1:].bool()
    manifest = read_json("clip4clip_tiny")["variants"][request.param]
    return model, inputs, outputs_of(tensors, request.param), manifest


def test_older_code(clip4clip):
    model, inputs, recorded, manifest = clip4clip
    output = model(**inputs)
    assert_close("contrastive logits", output.logits_per_image, recorded["contrastive_logits"])
    assert_close("image embeddings", output.image_embeds, recorded["image_embedding"])
    assert_close("clip embeddings", output.video_embeds, recorded["video_embedding"])
    assert torch.equal(output.matching_indices, recorded["cross/pair_video_index"].long())
    assert_close("matching logits", output.matching_logits, recorded["pairwise_logits"])
    losses = manifest["losses"]
    assert_close("contrastive loss", output.contrastive_loss, losses["contrastive_loss"])
    assert_close("matching loss", output.matching_loss, losses["pairwise_loss"])
    assert_close("reconstruction loss", 0.05 * output.reconstruction_loss, losses["diff_loss"])
    assert_close("total loss", output.loss, sum(losses.values()))
    output.loss.backward()
    assert_gradient_norms(model, manifest["grad_norm_per_parameter"], _CLIP4CLIP, _ZERO_GRADIENT)


def test_older_code_scores_attention_and_reconstruction(clip4clip):
    model, inputs, recorded, _ = clip4clip
    clips = model.clip_tokens(**{name: inputs[name] for name in inputs if name != "pixel_values"})
    states = model.decoder.encode_images(inputs["pixel_values"][:, 0])
    attention = model.decoder.positive_attention(states, clips.keys, clips.mask)
    expected = recorded["cross/attention_positive"]
    assert_close("attention", attention[: len(expected), :, : expected.shape[2]], expected)
    weights = model.reconstruction_weights(states, clips.keys, clips.mask, tokens_per_frame=10)
    assert_close("reconstruction weights", weights, recorded["pfr/reconstruction_weights"])
    sources = (clips.tokens * clips.token_mask[..., None])[:, :, 1:].flatten(1, 2)
    assert_close("reconstruction", weights @ sources, recorded["pfr/reconstruction"])

    gallery = model.encode_gallery(inputs["pixel_values"])
    clips = model.encode_clips(**{name: inputs[name] for name in inputs if name != "pixel_values"})
    assert_close("scores", model.match(clips, gallery).T, recorded["eval/pairwise"])


@pytest.fixture(scope="module")
def mmf():
    tensors = read("mmf_tiny_recorded")
    model = convert_original_checkpoint(weights_of(read("mmf_tiny_encoder") | read("mmf_tiny_decoder")))
    frame_mask = tensors["inputs/video_temporal_mask"].bool()
    images = tensors["inputs/image"]
    videos = torch.zeros(*frame_mask.shape, *images.shape[1:])
    videos[frame_mask] = tensors["inputs/real_frames"]
    return model, (images, videos, frame_mask), outputs_of(tensors, "vic_vim_rec"), read_json("mmf_tiny")


def test_newer_code(mmf):
    model, inputs, recorded, manifest = mmf
    manifest = manifest["variants"]["vic_vim_rec"]
    output = model(*inputs)
    # Recorded before normalisation to unit length.
    for name, embeds in (("image", output.image_embeds), ("video", output.video_embeds)):
        expected = recorded[f"eval/{name}_embedding"]
        assert_close(f"{name} embeddings", embeds, expected / expected.norm(dim=1, keepdim=True))
    assert torch.equal(output.matching_indices, recorded["pair_video_index"].long())
    assert_close("matching logits", output.matching_logits, recorded["vim_logits"])
    losses = manifest["losses"]
    assert_close("contrastive loss", output.contrastive_loss, losses["vic_loss"])
    assert_close("matching loss", output.matching_loss, losses["vim_loss"])
    assert_close("reconstruction loss", output.reconstruction_loss, losses["rec_loss"])
    output.loss.backward()
    norms = manifest["grad_norm_per_parameter"]
    scale = next(name for name in norms if name.endswith("logit_scale"))
    assert_gradient_norms(model, {name: norm for name, norm in norms.items() if name != scale}, _MMF)
    # The official scalar s multiplies both embeddings; ours is log(s^2), so d/ds = d/dours * 2 / s.
    s = model.logit_scale.detach().exp().sqrt()
    assert_close("gradient of the scale", (model.logit_scale.grad * 2 / s).abs(), norms[scale])


def test_newer_code_attention_and_reconstruction(mmf):
    model, (images, videos, frame_mask), recorded, _ = mmf
    tokens = model.get_image_features(images).last_hidden_state
    clips = model.clip_tokens(videos, frame_mask)
    states = model.decoder.encode_images(tokens)
    attention = model.decoder.positive_attention(states, clips.keys, clips.mask)
    attention = attention * model.reconstruction_head.attention_factor
    expected = recorded["rec_attention_in"]
    assert_close("attention", attention[: len(expected), :, : expected.shape[2]], expected)
    weights = model.reconstruction_weights(states, clips.keys, clips.mask, tokens.shape[1])
    reconstruction = weights @ (clips.tokens * clips.token_mask[..., None]).flatten(1, 2)
    expected = recorded["rec_reconstruction"]
    assert_close("reconstruction", reconstruction[: len(expected)], expected)


def test_recorded_functions():
    recorded = read_json("functions")
    for case in recorded["patch_mask"]:
        mask = boxes_to_patch_mask(case["boxes"], iou_threshold=case["iou_thresh"])
        assert mask.int().tolist() == case["mask"][1:], case
    for case in recorded["frame_sampling"]:
        sizes = case["num_frames"], case["max_frames"]
        assert sample_frame_indices(*sizes, "eval") == case["eval_presample"]
        assert sample_frame_indices(*sizes, "train") == case["train_uniform"]
    for case in recorded["train_random_drop"]:
        fraction = case["drop_fraction"] if case["gate"] >= 0.5 else 0.0
        sampled = sample_frame_indices(case["num_frames"], 10, "train")
        assert drop_last_frames(sampled, fraction) == case["kept"], case
    recall = recall_at_k(recorded["recall"]["pred"], recorded["recall"]["gt"])
    percent = {name: 100 * value for name, value in recall.items()}
    assert percent == pytest.approx(recorded["recall"]["result_percent"], abs=1e-9)


@pytest.mark.parametrize("size, name, step", [(32, "size32", 1), (224, "size224_every8", 8)])
@pytest.mark.parametrize("backend", ["pillow", "torchvision"])
def test_recorded_preprocessing(backend, size, name, step):
    """By Pillow bit for bit; torchvision's 8-bit arithmetic differs by one grey level here and there."""
    tensors = read("preprocess")
    processor = RiceVideoProcessor(size={"height": size, "width": size}, resize_backend=backend)
    picture = Image.fromarray(tensors["inputs/rgb_uint8_0"].numpy())
    ours = processor([[picture]])["pixel_values_videos"][0, 0][:, ::step, ::step]
    one_level = 1 / 255 / torch.tensor(processor.image_std)[:, None, None]
    difference = (ours - tensors[f"outputs/{name}_0"]).abs() / one_level
    assert difference.max() < (1.01 if backend == "torchvision" else 0.01)
    assert (difference > 0.01).float().mean() < 0.05


def test_the_recordings_stay_small():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert max(sizes.values()) < 2_000_000 and sum(sizes.values()) < 4_000_000, sizes
