"""From a clip's frames, or a video file, to what RICE takes: sampled frames, frame mask, patch mask."""

import math
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvF
from PIL import Image
from transformers import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import load_video

from .image_processing_rice import open_image, resize_with_pillow

Frame = Any  # PIL image, (H, W, 3) or (3, H, W) array or tensor, or a path
Box = Sequence[float] | Sequence[Sequence[float]] | None


# Boxes drawn by people and detectors overshoot the frame a little; beyond this they are in another unit.
_BOX_OVERSHOOT = 0.05

# How frames are spread over the clip, and which clips may then lose their end at random.
_SAMPLING_MODES = {
    "train": ("train", None),
    "eval": ("eval", None),
    "train_random_drop": ("train", "any"),
    "train_random_drop_full": ("train", "full"),
    "eval_random_drop_full": ("eval", "full"),
}


def sample_frame_indices(num_frames: int, max_frames: int, mode: str = "eval") -> list[int]:
    """
    Which frames of a clip are used, as both official code bases choose them.

    Args:
        num_frames: Frames the clip has, >= 1.
        max_frames: Frames to keep at most, >= 1.
        mode: `"train"` spreads over the whole clip with both ends included; `"eval"` leaves the end out. The others
            then drop the end of the clip at random, see [`draw_frame_drop`]: `"train_random_drop"` as the older
            official code trains, `"train_random_drop_full"` as the newer one does, which leaves clips alone that have
            fewer than `max_frames` frames, and `"eval_random_drop_full"` as the newer one does at test time.

    Returns:
        Ascending indices; all of them when `num_frames <= max_frames` and nothing is dropped.

    Raises:
        ValueError: for numbers that are not whole or below 1, or an unknown mode.
    """
    for name, value in (("num_frames", num_frames), ("max_frames", max_frames)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ValueError(f"`{name}` must be a whole number, got {value!r}.")
    if num_frames < 1:
        raise ValueError(
            f"`num_frames` must be at least 1, got {num_frames}: a clip without frames cannot be sampled."
        )
    if max_frames < 1:
        raise ValueError(f"`max_frames` must be at least 1, got {max_frames}.")
    if mode not in _SAMPLING_MODES:
        raise ValueError(f"`mode` must be one of {', '.join(_SAMPLING_MODES)}, got {mode!r}.")
    spread, drop = _SAMPLING_MODES[mode]
    if num_frames <= max_frames:
        indices = list(range(num_frames))
    elif spread == "train":
        indices = np.linspace(0, num_frames - 1, max_frames).astype(int).tolist()
    else:
        indices = np.linspace(0, num_frames, max_frames, endpoint=False).astype(int).tolist()
    if drop == "any" or (drop == "full" and len(indices) == max_frames):
        indices = drop_last_frames(indices, draw_frame_drop())
    return indices


def drop_last_frames(indices: Sequence[int], fraction: float) -> list[int]:
    """
    Keeps the first `n - floor(n * fraction)` of n frames, at least one, as both official code bases do.

    Args:
        indices: The frames of a clip, after sampling.
        fraction: 0..1.
    """
    return list(indices[: max(1, len(indices) - math.floor(len(indices) * fraction))])


def draw_frame_drop() -> float:
    """
    The share of a clip's frames that official training drops from its end: with probability 0.5 nothing, otherwise
    one of 0, 0.1, ..., 0.9. Drawn from torch's random state, which a DataLoader seeds in each of its workers.
    """
    gate, drop = torch.randint(10, (2,)).tolist()
    return 0.1 * drop if gate >= 5 else 0.0


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
        if isinstance(clip, (str, os.PathLike, dict)):
            if boxes is not None:
                raise ValueError(f"Clip {index} is a video file; boxes need a list of frames to belong to.")
            return list(torch.from_numpy(read_video(clip, max_frames, sampling)).movedim(-1, 1)), None
        if len(clip) == 0:
            raise ValueError(f"Clip {index} has no frames; a clip needs at least one.")
        if boxes is not None and len(boxes) != len(clip):
            raise ValueError(f"Clip {index} has {len(clip)} frames but {len(boxes)} entries in `boxes`.")
        chosen = sample_frame_indices(len(clip), max_frames or len(clip), sampling)
        kept = None if boxes is None else [_check_boxes(boxes[i], index, i) for i in chosen]
        if settings["frames_without_box"] == "drop" and kept:
            shown = frames_with_box(kept)
            chosen, kept = [chosen[i] for i in shown], [kept[i] for i in shown]
        return [load_frame(clip[i]) for i in chosen], kept

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
            # Resizing may overshoot a little; 0..255 and missing numbers are far beyond.
            elif settings["do_rescale"] and not batch.abs().max() < 2:
                raise ValueError(
                    "Frames must be uint8 or floats in 0..1; give 0..255 as uint8, or set `do_rescale=False`."
                )
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
    if isinstance(videos, (str, os.PathLike, dict)):
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


def load_frame(frame: Frame) -> torch.Tensor:
    """
    One frame as a `(3, H, W)` tensor, uint8 or float in 0..1.

    Raises:
        ImageError: naming the file that is missing or cannot be decoded.
        ValueError: for an array that is no picture.
    """
    if isinstance(frame, (str, os.PathLike)):
        frame = open_image(frame)
    if isinstance(frame, Image.Image):
        return tvF.pil_to_tensor(frame.convert("RGB"))
    frame = torch.as_tensor(frame)
    if frame.dtype != torch.uint8 and not frame.is_floating_point():
        raise ValueError(f"A frame must hold uint8 or floats, got {frame.dtype}; convert it to uint8.")
    if frame.dim() == 2:
        frame = frame[None].expand(3, -1, -1)
    if frame.dim() != 3 or 3 not in (frame.shape[0], frame.shape[-1]):
        raise ValueError(f"A frame must be (H, W, 3) or (3, H, W), got shape {tuple(frame.shape)}.")
    return frame if frame.shape[0] == 3 else frame.movedim(-1, 0)


@cache
def _video_backend() -> str:
    # torchcodec can be installed without the FFmpeg libraries it loads at first use; PyAV brings its own.
    try:
        from torchcodec.decoders import VideoDecoder

        VideoDecoder(b"")
    except (ImportError, OSError):
        return "pyav"
    except (RuntimeError, ValueError) as error:
        return "pyav" if "libtorchcodec" in str(error) else "torchcodec"
    return "torchcodec"


def _count_frames(path: str) -> int:
    import av

    with av.open(path) as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))


