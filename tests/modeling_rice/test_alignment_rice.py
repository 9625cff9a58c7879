"""Cross-view alignment: late interaction equals its definition, and statistics equal those of all patches at once."""

import pytest
import torch
from torch.nn.functional import normalize

from modeling_rice.alignment_rice import PatchStatistics, RiceAlignment, ViewStatistics, align_patches, whitening


def plain_alignment(image_patches, video_patches, video_mask):
    """The definition, one pair at a time."""
    scores = torch.zeros(len(video_patches), len(image_patches))
    for c, (clip, mask) in enumerate(zip(video_patches, video_mask, strict=True)):
        frames = [frame[kept] for frame, kept in zip(clip, mask, strict=True) if kept.any()]
        if not frames:
            continue
        for n, image in enumerate(image_patches):
            image_side = torch.stack([max(p @ q for frame in frames for q in frame) for p in image]).mean()
            frame_side = [torch.stack([(image @ q).max() for q in frame]).mean() for frame in frames]
            scores[c, n] = image_side + torch.stack(frame_side).max()
    return scores


def patches(*shape):
    return normalize(torch.randn(*shape), dim=-1)


@pytest.fixture
def masked_clips():
    """Three clips of four frames: boxes that hide patches, padded frames, a frame without a patch, nothing at all."""
    mask = torch.rand(3, 4, 9) > 0.4
    mask[0, 2:] = False
    mask[1, 1] = False
    mask[2] = False
    return patches(3, 4, 9, 5), mask


@pytest.mark.parametrize("max_memory", [None, 1, 2000])
def test_equals_the_definition(masked_clips, max_memory):
    images, (clips, mask) = patches(7, 6, 5), masked_clips
    expected = plain_alignment(images, clips, mask)
    assert expected[2].eq(0).all() and expected[:2].ne(0).all()
    torch.testing.assert_close(align_patches(images, clips, mask, max_memory), expected, atol=1e-5, rtol=0)


def test_autocast_changes_no_score(masked_clips):
    images, (clips, mask) = patches(7, 6, 5), masked_clips
    expected = align_patches(images, clips, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(align_patches(images, clips, mask), expected)


def test_without_a_mask_every_patch_counts():
    images, clips = patches(4, 6, 5), patches(2, 3, 9, 5)
    expected = plain_alignment(images, clips, torch.ones(2, 3, 9, dtype=torch.bool))
    torch.testing.assert_close(align_patches(images, clips), expected, atol=1e-5, rtol=0)


def test_a_frame_mask_serves_for_all_patches_of_a_frame():
    images, clips = patches(4, 6, 5), patches(2, 3, 9, 5)
    frame_mask = torch.tensor([[True, True, False], [True, False, False]])
    expected = torch.cat([align_patches(images, clips[:1, :2]), align_patches(images, clips[1:, :1])])
    torch.testing.assert_close(align_patches(images, clips, frame_mask[..., None]), expected)


def test_a_pair_worked_out_by_hand():
    """Image patches at 0 and 90 degrees; frames at 0 and 180 degrees, and at 60 and 60."""
    image = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    half, root = 0.5, 3**0.5 / 2
    clip = torch.tensor([[[[1.0, 0.0], [-1.0, 0.0]], [[half, root], [half, root]]]])
    # Image patches find 1 and cos 30; the first frame's find 1 and 0, the second's cos 30 twice.
    assert align_patches(image, clip).item() == pytest.approx((1 + root) / 2 + root)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_best_of_unlike_patches_may_be_below_zero(kind):
    image = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    clip = torch.tensor([[[[-1.0, 0.0], [-0.5, 0.75**0.5]], [[-1.0, 0.0], [-1.0, 0.0]]]])
    # The image's patches find -0.5 at best; the first frame's find -1 and -0.5, the second's -1.
    assert align_patches(image, clip.to(kind)).item() == -0.5 - 0.75


@pytest.mark.parametrize("max_memory", [None, 1, 2000])
def test_one_image_of_many_is_unlike_every_frame(max_memory):
    """Its cosines are all below zero, those of the images before and after it are not."""
    images, clips = patches(40, 6, 5), patches(2, 3, 9, 5).abs()
    images[35] = -images[35].abs()
    expected = plain_alignment(images, clips, torch.ones(2, 3, 9, dtype=torch.bool))
    assert expected[:, 35].lt(0).all() and expected.gt(0).any()
    torch.testing.assert_close(align_patches(images, clips, max_memory=max_memory), expected, atol=1e-5, rtol=0)


def test_a_nan_patch_gives_a_nan_score():
    clip = patches(1, 2, 9, 5)
    clip[0, 0, 0] = float("nan")
    assert align_patches(patches(3, 6, 5), clip).isnan().all()


def test_half_precision_is_near_and_scores_are_float32(masked_clips):
    images, (clips, mask) = patches(7, 6, 5), masked_clips
    expected = align_patches(images, clips, mask)
    for kind in (torch.bfloat16, torch.float16):
        scores = align_patches(images.half(), clips.to(kind), mask)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, expected, atol=0.02, rtol=0)


