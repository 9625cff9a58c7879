"""The processor for all inputs of RICE: shop images, clips with boxes, titles and ASR."""

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

# Settings that generic code passes for any kind of input.
_GENERIC_SETTINGS = ("padding", "truncation", "max_length", "return_tensors")
# Settings of tokenizers that have no meaning for one text per image or clip.
_REFUSED_TEXT_SETTINGS = (
    *("text_pair", "text_target", "text_pair_target", "is_split_into_words", "stride", "return_overflowing_tokens"),
    *("return_mm_token_type_ids", "return_text_replacement_offsets", "sanitize_control_tokens"),
)
_DOWNLOAD_S = 30


class RiceProcessorKwargs(ProcessingKwargs, total=False):
    """Settings for one call, grouped by input: images, videos, texts."""

    images_kwargs: ImagesKwargs
    videos_kwargs: RiceVideosKwargs
    text_kwargs: TextKwargs
    _defaults = {
        "common_kwargs": {"return_tensors": "pt"},
        "text_kwargs": {"padding": True, "truncation": True},
    }


class RiceProcessor(ProcessorMixin):
    """
    Turns images, clips and texts into the tensors that [`RiceModel`] takes.

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
            images: One or several shop images: PIL images, paths, URLs, encoded bytes, `{"path", "bytes"}` of
                `datasets`, or arrays and tensors `(H, W, 3)` or `(3, H, W)` of uint8 or of floats in 0..1.
            text: Plain text, tokenised to `input_ids`.
            videos: One or several clips, see [`RiceVideoProcessor`].
            titles, asr: One string per image or clip, in a list, an array or a column of a table. An empty or missing
                (`None`, NaN) entry means no text; its attention mask is zero. A title that is too long is cut at its
                end. ASR that is too long keeps its middle, since speech at the start and end of a clip often belongs
                to the previous or next product.
            boxes: Boxes of the intended product, see [`RiceVideosKwargs`].
            kwargs: Settings for this call. A plain setting (`size`, `do_normalize`, `device`, `padding`,
                `return_tensors`, ...) applies to all inputs that have it. `images_kwargs`, `videos_kwargs` and
                `text_kwargs` are dictionaries of settings for one kind of input, `common_kwargs` for all.
                `return_tensors` is `"pt"` (the default), `"np"` or `None`.

        Returns:
            `pixel_values` `(n, 3, H, W)` for images; `pixel_values_videos`, `frame_mask` and, with boxes, `patch_mask`
            for clips (see [`RiceVideoProcessor.preprocess`]); `title_input_ids`, `asr_input_ids`, `input_ids` and
            their `_attention_mask`, `(n, L)`, for texts.

        Raises:
            ValueError: if nothing was given; if numbers of entries differ; for a text that is a number or bytes; for a
                setting that is unknown, unsupported, or applies to none of the inputs; for numbers that are not an
                image; for a missing or unreadable file (`MediaError`, if missing also a `FileNotFoundError`).
        """
        if all(value is None for value in (images, text, videos, titles, asr)):
            raise ValueError("There is nothing to process; give `images`, `videos`, `titles`, `asr` or `text`.")
        if boxes is not None and videos is None:
            raise ValueError("`boxes` belong to the frames of `videos`, which were not given; give both.")
        if boxes is not None and "boxes" in (kwargs.get("videos_kwargs") or {}):
            raise ValueError("`boxes` was given twice, as an argument and in `videos_kwargs`; give it once.")
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
        """Merges settings as transformers does, but refuses unknown names and settings that would have no effect."""
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
                    raise ValueError(f"Unknown argument {name!r} in `{kind}` of {type(self).__name__}; leave it out.")
        nested = (*given, "common_kwargs", "audio_kwargs")
        for name in [name for name in kwargs if name not in nested]:
            kinds = [kind for kind in given if name in known[kind]]
            if not kinds:
                raise ValueError(f"Unknown argument {name!r} for {type(self).__name__}; leave it out.")
            if name not in _GENERIC_SETTINGS and not any(given[kind] for kind in kinds):
                wanted = " or ".join(kind.removesuffix("_kwargs") for kind in kinds)
                raise ValueError(f"`{name}` is a setting for {wanted}, and there is none in this call; leave it out.")
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name not in nested}
        for name, value in kwargs.pop("common_kwargs", {}).items():
            for kind in (kind for kind in given if name in known[kind]):
                kwargs[kind] = {name: value} | kwargs.get(kind, {})
        # Text settings given to `from_pretrained`; settings for images and videos are stored in their processors.
        loaded = {name: value for name, value in self.tokenizer.init_kwargs.items() if name in known["text_kwargs"]}
        try:
            merged = self._merge_kwargs(RiceProcessorKwargs, tokenizer_init_kwargs=loaded, **kwargs)
            # `_merge_kwargs` does not validate the settings of texts.
            validate_typed_dict(TextKwargs, {name: value for name, value in merged["text_kwargs"].items() if value})
        except StrictDataclassError as error:
            raise ValueError(type_sentence(error)) from None
        self._check_text_settings(merged["text_kwargs"])
        # A number as `size` has the same meaning for clips as for images.
        merged["videos_kwargs"].setdefault(
            "default_to_square", getattr(self.image_processor, "default_to_square", True)
        )
        return merged

    def _check_text_settings(self, settings: dict[str, Any]) -> None:
        """Raises `ValueError` for settings that tokenizers would ignore, or would fail on without naming them."""
        for name in _REFUSED_TEXT_SETTINGS:
            if settings.get(name):
                raise ValueError(f"`{name}` has no meaning for one text per image or clip; leave it out.")
        if settings.get("truncation") == "only_second":
            raise ValueError('`truncation="only_second"` has no effect on single texts; give True.')
        adds = settings.get("max_length") is not None and settings.get("add_special_tokens", True)
        added = self.tokenizer.num_special_tokens_to_add() if adds else 0
        for name, lowest in (("max_length", added + 1), ("pad_to_multiple_of", 1)):
            if settings.get(name) is not None and settings[name] < lowest:
                why = f", since the tokenizer adds {added} tokens to each text" if lowest > 1 else ""
                raise ValueError(f"`{name}` must be at least {lowest} tokens{why}, got {settings[name]}.")

    def _process_images(self, images: Any, settings: dict[str, Any]) -> BatchFeature:
        """Processes float images, which are in 0..1 already, separately from the other images of a list."""
        check_picture_settings(settings, getattr(self.image_processor, "backend", "torchvision"))
        layout = settings.pop("input_data_format", None)
        any_range = not settings.get("do_rescale", self.image_processor.do_rescale)
        pictures = [_load_picture(image, i, any_range, layout) for i, image in enumerate(flatten_images(images))]
        return self._process_pictures(pictures, settings)

    def _process_pictures(self, pictures: list, settings: dict[str, Any]) -> BatchFeature:
        if getattr(self.image_processor, "backend", None) == "torchvision":
            # They are RGB already; converting would copy them.
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
        """Rescaling settings for floats, where white is 1 instead of 255."""
        if not settings.get("do_rescale", self.image_processor.do_rescale):
            return {}
        factor = 255 * (settings.get("rescale_factor") or self.image_processor.rescale_factor)
        return {"do_rescale": False} if factor == 1 else {"rescale_factor": factor}

    @staticmethod
    def read_texts(values, name: str = "titles") -> list[str]:
        """Texts in any form that the processor takes, as a list of `str`; see `text_entries_rice.read_texts`."""
        return read_texts(values, name)

    def _tokenize(self, strings: list[str], settings: dict, keep_middle: bool = False) -> dict[str, Any]:
        if keep_middle and settings["truncation"] not in (None, False, "do_not_truncate"):
            longest = settings.get("max_length") or self.tokenizer.model_max_length
            strings = [self._middle(string, longest) for string in strings]
        encoded = dict(self.tokenizer(strings, **settings))
        if not settings.get("return_token_type_ids"):
            # Some tokenizers always return them; with single texts they carry no information.
            encoded.pop("token_type_ids", None)
        return encoded

    def _middle(self, string: str, max_tokens: int) -> str:
        """The middle part of a text, of about `max_tokens` tokens."""
        # A token is at least one byte, so short texts need not be tokenised.
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
        """All keys that this processor can return."""
        text = [f"{kind}_{name}" for kind in ("title", "asr") for name in ("input_ids", "attention_mask")]
        return ["pixel_values", *self.video_processor.model_input_names, *text]


