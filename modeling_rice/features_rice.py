"""Encoded shop images, clips and frames: containers of tensors that can be compared, saved and loaded."""

import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .fingerprint_rice import same_state

# Keys of a batch of pairs. Methods accept the whole batch and use the part they need.
_BATCH_KEYS = (
    *("pixel_values", "pixel_values_videos", "frame_mask", "patch_mask", "product_ids", "title_embeds", "asr_embeds"),
    *("title_input_ids", "title_attention_mask", "asr_input_ids", "asr_attention_mask", "asr_is_noise"),
)
PLAIN_TEXT_KEYS = ("input_ids", "attention_mask")
# Arguments that generic code, such as adapters for text models, passes as `None`.
_GENERIC_KEYS = (
    *(*PLAIN_TEXT_KEYS, "inputs_embeds", "task_ids", "labels"),
    *("output_attentions", "output_hidden_states"),
)


def refuse_unknown(method: str, arguments: dict) -> None:
    """
    Raises:
        TypeError: for an argument of a model's `method` that is not a key of a batch.
        ValueError: if hidden states or attentions are requested.
    """
    for name in ("output_attentions", "output_hidden_states"):
        if arguments.get(name):
            raise ValueError(f"`{name}` is not supported by `{method}` of RICE; leave it out.")
    unset = [name for name in _GENERIC_KEYS if arguments.get(name) is None or arguments[name] is False]
    unknown = [name for name in arguments if name not in (*_BATCH_KEYS, *unset)]
    if unknown:
        raise TypeError(
            f"`{method}` takes no argument {', '.join(map(repr, unknown))}; a batch holds {', '.join(_BATCH_KEYS)}."
        )


def require_tensor(name: str, value: object) -> Tensor:
    """
    Raises:
        ValueError: for a value that is not a tensor, such as images that were not processed.
    """
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise ValueError(f"`{name}` must be a tensor, got a {kind}; give what the processor returns.")
    return value


def require_pairs(images: Tensor, clips: Tensor) -> None:
    """Raises `ValueError` unless there are as many images as clips."""
    if len(images) != len(clips):
        raise ValueError(f"There are {len(images)} images and {len(clips)} clips; give one clip per image.")


