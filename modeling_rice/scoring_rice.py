"""From encodings to scores, and from scores to a ranking: each score of a model, their fusion, and the default.

Scores are a dict from kind to `(num_clips, num_images)`. Nothing here knows a class of RICE: a model is any object
with `similarity`, and `match`, `align` and `text_similarity` where it has such scores.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

KINDS = ("embedding", "matching", "alignment", "fused")
"""What images may be ranked by, in the order of tables."""
PARTS = ("visual", "text")
"""What the embedding score is made of where it holds text; nothing is ranked by these alone."""

# Scores of pairs besides the embedding's: the model's method, and the weight in the fused score.
_METHODS = {"matching": "match", "alignment": "align"}
_WEIGHTS = {"matching": "fusion_weight", "alignment": "alignment_weight"}


@dataclass(frozen=True)
class FusionWeights:
    """
    What the scores of a model count for in the fused score, named as in its config; `None` leaves a score out.

    Attributes:
        fusion_weight: Of the matching z-score, above 0.
        alignment_weight: Of the alignment z-score, 0 or more.
        fused_text_weight: Of the cosine between ASR and title, 0 or more, beside the z-score of the visual cosine
            alone. With `None` that z-score is of the embedding score, which may hold text.

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
        """Those of a model's config, of the scores that it has."""
        matching = getattr(config, "fusion_weight", None) if getattr(config, "use_decoder", True) else None
        return cls(matching, getattr(config, "alignment_weight", None), getattr(config, "fused_text_weight", None))

    def rule(self) -> str:
        """The fused score in words."""
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
        """Those of `kinds` that have a weight beside the embedding's; where there are none, nothing is fused."""
        return [kind for kind in kinds if kind in _WEIGHTS and getattr(self, _WEIGHTS[kind]) is not None]


def z_scores(scores: Tensor) -> Tensor:
    """
    Scores shifted to mean 0 and scaled to standard deviation 1 over the last dimension, the gallery of a clip.

    Args:
        scores (`(..., num_images)`): Of any dtype. Those that are not finite take no part and become NaN.

    Returns:
        `(..., num_images)` float64. A row without spread becomes zeros, so that it leaves a fused ranking to the other
        scores.
    """
    scores = torch.as_tensor(scores).double()
    if scores.shape[-1] == 0:
        return scores
    finite = scores.isfinite()
    known = scores.masked_fill(~finite, 0.0)
    count = finite.sum(dim=-1, keepdim=True).clamp(min=1)
    centred = (known - known.sum(dim=-1, keepdim=True) / count).masked_fill(~finite, 0.0)
    spread = (centred.square().sum(dim=-1, keepdim=True) / count).sqrt()
    # Equal float32 scores can differ by rounding after the mean is taken away; such a spread carries no order.
    level = known.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    standard = torch.where(spread > 1e-9 * level, centred / spread, 0.0)
    return standard.masked_fill(~finite, math.nan)


def fuse(scores: Mapping[str, Tensor], weights: FusionWeights) -> Tensor:
    """
    `z(embedding) + fusion_weight * z(matching) + alignment_weight * z(alignment)`, of the scores that are there and
    have a weight. Where `fused_text_weight` is given and there is text, the first is `z(visual)`, and that weight
    times the text is added as it is: its zeros stand for a missing ASR or title and must add nothing.

    Args:
        scores: By kind, each `(..., num_images)` over a whole gallery.
        weights: Of the fused score.

    Returns:
        `(..., num_images)` float64, NaN where a score is not finite.
    """
    reads_text = weights.fused_text_weight is not None and "text" in scores
    # Of two images every z-score is 1 or -1: where scores cancel, the embedding decides and not the rounding.
    fused = (1 + 1e-9) * z_scores(scores["visual" if reads_text else "embedding"])
    for kind in weights.fused_kinds(scores):
        fused = fused + getattr(weights, _WEIGHTS[kind]) * z_scores(scores[kind])
    return fused + weights.fused_text_weight * torch.as_tensor(scores["text"]).double() if reads_text else fused


