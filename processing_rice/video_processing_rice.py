"""Turns a clip's frames, or a video file, into the inputs of RICE: sampled frames, frame mask, patch mask."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import get_size_dict
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor

from .image_processing_rice import RicePillowImageProcessor, check_picture_settings, type_sentence
from .media_rice import is_picture_entry, picture_tensor
from .sampling_rice import SAMPLING_MODES, sample_frame_indices
from .video_media_rice import sample_video

Frame = Any  # what `media_rice.picture_tensor` takes
Box = Sequence[float] | Sequence[Sequence[float]] | None


_PILLOW = RicePillowImageProcessor()
_CHOICES = {
    "padding": ("longest", "max_length", True, False),
    "resize_backend": ("torchvision", "pillow"),
    "frames_without_box": ("keep", "drop"),
    "sampling": tuple(SAMPLING_MODES),
}

# Boxes of annotators and detectors overshoot the frame slightly; beyond this they are in another unit.
_BOX_OVERSHOOT = 0.05


def boxes_to_patch_mask(
    boxes: Sequence[Sequence[float]] | np.ndarray | torch.Tensor,
    image_size: int | tuple[int, int] = 224,
    patch_size: int = 32,
    iou_threshold: float = 0.02,
) -> torch.Tensor:
    """
    Patches that show the intended product (IPD, paper section 4.4): those whose IoU with a box reaches the threshold.

    As in the official code, the IoU counts both end pixels of an interval, boxes are not clipped to the image, and a
    frame in which no patch reaches the threshold keeps all patches.

    Args:
        boxes (`(n, 4)`): Left, top, right, bottom in pixels of the resized image; an empty list keeps all patches.
        image_size: Side of the square image, or its height and width, in pixels.
        patch_size: Side of a patch in pixels.
        iou_threshold: Minimum IoU of a kept patch, 0..1.

    Returns:
        `(P,)` bool, row-major, `True` = keep; P = (height // patch_size) * (width // patch_size).

    Raises:
        ValueError: for boxes that are not `(n, 4)` or not finite, and for patches that do not fit into the image.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    rows, columns = _patch_grid(height, width, patch_size)
    try:
        boxes = torch.as_tensor(np.asarray(boxes, dtype=np.float64))
    except (TypeError, ValueError):
        raise ValueError(f"`boxes` must be (n, 4) numbers, left-top-right-bottom, got {boxes!r}.") from None
    if boxes.numel() == 0:
        return torch.ones(rows * columns, dtype=torch.bool)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"`boxes` must be (n, 4) left-top-right-bottom, got shape {tuple(boxes.shape)}.")
    if not boxes.isfinite().all():
        raise ValueError(f"`boxes` must be finite, got {boxes.tolist()}.")
    starts = (patch_size * torch.arange(count, dtype=torch.float64) for count in (rows, columns))
    top, left = (grid.flatten() for grid in torch.meshgrid(*starts, indexing="ij"))
    cells = torch.stack([left, top, left + patch_size, top + patch_size], dim=1)

    corner_min = torch.maximum(cells[:, None, :2], boxes[None, :, :2])
    corner_max = torch.minimum(cells[:, None, 2:], boxes[None, :, 2:])
    intersection = (corner_max - corner_min + 1).clamp(min=0).prod(dim=-1)
    cell_area, box_area = ((b[:, 2:] - b[:, :2] + 1).prod(dim=-1) for b in (cells, boxes))
    iou = intersection / (cell_area[:, None] + box_area[None] - intersection)
    keep = (iou >= iou_threshold).any(dim=1)
    return keep if keep.any() else torch.ones_like(keep)


