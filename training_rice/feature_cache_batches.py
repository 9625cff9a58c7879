"""Batches whose pictures come from a feature cache."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_rice.collator import Failure, RiceCollator

from .feature_cache import FeatureCache

Clip = tuple[Tensor, Tensor | None]


@dataclass
class CachedCollator(RiceCollator):
    """
    A [`RiceCollator`] for rows whose `frames` and `image` are row numbers of feature caches. Its batches hold encoded
    pictures instead of pixels: `pixel_values` `(B, F)` and `pixel_values_videos` `(B, T, F)`, from
    `RiceModel.encode_pictures`. The draws of each step (frames, views, ASR noise) are made here.

    Args:
        clips, images: The caches; a training batch uses one random view of each clip and image.
    """

    clips: FeatureCache | None = None
    images: FeatureCache | None = None

    @classmethod
    def of(cls, collator: RiceCollator, clips: FeatureCache, images: FeatureCache, **changes: Any) -> Self:
        """A cached collator with the settings of `collator`, with changes, and the caches of its pictures."""
        settings = {field.name: getattr(collator, field.name) for field in fields(collator)}
        return cls(**{**settings, **changes}, clips=clips, images=images)

    def _load_pair(self, row: dict[str, Any]) -> tuple[dict, Clip, Tensor] | None:
        failures: list[Failure] = []
        views = [_draw_view(cache.num_views) for cache in (self.clips, self.images)]
        clip = self._load_clip(row, failures, views[0])
        image = self._load_image(row["clip_id"], row["image"], failures, views[1])
        self._report(failures)
        return None if clip is None or image is None else (row, clip, image)

    def _load_clip(self, row: dict[str, Any], failures: list[Failure], change: int | None = None) -> Clip | None:
        cached = self.clips.read(change or 0, row["frames"])
        failures += map(dict, cached.failures)
        if len(cached.states) == 0:
            return None
        drops_frames = change is not None and self.augmentation is not None
        chosen = self._choose(len(cached.states), self._max_frames, None, augment=drops_frames)
        return cached.states[chosen], None if cached.patch_mask is None else cached.patch_mask[chosen]

    def _load_image(
        self, row_id: str, entry: int, failures: list[Failure], change: int | None = None
    ) -> Tensor | None:
        cached = self.images.read(change or 0, entry)
        failures += [dict(failure) | {"id": row_id} for failure in cached.failures]
        return cached.states[0] if len(cached.states) else None

    def _process_clips(self, rows: Iterable[dict], clips: Iterable[Clip], padding: str) -> dict[str, Tensor]:
        states, masks = zip(*clips, strict=True)
        lengths = torch.tensor([len(frames) for frames in states])
        longest = self._max_frames if padding == "max_length" else int(lengths.max())
        inputs = {"pixel_values_videos": _pad(states, longest)}
        inputs["frame_mask"] = torch.arange(longest) < lengths[:, None]
        if masks[0] is not None:
            inputs["patch_mask"] = _pad(masks, longest)
        if self.use_text:
            inputs |= self.processor(asr=[row["asr"] for row in rows])
        return inputs

    def _process_images(self, rows: Iterable[dict], images: Iterable[Tensor]) -> dict[str, Tensor]:
        inputs = {"pixel_values": torch.stack(list(images))}
        if self.use_text:
            inputs |= self.processor(titles=[row["title"] for row in rows])
        return inputs


def _draw_view(num_views: int) -> int:
    # Nothing is drawn for a single view, so that the draws of frames are the same as without a cache.
    return int(torch.randint(num_views, ())) if num_views > 1 else 0


def _pad(clips: Iterable[Tensor], length: int) -> Tensor:
    padded = pad_sequence(list(clips), batch_first=True)
    return torch.nn.functional.pad(padded, (0, 0) * (padded.dim() - 2) + (0, length - padded.shape[1]))


def with_numbers(rows: Dataset, images: Iterable[int] | None = None) -> Dataset:
    """Rows with numbers of cached rows instead of media: their own for clips, the given ones for shop images."""
    if "frames" in rows.column_names:
        rows = rows.remove_columns(["frames", "boxes", "box_frames", "video", "start", "end"])
        rows = rows.add_column("frames", list(range(len(rows))))
    if images is not None:
        rows = rows.remove_columns("image").add_column("image", list(images))
    return rows
