"""Checks of untrusted settings: the JSON files of a model folder, field by field, before a model is built."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs

from data_rice.parsing import read_json_object
from modeling_rice import RiceConfig, RiceModel
from processing_rice import RiceProcessor, RiceVideoProcessor

from .checkpoint import weight_files
from .repository import explain

# Fields that transformers, its Trainer or a training script adds to any model's config.
_GENERIC_SETTINGS = ("auto_map", "custom_pipelines", "quantization_config", "torch_dtype", "tie_word_embeddings")
_GENERIC_SETTINGS += ("use_cache", "loss_type", "num_labels", "gradient_checkpointing")

# Above any width, vocabulary or length of a model; a dictionary of as many labels still fits into memory.
_LARGEST = 10**6
_LARGEST_SIDE, _MOST_FRAMES = 4096, 1024


@contextmanager
def usable(name: str, file: str) -> Iterator[None]:
    """
    Turns any error of a library about a damaged file into one sentence that names the file.

    Args:
        name: Name of the checkpoint, for the message.
        file: The file or files that the block reads.

    Raises:
        ValueError: if the block fails. Errors that `hub_rice.repository.hub_errors` explains pass through.
    """
    try:
        yield
    except Refusal:
        raise
    # The errors of the tokenizers library derive directly from BaseException.
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)) or explain(error, name) is not None:
            raise
        reason = shorten(f"{type(error).__name__}: {error}".rstrip(": "), 200)
        raise Refusal(f"{file} of {name} cannot be used ({reason}): save it again.") from error


class Refusal(ValueError):
    """An error whose message is a sentence for the user."""


def read_config(folder: str | os.PathLike, name: str) -> RiceConfig:
    """
    Reads the configuration of a RICE checkpoint and checks that it fits the weights, without building the model.

    Args:
        folder: Folder of the checkpoint.
        name: Name of the checkpoint, for the message.

    Raises:
        ValueError: for a field that cannot be used or a weight of another shape; the message names it.
    """
    path = Path(folder) / "config.json"
    settings = read_json_object(path)
    model_type = settings.get("model_type")
    if model_type != RiceConfig.model_type:
        raise ValueError(f"{name} holds a {model_type} model, not a RICE checkpoint: name a RICE checkpoint.")
    _check_numbers(settings, path)
    for part, section in settings.items():
        # transformers would prompt the user whether to run it.
        if isinstance(section, Mapping) and "auto_map" in section:
            raise ValueError(f"{path}: {part}.auto_map names Python code, which is not run: remove the field.")
    with usable(name, "config.json"):
        check_known(settings, name)
        files = [file for file in weight_files(folder) if file.is_file()]
        shapes = {key: shape for file in files for key, shape in _shapes(file)}
        _check_depths(settings, path, len(shapes))
        config, expected = _build(settings, path)
        for key, shape in expected.items():
            if key in shapes and shapes[key] != shape:
                raise Refusal(
                    f"the weights of {name} do not match its config.json: {key} has shape {shapes[key]} instead of "
                    f"{shape}; save it again."
                )
    return config


def check_known(settings: dict, name: str) -> None:
    """
    Refuses a config with unknown settings, which would otherwise be dropped silently.

    Args:
        settings: The content of config.json.
        name: Name of the checkpoint, for the message.

    Raises:
        ValueError: for an unknown setting; the message names the first one.
    """
    known = {field.name for field in dataclasses.fields(RiceConfig)}.union(RiceConfig().to_dict(), _GENERIC_SETTINGS)
    unknown = sorted(key for key in settings if key not in known and not key.startswith("_"))
    unknown = [key for key in unknown if not key.endswith("_token_id")]
    if unknown:
        raise Refusal(
            f"{name} was saved by a newer version of this project: its config has the setting {unknown[0]!r}, which "
            f"this version does not have; install the newer version."
        )


def _shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with safe_open(str(file), framework="pt") as weights:
        for key in weights.keys():
            yield key, tuple(weights.get_slice(key).get_shape())


def _leaves(value, where: str = "") -> Iterator[tuple[str, object]]:
    """Each plain value with its path of names, joined by dots."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, where)
    else:
        yield where, value


def _check_numbers(settings: Mapping, path: Path, prefix: str = "") -> None:
    """Raises `ValueError` for numbers that are not finite, or too large to build a model of that size."""
    for where, value in _leaves(settings):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path}: {prefix}{where} is {value}, which is not finite: save it again.")
        if isinstance(value, int) and abs(value) > _LARGEST:
            shown = shorten(str(value), 30)
            raise ValueError(f"{path}: {prefix}{where} is {shown}, which is too large for a model: save it again.")


