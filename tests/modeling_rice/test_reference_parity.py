"""Both official code bases, number by number: recorded outputs, losses and gradients of converted weights.

The recordings were made by running the official classes on CPU in single precision with dropout 0. Everything is
compared to 1e-4 of the recorded tensor's maximum.
"""

import functools
import json
import re
from collections import defaultdict

import pytest
import torch
from safetensors.torch import load_file

from modeling_rice.convert_rice_original_to_hf import convert_original_checkpoint

TOLERANCE = 1e-4
CLIP4CLIP_CASES = [
    ("golden_tiny_public", variant) for variant in ("icl", "icl_pmd", "icl_pmd_pfr", "icl_pmd_pfr_ipd")
] + [
    ("golden_public", variant)
    for variant in ("icl", "icl_pmd", "icl_pmd_pfr", "icl_pmd_pfr_ipd", "icl_pmd_pfr_text", "icl_pmd_pfr_ipd_text")
]
MMF_CASES = ["vic_contrastive_head", "vic", "vic_vim", "vic_vim_rec"]

# Our parameter -> official one; several of ours (query, key, value) make up one of theirs.
_BLOCK = [
    (r"\.(self_attn|attention)\.[qkv]_proj\.(weight|bias)", r".attn.in_proj_\2"),
    (r"\.(self_attn|attention)\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
]
_ENCODER = [
    (r"vision_model\.embeddings\.class_embedding", "{visual}class_embedding"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "{visual}positional_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.", "{visual}conv1."),
    (r"vision_model\.pre_layrnorm\.", "{visual}ln_pre."),
    (r"vision_model\.post_layernorm\.", "{visual}ln_post."),
    (r"visual_projection\.weight", "{visual}proj"),
    (r"vision_model\.encoder\.layers\.", "{visual}transformer.resblocks."),
]
_CLIP4CLIP = [
    (r"decoder\.cross_layer\.attention\.(q|k|v)_proj\.", r"cross.transformer.cross_attention.attn.<\1>."),
    ("<q>", "query"),
    ("<k>", "key"),
    ("<v>", "value"),
    *_BLOCK,
    *((pattern, name.format(visual="clip.visual.")) for pattern, name in _ENCODER),
    (r"decoder\.cross_layer\.", "cross.transformer.cross_attention."),
    (r"decoder\.self_layers\.", "cross.transformer.resblocks."),
    (r"decoder\.position_embedding\.", "cross.embeddings.position_embeddings."),
    (r"decoder\.head\.layer_norm\.", "cross.pooler.ln_pool."),
    (r"decoder\.head\.dense\.", "cross.pooler.dense."),
    (r"decoder\.head\.score\.", "similarity_dense."),
    (r"decoder\.(title|asr)_projection\.", r"fc_\1."),
    (r"reconstruction_head\.conv1\.", "recons_weights.conv.0."),
    (r"reconstruction_head\.conv2\.", "recons_weights.conv.2."),
]
_MMF = [
    *_BLOCK,
    *((pattern, name.format(visual="image_encoder.model.")) for pattern, name in _ENCODER),
    (r"decoder\.cross_layer\.", "transformer.transformer.transformer.layers.1."),
    (r"decoder\.self_layers\.0\.", "transformer.transformer.transformer.layers.0."),
    (r"decoder\.head\.layer_norm\.", "transformer.transformer.pooler.layer_norm."),
    (r"decoder\.head\.dense\.", "transformer.transformer.pooler.dense."),
    (r"decoder\.head\.score\.", "transformer.heads.vim."),
    (r"reconstruction_head\.conv1\.", "transformer.heads.rec.0."),
    (r"reconstruction_head\.conv2\.", "transformer.heads.rec.2."),
]
# Mathematically zero, recorded as rounding noise (the manifests say so): softmax does not see a constant.
_ZERO_GRADIENT = ("similarity_dense.bias", "cross.transformer.cross_attention.attn.key.bias")


@functools.cache
def read_golden(path):
    return load_file(path), json.loads(path.with_suffix(".json").read_text())


@pytest.fixture
def golden(reference_dir):
    return lambda name: read_golden(reference_dir / f"{name}.safetensors")


def official_weights(tensors, without=()):
    """The recorded weights, which are the union over variants, less the parts a variant does not have."""
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    return {key: value for key, value in weights.items() if not key.startswith(tuple(without))}


def official_gradients(model, rules):
    gradients = defaultdict(list)
    # Query, key and value stand in this order in the official packed matrices.
    for name, parameter in sorted(model.named_parameters(), key=lambda item: re.sub("q_proj", "a_proj", item[0])):
        if parameter.grad is None:
            continue
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        gradients[name].append(torch.atleast_1d(parameter.grad))
    return {name: torch.cat(parts) for name, parts in gradients.items()}


def assert_close(name, actual, expected):
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-12)
    assert error < TOLERANCE, f"{name}: {error:.1e} of the maximum"


