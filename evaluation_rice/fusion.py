"""Fusing embedding, matching and text scores: z-scores per query, and weights fitted on a validation split."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

TEXT_WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
FUSED_TEXT_WEIGHTS = (0.0, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 15.0, 20.0, 30.0, 50.0)
"""Of raw cosines beside z-scores: their spread over a gallery is a small part of 1."""
DEFAULT_WEIGHTS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
DEFAULT_WEIGHTS += (7.0, 10.0, 15.0, 20.0, 30.0, 50.0)
"""At both ends one score decides almost alone: at 50 the embedding only orders images that match equally well."""


def edge_words(name: str, weight: float, weights: Sequence[float]) -> str | None:
    """What to tell of a weight at an end of its grid, where the best one may lie beyond; `None` for one inside.

    A weight of 0 is no such end: it leaves a score out.
    """
    low, high = min(weights), max(weights)
    if low < weight < high or weight == 0:
        return None
    end = "lower" if weight <= low else "upper"
    return (
        f"the {name} {weight:g} lies at the {end} end of its grid ({low:g} to {high:g}): a better one may lie beyond"
    )


def z_scores(scores: np.ndarray) -> np.ndarray:
    """Scores of one query over its gallery, shifted to mean 0 and scaled to standard deviation 1.

    A row without spread becomes zeros, so that it leaves a fused ranking to the other score. Images whose score is
    not finite take no part in mean and deviation and stay NaN.

    Args:
        scores: float array of shape `(num_images,)`.
    """
    scores = np.asarray(scores, dtype=np.float64)
    finite = np.isfinite(scores)
    result = np.full(scores.shape, np.nan)
    if not finite.any():
        return result
    known = scores[finite]
    spread = known.std()
    # Equal float32 scores can differ by rounding after the mean is taken away; such a spread carries no order.
    level = max(np.abs(known).max(), np.finfo(np.float64).tiny)
    result[finite] = (known - known.mean()) / spread if spread > 1e-9 * level else 0.0
    return result


def fuse(
    embedding: np.ndarray,
    matching: np.ndarray,
    weight: float,
    text: np.ndarray | None = None,
    text_weight: float = 0.0,
) -> np.ndarray:
    """`z(embedding) + weight * z(matching)` of one query over its gallery, plus `text_weight * text` where given.

    Text is not normalised: its zeros stand for a missing ASR or title and must add nothing. A query without ASR so has
    the fused scores of a model that knows no text.

    Args:
        embedding: float array `(num_images,)`; with `text` the visual score alone, or text would count twice.
        matching: the same of the matching scores.
        weight: of the matching z-score, above 0.
        text: cosines of the query's ASR with the titles, in -1..1, 0 where either is missing.
        text_weight: of `text`, 0 or more.

    Returns:
        float array `(num_images,)`, NaN where a score is not finite.
    """
    fused = z_scores(embedding) + weight * z_scores(matching)
    return fused if text is None else fused + text_weight * np.asarray(text, dtype=np.float64)


def fuse_scores(scores: Mapping[str, np.ndarray], weight: float, text_weight: float | None = None) -> np.ndarray:
    """`fuse` of what a model knows of one query, the one rule of evaluation, training and index.

    Args:
        scores: "embedding" and "matching", and where there is text also "visual" and "text", each `(num_images,)`, as
            `evaluation_rice.retrieval.model_scores` gives them.
        weight: of the matching z-score.
        text_weight: of the text beside z-scores of the visual score. `None` is the rule of checkpoints without this
            weight: z-scores of the embedding score, text included.
    """
    if text_weight is None or "text" not in scores:
        return fuse(scores["embedding"], scores["matching"], weight)
    return fuse(scores["visual"], scores["matching"], weight, scores["text"], text_weight)


def check_text_weight(weight: float) -> float:
    """`weight` as a float; raises `ValueError` unless it is finite and 0 or more."""
    weight = float(weight)
    if not np.isfinite(weight) or weight < 0:
        raise ValueError(f"text weight of the fused score is {weight!r}: it must be a number of 0 or more.")
    return weight


def check_weight(weight: float) -> float:
    """`weight` as a float; raises `ValueError` unless it is finite and above 0."""
    weight = float(weight)
    if not np.isfinite(weight) or weight <= 0:
        raise ValueError(f"fusion weight is {weight!r}: it must be a number above 0.")
    return weight


def first_relevant_rank(scores: np.ndarray, relevant: Sequence[int]) -> np.ndarray:
    """Rank (from 1) of the best relevant image; ties keep the gallery order; 0 where none can be retrieved.

    Args:
        scores: float array `(..., num_images)`; an image with a score that is not finite cannot be retrieved.
        relevant: gallery positions of the relevant images.
    """
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
    embedding_scores: Sequence[np.ndarray],
    matching_scores: Sequence[np.ndarray],
    relevant: Sequence[Sequence[int]],
    weights: Sequence[float] = DEFAULT_WEIGHTS,
) -> tuple[float, list[dict[str, float]]]:
    """The weight with the best R@1 on a validation split; ties: best mean reciprocal rank, then the smallest weight.

    Args:
        embedding_scores: per query a float array `(num_images,)` over its own gallery; galleries may differ in size.
        matching_scores: the same for the matching scores.
        relevant: per query the gallery positions of its relevant images; a query without any counts as a miss.
        weights: the candidates, each above 0.

    Returns:
        the weight, and the validation curve `[{"weight": w, "R@1": ..., "MRR": ...}, ...]` in ascending weight.

    Raises:
        ValueError: no queries, sequences of different lengths, or a weight that is not above 0.
    """
    weights = np.array(sorted({check_weight(weight) for weight in weights}))
    if weights.size == 0:
        raise ValueError("weights is empty: name at least one candidate above 0.")
    if not len(embedding_scores) == len(matching_scores) == len(relevant):
        raise ValueError(
            f"embedding_scores, matching_scores and relevant must have one entry per query each, but have "
            f"{len(embedding_scores)}, {len(matching_scores)} and {len(relevant)}."
        )
    if not len(relevant):
        raise ValueError("there are no validation queries: a fusion weight needs at least one.")
    fused = (
        z_scores(embedding) + weights[:, None] * z_scores(matching)
        for embedding, matching in zip(embedding_scores, matching_scores)
    )
    return _best_weight(weights, fused, relevant)


def fit_text_weight(
    visual_scores: Sequence[np.ndarray],
    text_scores: Sequence[np.ndarray],
    relevant: Sequence[Sequence[int]],
    weights: Sequence[float] = TEXT_WEIGHTS,
) -> tuple[float, list[dict[str, float]]]:
    """The smallest weight w of `visual + w * text` whose R@1 is within a standard error of the best one's.

    So the text gets no more trust than validation shows it to deserve, and misleads less where the ASR is worse than
    there. (The one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984. The error is that
    of the best weight's R@1 as a share of `len(relevant)` queries.)

    Nothing is normalised per query: a query without words keeps its visual ranking, and an image without a title its
    visual score. Visual scores are cosines like those of the text, or with `FUSED_TEXT_WEIGHTS` fused scores (`fuse`),
    whose own weight stays as it is.

    Args:
        visual_scores, text_scores: per query a float array `(num_images,)` over its own gallery.
        relevant: as `fit_fusion_weight`.
        weights: the candidates, 0 or more.

    Returns:
        as `fit_fusion_weight`.

    Raises:
        ValueError: no queries.
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
    """From per query the scores under each ascending weight, `(num_weights, num_images)`."""
    hits, reciprocal = np.zeros(weights.size), np.zeros(weights.size)
    for rows, wanted in zip(scores, relevant):
        rank = first_relevant_rank(rows, wanted)
        hits += rank == 1
        reciprocal += np.where(rank > 0, 1 / np.maximum(rank, 1), 0.0)
    # Sums of reciprocals in another order differ in the last digits, which must not choose the weight.
    best = min(range(weights.size), key=lambda i: (-hits[i], -round(reciprocal[i], 9), weights[i]))
    curve = [
        {"weight": float(w), "R@1": float(h / len(relevant)), "MRR": float(r / len(relevant))}
        for w, h, r in zip(weights, hits, reciprocal)
    ]
    return float(weights[best]), curve