def _check_depths(settings: Mapping, path: Path, num_weights: int, where: str = "") -> None:
    """Raises `ValueError` for more layers than there are weights, which could take hours to build."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            _check_depths(value, path, num_weights, f"{where}{key}.")
        elif "layers" in key or "depth" in key:
            counts = value if isinstance(value, list) else [value]
            if any(isinstance(count, int) and not -1 <= count <= num_weights for count in counts):
                raise Refusal(f"{path}: {where}{key} is {value}, but there are {num_weights} weights: save it again.")


def _build(settings: dict, path: Path) -> tuple[RiceConfig, dict[str, tuple[int, ...]]]:
    """The configuration, and the shapes of the model's weights."""

    def build(settings: dict) -> tuple[RiceConfig, dict[str, tuple[int, ...]]]:
        config = RiceConfig.from_dict(settings)
        with torch.device("meta"):
            return config, {key: tuple(tensor.shape) for key, tensor in RiceModel(config).state_dict().items()}

    try:
        return build(settings)
    except StrictDataclassFieldValidationError as error:
        raise Refusal(f"{path}: {_reason(error)}; save the model again.") from error
    except Exception as error:
        field = _culprit(settings, build)
        if field is None:
            raise
        reason = shorten(f"{type(error).__name__}: {_reason(error)}", 200)
        raise Refusal(f"{path}: {field} cannot be used ({reason}): save the model again.") from error


def _culprit(settings: dict, build: Callable) -> str | None:
    """The field, with its value, whose default (or 1 instead of its number) makes the model buildable."""
    places = [(None, name) for name, value in settings.items() if not isinstance(value, Mapping)]
    places += [(part, name) for part, value in settings.items() if isinstance(value, Mapping) for name in value]
    for part, name in places:
        section = settings if part is None else settings[part]
        rest = {key: item for key, item in section.items() if key != name}
        for trial in [rest, {**rest, name: 1}] if isinstance(section[name], int) else [rest]:
            try:
                build(trial if part is None else {**settings, part: trial})
            except Exception:
                # This field is not the cause, or not the only one.
                continue
            return shorten(f"{part}.{name}={section[name]!r}".removeprefix("None."), 80)
    return None


def check_processor_files(folder: str | os.PathLike) -> None:
    """
    Checks the settings of a processor before it is built from them.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: for a setting that cannot be used; the message names file and field.
    """
    folder = Path(folder)
    path = folder / "processor_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no processor_config.json: save its processor there.")
    settings = read_json_object(path)
    schemas = {"image_processor": ImagesKwargs, "video_processor": RiceVideoProcessor.valid_kwargs}
    for part, schema in schemas.items():
        if part in settings:
            _check_section(settings[part], schema, path, f"{part}.")
    for name, part in (("preprocessor_config.json", "image"), ("video_preprocessor_config.json", "video")):
        if (folder / name).is_file():
            _check_section(read_json_object(folder / name), schemas[f"{part}_processor"], folder / name)
    if (folder / "tokenizer_config.json").is_file():
        read_json_object(folder / "tokenizer_config.json")


def _check_section(section, schema: type, path: Path, prefix: str = "") -> None:
    if not isinstance(section, Mapping):
        raise ValueError(f"{path}: {prefix[:-1]} is not a JSON object: save the processor again.")
    _check_numbers(section, path, prefix)
    settings = {key: value for key, value in section.items() if key in schema.__annotations__ and value is not None}
    # JSON does not distinguish 1 from 1.0.
    floats = ("image_mean", "image_std", "rescale_factor")
    try:
        validate_typed_dict(schema, settings | {key: _as_floats(settings[key]) for key in floats if key in settings})
    except StrictDataclassFieldValidationError as error:
        raise ValueError(f"{path}: {prefix[:-1]} {_reason(error)}: save the processor again.") from error
    for where, value in _leaves(settings):
        check = _RANGES.get(where.partition(".")[0])
        if check is not None and value is not None and not check(value):
            raise ValueError(f"{path}: {prefix}{where} is {value}, which is out of range: save the processor again.")


def _reason(error: Exception) -> str:
    """The message of a strict dataclass, without class names."""
    return shorten(re.sub(r"^(Validation|Class validation) error for \w+ '\w+':\s*\w+: ", "", str(error)), 200)


def _as_floats(value):
    if isinstance(value, list):
        return [_as_floats(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


_RANGES: dict[str, Callable] = {
    "size": lambda side: 1 <= side <= _LARGEST_SIDE,
    "crop_size": lambda side: 1 <= side <= _LARGEST_SIDE,
    "patch_size": lambda side: 1 <= side <= _LARGEST_SIDE,
    "num_frames": lambda count: 1 <= count <= _MOST_FRAMES,
    "image_std": lambda spread: spread > 0,
    "rescale_factor": lambda factor: factor > 0,
    "resample": lambda number: number in set(PILImageResampling),
}


def check_tokenizer(folder: str | os.PathLike, name: str) -> None:
    """Raises `ValueError` if the vocabulary file tokenizer.json cannot be read."""
    with usable(name, "tokenizer.json"):
        Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))


def try_out(model: RiceModel, processor: RiceProcessor, name: str) -> None:
    """
    Encodes one image and one clip, so that unusable settings are found when a checkpoint is loaded.

    Raises:
        ValueError: if that fails; the message names the files.
    """
    picture = Image.new("RGB", (48, 64), "grey")
    with usable(name, "processor_config.json, tokenizer.json or tokenizer_config.json"):
        images = processor(images=[picture], titles=["a"])
        clips = processor(videos=[[picture]], asr=["a"], padding="longest")
    with usable(name, "config.json"), torch.no_grad():
        gallery, encoded = model.encode_gallery(**images), model.encode_clips(**clips)
        model.similarity(encoded, gallery)
        if model.alignment is not None:
            model.align(encoded, gallery)
        if model.config.use_decoder:
            model.match(encoded, gallery)
