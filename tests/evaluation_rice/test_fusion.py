import numpy as np
import pytest

from evaluation_rice.fusion import (
    DEFAULT_WEIGHTS,
    FUSED_TEXT_WEIGHTS,
    edge_words,
    first_relevant_rank,
    fit_fusion_weight,
    fit_text_weight,
)
from modeling_rice.scoring_rice import FusionWeights, fuse, z_scores


def test_first_relevant_rank_keeps_gallery_order_among_ties():
    assert first_relevant_rank(np.array([0.5, 0.5, 0.5]), [1]) == 2
    assert first_relevant_rank(np.array([0.5, 0.9, 0.5]), [0, 2]) == 2
    assert first_relevant_rank(np.array([np.nan, 0.1]), [0]) == 0
    assert first_relevant_rank(np.array([1.0, 0.0]), []) == 0


def test_rank_agrees_with_a_stable_sort():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, size=(50, 20)).astype(float)
    relevant = [3, 11]
    for row, rank in zip(scores, first_relevant_rank(scores, relevant)):
        order = np.argsort(-row, kind="stable")
        assert rank == 1 + min(int(np.where(order == i)[0][0]) for i in relevant)


def plain_fit(embedding, matching, relevant, weights):
    best = None
    for weight in sorted(weights):
        fused = [fuse({"embedding": e, "matching": m}, FusionWeights(weight)) for e, m in zip(embedding, matching)]
        ranks = [first_relevant_rank(row, r) for row, r in zip(fused, relevant)]
        key = (sum(rank == 1 for rank in ranks), round(sum(1 / rank for rank in ranks if rank), 9))
        if best is None or key > best[0]:
            best = (key, weight)
    return best[1]


def test_fit_finds_the_weight_of_a_plain_search():
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 12, size=60)
    relevant = [[int(rng.integers(size))] for size in sizes]
    embedding = [rng.normal(size=size) for size in sizes]
    matching = [rng.normal(size=size) for size in sizes]
    for e, m, (r,) in zip(embedding, matching, relevant):
        e[r] += 1
        m[r] += 2
    weights = (0.1, 0.5, 1.0, 2.0, 4.0)
    weight, curve = fit_fusion_weight([z_scores(row) for row in embedding], matching, relevant, weights)
    assert weight == plain_fit(embedding, matching, relevant, weights)
    assert [point["weight"] for point in curve] == list(weights)
    assert max(curve, key=lambda point: point["R@1"])["R@1"] == next(
        point["R@1"] for point in curve if point["weight"] == weight
    )


def test_fit_breaks_ties_by_reciprocal_rank_then_by_the_smaller_weight():
    flat = [np.zeros(3)]
    assert fit_fusion_weight([np.array([1.0, 0.0, 0.5])], flat, [[0]], (2.0, 0.5, 1.0))[0] == 0.5
    # Wrong at rank 1 with any weight, but a large one lifts the relevant image from rank 3 to rank 2.
    embedding, matching = [np.array([3.0, 2.0, 0.0])], [np.array([3.0, 0.0, 2.0])]
    assert fit_fusion_weight(embedding, matching, [[2]], (0.1, 5.0))[0] == 5.0


def test_the_grid_covers_weights_beyond_the_best_for_matching():
    # z-scores of three images, the relevant one first: it wins by matching where that weighs more than 6.
    embedding, matching = np.array([0.0, 1.0, 0.0]), np.array([1.0, 0.9, 0.0])
    weight, curve = fit_fusion_weight([z_scores(embedding)], [matching], [[0]])
    needed = (z_scores(embedding)[1] - z_scores(embedding)[0]) / (z_scores(matching)[0] - z_scores(matching)[1])
    assert 7 < needed < weight == 10.0 and curve[-1]["weight"] == 50.0
    assert edge_words("fusion weight", weight, DEFAULT_WEIGHTS) is None


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (50.0, "the fusion weight 50 lies at the upper end of its grid (0.01 to 50): a better one may lie beyond"),
        (0.01, "the fusion weight 0.01 lies at the lower end of its grid (0.01 to 50): a better one may lie beyond"),
        (70.0, "the fusion weight 70 lies at the upper end of its grid (0.01 to 50): a better one may lie beyond"),
        (30.0, None),
    ],
)
def test_a_weight_at_an_end_of_its_grid_is_reported(weight, words):
    assert edge_words("fusion weight", weight, DEFAULT_WEIGHTS) == words


def test_a_text_weight_of_zero_is_not_an_end_of_the_grid():
    assert edge_words("text weight", 0.0, FUSED_TEXT_WEIGHTS) is None
    assert "upper end" in edge_words("text weight", 50.0, FUSED_TEXT_WEIGHTS)


@pytest.mark.parametrize("weights", [(0.0,), (-1.0,), (float("nan"),), ()])
def test_fit_refuses_weights_that_are_not_positive(weights):
    with pytest.raises(ValueError):
        fit_fusion_weight([np.zeros(2)], [np.zeros(2)], [[0]], weights)


def test_fit_refuses_nothing_and_unequal_lengths():
    with pytest.raises(ValueError, match="no validation queries"):
        fit_fusion_weight([], [], [])
    with pytest.raises(ValueError, match="one entry per query"):
        fit_fusion_weight([np.zeros(2)], [], [[0]])


@pytest.mark.parametrize("known", [0.0, 0.5, 5.0, 50.0])
def test_the_fit_recovers_the_weight_of_the_text(known):
    """Each query's best image is the relevant one at the weight sought, and at those beside it not for all."""
    rng = np.random.default_rng(1)
    fused = [z_scores(rng.normal(size=20)).numpy() for _ in range(400)]
    texts = [np.round(0.2 * rng.normal(size=20), 3) for _ in range(400)]
    relevant = [[int(np.argmax(row + known * text))] for row, text in zip(fused, texts)]
    weight, curve = fit_text_weight(fused, texts, relevant, FUSED_TEXT_WEIGHTS)
    assert weight == known
    assert [point["R@1"] == 1 for point in curve] == [point["weight"] == known for point in curve]
    assert [point["weight"] for point in curve] == list(FUSED_TEXT_WEIGHTS)


@pytest.mark.parametrize(("harmed", "expected"), [(1, 1.0), (12, 2.0)])
def test_the_text_weight_is_the_smallest_within_one_standard_error(harmed, expected):
    """Of 100 queries 50 need weight 1 and `harmed` more need weight 2: at 2 the error of R@1 is about 5 queries."""
    needs = [0.5] * 50 + [1.5] * harmed + [None] * (50 - harmed)
    fused = [np.array([0.0, need or 1.0]) for need in needs]
    texts = [np.array([1.0 if need else -1.0, 0.0]) for need in needs]
    weight, curve = fit_text_weight(fused, texts, [[0]] * 100, (0.0, 1.0, 2.0))
    assert [point["R@1"] for point in curve] == [0.0, 0.5, (50 + harmed) / 100]
    assert weight == expected