def assert_gradient_norms(gradients, recorded):
    compared = recorded.keys() - set(_ZERO_GRADIENT)
    assert compared <= gradients.keys(), f"no gradient for {compared - gradients.keys()}"
    for name in compared:
        assert_close(f"gradient norm of {name}", gradients[name].double().norm(), torch.tensor(recorded[name]))


class Clip4ClipRun:
    """One variant of the older code base: its converted model, inputs, training outputs and gradients."""

    def __init__(self, tensors, variant):
        without = [] if "pfr" in variant else ["recons_weights."]
        without += [] if "pmd" in variant else ["cross.", "similarity_dense."]
        without += [] if "text" in variant else ["fc_"]
        self.model = convert_original_checkpoint(official_weights(tensors, without))
        self.recorded = {
            key.removeprefix(f"outputs/{variant}/"): value
            for key, value in tensors.items()
            if key.startswith(f"outputs/{variant}/")
        }
        self.images = tensors["inputs/image"].clone().requires_grad_()
        self.videos = tensors["inputs/video"].clone().requires_grad_()
        self.frame_mask = tensors["inputs/video_mask"].bool()
        self.patch_mask = tensors["inputs/patch_mask"][:, :, 1:].bool() if "ipd" in variant else None
        self.titles = tensors["inputs/item_emb"] if "text" in variant else None
        self.asr = tensors["inputs/asr_emb"] if "text" in variant else None
        self.output = self.model(
            self.images,
            self.videos,
            self.frame_mask,
            self.patch_mask,
            title_embeds=self.titles,
            asr_embeds=self.asr,
        )


def case_id(case):
    return "-".join(case)


@pytest.fixture(params=CLIP4CLIP_CASES, ids=case_id)
def clip4clip(request, golden):
    name, variant = request.param
    tensors, manifest = golden(name)
    return Clip4ClipRun(tensors, variant), manifest["variants"][variant]


def test_clip4clip_outputs_and_losses(clip4clip):
    run, manifest = clip4clip
    output, recorded = run.output, run.recorded
    assert_close("contrastive logits", output.logits_per_image, recorded["contrastive_logits"])
    assert_close("image embeddings", output.image_embeds, recorded["image_embedding"])
    assert_close("clip embeddings", output.video_embeds, recorded["video_embedding"])
    losses = {
        "contrastive_loss": output.contrastive_loss,
        "pairwise_loss": output.matching_loss,
        "diff_loss": None if output.reconstruction_loss is None else 0.05 * output.reconstruction_loss,
    }
    losses = {name: loss for name, loss in losses.items() if loss is not None}
    assert losses.keys() == manifest["losses"].keys()
    for name, loss in losses.items():
        assert_close(name, loss, recorded[f"loss/{name}"])
    assert_close("total loss", output.loss, recorded["loss/total"])
    if run.model.decoder is not None:
        assert torch.equal(output.matching_indices, recorded["cross/pair_video_index"])
        assert_close("matching logits", output.matching_logits, recorded["pairwise_logits"])
        assert_close("unscaled scores", output.matching_logits / 100, recorded["cross/scores_unscaled"])


# Tokens are recorded once without and once with boxes.
@pytest.mark.parametrize(
    "clip4clip",
    [case for case in CLIP4CLIP_CASES if case[1] in ("icl", "icl_pmd_pfr_ipd")],
    indirect=True,
    ids=case_id,
)
def test_clip4clip_encoder_tokens(clip4clip):
    run, _ = clip4clip
    recorded = run.recorded
    images = run.model.get_image_features(run.images).last_hidden_state
    clips = run.model.get_video_features(run.videos, run.frame_mask, run.patch_mask).last_hidden_state
    if run.model.decoder is None:
        images, clips = run.model._project(images), run.model._project(clips)
    counted = torch.ones_like(run.frame_mask) if run.patch_mask is not None else run.frame_mask
    assert_close("image tokens", images, recorded["encoder/image_tokens"])
    assert_close("image class token", images[:, 0], recorded["encoder/image_cls"])
    assert_close("clip tokens", clips[counted], recorded["encoder/video_tokens"][counted])
    assert_close("clip class tokens", clips[:, :, 0][counted], recorded["encoder/video_cls"][counted])