def test_no_images_and_no_clips_give_empty_scores():
    assert align_patches(patches(0, 6, 5), patches(2, 3, 9, 5)).shape == (2, 0)
    assert align_patches(patches(4, 6, 5), patches(0, 3, 9, 5)).shape == (0, 4)


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="images have width 5 and those of clips 6; encode both with one model"):
        align_patches(patches(4, 6, 5), patches(2, 3, 9, 6))


def test_statistics_in_parts_equal_those_of_all_patches():
    batches = [torch.randn(3, 4, 6) * torch.arange(1, 7) + 100 for _ in range(5)]
    statistics = PatchStatistics(6)
    for batch in batches:
        statistics.update(batch)
    everything = torch.cat(batches).flatten(0, 1).double()
    assert statistics.count == 60
    torch.testing.assert_close(statistics.mean(), everything.mean(dim=0))
    torch.testing.assert_close(statistics.covariance(), torch.cov(everything.T, correction=0))


@pytest.fixture
def covariance():
    """Variances 16, 4 and 1 along axes that are not those of the coordinates."""
    axes = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    return axes @ torch.diag(torch.tensor([16.0, 4.0, 1.0], dtype=torch.float64)) @ axes.T


@pytest.mark.parametrize(
    "strength, shrinkage, expected",
    [
        (0, 0, [16, 4, 1]),
        (1, 0, [1, 1, 1]),
        (0.5, 0, [4, 2, 1]),
        # Half of the mean variance, 7, is added to half of each: 11.5, 5.5 and 4.
        (1, 0.5, [16 / 11.5, 4 / 5.5, 1 / 4]),
    ],
)
def test_whitened_variances(covariance, strength, shrinkage, expected):
    projection = whitening(covariance, 3, strength, shrinkage)
    expected = torch.diag(torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(projection.T @ covariance @ projection, expected, atol=1e-9, rtol=0)


def test_a_lower_rank_keeps_the_axes_of_most_variance(covariance):
    torch.testing.assert_close(whitening(covariance, 2, 0.5, 0.1), whitening(covariance, 3, 0.5, 0.1)[:, :2])


def test_patches_that_never_vary_give_finite_projections():
    assert torch.isfinite(whitening(torch.zeros(4, 4), 4, 1.0, 0.0)).all()


def test_a_new_module_normalises_patches_and_keeps_embeddings():
    alignment = RiceAlignment(patch_width=6, rank=64, embed_width=4)
    x, features = torch.randn(2, 3, 6), torch.randn(2, 4)
    torch.testing.assert_close(alignment.project(x), normalize(x, dim=-1))
    for is_clip in (False, True):
        assert torch.equal(alignment.center(features, is_clip), features)


def view(*pictures):
    """Statistics of pictures of four patches of width 6 and a feature of width 4, which came one by one."""
    statistics = ViewStatistics(6, 4)
    for patches_, features in pictures:
        statistics.update(patches_[None], features[None])
    return statistics


def pictures(count, shift):
    return [(torch.randn(4, 6) * torch.arange(1, 7) + shift, torch.randn(4) + shift) for _ in range(count)]


def fitted(images, frames, strength=1.0):
    alignment = RiceAlignment(patch_width=6, rank=6, embed_width=4)
    return alignment, alignment.fit(view(*images), view(*frames), strength, shrinkage=0.0)


def test_a_fit_centres_each_view_and_whitens_by_the_frames():
    images, frames = pictures(5, shift=10.0), pictures(8, shift=-3.0)
    alignment, said = fitted(images, frames)
    assert said is None
    frame_patches = torch.stack([p for p, _ in frames])
    whitened = (frame_patches - alignment.patch_mean).flatten(0, 1) @ alignment.patch_projection
    torch.testing.assert_close(whitened.mean(dim=0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(whitened.T, correction=0), torch.eye(6), atol=1e-4, rtol=0)
    for is_clip, seen in ((False, images), (True, frames)):
        features = torch.stack([f for _, f in seen])
        torch.testing.assert_close(alignment.center(features, is_clip), features - features.mean(dim=0))


def test_a_fit_may_keep_embeddings_unchanged():
    images, frames = pictures(5, shift=10.0), pictures(8, shift=-3.0)
    alignment, _ = fitted(images, frames)
    before = alignment.video_mean.clone()
    assert alignment.fit(view(), view(*pictures(8, shift=1.0)), 1.0, 0.0, center=False) is None
    assert torch.equal(alignment.video_mean, before) and before.any()


def test_without_frames_patches_are_whitened_by_the_shop_and_nothing_is_centred():
    images = pictures(5, shift=10.0)
    alignment, said = fitted(images, [])
    assert said == "Embeddings are not centred, since this needs at least two pictures and two frames of clips."
    # Five pictures count for 5 of 5 + 8.
    patches_ = torch.cat([p for p, _ in images])
    mean = patches_.mean(dim=0) * 5 / 13
    torch.testing.assert_close(alignment.patch_mean, mean)
    variances = torch.linalg.eigvalsh((patches_ - mean).T @ (patches_ - mean) / len(patches_))
    projected = (patches_ - mean) @ alignment.patch_projection
    left = (projected.T @ projected / len(patches_)).diagonal().sort().values
    torch.testing.assert_close(left, variances ** (1 - 5 / 13), rtol=1e-3, atol=0)
    assert not alignment.image_mean.any() and not alignment.video_mean.any()


def test_one_picture_has_no_statistics():
    alignment, said = fitted(pictures(1, shift=10.0), [])
    assert said.startswith("One picture has no statistics")
    x = torch.randn(3, 4, 6)
    # A rotation: cosines are those of the encoder's own patches.
    ours, own = alignment.project(x).flatten(0, 1), normalize(x, dim=-1).flatten(0, 1)
    torch.testing.assert_close(ours @ ours.T, own @ own.T)
    assert torch.equal(alignment.center(x[..., :4], is_clip=True), x[..., :4])


def test_a_fit_replaces_the_previous_one():
    alignment, _ = fitted(pictures(5, shift=10.0), pictures(5, shift=3.0))
    one = view(*pictures(1, shift=1.0))
    alignment.fit(one, view(), 1.0, 0.0)
    assert not alignment.image_mean.any() and not alignment.patch_mean.any()


def test_no_picture_at_all_is_refused():
    with pytest.raises(ValueError, match="no picture to take statistics from"):
        fitted([], [])


def test_numbers_that_are_not_finite_are_refused():
    broken = pictures(3, shift=1.0)
    broken[1][0][0, 0] = float("nan")
    with pytest.raises(ValueError, match="numbers that are not finite"):
        fitted(broken, pictures(3, shift=1.0))


def test_patches_are_projected_in_single_precision_also_under_autocast():
    module = RiceAlignment(8, 4, 5)
    module.patch_projection.copy_(torch.diag(10.0 ** torch.arange(-3, 5))[:, :4])
    vectors = torch.randn(6, 8)
    expected = module.project(vectors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.project(vectors), expected)


def test_a_fit_that_fails_changes_nothing(monkeypatch):
    module, views = RiceAlignment(4, 4, 3), [ViewStatistics(4, 3) for _ in range(2)]
    for view in views:
        view.update(torch.randn(5, 6, 4), torch.randn(5, 3))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    error = torch.linalg.LinAlgError("The algorithm failed to converge.")
    monkeypatch.setattr(torch.linalg, "eigh", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(torch.linalg.LinAlgError):
        module.fit(*views, strength=1.0, shrinkage=0.1)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_statistics_are_saved_with_the_weights():
    alignment, _ = fitted(pictures(5, shift=10.0), pictures(5, shift=3.0))
    other = RiceAlignment(patch_width=6, rank=6, embed_width=4)
    other.load_state_dict(alignment.state_dict())
    x = torch.randn(2, 4, 6)
    assert torch.equal(other.project(x), alignment.project(x))
