"""One processor for everything RICE reads: shop images, clips with boxes, titles and ASR text."""

import os
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import BatchFeature, CLIPImageProcessor, PreTrainedTokenizerBase
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack

from .image_processing_rice import RicePillowImageProcessor, check_picture_settings, on_device, type_sentence
from .media_rice import is_file_source, media_error, open_image, picture_tensor
from .text_entries_rice import read_texts
from .video_processing_rice import RiceVideoProcessor, RiceVideosKwargs

# What generic code passes along whatever it processes.
_GENERIC_SETTINGS = ("padding", "truncation", "max_length", "return_tensors")
# Settings of tokenizers that have no meaning for one text per image or clip.
_REFUSED_TEXT_SETTINGS = (
    *("text_pair", "text_target", "text_pair_target", "is_split_into_words", "stride", "return_overflowing_tokens"),
    *("return_mm_token_type_ids", "return_text_replacement_offsets", "sanitize_control_tokens"),
)
_DOWNLOAD_S = 30


class RiceProcessorKwargs(ProcessingKwargs, total=False):
    """Settings for one call, by what they belong to."""

    images_kwargs: ImagesKwargs
    videos_kwargs: RiceVideosKwargs
    text_kwargs: TextKwargs
    _defaults = {
        "common_kwargs": {"return_tensors": "pt"},
        "text_kwargs": {"padding": True, "truncation": True},
    }


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
        **kwargs: Unpack[RiceProcessorKwargs],
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
            kwargs: Settings for this call. One that stands by itself (`size`, `do_normalize`, `device`, `padding`,
                `return_tensors`, ...) acts on all of images, videos and texts that know it; `images_kwargs`,
                `videos_kwargs` and `text_kwargs` are dictionaries for one of them, `common_kwargs` for all.
                `return_tensors` is `"pt"` by default, `"np"` or `None`.

        Returns:
            `pixel_values` `(n, 3, H, W)`; `pixel_values_videos`, `frame_mask`, `patch_mask`; `title_input_ids`,
            `asr_input_ids` and their `_attention_mask` `(n, L)`; whichever was asked for.

        Raises:
            ValueError: when nothing was given, when counts do not fit, for a text that is a number or bytes, for a
                setting that is unknown, belongs to nothing that was given, or cannot be followed, numbers that are no
                picture, or (`MediaError`, also `FileNotFoundError`) a file that is missing or cannot be decoded.
        """
        if all(value is None for value in (images, text, videos, titles, asr)):
            raise ValueError("Nothing to process: give `images`, `videos`, `titles`, `asr` or `text`.")
        if boxes is not None and videos is None:
            raise ValueError("`boxes` belong to the frames of `videos`, which were not given.")
        if boxes is not None and "boxes" in (kwargs.get("videos_kwargs") or {}):
            raise ValueError("`boxes` was given twice, by itself and in `videos_kwargs`; give it once.")
        has_text = any(value is not None for value in (text, titles, asr))
        settings = self._call_settings(kwargs, images is not None, videos is not None, has_text)
        text, titles, asr = (
            None if strings is None else read_texts(strings, name)
            for name, strings in (("text", text), ("titles", titles), ("asr", asr))
        )
        data = {}
        if images is not None:
            data |= self._process_images(images, settings["images_kwargs"])
        if videos is not None:
            data |= self.video_processor(videos, **({"boxes": boxes} | settings["videos_kwargs"]))
        counts = {len(data[name]) for name in ("pixel_values", "pixel_values_videos") if name in data}
        for name, strings in (("titles", titles), ("asr", asr)):
            if counts and strings is not None and len(strings) not in counts:
                pictures = " and ".join(map(str, sorted(counts)))
                raise ValueError(
                    f"`{name}` has {len(strings)} entries for {pictures} images or clips; give one for each."
                )
        for name, prefix, strings in (("text", "", text), ("titles", "title_", titles), ("asr", "asr_", asr)):
            if strings == []:
                raise ValueError(f"`{name}` is empty; give at least one text, or None.")
            if strings is not None:
                encoded = self._tokenize(strings, settings["text_kwargs"], keep_middle=prefix == "asr_")
                if prefix and "attention_mask" in encoded:
                    _mask_missing(encoded["attention_mask"], strings)
                data |= {prefix + name: values for name, values in encoded.items()}
        return BatchFeature(data)

    def _call_settings(self, kwargs: dict, has_images: bool, has_videos: bool, has_text: bool) -> dict[str, dict]:
        """Merges as transformers does, which would ignore names that it does not know and settings without effect."""
        given = {"images_kwargs": has_images, "videos_kwargs": has_videos, "text_kwargs": has_text}
        parts = dict(zip(given, (self.image_processor, self.video_processor, None), strict=True))
        known = {
            kind: {*RiceProcessorKwargs.__annotations__[kind].__annotations__}
            | {*getattr(getattr(part, "valid_kwargs", None), "__annotations__", ())}
            for kind, part in parts.items()
        }
        for kind in (*given, "common_kwargs"):
            if not isinstance(kwargs.get(kind) or {}, Mapping):
                raise ValueError(f"`{kind}` must be a dictionary of settings, got {kwargs[kind]!r}.")
            for name in kwargs.get(kind) or ():
                if not any(name in names for part, names in known.items() if kind in (part, "common_kwargs")):
                    raise ValueError(f"Unknown argument {name!r} in `{kind}` of {type(self).__name__}.")
        nested = (*given, "common_kwargs", "audio_kwargs")
        for name in [name for name in kwargs if name not in nested]:
            kinds = [kind for kind in given if name in known[kind]]
            if not kinds:
                raise ValueError(f"Unknown argument {name!r} for {type(self).__name__}.")
            if name not in _GENERIC_SETTINGS and not any(given[kind] for kind in kinds):
                wanted = " or ".join(kind.removesuffix("_kwargs") for kind in kinds)
                raise ValueError(f"`{name}` is a setting for {wanted}, and there is none in this call; leave it out.")
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name not in nested}
        for name, value in kwargs.pop("common_kwargs", {}).items():
            for kind in (kind for kind in given if name in known[kind]):
                kwargs[kind] = {name: value} | kwargs.get(kind, {})
        # What `from_pretrained` was told of texts; what it was told of pictures is in their processors.
        loaded = {name: value for name, value in self.tokenizer.init_kwargs.items() if name in known["text_kwargs"]}
        try:
            merged = self._merge_kwargs(RiceProcessorKwargs, tokenizer_init_kwargs=loaded, **kwargs)
            # Those of texts are not looked at there.
            validate_typed_dict(TextKwargs, {name: value for name, value in merged["text_kwargs"].items() if value})
        except StrictDataclassError as error:
            raise ValueError(type_sentence(error)) from None
        self._check_text_settings(merged["text_kwargs"])
        # A number as `size` means for clips what it means for images.
        merged["videos_kwargs"].setdefault(
            "default_to_square", getattr(self.image_processor, "default_to_square", True)
        )
        return merged

    def _check_text_settings(self, settings: dict[str, Any]) -> None:
        """ValueError for what tokenizers would ignore, or stumble over without naming it."""
        for name in _REFUSED_TEXT_SETTINGS:
            if settings.get(name):
                raise ValueError(f"`{name}` has no meaning for one text per image or clip; leave it out.")
        if settings.get("truncation") == "only_second":
            raise ValueError('`truncation="only_second"` cuts nothing where there is one text; give True.')
        adds = settings.get("max_length") is not None and settings.get("add_special_tokens", True)
        added = self.tokenizer.num_special_tokens_to_add() if adds else 0
        for name, lowest in (("max_length", added + 1), ("pad_to_multiple_of", 1)):
            if settings.get(name) is not None and settings[name] < lowest:
                why = f", since the tokenizer adds {added} to each text" if lowest > 1 else ""
                raise ValueError(f"`{name}` must be at least {lowest} tokens{why}, got {settings[name]}.")

    def _process_images(self, images: Any, settings: dict[str, Any]) -> BatchFeature:
        """Floats are in 0..1 already, so that they and the others of a list go apart through the image processor."""
        check_picture_settings(settings, getattr(self.image_processor, "backend", "torchvision"))
        layout = settings.pop("input_data_format", None)
        any_range = not settings.get("do_rescale", self.image_processor.do_rescale)
        pictures = [_load_picture(image, i, any_range, layout) for i, image in enumerate(flatten_images(images))]
        return self._process_pictures(pictures, settings)

    def _process_pictures(self, pictures: list, settings: dict[str, Any]) -> BatchFeature:
        if getattr(self.image_processor, "backend", None) == "torchvision":
            # They are RGB by now, and converting would copy them.
            settings = {**settings, "do_convert_rgb": False}
        is_float = [not isinstance(picture, Image.Image) and picture.is_floating_point() for picture in pictures]
        if not any(is_float):
            return on_device(self.image_processor(pictures, **settings), settings.get("device"))
        if all(is_float):
            settings = {**settings, **self._rescaling_of_floats(settings)}
            return on_device(self.image_processor(pictures, **settings), settings.get("device"))
        parts = {
            kind: iter(
                self._process_pictures([p for p, f in zip(pictures, is_float) if f == kind], settings)["pixel_values"]
            )
            for kind in (True, False)
        }
        rows = [next(parts[kind]) for kind in is_float]
        stack = {"pt": torch.stack, "np": np.stack}.get(settings["return_tensors"], list)
        return BatchFeature({"pixel_values": stack(rows)})

    def _rescaling_of_floats(self, settings: dict[str, Any]) -> dict[str, Any]:
        """White is 1 instead of 255."""
        if not settings.get("do_rescale", self.image_processor.do_rescale):
            return {}
        factor = 255 * (settings.get("rescale_factor") or self.image_processor.rescale_factor)
        return {"do_rescale": False} if factor == 1 else {"rescale_factor": factor}

    @staticmethod
    def read_texts(values, name: str = "titles") -> list[str]:
        """Texts as the processor takes them, as a list of `str`; see `text_entries_rice.read_texts`."""
        return read_texts(values, name)

    def _tokenize(self, strings: list[str], settings: dict, keep_middle: bool = False) -> dict[str, Any]:
        if keep_middle and settings["truncation"] not in (None, False, "do_not_truncate"):
            longest = settings.get("max_length") or self.tokenizer.model_max_length
            strings = [self._middle(string, longest) for string in strings]
        encoded = dict(self.tokenizer(strings, **settings))
        if not settings.get("return_token_type_ids"):
            # Some tokenizers give them unasked; there is one text only.
            encoded.pop("token_type_ids", None)
        return encoded

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
    One image, a batch of them in one array, or lists of either, as a list of images. A column of a table is a list.

    Raises:
        ValueError: there is none, or they have no order.
    """
    if isinstance(images, (set, frozenset)):
        raise ValueError("`images` is a set, which has no order; give a list.")
    # Arrays of numbers are one picture or, with four axes, several; those with one axis are columns.
    if not is_file_source(images) and hasattr(images, "__iter__") and getattr(images, "ndim", 1) in (1, 4):
        flat = [image for entry in images for image in flatten_images(entry)]
        if not flat:
            raise ValueError("`images` is empty; give at least one image.")
        return flat
    return [images]


def _load_picture(image: Any, index: int, any_range: bool, layout: str | None) -> Image.Image | torch.Tensor:
    if not is_file_source(image):
        return picture_tensor(image, f"Image {index}", any_range, layout)
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:")) and not os.path.exists(image):
        return open_image(_download(image), name=image[:200])
    return open_image(image, copy=False)


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
        image_processor=image_processor_class(size=size, do_center_crop=False, default_to_square=True),
        video_processor=RiceVideoProcessor(
            size=size, patch_size=patch_size, num_frames=num_frames, resize_backend=resize_backend
        ),
        tokenizer=tokenizer,
    )


RiceProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["RiceProcessor", "RiceProcessorKwargs", "build_processor"]
