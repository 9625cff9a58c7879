"""Z-scores, their sum, the default ranking, and scores to ranked lists."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_rice.scoring_rice import (
    FusionWeights,
    best_first,
    default_ranking,
    fuse,
    model_scores,
    pair_kinds,
    ranked_scores,
    with_fused,
    z_scores,
)

NAN, INF = float("nan"), float("inf")


def plain_z_scores(row: np.ndarray) -> np.ndarray:
    """One row, in the words of the definition."""
    row = np.asarray(row, dtype=np.float64)
    finite = np.isfinite(row)
    result = np.full(row.shape, np.nan)
    if finite.any():
        known = row[finite]
        flat = known.std() <= 1e-9 * max(np.abs(known).max(), np.finfo(np.float64).tiny)
        result[finite] = 0.0 if flat else (known - known.mean()) / known.std()
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_z_scores_equal_a_plain_loop_over_rows(dtype):
    scores = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores[0, 0] = 0.1
    scores[0, 1] = 0.0
    scores[1, 0, 2:5] = torch.tensor([NAN, INF, -INF])
    scores[1, 1] = NAN
    scores[1, 2, 1:] = NAN
    actual = z_scores(scores)
    assert actual.dtype == torch.float64
    expected = [[plain_z_scores(row) for row in block] for block in scores.numpy()]
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-12)
    assert not actual[0, :2].any()


def test_a_spread_from_rounding_counts_as_none():
    row = torch.full((5,), 0.1, dtype=torch.float64)
    row[0] += 1e-17 + 1.4e-17
    assert not z_scores(row).any() and not z_scores(torch.full((7,), 0.3)).any()
    assert z_scores(torch.tensor([1e-30, 2e-30, 6e-30], dtype=torch.float64)).std(correction=0) == pytest.approx(1)


def test_an_empty_gallery_has_no_z_scores():
    assert z_scores(torch.zeros(3, 0)).shape == (3, 0)


VISUAL = torch.tensor([0.1, 0.3, 0.3, 0.1], dtype=torch.float64)
MATCHING = torch.tensor([2.0, 2.0, 4.0, 4.0])
"""Their z-scores are -1, 1, 1, -1 and -1, -1, 1, 1."""
ALIGNMENT = torch.tensor([5.0, 7.0, 5.0, 7.0])
"""-1, 1, -1, 1."""


def assert_scores(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-9)


def test_every_weighted_score_of_the_model_is_added():
    scores = {"embedding": VISUAL, "matching": MATCHING, "alignment": ALIGNMENT}
    assert_scores(fuse(scores, FusionWeights(0.5)), [-1.5, 0.5, 1.5, -0.5])
    assert_scores(fuse(scores, FusionWeights(0.5, 2.0)), [-3.5, 2.5, -0.5, 1.5])
    assert_scores(fuse(scores, FusionWeights(None, 2.0)), [-3, 3, -1, 1])
    assert_scores(fuse({"embedding": VISUAL}, FusionWeights(0.5, 2.0)), [-1, 1, 1, -1])
    assert with_fused(scores, FusionWeights(0.5)).keys() == {*scores, "fused"}
    assert with_fused(scores, FusionWeights()).keys() == scores.keys()
    assert with_fused({"embedding": VISUAL}, FusionWeights(0.5, 2.0)).keys() == {"embedding"}


@pytest.mark.parametrize("cosines", [[0.1, 0.3], [0.3, 0.1]])
def test_the_embedding_decides_if_scores_of_two_images_cancel(cosines):
    scores = {"embedding": torch.tensor(cosines), "alignment": torch.tensor(cosines[::-1]) * 3.7}
    fused = fuse(scores, FusionWeights(alignment_weight=1.0))
    assert fused.argmax() == scores["embedding"].argmax() and fused.abs().max() < 1e-6
    # Also once it is rounded.
    assert fused.float().argmax() == fused.argmax()


def test_text_is_added_unscaled_and_counts_once():
    text = torch.tensor([0.0, 0.0, 0.0, 0.4], dtype=torch.float64)
    scores = {"embedding": VISUAL + 0.5 * text, "visual": VISUAL, "text": text, "matching": MATCHING}
    assert_scores(fuse(scores, FusionWeights(0.5, fused_text_weight=5.0)), [-1.5, 0.5, 1.5, 1.5])
    # Checkpoints without a text weight: text within the embedding's z-score, here that of 0.1, 0.3, 0.3, 0.3.
    root = np.sqrt(3)
    expected = np.array([-root, 1 / root, 1 / root, 1 / root]) + 0.5 * np.array([-1, -1, 1, 1])
    assert_scores(fuse(scores, FusionWeights(0.5)), expected)
    bare = {"embedding": VISUAL, "matching": MATCHING}
    assert torch.equal(fuse(bare, FusionWeights(0.5, fused_text_weight=5.0)), fuse(bare, FusionWeights(0.5)))


def test_without_asr_the_fused_score_is_that_of_no_text():
    generator = torch.Generator().manual_seed(0)
    visual, matching = torch.randn(9, generator=generator), torch.randn(9, generator=generator)
    bare = {"embedding": visual, "matching": matching}
    silent = {**bare, "visual": visual, "text": torch.zeros(9)}
    weights = FusionWeights(0.7, fused_text_weight=30.0)
    assert torch.equal(fuse(silent, weights), fuse(bare, weights))


def test_a_score_that_is_not_finite_is_left_out():
    scores = {"embedding": torch.tensor([0.1, NAN, 0.5, 0.2]), "matching": torch.tensor([1.0, 9.0, 2.0, INF])}
    assert fuse(scores, FusionWeights(1.0)).isfinite().tolist() == [True, False, True, False]
    scores |= {"visual": VISUAL, "text": torch.tensor([0.0, NAN, 0.0, 0.0]), "matching": MATCHING}
    spoken = fuse(scores, FusionWeights(0.5, fused_text_weight=4.0))
    assert spoken.isnan().tolist() == [False, True, False, False]


def test_equal_matching_scores_leave_the_order_to_the_embedding():
    scores = {"embedding": torch.tensor([0.3, 0.9, 0.1]), "matching": torch.full((3,), 7.0)}
    assert best_first(fuse(scores, FusionWeights(5.0))) == [1, 0, 2]


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"fusion_weight": 0.0}, "`fusion_weight` must be a number above 0, got 0.0"),
        ({"fusion_weight": NAN}, "above 0"),
        ({"fusion_weight": INF}, "above 0"),
        ({"alignment_weight": -0.1}, "`alignment_weight` must be a number of 0 or more, got -0.1"),
        ({"fused_text_weight": NAN}, "`fused_text_weight` must be a number of 0 or more"),
    ],
)
def test_weights_out_of_their_range_are_refused(weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        FusionWeights(**weights)


def test_weights_are_those_of_the_scores_that_a_model_has(make_config):
    config = make_config(fusion_weight=0.7, alignment_weight=0, fused_text_weight=3)
    assert FusionWeights.of(config) == FusionWeights(0.7, 0, 3)
    assert FusionWeights.of(make_config(use_decoder=False, fusion_weight=0.7)) == FusionWeights()
    assert FusionWeights.of(SimpleNamespace()) == FusionWeights.of(None) == FusionWeights()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "matching"),
        ({"use_decoder": False}, "embedding"),
        ({"fusion_weight": 0.7}, "fused"),
        ({"use_decoder": False, "fusion_weight": 0.7}, "embedding"),
        ({"use_decoder": False, "alignment_weight": 1.0}, "fused"),
        ({"fusion_weight": 0.7, "ranking": "matching"}, "matching"),
        ({"ranking": "embedding"}, "embedding"),
    ],
)
def test_the_default_ranking_is_that_of_the_config_or_follows_from_the_scores(make_config, settings, expected):
    assert default_ranking(make_config(**settings)) == expected


class Aligned:
    """A model with a third score, which knows only how its scores are called."""

    config = SimpleNamespace(use_decoder=False, alignment_weight=2.0)

    def similarity(self, clips, gallery, text_weight=None):
        return clips @ gallery.T

    def align(self, clips, gallery):
        return -clips @ gallery.T


def test_an_additional_score_is_found_by_its_weight_and_method():
    model, clips, gallery = Aligned(), torch.eye(2), torch.tensor([[1.0, 0.0], [0.5, 0.2], [0.0, 1.0]])
    assert pair_kinds(model) == ["alignment"] and model_scores(model, clips, gallery).keys() == {
        "embedding",
        "alignment",
    }
    # z(alignment) is -z(embedding) here, and counts twice.
    fused, scores = ranked_scores(model, clips, gallery)
    torch.testing.assert_close(fused, -z_scores(clips @ gallery.T))
    assert scores.keys() == {"embedding", "alignment", "fused"}
    assert torch.equal(ranked_scores(model, clips, gallery, "alignment")[0], -clips @ gallery.T)
    with pytest.raises(ValueError, match="no matching decoder.*rank by 'embedding' or 'alignment' instead"):
        ranked_scores(model, clips, gallery, "matching")


@pytest.fixture
def encoded(make_model, make_batch):
    model, batch = make_model(), make_batch(size=5)
    gallery = model.encode_gallery(batch["pixel_values"])
    return model, gallery, model.encode_clips(batch["pixel_values_videos"], batch["frame_mask"])


def test_only_the_most_similar_images_are_matched(encoded):
    model, gallery, clips = encoded
    exact, known = ranked_scores(model, clips, gallery, "matching")
    scores, _ = ranked_scores(model, clips, gallery, "matching", candidates=2)
    kept = known["embedding"].argsort(dim=1, descending=True)[:, :2]
    assert (scores > -INF).sum(dim=1).tolist() == [2] * 5
    torch.testing.assert_close(scores.gather(1, kept).float(), exact.gather(1, kept))
    torch.testing.assert_close(exact, model.match(clips, gallery))
    scores, known = ranked_scores(model, clips, gallery, "embedding", candidates=2)
    assert torch.equal(scores, model.similarity(clips, gallery)) and torch.equal(scores, known["embedding"])


TEXTS = {"text_embed_dim": 6, "text_score_weight": 0.5}


@pytest.mark.parametrize("settings", [{}, TEXTS, TEXTS | {"fused_text_weight": 3.0}])
def test_fused_scores_of_a_model_are_sums_of_its_z_scores(make_model, make_batch, settings):
    model, batch = make_model(fusion_weight=0.7, **settings), make_batch(size=5)
    titles, asr = ({"title_embeds": torch.randn(5, 6)}, {"asr_embeds": torch.randn(5, 6)}) if settings else ({}, {})
    for embeds in asr.values():
        # A clip without ASR.
        embeds[1] = 0
    gallery = model.encode_gallery(batch["pixel_values"], **titles)
    clips = model.encode_clips(batch["pixel_values_videos"], batch["frame_mask"], **asr)
    scores, known = ranked_scores(model, clips, gallery)
    assert len(model_scores(model, clips, gallery)) == len(known) - 1 == (4 if settings else 2)
    text_weight = settings.get("fused_text_weight")
    seen = model.similarity(clips, gallery, text_weight=None if text_weight is None else 0.0)
    expected = z_scores(seen) + 0.7 * z_scores(model.match(clips, gallery))
    if text_weight is not None:
        expected = expected + text_weight * model.text_similarity(clips, gallery)
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
    kept = known["embedding"][0].topk(2).indices
    few, _ = ranked_scores(model, clips, gallery, "fused", candidates=2)
    alone, _ = ranked_scores(model, clips[0], gallery[kept], "fused")
    assert (few[0] > -INF).sum() == 2
    torch.testing.assert_close(few[0, kept], alone[0])
    same, _ = ranked_scores(model, clips, gallery[[0, 0]], "fused")
    assert (same[:, 0] == same[:, 1]).all() and same.isfinite().all()


def test_scores_that_a_model_does_not_have_are_refused(make_model, make_batch, encoded):
    model, gallery, clips = encoded
    with pytest.raises(ValueError, match=r"`config.fusion_weight`.*rank by 'embedding' or 'matching'"):
        ranked_scores(model, clips, gallery, "fused")
    with pytest.raises(ValueError, match="has no alignment"):
        ranked_scores(model, clips, gallery, "alignment")
    with pytest.raises(ValueError, match="`rank_by` must be one of 'embedding', .* got 'colour'"):
        ranked_scores(model, clips, gallery, "colour")
    blind, batch = make_model(use_decoder=False, fusion_weight=0.7), make_batch()
    images, videos = blind.encode_gallery(batch["pixel_values"]), blind.encode_clips(batch["pixel_values_videos"])
    for kind in ("matching", "fused"):
        with pytest.raises(ValueError, match="matching decoder"):
            ranked_scores(blind, videos, images, kind)


def test_best_first_keeps_the_order_of_ties_and_drops_unscored_images():
    scores = torch.tensor([1.0, 3.0, NAN, 1.0, -INF, INF, 2.0])
    assert best_first(scores) == [1, 6, 0, 3] and best_first(scores, 2) == [1, 6]
    with pytest.raises(ValueError, match="`top_k` must be at least 1, got 0"):
        best_first(scores, 0)
