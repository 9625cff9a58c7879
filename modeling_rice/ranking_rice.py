"""Which of a shop's images a clip shows: candidates of any kind to a gallery, and scores to ranked lists."""

import os

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .features_rice import RiceClips, RiceGallery

RANKINGS = ("embedding", "matching", "fused")
_ENCODE_AT_ONCE = 64


def encode_candidates(model, processor, candidates, titles: list[str] | None = None) -> RiceGallery:
    """
    Candidates of a ranking as a gallery.

    Args:
        model, processor: A [`RiceModel`] in eval mode, and the processor that was saved with it.
        candidates: Shop images (PIL, arrays, tensors, paths), a gallery from `encode_gallery`, or the path of one
            that was saved (`.safetensors`).
        titles: One per image, for models that read them; an empty one is a title that is not there.

    Raises:
        ValueError: no candidates, titles that do not fit them, a picture or gallery that cannot be read.
        FileNotFoundError: a file that is missing.
    """
    if hasattr(candidates, "embeds"):
        gallery = candidates
    elif isinstance(candidates, (str, os.PathLike)) and os.fspath(candidates).endswith(".safetensors"):
        gallery = RiceGallery.load(candidates)
    else:
        gallery = None
        candidates = (
            list(candidates) if isinstance(candidates, (list, tuple)) or _is_stack(candidates) else [candidates]
        )
    count = len(candidates if gallery is None else gallery)
    if count == 0:
        raise ValueError("`candidates` is empty; give at least one shop image.")
    # A column of a table counts and slices by its own rules.
    titles = [titles] if isinstance(titles, str) else None if titles is None else list(titles)
    if titles is not None and len(titles) != count:
        raise ValueError(f"`titles` has {len(titles)} entries for {count} candidates; give one per candidate.")
    if gallery is not None:
        return gallery.to(model.device)
    parts = []
    starts = range(0, count, _ENCODE_AT_ONCE)
    for start in tqdm(starts, desc="candidates", unit="batch", disable=len(starts) < 4):
        rows = slice(start, start + _ENCODE_AT_ONCE)
        inputs = processor(images=candidates[rows], titles=None if titles is None else titles[rows])
        parts.append(model.encode_gallery(**inputs.to(model.device)))
    return type(parts[0]).cat(parts)


def _is_stack(candidates) -> bool:
    return getattr(candidates, "ndim", 0) == 4


def pair_scores(
    model, clips: RiceClips, gallery: RiceGallery, rank_by: str, candidates: int | None = None
) -> tuple[Tensor, Tensor]:
    """
    Scores by which images are ranked for each clip, and `model.similarity`, both `(num_clips, num_images)`.

    Args:
        model: A [`RiceModel`] in eval mode.
        rank_by: `"embedding"` (the similarity), `"matching"` (the decoder's score) or `"fused"` (`fused_scores`).
        candidates: With the last two, score only this many images per clip, the most similar ones; the others get
            minus infinity. `None` scores every pair.

    Raises:
        ValueError: for another `rank_by`, matching without a decoder, or fused without a fitted weight.
    """
    if rank_by not in RANKINGS:
        raise ValueError(f"`rank_by` must be one of {', '.join(map(repr, RANKINGS))}, got {rank_by!r}.")
    cosines = model.similarity(clips, gallery)
    if rank_by == "embedding":
        return cosines, cosines
    score = fused_scores if rank_by == "fused" else type(model).match
    if candidates is None or candidates >= len(gallery):
        return score(model, clips, gallery), cosines
    scores = torch.full_like(cosines, float("-inf"))
    for row, nearest in enumerate(cosines.topk(candidates, dim=1).indices):
        scores[row, nearest] = score(model, clips[row], gallery[nearest])[0].to(scores.dtype)
    return scores, cosines


def fused_scores(model, clips: RiceClips, gallery: RiceGallery) -> Tensor:
    """
    `z(embedding) + config.fusion_weight * z(matching)`, `(num_clips, num_images)` float64, each z-score over the
    images of one clip. With `config.fused_text_weight` it is `z(visual)`, the cosine without text, and that weight
    times the cosine of ASR and title is added. The rule of the evaluation's fused score, for finite scores.

    Raises:
        ValueError: a model without decoder or without `config.fusion_weight`.
    """
    weight, text_weight = model.config.fusion_weight, model.config.fused_text_weight
    if weight is None:
        raise ValueError(
            "`config.fusion_weight` is missing, which the fused score needs; rank by 'matching' or 'embedding', or "
            "set it to a weight fitted on a validation split."
        )
    matching = _z_scores(model.match(clips, gallery))
    texts = None if text_weight is None else model.text_similarity(clips, gallery)
    if texts is None:
        return _z_scores(model.similarity(clips, gallery)) + weight * matching
    visual = _z_scores(model.similarity(clips, gallery, text_weight=0.0))
    return visual + weight * matching + text_weight * texts.double()


def _z_scores(scores: Tensor) -> Tensor:
    scores = scores.double()
    spread = scores.std(dim=-1, keepdim=True, correction=0)
    # Equal scores differ by rounding, which is no order.
    level = scores.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    centred = scores - scores.mean(dim=-1, keepdim=True)
    return torch.where(spread > 1e-9 * level, centred / spread, 0.0)


def default_ranking(model) -> str:
    """The score that a model's images are ranked by unless told otherwise: the fused one where it was fitted."""
    if model.decoder is None:
        return "embedding"
    return "matching" if model.config.fusion_weight is None else "fused"


def best_first(scores: Tensor, top_k: int | None = None) -> list[int]:
    """
    Positions in `scores` `(n,)` from best to worst; equal scores keep their order, minus infinity is left out.

    Raises:
        ValueError: for `top_k` below 1.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
    order = scores.argsort(descending=True, stable=True).tolist()
    return [i for i in order if scores[i] > float("-inf")][:top_k]
