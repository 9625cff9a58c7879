"""Frames encoded by themselves and pooled to clips, against clips that are encoded whole."""

import pytest
import torch
from transformers import SiglipVisionConfig

from modeling_rice import RiceFrames

SIGLIP = SiglipVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
)
VARIANTS = {
    "default": {},
    "clip4clip": {"preset": "clip4clip"},
    "mmf": {"preset": "mmf"},
    "raw lengths": {"normalize_frames": False},
    "raw tokens": {"decoder_token_source": "raw", "decoder_normalize_key_value": False},
    "no decoder": {"use_decoder": False, "use_reconstruction": False},
    "weighted": {"temporal_pooling": "attention", "frame_consensus_scale": 4.0},
    "lstm": {"temporal_pooling": "lstm"},
    "transformer": {"temporal_pooling": "transformer"},
    "saliency": {"vision_config": SIGLIP, "vision_pooling": "mean", "patch_saliency": "learned"},
    "boxes in the pooling": {"vision_config": SIGLIP, "vision_pooling": "mean", "patch_mask_pooling": True},
}


def assert_same_clips(actual, expected, atol=1e-5):
    for name in expected.fields:
        one, other = getattr(actual, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is None:
            continue
        if name in ("keys", "values") and expected.mask is not None:
            # What stands at masked tokens has no influence.
            one, other = one * expected.mask[..., None], other * expected.mask[..., None]
        torch.testing.assert_close(one, other, atol=atol, rtol=atol)
    assert actual.model_fingerprint == expected.model_fingerprint


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_pooled_frames_equal_clips_encoded_whole(make_model, make_batch, variant, masked):
    model, batch = make_model(**VARIANTS[variant]), make_batch(4, patch_mask=masked)
    videos, frame_mask, patch_mask = batch["pixel_values_videos"], batch["frame_mask"], batch.get("patch_mask")
    whole = model.encode_clips(videos, frame_mask, patch_mask)

    def encode(rows):
        # In two batches, as a stream's frames come.
        half = len(videos[rows]) // 2
        parts = [slice(None, half), slice(half, None)]
        masks = [None if patch_mask is None else patch_mask[rows][part] for part in parts]
        with torch.no_grad():
            frames = [model.encode_frames(videos[rows][part], mask) for part, mask in zip(parts, masks)]
        return RiceFrames.cat(frames)

    every = torch.ones_like(frame_mask)
    with torch.no_grad():
        assert_same_clips(model.pool_frames(encode(every), frame_mask), whole)
    if not masked or model.config.mask_padded_frames:
        with torch.no_grad():
            assert_same_clips(model.pool_frames(encode(frame_mask), frame_mask), whole)
    # Windows of one stream: its frames are encoded once and shared.
    stream = encode(torch.tensor([[False] * 3, [False] * 3, [False] * 3, [True] * 3]))
    windows = torch.tensor([[0, 1], [1, 2]])
    with torch.no_grad():
        shared = model.pool_frames(stream[windows.flatten()], torch.ones(2, 2, dtype=torch.bool))
        alone = [model.pool_frames(stream[window]) for window in windows]
    expected = model.encode_clips(videos[3][windows], None, None if patch_mask is None else patch_mask[3][windows])
    for row in range(2):
        assert_same_clips(shared[row], expected[row])
        assert_same_clips(alone[row], expected[row])
    gallery = model.encode_gallery(batch["pixel_values"])
    torch.testing.assert_close(model.similarity(shared, gallery), model.similarity(expected, gallery))


@pytest.mark.parametrize("variant", ["default", "mmf", "lstm", "transformer", "saliency"])
def test_gradients_through_pooled_frames_are_those_of_whole_clips(make_model, make_batch, variant):
    settings = {"text_embed_dim": 6, **VARIANTS[variant]}
    model, batch = make_model(dtype=torch.float64, **settings), make_batch(4, dtype=torch.float64, text_dim=6)
    videos, frame_mask, asr = batch["pixel_values_videos"], batch["frame_mask"], batch["asr_embeds"]
    torch.manual_seed(0)
    probes = [torch.randn(4, 16, dtype=torch.float64)]
    gradients = []
    for pooled in (False, True):
        model.train().zero_grad()
        pixels = videos.clone().requires_grad_()
        torch.manual_seed(0)
        if pooled:
            clips = model.pool_frames(model.encode_frames(pixels[frame_mask]), frame_mask, asr)
        else:
            clips = model.clip_tokens(pixels, frame_mask, asr_embeds=asr)
        probes.append(torch.linspace(-1, 1, clips.keys.numel(), dtype=torch.float64).view_as(clips.keys))
        kept = clips.mask[..., None]
        loss = (clips.embeds * probes[0]).sum() + (clips.keys * kept * probes[1]).sum() + clips.values.mul(kept).sum()
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        gradients[-1]["pixels"] = pixels.grad
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-9, rtol=1e-9, msg=name)
    assert gradients[1]["pixels"][frame_mask].abs().max() > 0 and not gradients[1]["pixels"][~frame_mask].any()


def test_frames_are_stored_and_sliced_as_other_encodings(make_model, make_batch, tmp_path):
    model, batch = make_model(), make_batch(3, patch_mask=True)
    with torch.no_grad():
        frames = model.encode_frames(batch["pixel_values_videos"].flatten(0, 1), batch["patch_mask"].flatten(0, 1))
    assert len(frames) == 9 and frames.tokens.shape == (9, 17, 16) and frames.features.shape == (9, 16)
    assert frames.token_mask[:, 0].all() and torch.equal(frames.token_mask[:, 1:], batch["patch_mask"].flatten(0, 1))
    frames.save(tmp_path / "frames")
    again = RiceFrames.load(tmp_path / "frames")[2:5]
    assert again.model_fingerprint == model.fingerprint() and torch.equal(again.features, frames.features[2:5])


def test_frames_that_do_not_form_clips_are_refused(make_model, make_batch):
    model, other, batch = make_model(), make_model(normalize_frames=False), make_batch(2)
    with torch.no_grad():
        frames = model.encode_frames(batch["pixel_values_videos"].flatten(0, 1))
    with pytest.raises(ValueError, match="4 real frames of 6, but there are 5 frames"):
        model.pool_frames(frames[:5], batch["frame_mask"])
    with pytest.raises(ValueError, match="Clip 1 of the batch has no real frame"):
        model.pool_frames(frames, torch.tensor([[True] * 3, [False] * 3]))
    with pytest.raises(ValueError, match="`frames` was encoded by another model"):
        other.pool_frames(frames, batch["frame_mask"])
