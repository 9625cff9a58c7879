"""A model with an alignment: embeddings and patches equal their definitions, and masked ones count nowhere."""

import pytest
import torch
from torch.nn.functional import normalize
from transformers import ResNetConfig

from modeling_rice import RiceClips, RiceGallery, RiceModel
from modeling_rice.alignment_rice import align_patches
from modeling_rice.fingerprint_rice import same_state
from modeling_rice.scoring_rice import FusionWeights, default_ranking, fuse, ranked_scores

SETTINGS = {"use_decoder": False, "alignment_weight": 1.0, "alignment_rank": 6, "vision_feature_layer": 1}


@pytest.fixture
def make_aligned(make_model):
    """A function that builds a model whose statistics were taken from random pictures."""

    def make(**overrides) -> RiceModel:
        model = make_model(**{**SETTINGS, **overrides})
        images, frames = torch.randn(7, 3, 32, 32) + 1, torch.randn(9, 3, 32, 32) - 1
        # In batches, as they come from a loader.
        assert model.fit_alignment(images.split(3), iter(frames.split(4))) is None
        return model

    return make


def encoded(model, batch) -> tuple[RiceClips, RiceGallery]:
    names = ("pixel_values_videos", "frame_mask", "patch_mask")
    clips = model.encode_clips(**{name: batch[name] for name in names if name in batch})
    return clips, model.encode_gallery(batch["pixel_values"])


def raw(model, pixels, is_clip):
    """Projected global features, and patches of the chosen layer, before anything is subtracted."""
    with torch.no_grad():
        output = model.vision_model(pixels, output_hidden_states=True)
        features = model.visual_projection(model.vision_model.post_layernorm(output.last_hidden_state[:, 0]))
    # Without the class token.
    return output.hidden_states[1][:, 1:], features


def test_statistics_are_those_of_the_pictures(make_model):
    model = make_model(**SETTINGS, alignment_shrinkage=0)
    images, frames = torch.randn(7, 3, 32, 32) + 1, torch.randn(9, 3, 32, 32) - 1
    assert model.fit_alignment([images], [frames]) is None
    patches, features = raw(model, frames, True)
    torch.testing.assert_close(model.alignment.video_mean, features.mean(dim=0))
    torch.testing.assert_close(model.alignment.image_mean, raw(model, images, False)[1].mean(dim=0))
    torch.testing.assert_close(model.alignment.patch_mean, patches.mean(dim=(0, 1)))
    whitened = ((patches - patches.mean(dim=(0, 1))) @ model.alignment.patch_projection).flatten(0, 1)
    torch.testing.assert_close(torch.cov(whitened.T, correction=0), torch.eye(6), atol=1e-3, rtol=0)


def test_embeddings_and_scores_equal_their_definition(make_aligned, make_batch):
    model, batch = make_aligned(), make_batch()
    clips, gallery = encoded(model, batch)
    alignment = model.alignment
    patches, features = raw(model, batch["pixel_values"], False)
    torch.testing.assert_close(gallery.embeds, normalize(features - alignment.image_mean, dim=-1))
    images = normalize((patches - alignment.patch_mean) @ alignment.patch_projection, dim=-1)
    assert gallery.patches.dtype == torch.float16
    torch.testing.assert_close(gallery.patches.float(), images, atol=1e-3, rtol=0)
    expected = torch.zeros(5, 5)
    for c, mask in enumerate(batch["frame_mask"]):
        patches, features = raw(model, batch["pixel_values_videos"][c][mask], True)
        frames = normalize(features - alignment.video_mean, dim=-1)
        torch.testing.assert_close(clips.embeds[c], normalize(frames.mean(dim=0), dim=-1))
        shown = normalize((patches - alignment.patch_mean) @ alignment.patch_projection, dim=-1)
        for n, image in enumerate(images):
            cosines = torch.einsum("pr,tqr->ptq", image, shown)
            found = cosines.amax(dim=(1, 2)).mean()
            expected[c, n] = found + cosines.amax(dim=0).mean(dim=1).max()
    torch.testing.assert_close(model.align(clips, gallery), expected, atol=2e-3, rtol=0)
    fused, scores = ranked_scores(model, clips, gallery)
    assert default_ranking(model.config) == "fused" and set(scores) == {"embedding", "alignment", "fused"}
    torch.testing.assert_close(fused, fuse(scores, FusionWeights(alignment_weight=1.0)))


def test_padded_frames_and_other_clips_of_a_batch_change_nothing(make_aligned, make_batch):
    model, batch = make_aligned(), make_batch()
    clips, gallery = encoded(model, batch)
    together = model.align(clips, gallery)
    for c, mask in enumerate(batch["frame_mask"]):
        alone = model.encode_clips(batch["pixel_values_videos"][c : c + 1, mask])
        torch.testing.assert_close(model.align(alone, gallery), together[c : c + 1], atol=1e-3, rtol=0)
    assert torch.equal(clips.patch_mask, batch["frame_mask"][:, :, None].expand(-1, -1, 16))
    joined = RiceClips.cat([clips[:2], model.encode_clips(batch["pixel_values_videos"][2:3, :2])])
    torch.testing.assert_close(model.align(joined, gallery), together[:3], atol=1e-3, rtol=0)


@pytest.mark.parametrize("pooled", [False, True])
def test_masked_patches_count_nowhere(make_aligned, make_batch, pooled):
    settings = {"patch_mask_pooling": True, "vision_pooling": "mean"} if pooled else {}
    model, batch = make_aligned(**settings), make_batch(patch_mask=True)
    clips, gallery = encoded(model, batch)
    expected = batch["patch_mask"] & batch["frame_mask"][:, :, None]
    assert torch.equal(clips.patch_mask, expected)
    scores = model.align(clips, gallery)
    torch.testing.assert_close(scores, align_patches(gallery.patches, clips.patches.float(), expected))
    other = clips[:]
    other.patches = torch.where(expected[..., None], clips.patches, torch.tensor(3.0).half())
    torch.testing.assert_close(model.align(other, gallery), scores)