def _patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches. Raises `ValueError` if there are none."""
    if not 1 <= patch_size <= min(height, width):
        raise ValueError(
            f"`patch_size` must be at least 1 and fit into the image of {height} x {width} pixels, got {patch_size}."
        )
    return height // patch_size, width // patch_size


def _check_boxes(boxes: Box, clip: int, frame: int) -> np.ndarray | None:
    """The boxes of a frame as `(n, 4)` in 0..1, or `None`. Raises `ValueError` with the clip and the frame."""
    if boxes is None or (hasattr(boxes, "__len__") and not isinstance(boxes, Mapping) and len(boxes) == 0):
        return None
    try:
        values = np.asarray(boxes, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    values = values[None] if values.ndim == 1 else values
    where = f"Clip {clip}, frame {frame}: the box {boxes!r}"
    if values.ndim != 2 or values.shape[1] != 4 or not np.isfinite(values).all():
        raise ValueError(f"{where} is not left-top-right-bottom in finite numbers; give `None` for no box.")
    if values.min() < -_BOX_OVERSHOOT or values.max() > 1 + _BOX_OVERSHOOT:
        raise ValueError(f"{where} is not in 0..1 of the frame; divide pixels by the frame's width and height.")
    values = values.clip(0, 1)
    if (values[:, 2:] <= values[:, :2]).any():
        raise ValueError(f"{where} has no area in the frame; give `None` for no box.")
    return values


def _count(boxes: Any, name: str) -> int:
    """Number of entries of a list or an array of boxes. Raises `ValueError` for anything else."""
    if isinstance(boxes, (str, bytes, Mapping)) or not hasattr(boxes, "__len__") or not hasattr(boxes, "__getitem__"):
        raise ValueError(f"{name} is a {type(boxes).__name__}; give a list with the boxes of each frame.")
    return len(boxes)


def frames_with_box(boxes: Sequence) -> list[int]:
    """Indices of the frames of a clip that have a box (not `None`); all indices if no frame has one."""
    return [i for i, box in enumerate(boxes) if box is not None] or list(range(len(boxes)))


class RiceVideosKwargs(VideosKwargs, total=False):
    """
    Settings for clips. The settings `fps`, `video_metadata`, `return_metadata` and `do_pad` of transformers are
    refused, since clips are sampled by number of frames.

    boxes: Per clip and per listed frame: `None`, one box or several, left-top-right-bottom in 0..1 of the frame. Boxes
        that overshoot the frame by up to 0.05 are clipped. Boxes further outside, without area or not finite are
        refused.
    sampling: `"eval"`, `"train"` or one of the other modes of [`sample_frame_indices`].
    padding: `"longest"` pads clips to the longest of the batch, `"max_length"` to `num_frames`.
    patch_size: Side of the encoder's patches in pixels, for the patch mask.
    box_iou_threshold: See [`boxes_to_patch_mask`].
    frames_without_box: For frames without a box in a clip with boxes: `"keep"` keeps all their patches, as published;
        `"drop"` leaves the frames out, since they do not show the product. A clip without any box keeps its frames.
    resize_backend: `"torchvision"` or `"pillow"`, see [`RiceVideoProcessor`].
    """

    boxes: list | None
    sampling: str | None
    padding: str | bool | None
    patch_size: int | None
    box_iou_threshold: float | int | None
    frames_without_box: str | None
    resize_backend: str | None


class RiceVideoProcessor(BaseVideoProcessor):
    """
    Samples, resizes, normalises and pads the frames of clips. By default `size` is a square, to which frames are
    stretched; `{"shortest_edge": n}` keeps the aspect ratio. With `do_center_crop` the central `crop_size` of the
    resized frame is used.

    A clip is one of the following:

    - a list of frames (PIL images, arrays, tensors, paths; sizes may differ);
    - a `(T, H, W, 3)` or `(T, 3, H, W)` array or tensor;
    - the path of a video file, or `{"path", "start", "end"}` with times in seconds;
    - a row of a data set with `frames`, or with `video`, `start` and `end`.

    A list of paths is a list of videos; for a clip whose frames are paths, give a list that contains the list of
    paths. Arrays and tensors are uint8, or floats in 0..1. Frames are sampled before they are decoded.

    `resize_backend` is `"torchvision"`, which resizes a batch at once, or `"pillow"`, which resizes one uint8 frame at
    a time, as the official code did. The two differ by at most one grey level of 255.
    """

    resample = PILImageResampling.BICUBIC
    size = {"height": 224, "width": 224}
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_resize = True
    do_center_crop = False
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = True
    num_frames = 10
    sampling = "eval"
    padding = "longest"
    patch_size = 32
    box_iou_threshold = 0.02
    frames_without_box = "keep"
    resize_backend = "torchvision"
    boxes = None
    valid_kwargs = RiceVideosKwargs
    model_input_names = ["pixel_values_videos", "frame_mask", "patch_mask"]

    def preprocess(self, videos, boxes: list[list[Box]] | None = None, **kwargs) -> BatchFeature:
        """
        Args:
            videos: One clip or a list of clips, see the class.
            boxes: See [`RiceVideosKwargs`]; one list per clip with one entry per frame, before sampling.
            kwargs: Any attribute of this processor, for this call only, and `return_tensors`.

        Returns:
            `pixel_values_videos` `(B, T, 3, H, W)`, zero at padded frames, uint8 if uint8 frames are neither rescaled
            nor normalised; `frame_mask` `(B, T)` bool, `True` = real frame; with boxes also `patch_mask` `(B, T, P)`
            bool, `True` = keep.

        Raises:
            ValueError: for an unknown or unsupported setting, a clip without frames, invalid boxes, or an unreadable
                frame; the message names it.
            FileNotFoundError: for a missing file.
        """
        settings = self._settings(kwargs)
        clips = make_clips(videos)
        if boxes is not None and _count(boxes, "`boxes`") != len(clips):
            raise ValueError(f"`boxes` has {len(boxes)} entries for {len(clips)} clips; give one per clip.")
        by_clip = [None] * len(clips) if boxes is None else boxes
        loaded = [self._load_clip(i, *each, settings) for i, each in enumerate(zip(clips, by_clip, strict=True))]
        counts = [len(frames) for frames, _ in loaded]
        length = max(counts)
        if settings["padding"] is False and min(counts) < length:
            raise ValueError(
                f"`padding=False` needs clips of equal length, got {min(counts)} to {length} frames; give another "
                f"`padding`."
            )
        if settings["padding"] == "max_length":
            length = max(length, settings["num_frames"])
        real, resized = self._to_pixels([frame for frames, _ in loaded for frame in frames], settings)
        frame_mask = torch.zeros(len(clips), length, dtype=torch.bool)
        for row, count in enumerate(counts):
            frame_mask[row, :count] = True
        pixels = real.new_zeros(len(clips), length, *real.shape[1:])
        pixels[frame_mask.nonzero(as_tuple=True)] = real
        data = {"pixel_values_videos": pixels, "frame_mask": frame_mask}
        if boxes is not None:
            kept = [box for frames, listed in loaded for box in listed or [None] * len(frames)]
            masks = [self._patch_mask(*each, real.shape[-2:], settings) for each in zip(kept, resized, strict=True)]
            data["patch_mask"] = torch.ones(len(clips), length, len(masks[0]), dtype=torch.bool)
            data["patch_mask"][frame_mask] = torch.stack(masks)
        data = {name: values.to(settings["device"]) for name, values in data.items()}
        return BatchFeature(data, tensor_type=settings["return_tensors"])

    def check_settings(self) -> None:
        """Raises `ValueError` for an attribute that no clip could be processed with."""
        self._settings({})

    def _settings(self, kwargs: dict) -> dict:
        names = (*self.valid_kwargs.__annotations__, *VideosKwargs.__annotations__)
        unknown = [name for name in kwargs if name not in names]
        if unknown:
            raise ValueError(f"Unknown argument {unknown[0]!r} for {type(self).__name__}; see its attributes.")
        try:
            validate_typed_dict(self.valid_kwargs, kwargs)
        except StrictDataclassError as error:
            raise ValueError(type_sentence(error)) from None
        settings = {name: getattr(self, name, None) for name in names} | {
            name: value for name, value in kwargs.items() if value is not None
        }
        check_picture_settings(settings, {"pillow": "pil"}.get(settings["resize_backend"], "torchvision"))
        for name in ("fps", "video_metadata", "return_metadata", "do_pad"):
            if settings[name] or (name == "fps" and settings[name] is not None):
                raise ValueError(f"`{name}` is not supported, since clips are sampled by `num_frames`; leave it out.")
        for name, choices in _CHOICES.items():
            if settings[name] not in choices:
                listed = " or ".join(repr(choice) for choice in choices if isinstance(choice, str)).replace("'", '"')
                raise ValueError(f"`{name}` must be {listed}, got {settings[name]!r}.")
        if not 0 <= settings["box_iou_threshold"] <= 1:
            raise ValueError(f"`box_iou_threshold` must be in 0..1, got {settings['box_iou_threshold']}.")
        if settings["patch_size"] < 1:
            raise ValueError(f"`patch_size` must be at least 1 pixel, got {settings['patch_size']}.")
        if settings["num_frames"] < 1:
            raise ValueError(f"`num_frames` must be at least 1, got {settings['num_frames']}.")
        settings["size"] = _size_of("size", settings["size"], settings["default_to_square"])
        if settings["do_center_crop"]:
            settings["crop_size"] = _size_of("crop_size", settings["crop_size"], True)
        return settings

    def _load_clip(self, index: int, clip, boxes: Sequence[Box] | None, settings: dict) -> tuple[list, list | None]:
        # Frames that were sampled before are not dropped at random again.
        max_frames, sampling = (settings["num_frames"], settings["sampling"])
        if not settings["do_sample_frames"]:
            max_frames, sampling = None, "eval"
        clip = _clip_of(clip)
        if isinstance(clip, (str, os.PathLike, Mapping)):
            if boxes is not None:
                raise ValueError(f"Clip {index} is a video file; boxes need a list of frames, so give its frames.")
            return [picture_tensor(frame) for frame in sample_video(clip, max_frames, sampling).values()], None
        if isinstance(clip, (bytes, bytearray, set, frozenset)) or not hasattr(clip, "__getitem__"):
            raise ValueError(f"Clip {index} is a {type(clip).__name__}; give a list of frames or the path of a video.")
        if len(clip) == 0:
            raise ValueError(f"Clip {index} has no frames; give at least one.")
        if boxes is not None and _count(boxes, f"The entry of clip {index} in `boxes`") != len(clip):
            raise ValueError(
                f"Clip {index} has {len(clip)} frames but {len(boxes)} entries in `boxes`; give one per frame."
            )
        chosen = sample_frame_indices(len(clip), max_frames or len(clip), sampling)
        kept = None if boxes is None else [_check_boxes(boxes[i], index, i) for i in chosen]
        if settings["frames_without_box"] == "drop" and kept:
            shown = frames_with_box(kept)
            chosen, kept = [chosen[i] for i in shown], [kept[i] for i in shown]
        numbers = {"any_range": not settings["do_rescale"], "layout": settings["input_data_format"]}
        return [picture_tensor(clip[i], f"Clip {index}, frame {i}", **numbers) for i in chosen], kept

    def _to_pixels(self, frames: list[torch.Tensor], settings: dict) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """
        Frames -> pixels `(n, 3, H, W)`, and the height and width of each frame after resizing and before cropping.
        Frames of the same size are resized together.
        """
        unscaled = not settings["do_rescale"] and not settings["do_normalize"]
        as_bytes = unscaled and all(frame.dtype == torch.uint8 for frame in frames)
        groups: dict[tuple, list[int]] = {}
        for i, frame in enumerate(frames):
            groups.setdefault((frame.shape, frame.dtype), []).append(i)
        output, resized = None, [(0, 0)] * len(frames)
        for (_, dtype), rows in groups.items():
            batch = torch.stack([frames[i] for i in rows])
            batch = self._resize(batch, settings) if settings["do_resize"] else batch.to(settings["device"])
            height, width = batch.shape[-2:]
            for i in rows:
                resized[i] = height, width
            if settings["do_center_crop"]:
                crop = settings["crop_size"]
                if crop.height > height or crop.width > width:
                    raise ValueError(
                        f"`crop_size` must be at most the resized frame of {height} x {width} pixels, got "
                        f"{crop.height} x {crop.width}."
                    )
                batch = self.center_crop(batch, crop)
            batch = batch if as_bytes else batch.float()
            if settings["do_rescale"]:
                # Floats are in 0..1 already.
                factor = (settings["rescale_factor"] or 1 / 255) * (1 if dtype == torch.uint8 else 255)
                batch = batch if factor == 1 else batch * factor
            if output is None:
                output = batch.new_empty(len(frames), *batch.shape[1:])
            if batch.shape[1:] != output.shape[1:]:
                raise ValueError(
                    f"The processed frames have different sizes, {tuple(output.shape[-2:])} and "
                    f"{tuple(batch.shape[-2:])} pixels; give `size` with height and width, or `do_center_crop` and "
                    f"`crop_size`."
                )
            output[rows] = batch
        if settings["do_normalize"]:
            output = self.normalize(output, settings["image_mean"], settings["image_std"], inplace=True)
        return output, resized

    def _resize(self, batch: torch.Tensor, settings: dict) -> torch.Tensor:
        size, resample = settings["size"], settings["resample"]
        resample = PILImageResampling.BICUBIC if resample is None else resample
        if (size.height, size.width) == tuple(batch.shape[-2:]):
            return batch.to(settings["device"])
        if settings["resize_backend"] == "pillow" and batch.dtype == torch.uint8:
            pictures = [_PILLOW.resize(picture.numpy(), size, resample) for picture in batch]
            return torch.from_numpy(np.stack(pictures)).to(settings["device"])
        return self.resize(batch.to(settings["device"]), size, resample)

    @staticmethod
    def _patch_mask(
        box: np.ndarray | None, resized: tuple[int, int], output: tuple[int, int], settings: dict
    ) -> torch.Tensor:
        """Patch mask of a frame that was resized and then center-cropped."""
        rows, columns = _patch_grid(*output, settings["patch_size"])
        if box is None:
            return torch.ones(rows * columns, dtype=torch.bool)
        # Integer offsets, as in the center crop.
        top, left = ((side - kept) // 2 for side, kept in zip(resized, output, strict=True))
        pixels = box * ([resized[1], resized[0]] * 2) - [left, top] * 2
        return boxes_to_patch_mask(pixels, tuple(output), settings["patch_size"], settings["box_iou_threshold"])


def _size_of(name: str, size: Any, default_to_square: bool) -> SizeDict:
    """`size` or `crop_size`, in any of its forms, as a `SizeDict`."""
    try:
        sides = SizeDict(**get_size_dict(size, default_to_square=default_to_square is not False, param_name=name))
    except (TypeError, ValueError):
        sides = SizeDict()
    # Only the forms of transformers that do not depend on the other images of a batch.
    named = dict(sides)
    if set(named) not in ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}) or any(
        not isinstance(side, int) or side < 1 for side in named.values()
    ):
        raise ValueError(
            f"`{name}` must be a number of pixels, or name height and width, or shortest_edge, got {size!r}."
        )
    return sides


def make_clips(videos) -> list:
    """One or several clips -> a list of clips. Nested lists of clips, one per sample, are flattened."""
    if isinstance(videos, (str, os.PathLike, Mapping)):
        return [videos]
    if isinstance(videos, (bytes, bytearray, set, frozenset)) or not hasattr(videos, "__getitem__"):
        raise ValueError(f"`videos` is a {type(videos).__name__}; give a clip, or a list of clips.")
    if isinstance(videos, (np.ndarray, torch.Tensor)):
        return [videos] if videos.ndim == 4 else list(videos)
    if len(videos) == 0:
        raise ValueError("`videos` is empty; give at least one clip.")
    first = videos[0]
    is_frame = isinstance(first, (Image.Image, bytes, bytearray)) or is_picture_entry(first)
    is_frame = is_frame or (isinstance(first, (np.ndarray, torch.Tensor)) and first.ndim == 3)
    if is_frame:
        return [list(videos)]
    return [clip for entry in videos for clip in (entry if _holds_clips(entry) else [entry])]


def _clip_of(entry):
    """The clip in a row of a data set; anything else is returned unchanged."""
    if not isinstance(entry, Mapping) or "path" in entry:
        return entry
    video = entry.get("video")
    if isinstance(video, (str, os.PathLike)) and video:
        return {"path": video, "start": entry.get("start"), "end": entry.get("end")}
    return next((clip for clip in (video, entry.get("frames")) if clip is not None and len(clip)), entry)


def _holds_clips(entry) -> bool:
    if not isinstance(entry, (list, tuple)) or len(entry) == 0:
        return False
    return isinstance(entry[0], (list, tuple)) or getattr(entry[0], "ndim", 0) == 4


RiceVideoProcessor.register_for_auto_class("AutoVideoProcessor")

__all__ = ["RiceVideoProcessor", "boxes_to_patch_mask", "sample_frame_indices"]
