"""From a clip's frames, or a video file, to what RICE takes: sampled frames, frame mask, patch mask."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvF
from PIL import Image
from transformers import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor

from .image_processing_rice import resize_with_pillow
from .media_rice import picture_tensor
from .sampling_rice import sample_frame_indices
from .video_media_rice import sample_video

Frame = Any  # what `media_rice.picture_tensor` takes
Box = Sequence[float] | Sequence[Sequence[float]] | None


# Boxes drawn by people and detectors overshoot the frame a little; beyond this they are in another unit.
_BOX_OVERSHOOT = 0.05


def boxes_to_patch_mask(
    boxes: Sequence[Sequence[float]] | np.ndarray | torch.Tensor,
    image_size: int | tuple[int, int] = 224,
    patch_size: int = 32,
    iou_threshold: float = 0.02,
) -> torch.Tensor:
    """
    Patches that show the intended product (IPD, paper section 4.4): those whose IoU with a box reaches the threshold.

    The IoU counts both end pixels of an interval, boxes are not clipped to the image, and a frame in which no patch
    passes keeps all, all as in the official code.

    Args:
        boxes (`(n, 4)`): Left, top, right, bottom in pixels of the resized image; none means no restriction.
        image_size: Side of the square image, or its height and width, in pixels.
        patch_size: Side of a patch in pixels.
        iou_threshold: 0..1.

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
    """Rows and columns of patches; ValueError when there would be none."""
    if not 1 <= patch_size <= min(height, width):
        raise ValueError(
            f"`patch_size` must be at least 1 and fit into the image of {height} x {width} pixels, got {patch_size}."
        )
    return height // patch_size, width // patch_size