@pytest.mark.parametrize(
    "clip4clip", [case for case in CLIP4CLIP_CASES if "pmd" in case[1]], indirect=True, ids=case_id
)
def test_clip4clip_decoder_states(clip4clip):
    run, _ = clip4clip
    model, recorded = run.model, run.recorded
    images = model.get_image_features(run.images).last_hidden_state
    clips = model.clip_tokens(run.videos, run.frame_mask, run.patch_mask, run.asr)
    states = model.decoder.encode_images(images, run.titles)
    keys, values, mask = clips.keys, clips.values, clips.mask
    index = run.output.matching_indices
    pairs = [(i, int(clip)) for i in range(2) for clip in index[i]]

    expected_mask = recorded["cross/kv_mask"].bool().unflatten(0, (-1, 4))[:, 0]
    assert torch.equal(mask, expected_mask)
    assert_close("states", states[[0, 0, 0, 0, 1, 1, 1, 1]], recorded["cross/query_after_self_layer0_first8"])
    contexts = model.decoder.pair_contexts(states[:, 0], keys, values, mask)
    chosen = torch.stack([contexts[clip, image] for image, clip in pairs])
    assert_close("contexts", chosen, recorded["cross/cross_attention_context_first8"][:, 0])
    finished = model.decoder.cross_layer(states[[image for image, _ in pairs], 0], None, chosen)
    assert_close("class states", finished, recorded["cross/query_after_cross_layer_first8"][:, 0])
    attention = model.decoder.positive_attention(states, keys, mask)
    assert_close("attention of positives", attention, recorded["cross/attention_positive"])
    if model.reconstruction_head is not None:
        tokens = images.shape[1]
        weights = model.reconstruction_weights(states, keys, mask, tokens)
        assert_close("reconstruction weights", weights, recorded["pfr/reconstruction_weights"])
        sources = (clips.tokens * clips.token_mask[..., None])[:, :, 1:].flatten(1, 2)
        assert_close("reconstruction", weights @ sources, recorded["pfr/reconstruction"])
        assert_close("reconstruction target", images[:, 1:], recorded["pfr/target"])


def test_clip4clip_gradients(clip4clip):
    run, manifest = clip4clip
    run.output.loss.backward()
    gradients = official_gradients(run.model, _CLIP4CLIP)
    assert_gradient_norms(gradients, manifest["grad_norm_per_parameter"])
    assert_close("image gradient norm", run.images.grad.norm(), torch.tensor(manifest["grad_norm_input_image"]))
    assert_close("clip gradient norm", run.videos.grad.norm(), torch.tensor(manifest["grad_norm_input_video"]))
    gradients |= {"input_image_0": run.images.grad[0], "input_video_0_0": run.videos.grad[0, 0]}
    recorded = {key.removeprefix("grad/"): g for key, g in run.recorded.items() if key.startswith("grad/")}
    assert len(recorded) >= 5
    for name, gradient in recorded.items():
        assert_close(f"gradient of {name}", gradients[name], gradient)


def test_clip4clip_evaluation_scores(clip4clip):
    run, _ = clip4clip
    gallery = run.model.encode_gallery(run.images.detach(), run.titles)
    clips = run.model.encode_clips(run.videos.detach(), run.frame_mask, run.patch_mask, run.asr)
    assert_close("cosines", run.model.similarity(clips, gallery).T, run.recorded["eval/contrastive"])
    if run.model.decoder is not None:
        assert_close("decoder scores", run.model.match(clips, gallery).T, run.recorded["eval/pairwise"])