def test_a_mask_follows_the_grid_of_the_chosen_stage(make_model):
    """A mask of the 4 x 4 patches of a ResNet's last stage hides the 8 x 8 of the one before that lie in them."""
    vision = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    settings = {"vision_config": vision, "vision_pooling": "mean", "patch_mask_pooling": True}
    model = make_model(**SETTINGS | settings)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[0, 0, 1:, :2] = True
    clips = model.encode_clips(torch.randn(1, 1, 3, 32, 32), patch_mask=mask.flatten(2))
    expected = mask.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(clips.patch_mask, expected.flatten(2))


def test_frames_are_shared_between_clips(make_aligned):
    model = make_aligned()
    videos = torch.randn(2, 2, 3, 32, 32)
    videos[1, 0] = videos[0, 1]
    frames = model.encode_frames(torch.cat([videos[0], videos[1, 1:]]))
    clips = model.pool_frames(frames[[0, 1, 1, 2]], torch.ones(2, 2, dtype=torch.bool))
    gallery = model.encode_gallery(torch.randn(3, 3, 32, 32))
    torch.testing.assert_close(model.align(clips, gallery), model.align(model.encode_clips(videos), gallery))


def test_statistics_are_part_of_checkpoint_and_fingerprint(make_aligned, make_batch, tmp_path):
    model, batch = make_aligned(), make_batch()
    model.save_pretrained(tmp_path)
    loaded = RiceModel.from_pretrained(tmp_path)
    assert loaded.fingerprint() == model.fingerprint()
    clips, gallery = encoded(loaded, batch)
    assert torch.equal(loaded.align(clips, gallery), model.align(*encoded(model, batch)))
    for name, buffer in model.alignment.named_buffers():
        before = model.fingerprint()
        buffer.add_(0.1)
        assert model.fingerprint() != before, name
    with pytest.raises(ValueError, match="`clips` was encoded by another model"):
        model.align(clips, gallery)
    assert same_state(loaded.to(torch.bfloat16).fingerprint(), clips.model_fingerprint)


def test_a_copy_in_half_precision_is_near(make_aligned, make_batch):
    model, batch = make_aligned(), make_batch()
    exact = model.align(*encoded(model, batch))
    scores = model.to(torch.bfloat16).align(*encoded(model, batch))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact, atol=0.05, rtol=0)


def test_an_alignment_beside_a_trained_decoder_is_one_more_score(make_aligned, make_batch):
    model, batch = make_aligned(use_decoder=True, fusion_weight=0.5), make_batch()
    clips, gallery = encoded(model, batch)
    fused, scores = ranked_scores(model, clips, gallery)
    assert set(scores) == {"embedding", "matching", "alignment", "fused"}
    torch.testing.assert_close(fused, fuse(scores, FusionWeights(0.5, 1.0)))


def test_training_computes_no_patches_and_has_a_gradient(make_aligned, make_batch):
    model = make_aligned(use_decoder=True, decoder_dropout=0.0).train()
    output = model(**make_batch())
    output.loss.backward()
    assert model.visual_projection.weight.grad.abs().max() > 0
    frames = model.encode_frames(torch.randn(2, 3, 32, 32))
    assert frames.patches is None and not any(b.requires_grad for b in model.alignment.buffers())


def test_maps_are_the_similarities_whose_maxima_form_the_score(make_aligned, make_batch):
    model, batch = make_aligned(), make_batch(patch_mask=True)
    clips, gallery = encoded(model, batch)
    maps = model.alignment_maps(**batch)
    assert maps.shape == (5, 16, 3, 16)
    shown = clips.patch_mask
    assert maps.masked_select(~shown[:, None].expand_as(maps)).eq(-1).all()
    for i in range(5):
        frames = [maps[i, :, t, shown[i, t]].amax(dim=0).mean() for t in range(3) if shown[i, t].any()]
        score = maps[i].amax(dim=(1, 2)).mean() + max(frames)
        torch.testing.assert_close(score, model.align(clips[i], gallery[i])[0, 0], atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"alignment_rank": 0}, "`alignment_rank` must be at least 1, got 0"),
        ({"alignment_strength": 1.5}, "`alignment_strength` must be in 0..1, got 1.5"),
        ({"alignment_shrinkage": -0.1}, "`alignment_shrinkage` must be in 0..1, got -0.1"),
        ({"alignment_weight": -1}, "`alignment_weight` must be 0 or more"),
    ],
)
def test_settings_out_of_their_range_are_refused(make_config, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_config(**settings)


def test_encoders_without_patches_are_refused(make_model, make_aligned, make_batch):
    batch, plain, aligned = make_batch(), make_model(use_decoder=False), make_aligned()
    with pytest.raises(ValueError, match="has no alignment .* rank by `similarity`"):
        plain.align(*encoded(plain, batch))
    with pytest.raises(ValueError, match="hold no patches to align"):
        aligned.align(*encoded(plain, batch))
    with pytest.raises(ValueError, match="no alignment to fit"):
        plain.fit_alignment([batch["pixel_values"]])
    with pytest.raises(ValueError, match="no alignment, so it has no maps"):
        plain.alignment_maps(**batch)
    with pytest.raises(ValueError, match="5 images and 2 clips"):
        aligned.alignment_maps(batch["pixel_values"], batch["pixel_values_videos"][:2])
