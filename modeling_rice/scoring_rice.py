"""From encodings to scores, and from scores to a ranking: each score of a model, their fusion, and the default score.

Scores are a dict from kind to `(num_clips, num_images)`. This module uses no class of RICE: a model is any object with
`similarity` and, if it has these scores, `match`, `align` and `text_similarity`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

KINDS = ("embedding", "matching", "alignment", "fused")
"""Scores that images can be ranked by, in the order of tables."""
PARTS = ("visual", "text")
"""Parts of an embedding score with text; images are not ranked by these alone."""

# Scores besides the embedding's: the method of the model, and the weight in the fused score.
_METHODS = {"matching": "match", "alignment": "align"}
_WEIGHTS = {"matching": "fusion_weight", "alignment": "alignment_weight"}


@dataclass(frozen=True)
class FusionWeights:
    """
    Weights of a model's scores in the fused score, named as in its config. `None` leaves a score out.

    Attributes:
        fusion_weight: Weight of the matching z-score, above 0.
        alignment_weight: Weight of the alignment z-score, 0 or more.
        fused_text_weight: Weight of the cosine between ASR and title, 0 or more. With it, the first term is the
            z-score of the visual cosine alone; with `None` it is that of the embedding score, which may include text.

    Raises:
        ValueError: for a weight out of its range.
    """

    fusion_weight: float | None = None
    alignment_weight: float | None = None
    fused_text_weight: float | None = None

    def __post_init__(self):
        if self.fusion_weight is not None and not 0 < self.fusion_weight < math.inf:
            raise ValueError(f"`fusion_weight` must be a number above 0, got {self.fusion_weight}.")
        for name in ("alignment_weight", "fused_text_weight"):
            weight = getattr(self, name)
            if weight is not None and not 0 <= weight < math.inf:
                raise ValueError(f"`{name}` must be a number of 0 or more, got {weight}.")

    @classmethod
    def of(cls, config: Any) -> "FusionWeights":
        """The weights in a model's config, for the scores that the model has."""
        matching = getattr(config, "fusion_weight", None) if getattr(config, "use_decoder", True) else None
        return cls(matching, getattr(config, "alignment_weight", None), getattr(config, "fused_text_weight", None))

    def rule(self) -> str:
        """The formula of the fused score, for people to read."""
        reads_text = self.fused_text_weight is not None
        terms = ["z(visual)" if reads_text else "z(embedding)"]
        terms += ["weight * z(matching)"] * (self.fusion_weight is not None)
        terms += ["alignment_weight * z(alignment)"] * (self.alignment_weight is not None)
        terms += ["text_weight * text"] * reads_text
        words = (
            "; visual is the embedding score without text, text the cosine of ASR and title, 0 where either is missing"
        )
        return f"{' + '.join(terms)}, per query" + words * reads_text

    def fused_kinds(self, kinds: Iterable[str]) -> list[str]:
        """The `kinds` besides the embedding that have a weight; without any there is no fused score."""
        return [kind for kind in kinds if kind in _WEIGHTS and getattr(self, _WEIGHTS[kind]) is not None]


def z_scores(scores: Tensor) -> Tensor:
    """
    Scores shifted to mean 0 and scaled to standard deviation 1 over the last dimension, the gallery of a clip.

    Args:
        scores (`(..., num_images)`): Any dtype. Scores that are not finite are ignored and become NaN.

    Returns:
        `(..., num_images)` float64. A row without spread becomes zeros, so that the other scores decide a fused
        ranking.
    """
    scores = torch.as_tensor(scores).double()
    if scores.shape[-1] == 0:
        return scores
    finite = scores.isfinite()
    known = scores.masked_fill(~finite, 0.0)
    count = finite.sum(dim=-1, keepdim=True).clamp(min=1)
    centred = (known - known.sum(dim=-1, keepdim=True) / count).masked_fill(~finite, 0.0)
    spread = (centred.square().sum(dim=-1, keepdim=True) / count).sqrt()
    # Equal float32 scores can differ by rounding after the mean is subtracted; such a spread is no order.
    level = known.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    standard = torch.where(spread > 1e-9 * level, centred / spread, 0.0)
    return standard.masked_fill(~finite, math.nan)


def fuse(scores: Mapping[str, Tensor], weights: FusionWeights) -> Tensor:
    """
    `z(embedding) + fusion_weight * z(matching) + alignment_weight * z(alignment)`, with the terms that have a score
    and a weight. If `fused_text_weight` is given and there is a text score, the first term is `z(visual)`, and
    `fused_text_weight * text` is added. The text is not turned into z-scores, because its zeros mean a missing ASR or
    title and must add nothing.

    Args:
        scores: Scores by kind, each `(..., num_images)` over a whole gallery.
        weights: Weights of the fused score.

    Returns:
        `(..., num_images)` float64, NaN where a score is not finite.
    """
    reads_text = weights.fused_text_weight is not None and "text" in scores
    # With two images every z-score is 1 or -1; if the terms cancel, the embedding decides and not the rounding.
    fused = (1 + 1e-9) * z_scores(scores["visual" if reads_text else "embedding"])
    for kind in weights.fused_kinds(scores):
        fused = fused + getattr(weights, _WEIGHTS[kind]) * z_scores(scores[kind])
    return fused + weights.fused_text_weight * torch.as_tensor(scores["text"]).double() if reads_text else fused