class MmfRun:
    """One variant of the newer code base."""

    def __init__(self, tensors, variant):
        without = [] if "rec" in variant else ["transformer.heads.rec."]
        if "vim" not in variant:
            without += ["transformer.transformer.", "transformer.heads.vim."]
        weights = official_weights(tensors, without)
        if variant == "vic_contrastive_head":
            weights["transformer.contrastive_norm.norm_s"] = weights.pop("transformer.logit_scale")
        self.model = convert_original_checkpoint(weights)
        self.recorded = {
            key.removeprefix(f"outputs/{variant}/"): value
            for key, value in tensors.items()
            if key.startswith(f"outputs/{variant}/")
        }
        self.images, self.videos = tensors["inputs/image"], tensors["inputs/video"]
        self.frame_mask = tensors["inputs/video_temporal_mask"].bool()
        self.output = self.model(self.images, self.videos, self.frame_mask)


@pytest.fixture(params=MMF_CASES)
def mmf(request, golden):
    tensors, manifest = golden("golden_mmf_tiny_public")
    return MmfRun(tensors, request.param), manifest["variants"][request.param]


def test_mmf_outputs_and_losses(mmf):
    run, manifest = mmf
    output, recorded = run.output, run.recorded
    losses = {
        "vic_loss": output.contrastive_loss,
        "vim_loss": output.matching_loss,
        "rec_loss": output.reconstruction_loss,
    }
    losses = {name: loss for name, loss in losses.items() if loss is not None}
    assert losses.keys() == manifest["losses"].keys()
    for name, loss in losses.items():
        assert_close(name, loss, recorded[f"loss/{name}"])
    assert_close("total loss", output.loss, sum(recorded[f"loss/{name}"] for name in losses))
    # Recorded before normalisation to unit length; the scale is in the logits here.
    for name, embeds in (("image", output.image_embeds), ("video", output.video_embeds)):
        unit = recorded[f"eval/{name}_embedding"] / recorded[f"eval/{name}_embedding"].norm(dim=1, keepdim=True)
        assert_close(f"{name} embeddings", embeds, unit)
    if run.model.decoder is not None:
        assert torch.equal(output.matching_indices, recorded["pair_video_index"])
        assert_close("matching logits", output.matching_logits, recorded["vim_logits"])


def test_mmf_encoder_and_decoder_states(mmf):
    run, _ = mmf
    model, recorded = run.model, run.recorded
    images = model.get_image_features(run.images).last_hidden_state
    clips = model.clip_tokens(run.videos, run.frame_mask)
    if "image_tokens_raw" in recorded:
        assert_close("image tokens", images, recorded["image_tokens_raw"])
        assert_close("clip tokens", clips.tokens[:1], recorded["video_tokens_raw_clip0"])
        assert_close("image features", model._project(images[:, 0]), recorded["image_feature"])
        real = run.frame_mask
        assert_close("frame features", model._project(clips.tokens[:, :, 0])[real], recorded["video_feature"][real])
    if model.decoder is None:
        return
    states = model.decoder.encode_images(images)
    keys, values, mask = clips.keys, clips.values, clips.mask
    contexts = model.decoder.pair_contexts(states[:, 0], keys, values, mask)
    chosen = run.output.matching_indices[0]
    finished = model.decoder.cross_layer(states[[0] * 4, 0], None, contexts[chosen, 0])
    assert_close("class states", finished, recorded["vim_last_hidden_first4"][:, 0])
    if model.reconstruction_head is not None:
        attention = model.decoder.positive_attention(states, keys, mask)
        factor = model.reconstruction_head.attention_factor
        assert_close("scaled attention of positives", attention * factor, recorded["rec_attention_in"])
        weights = model.reconstruction_weights(states, keys, mask, images.shape[1])
        assert_close("reconstruction weights", weights, recorded["rec_conv_out"].softmax(dim=-1))
        sources = (clips.tokens * clips.token_mask[..., None]).flatten(1, 2)
        assert_close("reconstruction", weights @ sources, recorded["rec_reconstruction"])


def test_mmf_gradients(mmf):
    run, manifest = mmf
    run.output.loss.backward()
    gradients = official_gradients(run.model, _MMF)
    # The official parameter s multiplies both embeddings; ours is log(s^2), so d/ds = d/dours * 2 / s.
    scale = next(name for name in manifest["grad_norm_per_parameter"] if name.endswith(("logit_scale", "norm_s")))
    s = run.model.logit_scale.detach().exp().sqrt()
    gradients[scale] = (gradients.pop("logit_scale") * 2 / s).abs()
    assert_gradient_norms(gradients, manifest["grad_norm_per_parameter"])
    total = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()
    assert_close("total gradient norm", total, torch.tensor(manifest["grad_norm_total"]))