def with_fused(scores: Mapping[str, Tensor], weights: FusionWeights) -> dict[str, Tensor]:
    """The scores, and where there is something to fuse with the embedding also "fused"."""
    return {**scores, "fused": fuse(scores, weights)} if weights.fused_kinds(scores) else dict(scores)


def pair_kinds(model: Any) -> list[str]:
    """The scores that a model has besides that of its embeddings and the fused one, in the order of `KINDS`."""
    config = getattr(model, "config", None)
    has = {
        "matching": getattr(config, "use_decoder", True),
        "alignment": getattr(config, "alignment_weight", None) is not None,
    }
    return [kind for kind, method in _METHODS.items() if has[kind] and hasattr(model, method)]


def model_scores(model: Any, clips: Any, gallery: Any, kinds: Iterable[str] | None = None) -> dict[str, Tensor]:
    """
    What a model knows of every clip and image, each float32 `(num_clips, num_images)`.

    Args:
        model: In eval mode.
        clips, gallery: As the model encoded them.
        kinds: Of `pair_kinds(model)`, those to score by besides the embeddings; all by default.

    Returns:
        "embedding"; with a score-level text term and texts on both sides also its `PARTS`, "visual" and "text"
        (without weight, 0 where a text is missing); and the kinds asked for.
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
    The kind of score that images are ranked by unless told otherwise: `config.ranking`, else the fused score where it
    has a weight, else matching where there is a decoder, else the embeddings' score.
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
    Scores by which images are ranked for each clip, and all that were made on the way.

    Args:
        model: In eval mode.
        clips, gallery: As the model encoded them.
        rank_by: One of `KINDS`; by default as `default_ranking(model.config)` says.
        candidates: Score only this many images per clip by more than their embeddings, the most similar ones; the
            others get minus infinity. A fused score is relative to these. `None` scores every pair.

    Returns:
        `(num_clips, num_images)`, and the scores by kind, of which "embedding" is always there.

    Raises:
        ValueError: for another `rank_by`, or one that the model does not have.
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
    The kinds of `pair_kinds` that a ranking needs.

    Raises:
        ValueError: for a kind that there is not, or that the model does not have.
    """
    if rank_by not in KINDS:
        raise ValueError(f"`rank_by` must be one of {', '.join(map(repr, KINDS))}, got {rank_by!r}.")
    known = pair_kinds(model)
    if rank_by == "fused":
        needed = weights.fused_kinds(known)
        if not needed:
            raise ValueError(
                "`rank_by='fused'` needs a score besides the embeddings' and its weight (`config.fusion_weight` of a "
                "matching decoder, `config.alignment_weight`), and this model has none; fit one on a validation "
                f"split, or rank by {' or '.join(map(repr, ['embedding', *known]))}."
            )
        return needed
    if rank_by != "embedding" and rank_by not in known:
        what = "matching decoder (`use_decoder=False`)" if rank_by == "matching" else "alignment (`alignment_weight`)"
        raise ValueError(f"This model has no {what}; rank by {' or '.join(map(repr, ['embedding', *known]))} instead.")
    return [] if rank_by == "embedding" else [rank_by]


def check_count(name: str, value: int | None) -> None:
    """ValueError for a number of things that is no whole number of at least 1; `None` is no limit."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise ValueError(f"`{name}` must be a whole number, got {value!r}.")
    if value is not None and value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


def best_first(scores: Tensor, top_k: int | None = None) -> list[int]:
    """
    Positions in `scores` `(n,)` from best to worst; equal scores keep their order, and what is not finite was not
    scored and is left out.

    Raises:
        ValueError: for a `top_k` that is no whole number of at least 1.
    """
    check_count("top_k", top_k)
    order = scores.argsort(descending=True, stable=True)
    return order[scores[order].isfinite()].tolist()[:top_k]
