"""One processor for everything RICE reads: shop images, clips with boxes, titles and ASR text."""

import os
import urllib.request
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, CLIPImageProcessor, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from .image_processing_rice import RicePillowImageProcessor
from .media_rice import is_file_source, media_error, open_image, picture_tensor
from .text_entries_rice import read_texts
from .video_processing_rice import RiceVideoProcessor

_TEXT_ARGUMENTS = ("truncation", "max_length", "add_special_tokens")
_DOWNLOAD_S = 30


class RiceProcessor(ProcessorMixin):
    """
    Args:
        image_processor: For shop images, e.g. `CLIPImageProcessor` (see [`build_processor`]).
        video_processor: A [`RiceVideoProcessor`].
        tokenizer: For titles and ASR, e.g. from `processing_rice.train_tokenizer`.
    """

    def __init__(self, image_processor, video_processor, tokenizer, **kwargs):
        super().__init__(image_processor, video_processor, tokenizer, **kwargs)

    def __call__(
        self,
        images=None,
        text=None,
        videos=None,
        titles: list[str] | str | None = None,
        asr: list[str] | str | None = None,
        boxes: list | None = None,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images: One or several shop images: PIL pictures, paths, web addresses, encoded bytes, `{"path", "bytes"}`
                of `datasets`, or arrays and tensors, `(H, W, 3)` or `(3, H, W)`, each uint8 or floats in 0..1.
            text: Plain text, tokenised to `input_ids`.
            videos: One or several clips, see [`RiceVideoProcessor`].
            titles, asr: One string per image or clip, in a list, an array or a column of a table. One that is empty or
                missing (`None`, NaN) is a text that is not there, and its attention mask is zero. A title that is too
                long loses its end, ASR what is far from its middle, since what is said at either end of a clip often
                belongs to the product before or after.
            boxes: Boxes of the intended product, see [`RiceVideosKwargs`].
            return_tensors: `"pt"`, `"np"` or `None`.
            kwargs: Settings of the video processor for this call (`num_frames`, `sampling`, `padding`), `truncation`
                and `max_length` of the tokenizer, or `images_kwargs`, `videos_kwargs`, `text_kwargs` as dictionaries.

        Returns:
            `pixel_values` `(n, 3, H, W)`; `pixel_values_videos`, `frame_mask`, `patch_mask`; `title_input_ids`,
            `asr_input_ids` and their `_attention_mask` `(n, L)`; whichever was asked for.

        Raises:
            ValueError: when nothing was given, when counts do not fit, for a text that is a number or bytes, for an
                unknown argument, numbers that are no picture, or (`MediaError`, also `FileNotFoundError`) a file that
                is missing or cannot be decoded.
        """
        if all(value is None for value in (images, text, videos, titles, asr)):
            raise ValueError("Nothing to process: give `images`, `videos`, `titles`, `asr` or `text`.")
        if boxes is not None and videos is None:
            raise ValueError("`boxes` belong to the frames of `videos`, which were not given.")
        images_kwargs = dict(kwargs.pop("images_kwargs", {}))
        videos_kwargs = dict(kwargs.pop("videos_kwargs", {}))
        text_kwargs = dict(kwargs.pop("text_kwargs", {})) | {
            name: kwargs.pop(name) for name in _TEXT_ARGUMENTS if name in kwargs
        }
        # What generic callers pass along for every modality there is.
        for name in ("common_kwargs", "audio_kwargs"):
            kwargs.pop(name, None)
        videos_kwargs |= kwargs
        if kwargs and videos is None:
            # `padding` is what generic callers always pass along; images have nothing to pad.
            unknown = [name for name in kwargs if name not in RiceVideoProcessor.valid_kwargs.__annotations__]
            if unknown:
                raise ValueError(f"Unknown argument {unknown[0]!r} for {type(self).__name__}.")

        text, titles, asr = (
            None if strings is None else read_texts(strings, name)
            for name, strings in (("text", text), ("titles", titles), ("asr", asr))
        )
        data = {}
        if images is not None:
            data |= self._process_images(images, {"return_tensors": return_tensors, **images_kwargs})
        if videos is not None:
            data |= self.video_processor(videos, boxes=boxes, **{"return_tensors": return_tensors, **videos_kwargs})
        counts = {len(data[name]) for name in ("pixel_values", "pixel_values_videos") if name in data}
        for name, strings in (("titles", titles), ("asr", asr)):
            if counts and strings is not None and len(strings) not in counts:
                pictures = " and ".join(map(str, sorted(counts)))
                raise ValueError(
                    f"`{name}` has {len(strings)} entries for {pictures} images or clips; give one for each."
                )
        for prefix, strings in (("", text), ("title_", titles), ("asr_", asr)):
            if strings is not None:
                encoded = self._tokenize(strings, return_tensors, text_kwargs, keep_middle=prefix == "asr_")
                if prefix:
                    _mask_missing(encoded["attention_mask"], strings)
                data |= {prefix + name: encoded[name] for name in ("input_ids", "attention_mask")}
        return BatchFeature(data)

    def _process_images(self, images: Any, settings: dict[str, Any]) -> BatchFeature:
        """Floats are in 0..1 already, so that they and the others of a list go apart through the image processor."""
        any_range = not settings.get("do_rescale", self.image_processor.do_rescale)
        pictures = [_load_picture(image, i, any_range) for i, image in enumerate(flatten_images(images))]
        is_float = [not isinstance(picture, Image.Image) and picture.is_floating_point() for picture in pictures]
        if not any(is_float):
            return self.image_processor(pictures, **settings)
        if all(is_float):
            return self.image_processor(pictures, **{**settings, "do_rescale": False})
        parts = {
            kind: iter(
                self._process_images([p for p, f in zip(pictures, is_float) if f == kind], settings)["pixel_values"]
            )
            for kind in (True, False)
        }
        rows = [next(parts[kind]) for kind in is_float]
        stack = {"pt": torch.stack, "np": np.stack}.get(settings["return_tensors"], list)
        return BatchFeature({"pixel_values": stack(rows)})

    @staticmethod
    def read_texts(values, name: str = "titles") -> list[str]:
        """Texts as the processor takes them, as a list of `str`; see `text_entries_rice.read_texts`."""
        return read_texts(values, name)

    def _tokenize(self, strings: list[str], return_tensors: str | None, text_kwargs: dict, keep_middle: bool = False):
        settings = {"padding": True, "truncation": True, "return_tensors": return_tensors, **text_kwargs}
        if keep_middle and settings["truncation"]:
            longest = settings.get("max_length") or self.tokenizer.model_max_length
            strings = [self._middle(string, longest) for string in strings]
        return self.tokenizer(strings, **settings)

    def _middle(self, string: str, max_tokens: int) -> str:
        """About as much around the middle of a text as gives so many tokens."""
        # No token stands for less than a byte, so that short texts need no second look.
        if len(string.encode()) < max_tokens:
            return string
        num_tokens = len(self.tokenizer(string, truncation=False, verbose=False)["input_ids"])
        if num_tokens <= max_tokens:
            return string
        kept = len(string) * max_tokens // num_tokens
        start = (len(string) - kept) // 2
        return string[start : start + kept]

    @property
    def model_input_names(self) -> list[str]:
        """Every key this processor can give."""
        text = [f"{kind}_{name}" for kind in ("title", "asr") for name in ("input_ids", "attention_mask")]
        return ["pixel_values", *self.video_processor.model_input_names, *text]


def _mask_missing(attention_mask, strings: list[str]) -> None:
    """Sets the rows of blank strings to zero, in place."""
    for row, string in enumerate(strings):
        if not string.strip():
            attention_mask[row] = [0] * len(attention_mask[row]) if isinstance(attention_mask, list) else 0


def flatten_images(images: Any) -> list:
    """
    One image, a batch of them in one array, or lists of either, as a list of images.

    Raises:
        ValueError: there is none.
    """
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4:
        flat = [image for entry in images for image in flatten_images(entry)]
        if not flat:
            raise ValueError("`images` is empty; give at least one image.")
        return flat
    return [images]


def _load_picture(image: Any, index: int, any_range: bool) -> Image.Image | torch.Tensor:
    if not is_file_source(image):
        return picture_tensor(image, f"Image {index}", any_range)
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:")) and not os.path.exists(image):
        return open_image(_download(image), name=image[:200])
    return open_image(image)


def _download(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=_DOWNLOAD_S) as answer:
            return answer.read()
    except (OSError, ValueError) as error:
        raise media_error("image", address[:200], f"cannot be fetched ({error})") from error


def build_processor(
    tokenizer: PreTrainedTokenizerBase,
    image_size: int = 224,
    patch_size: int = 32,
    num_frames: int = 10,
    resize_backend: str = "torchvision",
) -> RiceProcessor:
    """
    A processor that fits an encoder: images and frames are stretched to a square, as published.

    Args:
        tokenizer: For titles and ASR.
        image_size: Side of the square in pixels.
        patch_size: Side of the encoder's patches in pixels.
        num_frames: Frames sampled per clip at most.
        resize_backend: `"torchvision"`, or `"pillow"` for the grey levels of the official code.
    """
    size = {"height": image_size, "width": image_size}
    image_processor_class = RicePillowImageProcessor if resize_backend == "pillow" else CLIPImageProcessor
    return RiceProcessor(
        image_processor=image_processor_class(size=size, do_center_crop=False),
        video_processor=RiceVideoProcessor(
            size=size, patch_size=patch_size, num_frames=num_frames, resize_backend=resize_backend
        ),
        tokenizer=tokenizer,
    )


RiceProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["RiceProcessor", "build_processor"]