def with_fused(scores: Mapping[str, Tensor], weights: FusionWeights) -> dict[str, Tensor]:
    """The scores, and "fused" if there is a score to fuse with the embedding's."""
    return {**scores, "fused": fuse(scores, weights)} if weights.fused_kinds(scores) else dict(scores)


def pair_kinds(model: Any) -> list[str]:
    """The scores that a model has besides the embedding and the fused score, in the order of `KINDS`."""
    config = getattr(model, "config", None)
    has = {
        "matching": getattr(config, "use_decoder", True),
        "alignment": getattr(config, "alignment_weight", None) is not None,
    }
    return [kind for kind, method in _METHODS.items() if has[kind] and hasattr(model, method)]


def model_scores(model: Any, clips: Any, gallery: Any, kinds: Iterable[str] | None = None) -> dict[str, Tensor]:
    """
    Scores of every clip with every image, by kind, each float32 `(num_clips, num_images)`.

    Args:
        model: A model in eval mode.
        clips, gallery: Encoded by this model.
        kinds: Scores to compute besides the embedding's, from `pair_kinds(model)`; all by default.

    Returns:
        "embedding" and the requested kinds. With a score-level text term and texts on both sides also its `PARTS`:
        "visual" and "text" (unweighted, 0 where a text is missing).
    """
    scores = {"embedding": model.similarity(clips, gallery)}
    texts = model.text_similarity(clips, gallery) if hasattr(model, "text_similarity") else None
    if texts is not None:
        scores |= {"visual": model.similarity(clips, gallery, text_weight=0.0), "text": texts}
    for kind in pair_kinds(model) if kinds is None else kinds:
        scores[kind] = getattr(model, _METHODS[kind])(clips, gallery)
    return {kind: values.float() for kind, values in scores.items()}


def default_ranking(config: Any) -> str:
    """
    The score that images are ranked by if no other is requested: `config.ranking`, else the fused score if it has a
    weight, else matching if there is a decoder, else the embedding score.
    """
    ranking = getattr(config, "ranking", None)
    if ranking is not None:
        return ranking
    if FusionWeights.of(config).fused_kinds(_WEIGHTS):
        return "fused"
    return "matching" if getattr(config, "use_decoder", True) else "embedding"


def ranked_scores(
    model: Any, clips: Any, gallery: Any, rank_by: str | None = None, candidates: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    Scores by which images are ranked for each clip, and all scores that were computed for them.

    Args:
        model: A model in eval mode.
        clips, gallery: Encoded by this model.
        rank_by: One of `KINDS`; by default `default_ranking(model.config)`.
        candidates: Number of images per clip, the most similar by embedding, that get other scores than the
            embedding's; the others get minus infinity. Fused scores are relative to these images. `None` scores every
            pair.

    Returns:
        `(num_clips, num_images)`, and the scores by kind, always with "embedding".

    Raises:
        ValueError: for an unknown `rank_by`, or one that the model does not have.
    """
    kind = default_ranking(model.config) if rank_by is None else rank_by
    weights = FusionWeights.of(model.config)
    needed = check_ranking(model, kind, weights)
    if not needed or candidates is None or candidates >= len(gallery):
        scores = with_fused(model_scores(model, clips, gallery, needed), weights)
        return scores[kind], scores
    cosines = model.similarity(clips, gallery)
    result = torch.full(cosines.shape, -math.inf, dtype=torch.float64, device=cosines.device)
    for row, nearest in enumerate(cosines.topk(candidates, dim=1).indices):
        scores = with_fused(model_scores(model, clips[row], gallery[nearest], needed), weights)
        result[row, nearest] = scores[kind][0].to(result)
    return result, {"embedding": cosines}


def check_ranking(model: Any, rank_by: str, weights: FusionWeights) -> list[str]:
    """
    The kinds of `pair_kinds` that a ranking by `rank_by` needs.

    Raises:
        ValueError: for an unknown kind, or one that the model does not have.
    """
    if rank_by not in KINDS:
        raise ValueError(f"`rank_by` must be one of {', '.join(map(repr, KINDS))}, got {rank_by!r}.")
    known = pair_kinds(model)
    if rank_by == "fused":
        needed = weights.fused_kinds(known)
        if not needed:
            raise ValueError(
                "`rank_by='fused'` needs the weight of a second score (`config.fusion_weight` of a matching decoder, "
                "or `config.alignment_weight`), and this model has none; fit one on a validation split, or rank by "
                f"{' or '.join(map(repr, ['embedding', *known]))}."
            )
        return needed
    if rank_by != "embedding" and rank_by not in known:
        what = "matching decoder (`use_decoder=False`)" if rank_by == "matching" else "alignment (`alignment_weight`)"
        raise ValueError(f"This model has no {what}; rank by {' or '.join(map(repr, ['embedding', *known]))} instead.")
    return [] if rank_by == "embedding" else [rank_by]


def check_count(name: str, value: int | None) -> None:
    """Raises `ValueError` unless `value` is an integer of at least 1, or `None` (no limit)."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise ValueError(f"`{name}` must be an integer, got {value!r}.")
    if value is not None and value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


def best_first(scores: Tensor, top_k: int | None = None) -> list[int]:
    """
    Indices of `scores` `(n,)` from best to worst. Equal scores keep their order. Scores that are not finite mark
    images that were not scored; they are left out.

    Raises:
        ValueError: for a `top_k` that is not an integer of at least 1.
    """
    check_count("top_k", top_k)
    order = scores.argsort(descending=True, stable=True)
    return order[scores[order].isfinite()].tolist()[:top_k]