def _check_boxes(boxes: Box, clip: int, frame: int) -> np.ndarray | None:
    """The boxes of a frame as `(n, 4)` in 0..1, or `None`; ValueError names the clip and the frame."""
    if boxes is None or len(boxes) == 0:
        return None
    try:
        values = np.asarray(boxes, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    values = values[None] if values.ndim == 1 else values
    where = f"Clip {clip}, frame {frame}: the box {boxes!r}"
    if values.ndim != 2 or values.shape[1] != 4 or not np.isfinite(values).all():
        raise ValueError(f"{where} is not left-top-right-bottom in finite numbers; give `None` where there is none.")
    if values.min() < -_BOX_OVERSHOOT or values.max() > 1 + _BOX_OVERSHOOT:
        raise ValueError(f"{where} is not in 0..1 of the frame; divide pixels by the frame's width and height.")
    values = values.clip(0, 1)
    if (values[:, 2:] <= values[:, :2]).any():
        raise ValueError(f"{where} has no area in the frame; give `None` where there is none.")
    return values


def frames_with_box(boxes: Sequence) -> list[int]:
    """Positions of the frames of a clip that have a box (not `None`); all of them where none has."""
    return [i for i, box in enumerate(boxes) if box is not None] or list(range(len(boxes)))


class RiceVideosKwargs(VideosKwargs, total=False):
    """
    boxes: Per clip, per listed frame: `None`, one box or several, left-top-right-bottom in 0..1 of the frame. What is
        up to 0.05 outside is cut off; anything further out, without an area or not finite is refused.
    sampling: `"eval"`, `"train"` or one of the other modes of [`sample_frame_indices`].
    padding: `"longest"` pads clips to the longest of the batch, `"max_length"` to `num_frames`.
    patch_size: Side of the encoder's patches in pixels, for the patch mask.
    box_iou_threshold: See [`boxes_to_patch_mask`].
    frames_without_box: Of a clip with boxes, `"keep"` takes a frame without one whole, as published; `"drop"` leaves
        it out, as one that does not show the product. A clip without any box keeps its frames.
    resize_backend: `"torchvision"` or `"pillow"`, see [`RiceVideoProcessor`].
    """

    boxes: list
    sampling: str
    padding: str
    patch_size: int
    box_iou_threshold: float
    frames_without_box: str
    resize_backend: str


class RiceVideoProcessor(BaseVideoProcessor):
    """
    Samples, resizes (a plain stretch to the square the encoder takes), normalises and pads the frames of clips. With
    `do_center_crop` the encoder takes the central `crop_size` of that square.

    A clip is a list of frames (PIL images, arrays, tensors, paths; sizes may differ), a `(T, H, W, 3)` or
    `(T, 3, H, W)` array or tensor, the path of a video file (so a list of paths is a list of videos; frames by path
    are a list within the list), or `{"path", "start", "end"}` with seconds. Arrays and tensors are uint8, or floats in
    0..1. Frames are chosen before they are decoded.

    `resize_backend` is `"torchvision"`, which resizes a batch at once, or `"pillow"`, one uint8 picture at a time as
    the official code did; they differ by at most one grey level of 255.
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
            boxes: See [`RiceVideosKwargs`]; one list per clip, one entry per frame listed (before sampling).
            kwargs: Any attribute of this processor, for this call only, and `return_tensors`.

        Returns:
            `pixel_values_videos` `(B, T, 3, H, W)`, zero where padded, uint8 when uint8 frames are neither rescaled
            nor normalised; `frame_mask` `(B, T)` bool, `True` = real; with boxes also `patch_mask` `(B, T, P)` bool,
            `True` = keep.

        Raises:
            ValueError: for a clip without frames, boxes that do not fit, or an unreadable frame (named).
            FileNotFoundError: for a missing file.
        """
        settings = self._settings(kwargs)
        clips = make_clips(videos)
        if boxes is not None and len(boxes) != len(clips):
            raise ValueError(f"`boxes` has {len(boxes)} entries for {len(clips)} clips; give one per clip.")
        loaded = [self._load_clip(i, clip, boxes[i] if boxes else None, settings) for i, clip in enumerate(clips)]
        length = max(len(frames) for frames, _ in loaded)
        if settings["padding"] == "max_length":
            length = max(length, settings["num_frames"])
        frame_mask = torch.zeros(len(clips), length, dtype=torch.bool)
        for row, (frames, _) in enumerate(loaded):
            frame_mask[row, : len(frames)] = True
        real = self._to_pixels([frame for frames, _ in loaded for frame in frames], settings)
        pixels = real.new_zeros(len(clips), length, *real.shape[1:])
        pixels[frame_mask] = real
        data = {"pixel_values_videos": pixels, "frame_mask": frame_mask}
        if boxes is not None:
            data["patch_mask"] = self._patch_mask([clip_boxes for _, clip_boxes in loaded], length, settings)
        return BatchFeature(data, tensor_type=settings["return_tensors"])

    def _settings(self, kwargs: dict) -> dict:
        names = (*self.valid_kwargs.__annotations__, *VideosKwargs.__annotations__, "return_tensors")
        unknown = [name for name in kwargs if name not in names]
        if unknown:
            raise ValueError(f"Unknown argument {unknown[0]!r} for {type(self).__name__}; see its attributes.")
        settings = {name: getattr(self, name, None) for name in names} | {
            name: value for name, value in kwargs.items() if value is not None
        }
        if settings["padding"] not in ("longest", "max_length", True, False):
            raise ValueError(f'`padding` must be "longest" or "max_length", got {settings["padding"]!r}.')
        if settings["resize_backend"] not in ("torchvision", "pillow"):
            raise ValueError(
                f'`resize_backend` must be "torchvision" or "pillow", got {settings["resize_backend"]!r}.'
            )
        if settings["frames_without_box"] not in ("keep", "drop"):
            raise ValueError(f'`frames_without_box` must be "keep" or "drop", got {settings["frames_without_box"]!r}.')
        if settings["num_frames"] < 1:
            raise ValueError(f"`num_frames` must be at least 1, got {settings['num_frames']}.")
        size = settings["size"]
        if isinstance(size, int):
            size = {"height": size, "width": size}
        if not size.get("height") or not size.get("width"):
            raise ValueError(f"`size` must be a number or name height and width, got {size}.")
        settings["size"] = {"height": size["height"], "width": size["width"]}
        settings["output_size"] = (size["height"], size["width"])
        if settings["do_center_crop"]:
            crop = settings["crop_size"]
            if not crop or crop["height"] > size["height"] or crop["width"] > size["width"]:
                raise ValueError(f"`do_center_crop` needs a `crop_size` within `size` {size}, got {crop}.")
            settings["output_size"] = (crop["height"], crop["width"])
        return settings

    def _load_clip(self, index: int, clip, boxes: Sequence[Box] | None, settings: dict) -> tuple[list, list | None]:
        # Frames that were sampled before are not dropped at random either.
        max_frames, sampling = (settings["num_frames"], settings["sampling"])
        if not settings["do_sample_frames"]:
            max_frames, sampling = None, "eval"
        if isinstance(clip, (str, os.PathLike, Mapping)):
            if boxes is not None:
                raise ValueError(f"Clip {index} is a video file; boxes need a list of frames to belong to.")
            return [picture_tensor(frame) for frame in sample_video(clip, max_frames, sampling).values()], None
        if len(clip) == 0:
            raise ValueError(f"Clip {index} has no frames; a clip needs at least one.")
        if boxes is not None and len(boxes) != len(clip):
            raise ValueError(f"Clip {index} has {len(clip)} frames but {len(boxes)} entries in `boxes`.")
        chosen = sample_frame_indices(len(clip), max_frames or len(clip), sampling)
        kept = None if boxes is None else [_check_boxes(boxes[i], index, i) for i in chosen]
        if settings["frames_without_box"] == "drop" and kept:
            shown = frames_with_box(kept)
            chosen, kept = [chosen[i] for i in shown], [kept[i] for i in shown]
        any_range = not settings["do_rescale"]
        return [picture_tensor(clip[i], f"Clip {index}, frame {i}", any_range) for i in chosen], kept

    @staticmethod
    def _to_pixels(frames: list[torch.Tensor], settings: dict) -> torch.Tensor:
        """Frames of one size, which those of a batch mostly have, are resized together."""
        size = [settings["size"]["height"], settings["size"]["width"]]
        resample = PILImageResampling.BICUBIC
        if settings["resample"] is not None:
            resample = PILImageResampling(settings["resample"])
        interpolation = tvF.InterpolationMode(resample.name.lower())
        unscaled = not settings["do_rescale"] and not settings["do_normalize"]
        as_bytes = unscaled and all(frame.dtype == torch.uint8 for frame in frames)
        dtype = torch.uint8 if as_bytes else torch.float32
        output = torch.empty(len(frames), 3, *settings["output_size"], dtype=dtype)
        groups: dict[tuple, list[int]] = {}
        for i, frame in enumerate(frames):
            groups.setdefault((frame.shape, frame.dtype), []).append(i)
        for (_, dtype), rows in groups.items():
            batch = torch.stack([frames[i] for i in rows])
            if settings["do_resize"] and list(batch.shape[-2:]) != size:
                if settings["resize_backend"] == "pillow" and dtype == torch.uint8:
                    pictures = [resize_with_pillow(tvF.to_pil_image(picture), size, resample) for picture in batch]
                    batch = torch.stack([tvF.pil_to_tensor(picture) for picture in pictures])
                else:
                    batch = tvF.resize(batch, size, interpolation=interpolation, antialias=True)
            if settings["do_center_crop"]:
                batch = tvF.center_crop(batch, list(settings["output_size"]))
            batch = batch if as_bytes else batch.float()
            if settings["do_rescale"] and dtype == torch.uint8:
                batch = batch * (settings["rescale_factor"] or 1 / 255)
            output[rows] = batch
        if settings["do_normalize"]:
            output = tvF.normalize(output, list(settings["image_mean"]), list(settings["image_std"]), inplace=True)
        return output

    @staticmethod
    def _patch_mask(clips: list[list[np.ndarray | None] | None], length: int, settings: dict) -> torch.Tensor:
        (height, width), patch_size = settings["output_size"], settings["patch_size"]
        resized = np.array([settings["size"]["width"], settings["size"]["height"]] * 2)
        offset = (resized - [width, height] * 2) / 2
        rows, columns = _patch_grid(height, width, patch_size)
        mask = torch.ones(len(clips), length, rows * columns, dtype=torch.bool)
        for row, boxes in enumerate(clips):
            for column, box in enumerate(boxes or []):
                if box is None:
                    continue
                pixels = box * resized - offset
                mask[row, column] = boxes_to_patch_mask(
                    pixels, (height, width), patch_size, settings["box_iou_threshold"]
                )
        return mask


def make_clips(videos) -> list:
    """One clip or several -> a list of clips. Lists of clips within the list, one per sample, are joined."""
    if isinstance(videos, (str, os.PathLike, Mapping)):
        return [videos]
    if isinstance(videos, (np.ndarray, torch.Tensor)):
        return [videos] if videos.ndim == 4 else list(videos)
    if len(videos) == 0:
        raise ValueError("`videos` is empty; give at least one clip.")
    first = videos[0]
    is_frame = isinstance(first, Image.Image) or (isinstance(first, (np.ndarray, torch.Tensor)) and first.ndim == 3)
    if is_frame:
        return [list(videos)]
    return [clip for entry in videos for clip in (entry if _holds_clips(entry) else [entry])]


def _holds_clips(entry) -> bool:
    if not isinstance(entry, (list, tuple)) or len(entry) == 0:
        return False
    return isinstance(entry[0], (list, tuple)) or getattr(entry[0], "ndim", 0) == 4


RiceVideoProcessor.register_for_auto_class("AutoVideoProcessor")

__all__ = ["RiceVideoProcessor", "boxes_to_patch_mask", "sample_frame_indices"]
