"""Compares encoded clips with encoded images: every score of a model, and a ranking in one call."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .alignment_rice import align_patches
from .features_rice import RiceClips, RiceGallery
from .fingerprint_rice import require_encodings
from .loss_rice import cosines
from .scoring_rice import best_first, ranked_scores

_ENCODE_AT_ONCE = 64


class RiceComparison:
    """The methods of [`RiceModel`] that compare encodings."""

    # Attributes of the model.
    config: Any
    alignment: Any
    decoder: Any
    device: Any
    visual_projection: Any
    encode_clips: Any
    refuse_foreign: Any
    require_eval_mode: Any

    def similarity(self, clips: RiceClips, gallery: RiceGallery, text_weight: float | None = None) -> Tensor:
        """
        Cosine of every clip with every image, `(num_clips, num_images)`, in -1..1. If there is a `text_similarity`,
        `text_weight` times it is added.

        Args:
            clips, gallery: From `encode_clips` and `encode_gallery` of this model.
            text_weight: By default `config.text_score_weight`.

        Raises:
            ValueError: for features that another model encoded, or of another kind.
        """
        self.refuse_foreign(clips=clips, gallery=gallery)
        scores = self._cosines(clips.embeds, gallery.embeds)
        texts = self.text_similarity(clips, gallery)
        weight = self.config.text_score_weight if text_weight is None else text_weight
        return scores if texts is None or not weight else scores + weight * texts

    def text_similarity(self, clips: RiceClips, gallery: RiceGallery) -> Tensor | None:
        """
        Cosine of every clip's ASR with every title, `(num_clips, num_images)`, 0 where either is missing. `None` if
        the model has no score-level text term, or if clips or gallery were encoded without text.

        Raises:
            ValueError: for arguments that are not such encodings.
        """
        require_encodings(clips=clips, gallery=gallery)
        if clips.text_embeds is None or gallery.text_embeds is None:
            return None
        return self._cosines(clips.text_embeds, gallery.text_embeds)

    def _cosines(self, clips: Tensor, images: Tensor) -> Tensor:
        """Cosines `(c, n)` float32 of embeddings `(c, D)` and `(n, D)`, on the model's device."""
        if clips.shape[-1] != images.shape[-1]:
            raise ValueError(
                f"The embeddings of clips have width {clips.shape[-1]} and those of images {images.shape[-1]}; encode "
                f"both with one model."
            )
        return cosines(clips.to(self.device, torch.float32), images.to(self.device, torch.float32))

    @torch.no_grad()
    def match(self, clips: RiceClips, gallery: RiceGallery, max_memory: int = 512 * 2**20) -> Tensor:
        """
        Decoder score of every clip with every image. It costs one query row per pair against the clip's cached keys
        and values, and is exact. Call in eval mode.

        Args:
            clips, gallery: From `encode_clips` and `encode_gallery` of this model.
            max_memory: Bytes for intermediate results; larger requests are computed in chunks.

        Returns:
            `(num_clips, num_images)` float32, the raw output of the head without temperature.

        Raises:
            ValueError: if this model, or the model that encoded the features, has no decoder; for features that
                another model encoded; in training mode if that changes scores.
        """
        if self.decoder is None:
            raise ValueError("This model has no matching decoder (`use_decoder=False`); rank by `similarity` instead.")
        self.require_eval_mode("match")
        require_encodings(clips=clips, gallery=gallery)
        if gallery.states is None or clips.keys is None or clips.values is None or clips.mask is None:
            raise ValueError("The features come from a model without a matching decoder; encode them with this one.")
        self.refuse_foreign(clips=clips, gallery=gallery)
        device, dtype = self.device, self.visual_projection.weight.dtype
        clips_at_once, images_at_once = self._match_chunks(clips.keys.shape[1], len(clips), len(gallery), max_memory)
        scores = torch.empty(len(clips), len(gallery), device=device)
        for first in range(0, len(clips), clips_at_once):
            rows = slice(first, first + clips_at_once)
            keys, values = clips.keys[rows].to(device, dtype), clips.values[rows].to(device, dtype)
            mask = clips.mask[rows].to(device)
            for start in range(0, len(gallery), images_at_once):
                columns = slice(start, start + images_at_once)
                states = gallery.states[columns].to(device, dtype)
                scores[rows, columns] = self.decoder.score_pairs(states, keys, values, mask).float()
        return scores

    @torch.no_grad()
    def align(self, clips: RiceClips, gallery: RiceGallery, max_memory: int | None = None) -> Tensor:
        """
        Late interaction (MaxSim) of every clip with every image, in both directions; see
        [`alignment_rice.align_patches`]. Padded frames and masked patches are ignored.

        Args:
            clips, gallery: From `encode_clips` and `encode_gallery` of this model.
            max_memory: Bytes for the cosines held at a time; by default what suits the device.

        Returns:
            `(num_clips, num_images)` float32 in -2..2.

        Raises:
            ValueError: if the model has no alignment; for features without patches or of another model.
        """
        if self.alignment is None:
            raise ValueError(
                "This model has no alignment (`alignment_weight`); make one with `rice init`, or rank by `similarity` "
                "instead."
            )
        require_encodings(clips=clips, gallery=gallery)
        if gallery.patches is None or clips.patches is None:
            raise ValueError(
                "The features hold no patches to align, since they come from a model without alignment or in training "
                "mode; encode them with this model after `model.eval()`."
            )
        self.refuse_foreign(clips=clips, gallery=gallery)
        patches = clips.patches.to(self.device, self.visual_projection.weight.dtype)
        mask = None if clips.patch_mask is None else clips.patch_mask.to(self.device)
        return align_patches(gallery.patches.to(self.device), patches, mask, max_memory)

    def rank(
        self,
        clip,
        images,
        top_k: int | None = None,
        *,
        processor,
        titles: list[str] | None = None,
        asr: str | None = None,
        rank_by: str | None = None,
    ) -> list[dict]:
        """
        Ranks images for one clip and scores every pair. Call in eval mode.

        Args:
            clip: One clip, as `processor` takes it: a list of frames, an array or tensor, the path of a video, a row.
            images: Shop images, an encoded gallery, or the path of a saved one.
            top_k: Maximum number of entries to return; all by default.
            processor: The [`RiceProcessor`] that was saved with this model.
            titles, asr: A title per image and the clip's ASR, for models that read them.
            rank_by: `"embedding"`, `"matching"`, `"alignment"` or `"fused"`, as far as the model has them; by default
                `config.ranking` (see [`RiceConfig`]).

        Returns:
            `{"corpus_id": index, "score": score}` from best to worst, as `CrossEncoder.rank` of sentence-transformers.

        Raises:
            ValueError: as `match`; for a score that the model does not have; for inputs that `processor` refuses.
        """
        if titles is not None and _read_gallery(images) is not None:
            raise ValueError(
                "`titles` belong to shop images, and a gallery was given, which has its own; leave them out."
            )
        gallery = encode_candidates(self, processor, images, titles)
        clips = self.encode_clips(**processor(videos=[clip], asr=None if asr is None else [asr]))
        scores, _ = ranked_scores(self, clips, gallery, rank_by)
        return [{"corpus_id": i, "score": scores[0, i].item()} for i in best_first(scores[0], top_k)]

    def _match_chunks(self, num_tokens: int, num_clips: int, num_images: int, max_memory: int) -> tuple[int, int]:
        width, heads = self.config.decoder_hidden_size, self.config.decoder_num_heads
        hidden = self.config.decoder_intermediate_size or 4 * width
        bytes_per_pair = 4 * (2 * hidden + 5 * width + 2 * heads * num_tokens)
        bytes_per_clip = 4 * 4 * num_tokens * width
        images = max(1, min(num_images, max_memory // (2 * bytes_per_pair)))
        clips = max(1, min(num_clips, max_memory // (images * bytes_per_pair + bytes_per_clip)))
        return clips, images


def encode_candidates(model, processor, candidates, titles: list[str] | None = None) -> RiceGallery:
    """
    Encodes the candidates of a ranking as a gallery.

    Args:
        model, processor: A [`RiceModel`] in eval mode, and the processor that was saved with it.
        candidates: Shop images (PIL, arrays, tensors, paths), a gallery from `encode_gallery`, or the path of a saved
            gallery (`.safetensors`).
        titles: One per image, for models that read them; an empty string means no title.

    Raises:
        ValueError: no candidates, another number of titles than candidates, an image or gallery that cannot be read.
        FileNotFoundError: a missing file.
    """
    gallery = _read_gallery(candidates)
    if gallery is None:
        candidates = list_candidates(candidates)
    count = len(candidates if gallery is None else gallery)
    if count == 0:
        raise ValueError("`candidates` is empty; give at least one shop image.")
    # A column of a table has its own length and slicing rules.
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


def _read_gallery(candidates) -> RiceGallery | None:
    """The gallery that was given, or that of a path; `None` for images."""
    if hasattr(candidates, "embeds"):
        return candidates
    is_path = isinstance(candidates, (str, os.PathLike)) and os.fspath(candidates).endswith(".safetensors")
    return RiceGallery.load(candidates) if is_path else None


def list_candidates(candidates) -> list:
    """
    One or several shop images, in any accepted form, as a list.

    Raises:
        ValueError: for a set, which has no order, and for the path of a folder.
    """
    if isinstance(candidates, (set, frozenset)):
        raise ValueError("`candidates` is a set, which has no order; give a list.")
    if isinstance(candidates, (str, os.PathLike)) and os.path.isdir(candidates):
        raise ValueError(f"`candidates` is the folder {os.fspath(candidates)}; give a list of its images.")
    is_picture = isinstance(candidates, (str, os.PathLike, bytes, bytearray, Mapping))
    # An array of numbers is one image, or several if it has one more axis; other arrays are columns of a table.
    is_picture = is_picture or getattr(candidates, "ndim", 1) in (2, 3) or not hasattr(candidates, "__iter__")
    return [candidates] if is_picture else list(candidates)
