"""Fitting the weights of the fused score on a validation split."""

from collections.abc import Iterable, Sequence

import numpy as np

from modeling_rice.scoring_rice import FusionWeights, z_scores

TEXT_WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
EMBEDDING_TEXT = "weight of the text in the embedding score"
"""Name of the weight with the grid `TEXT_WEIGHTS`, for messages."""
FUSED_TEXT_WEIGHTS = (0.0, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 15.0, 20.0, 30.0, 50.0)
"""For raw cosines beside z-scores: the spread of cosines over a gallery is much smaller than 1."""
DEFAULT_WEIGHTS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
DEFAULT_WEIGHTS += (7.0, 10.0, 15.0, 20.0, 30.0, 50.0)
"""At both ends one score decides almost alone: at 50 the embedding only orders images with equal matching."""
ALIGNMENT_WEIGHTS = (0.0, *DEFAULT_WEIGHTS)
"""0 leaves the alignment out of the fused score."""


def edge_words(name: str, weight: float, weights: Sequence[float]) -> str | None:
    """A warning for a weight at an end of its grid, because a better one may lie beyond; `None` for other weights.

    A weight of 0 gives no warning: it leaves a score out.
    """
    low, high = min(weights), max(weights)
    if low < weight < high or weight == 0:
        return None
    end = "lower" if weight <= low else "upper"
    return (
        f"the {name} {weight:g} lies at the {end} end of its grid ({low:g} to {high:g}): a better one may lie beyond"
    )


def first_relevant_rank(scores: np.ndarray, relevant: Sequence[int]) -> np.ndarray:
    """Rank (from 1) of the best relevant image; ties keep the gallery order; 0 if none can be retrieved.

    Args:
        scores: float array `(..., num_images)`; an image with a score that is not finite cannot be retrieved.
        relevant: gallery positions of the relevant images.
    """
    scores = np.asarray(scores)
    scores = np.where(np.isfinite(scores), scores, -np.inf)
    relevant = np.asarray(sorted(relevant), dtype=int)
    if relevant.size == 0:
        return np.zeros(scores.shape[:-1], dtype=int)
    best = relevant[scores[..., relevant].argmax(-1)]
    score = np.take_along_axis(scores, np.asarray(best)[..., None], -1)
    before = np.arange(scores.shape[-1]) < np.asarray(best)[..., None]
    rank = 1 + (scores > score).sum(-1) + ((scores == score) & before).sum(-1)
    return np.where(np.isfinite(score[..., 0]), rank, 0)


def fit_fusion_weight(
    others: Sequence[np.ndarray],
    matching_scores: Sequence[np.ndarray],
    relevant: Sequence[Sequence[int]],
    weights: Sequence[float] = DEFAULT_WEIGHTS,
    name: str = "fusion_weight",
) -> tuple[float, list[dict[str, float]]]:
    """The weight of matching (or alignment) with the best R@1 on a validation split. Ties are broken by the best mean
    reciprocal rank, then by the smallest weight.

    Args:
        others: per query, the score to which the weighted z-score of matching is added: the z-score of the embedding,
            possibly plus other terms (`modeling_rice.scoring_rice.fuse`). A float array `(num_images,)` over the
            query's gallery; galleries may differ in size.
        matching_scores: per query, the model's matching scores in the same form.
        relevant: per query, the gallery positions of its relevant images; a query without any counts as a miss.
        weights: the candidates, above 0 for matching, 0 or more for alignment.
        name: name of the weight in `FusionWeights`, "fusion_weight" or "alignment_weight".

    Returns:
        the weight, and the validation curve `[{"weight": w, "R@1": ..., "MRR": ...}, ...]` in ascending weight.

    Raises:
        ValueError: there are no queries, the sequences differ in length, or a weight is out of range.
    """
    weights = np.array(sorted({getattr(FusionWeights(**{name: float(weight)}), name) for weight in weights}))
    if weights.size == 0:
        raise ValueError("weights is empty: name at least one candidate above 0.")
    if not len(others) == len(matching_scores) == len(relevant):
        raise ValueError(
            f"others, matching_scores and relevant must have one entry per query each, but have {len(others)}, "
            f"{len(matching_scores)} and {len(relevant)}."
        )
    if not len(relevant):
        raise ValueError("there are no validation queries: a fusion weight needs at least one.")
    fused = (
        np.asarray(other) + weights[:, None] * z_scores(matching).numpy()
        for other, matching in zip(others, matching_scores)
    )
    return _best_weight(weights, fused, relevant)


def fit_text_weight(
    visual_scores: Sequence[np.ndarray],
    text_scores: Sequence[np.ndarray],
    relevant: Sequence[Sequence[int]],
    weights: Sequence[float] = TEXT_WEIGHTS,
) -> tuple[float, list[dict[str, float]]]:
    """The smallest weight w of `visual + w * text` whose R@1 is within one standard error of the best.

    A small weight limits the harm on data whose ASR is worse than that of validation. This is the one-standard-error
    rule of Breiman et al., Classification and Regression Trees, 1984. The standard error is that of the best weight's
    R@1 as a share of `len(relevant)` queries. It is that over queries, also with several shops: all weights are
    compared on the same queries, so what makes one shop easier than another is common to all of them.

    Scores are not normalised per query: a query without words keeps its visual ranking, and an image without a title
    keeps its visual score. Visual scores are cosines, as those of the text, or fused scores with
    `FUSED_TEXT_WEIGHTS`; the other weights of fused scores do not change.

    Args:
        visual_scores, text_scores: per query, a float array `(num_images,)` over its gallery.
        relevant: as `fit_fusion_weight`.
        weights: the candidates, 0 or more.

    Returns:
        as `fit_fusion_weight`.

    Raises:
        ValueError: there are no queries.
    """
    weights = np.array(sorted(set(weights)))
    if not len(relevant):
        raise ValueError("there are no validation queries: a text weight needs at least one.")
    summed = (
        np.asarray(visual, dtype=np.float64) + weights[:, None] * np.asarray(text, dtype=np.float64)
        for visual, text in zip(visual_scores, text_scores)
    )
    _, curve = _best_weight(weights, summed, relevant)
    best_recall = max(point["R@1"] for point in curve)
    standard_error = (best_recall * (1 - best_recall) / len(relevant)) ** 0.5
    return next(point["weight"] for point in curve if point["R@1"] >= best_recall - standard_error), curve


def _best_weight(
    weights: np.ndarray, scores: Iterable[np.ndarray], relevant: Sequence[Sequence[int]]
) -> tuple[float, list[dict[str, float]]]:
    """The best weight and the curve; `scores` per query are `(num_weights, num_images)`, weights ascending."""
    hits, reciprocal = np.zeros(weights.size), np.zeros(weights.size)
    for rows, wanted in zip(scores, relevant):
        rank = first_relevant_rank(rows, wanted)
        hits += rank == 1
        reciprocal += np.where(rank > 0, 1 / np.maximum(rank, 1), 0.0)
    # The sum of reciprocals depends on their order in the last digits, which must not decide the weight.
    best = min(range(weights.size), key=lambda i: (-hits[i], -round(reciprocal[i], 9), weights[i]))
    curve = [
        {"weight": float(w), "R@1": float(h / len(relevant)), "MRR": float(r / len(relevant))}
        for w, h, r in zip(weights, hits, reciprocal)
    ]
    return float(weights[best]), curve