def _mask_missing(attention_mask, strings: list[str]) -> None:
    """Sets the attention mask of blank strings to zero, in place."""
    for row, string in enumerate(strings):
        if not string.strip():
            attention_mask[row] = [0] * len(attention_mask[row]) if isinstance(attention_mask, list) else 0


def flatten_images(images: Any) -> list:
    """
    One image, a batch of images in one array, or nested lists of these, as a flat list of images. A column of a table
    counts as a list.

    Raises:
        ValueError: if there is no image, or for a set, which has no order.
    """
    if isinstance(images, (set, frozenset)):
        raise ValueError("`images` is a set, which has no order; give a list.")
    # An array of numbers is one image or, with four axes, several; an array with one axis is a column.
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
    Builds a processor for an encoder. Images and frames are stretched to a square, as published.

    Args:
        tokenizer: For titles and ASR.
        image_size: Side of the square in pixels.
        patch_size: Side of the encoder's patches in pixels.
        num_frames: Maximum number of frames sampled per clip.
        resize_backend: `"torchvision"`, or `"pillow"` for the exact grey levels of the official code.

    Raises:
        ValueError: for a setting that no clip could be processed with.
    """
    size = {"height": image_size, "width": image_size}
    video_processor = RiceVideoProcessor(
        size=size, patch_size=patch_size, num_frames=num_frames, resize_backend=resize_backend
    )
    video_processor.check_settings()
    image_processor_class = RicePillowImageProcessor if resize_backend == "pillow" else CLIPImageProcessor
    return RiceProcessor(
        image_processor=image_processor_class(size=size, do_center_crop=False, default_to_square=True),
        video_processor=video_processor,
        tokenizer=tokenizer,
    )


RiceProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["RiceProcessor", "RiceProcessorKwargs", "build_processor"]