@dataclass
class _RiceFeatures:
    """
    Tensors with one row per item. The first field is always set, the others may be `None`.

    `model_fingerprint` identifies the model that encoded them ([`RiceModel.fingerprint`]); `None` if unknown.
    """

    fields: ClassVar[tuple[str, ...]] = ()
    # Fields with one entry per token or frame; their length differs between clips.
    token_fields: ClassVar[tuple[str, ...]] = ()
    # Fields that keep their precision when the others are cast.
    fixed_fields: ClassVar[tuple[str, ...]] = ("patches",)

    model_fingerprint: str | None = field(default=None, kw_only=True)

    def __init_subclass__(cls):
        cls.fields = tuple(cls.__annotations__)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.fields if getattr(self, name) is not None}

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        tensors = {name: function(tensor) for name, tensor in self._tensors().items()}
        return type(self)(model_fingerprint=self.model_fingerprint, **tensors)

    def __len__(self) -> int:
        return len(getattr(self, self.fields[0]))

    def __getitem__(self, index) -> Self:
        """Rows by slice, index tensor or list. A single integer returns one row and keeps the row dimension."""
        if isinstance(index, Integral):
            index = int(index)
            if not -len(self) <= index < len(self):
                raise IndexError(f"Row {index} is outside the {len(self)} rows of this {type(self).__name__}.")
            index = slice(index, index + 1 or None)
        return self._map(lambda tensor: tensor[index])

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={tuple(tensor.shape)}" for name, tensor in self._tensors().items())
        return f"{type(self).__name__}({shapes})"

    def to(self, *args, **kwargs) -> Self:
        """
        Moves or casts as `Tensor.to` does; for example, `.to(torch.float16)` halves the storage. Masks stay bool, and
        patches keep their precision.
        """
        moved = {name: tensor.to(*args, **kwargs) for name, tensor in self._tensors().items()}
        for name, tensor in self._tensors().items():
            if name in self.fixed_fields or not tensor.is_floating_point():
                moved[name] = tensor.to(moved[name].device)
        return type(self)(model_fingerprint=self.model_fingerprint, **moved)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """
        Concatenates along rows. Clips of unequal length are padded and masked.

        Raises:
            ValueError: for an empty list, for parts with different fields, and for parts from different models.
            RuntimeError: for parts of different width.
        """
        if not parts:
            raise ValueError(f"{cls.__name__}.cat needs at least one part, got an empty list.")
        names = parts[0]._tensors().keys()
        if any(part._tensors().keys() != names for part in parts):
            raise ValueError(
                f"The parts given to {cls.__name__}.cat hold different fields; encode them with the same settings."
            )
        models = {part.model_fingerprint for part in parts}
        known = sorted(name for name in models if name is not None)
        if any(not same_state(known[0], other) for other in known[1:]):
            raise ValueError(
                f"The parts given to {cls.__name__}.cat come from different models ({', '.join(known)}); encode them "
                f"with one model."
            )
        columns = {name: [getattr(part, name) for part in parts] for name in names}
        tensors = {name: torch.cat(_pad(c) if name in cls.token_fields else c) for name, c in columns.items()}
        # One part of unknown origin makes the origin of the result unknown.
        return cls(model_fingerprint=None if None in models else known[0], **tensors)

    def save(self, path: str | os.PathLike) -> None:
        """
        Writes a safetensors file.

        Raises:
            FileNotFoundError: if its folder does not exist.
        """
        if not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(
                f"There is no folder {Path(path).parent} to write {Path(path).name} to; create it."
            )
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in self._tensors().items()}
        about = {"type": type(self).__name__, "model_fingerprint": self.model_fingerprint}
        about["crc32"] = _checksum(about, tensors)
        save_file(tensors, str(path), metadata={"rice": json.dumps(about, allow_nan=False)})

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> Self:
        """
        Reads a file written by `save`.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if the file cannot be read, is damaged, or holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no feature file {path}; write one with {cls.__name__}.save.")
        try:
            with safe_open(str(path), framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("rice", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"The feature file {path} cannot be read ({error}); write it again.") from error
        about = about if isinstance(about, dict) else {}
        if about.get("type") != cls.__name__:
            raise ValueError(
                f"The feature file {path} holds {about.get('type') or 'no RICE features'}, not {cls.__name__}; write "
                f"one with {cls.__name__}.save."
            )
        if cls.fields[0] not in tensors or not tensors.keys() <= set(cls.fields):
            raise ValueError(
                f"The feature file {path} has the fields {', '.join(sorted(tensors))}, but a {cls.__name__} has "
                f"{', '.join(cls.fields)}; write it again with this version."
            )
        # Files of older versions have no checksum.
        if about.pop("crc32", None) not in (None, _checksum(about, tensors)):
            raise ValueError(f"The feature file {path} is damaged (its checksum does not match); write it again.")
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        return cls(model_fingerprint=about.get("model_fingerprint"), **tensors)


def _checksum(about: dict, tensors: dict[str, Tensor]) -> int:
    """Checksum of the metadata and all tensors of a file."""
    kinds = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    checksum = zlib.crc32(json.dumps([about, kinds], sort_keys=True).encode())
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum


def _pad(tensors: list[Tensor]) -> list[Tensor]:
    """Zero-pads the second dimension to the longest."""
    length = max(tensor.shape[1] for tensor in tensors)
    return [nn.functional.pad(t, (0, 0) * (t.dim() - 2) + (0, length - t.shape[1])) for t in tensors]


@dataclass(repr=False, eq=False)
class RiceGallery(_RiceFeatures):
    """
    Encoded shop images.

    Attributes:
        embeds (`(n, D)`): L2-normalised embeddings.
        states (`(n, d)`, *optional*): Class-token rows before the decoder's cross-attention block.
        text_embeds (`(n, E)`, *optional*): L2-normalised title embeddings, zero where there is no title.
        patches (`(n, P, R)` float16, *optional*): L2-normalised patches for `align`; 2 * P * R bytes per image.
    """

    embeds: Tensor
    states: Tensor | None = None
    text_embeds: Tensor | None = None
    patches: Tensor | None = None


@dataclass(repr=False, eq=False)
class RiceClips(_RiceFeatures):
    """
    Encoded clips.

    Attributes:
        embeds (`(c, D)`): L2-normalised embeddings.
        keys, values (`(c, S, d)`, *optional*): Projected clip tokens of the cross-attention block.
        mask (`(c, S)` bool, *optional*): `True` = real token.
        text_embeds (`(c, E)`, *optional*): L2-normalised ASR embeddings, zero where there is no ASR.
        patches (`(c, T, Q, R)` float16, *optional*): L2-normalised patches for `align`, frame by frame.
        patch_mask (`(c, T, Q)` bool, *optional*): `True` = patch of a real frame that is not masked.
    """

    embeds: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    mask: Tensor | None = None
    text_embeds: Tensor | None = None
    patches: Tensor | None = None
    patch_mask: Tensor | None = None

    token_fields = ("keys", "values", "mask", "patches", "patch_mask")


@dataclass(repr=False, eq=False)
class RiceFrames(_RiceFeatures):
    """
    Frames that were encoded one by one; [`RiceModel.pool_frames`] makes clips of them.

    Attributes:
        tokens (`(n, 1 + P, d)`): Decoder tokens, the frame's global token first.
        features (`(n, D)`): Projected global features, not normalised, in at least single precision.
        token_mask (`(n, 1 + P)` bool, *optional*): `True` = token that is not masked; `None` without a patch mask.
        patches (`(n, Q, R)`, *optional*): L2-normalised patches for `align`; not in training mode.
        patch_mask (`(n, Q)` bool, *optional*): The same as `token_mask` on the grid of `patches`.
    """

    tokens: Tensor
    features: Tensor
    token_mask: Tensor | None = None
    patches: Tensor | None = None
    patch_mask: Tensor | None = None