def read_video(
    clip, max_frames: int | None = None, sampling: str | Callable[[int, int], Sequence[int]] = "eval"
) -> np.ndarray:
    """
    Frames of a video file, or of its range of seconds; only the chosen ones are decoded.

    Args:
        clip: Path, or `{"path", "start", "end"}` in seconds, where a missing or negative end means the whole rest.
        max_frames: Frames to sample at most, all by default.
        sampling: See [`sample_frame_indices`], or a function of the first two of its arguments.

    Returns:
        `(T, H, W, 3)` uint8, RGB.

    Raises:
        FileNotFoundError, ValueError: for a missing or undecodable file, or a range without a frame.
    """
    entry = clip if isinstance(clip, dict) else {"path": clip}
    path = str(entry["path"])
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no video file {path}.")

    def choose(metadata, **_) -> np.ndarray:
        # Containers made from streams often do not state their number of frames.
        first, last = 0, metadata.total_num_frames or _count_frames(path)
        if entry.get("end") is not None and entry["end"] >= 0:
            last = min(last, max(int(np.ceil(entry["end"] * metadata.fps)), 1))
        if entry.get("start") is not None and entry["start"] > 0:
            first = int(entry["start"] * metadata.fps)
        if first >= last:
            raise ValueError(f"The range {entry.get('start')}..{entry.get('end')} s of {path} holds no frame.")
        sample = sampling if callable(sampling) else partial(sample_frame_indices, mode=sampling)
        return np.array(sample(last - first, max_frames or last - first)) + first

    try:
        frames, _ = load_video(path, backend=_video_backend(), sample_indices_fn=choose)
    except (RuntimeError, OSError, IndexError, StopIteration, ValueError) as error:
        # A plain one is a request that was refused above; the decoders raise subclasses.
        if type(error) is ValueError:
            raise
        raise ValueError(f"The video file {path} cannot be decoded ({error}); replace it or leave it out.") from error
    return frames.numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)


RiceVideoProcessor.register_for_auto_class("AutoVideoProcessor")

__all__ = ["RiceVideoProcessor", "boxes_to_patch_mask", "read_video", "sample_frame_indices"]
