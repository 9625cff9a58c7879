"""Arguments of train_rice.py: three dataclasses, readable from a YAML recipe and overridable on the command line."""

import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser, TrainingArguments

from modeling_rice import RiceConfig


@dataclass
class ModelArguments:
    """Where the model comes from."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "RICE checkpoint (folder or Hub id) to go on from; overrides the model section."},
    )
    init_vision_from: str | None = field(
        default=None, metadata={"help": "Vision model (folder or Hub id) whose weights the encoder starts from."}
    )
    model: dict | str | None = field(
        default=None,
        metadata={"help": "Fields of RiceConfig, as a YAML mapping in the recipe; one field: --model.NAME VALUE."},
    )


@dataclass
class DataArguments:
    """What the model learns from."""

    dataset: str = field(
        default="mini_lpr4m", metadata={"help": "mini_lpr4m, lpr4m, shop_clips, or a folder in one of their layouts."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the data set."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where the Arrow tables go."})
    validation_fraction: float | None = field(
        default=None, metadata={"help": "Share of training livestreams held out as validation split (LPR4M layout)."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side that pictures are resized to; the encoder's own by default, else 224."}
    )
    num_frames: int = field(
        default=10, metadata={"help": "Frames per clip at evaluation, and in the saved processor."}
    )
    train_num_frames: int | None = field(
        default=None, metadata={"help": "Frames per clip in training; as num_frames by default."}
    )
    frame_sampling: Literal["train", "random", "visible"] = field(
        default="train",
        metadata={
            "help": "Training frames: 'train' spreads evenly as published, 'random' draws anew each time, 'visible' "
            "draws frames with a box before others."
        },
    )
    augment_crop: float = field(
        default=1.0, metadata={"help": "Smallest area of the random crop of a clip or image; 1 crops nothing."}
    )
    augment_flip: float = field(default=0.0, metadata={"help": "Probability of mirroring a whole clip or image."})
    augment_jitter: float = field(
        default=0.0, metadata={"help": "Brightness, contrast and saturation change by up to +- this, once per clip."}
    )
    augment_background: float = field(
        default=0.0,
        metadata={"help": "Probability that a training clip loses everything outside its boxes to one colour."},
    )
    use_boxes: bool = field(
        default=False, metadata={"help": "Intended product detection: mask patches outside the rows' boxes."}
    )
    use_text: bool = field(default=False, metadata={"help": "Tokenise titles and ASR for the model."})
    vocab_size: int = field(default=2000, metadata={"help": "Vocabulary of the tokenizer trained on the data set."})
    tokenizer_texts: int = field(
        default=20000, metadata={"help": "Training rows whose title and ASR the tokenizer is trained on."}
    )


    def __post_init__(self):
        ranges = {"augment_crop": (0.05, 1.0), "augment_jitter": (0.0, 0.99)}
        for name in ("augment_crop", "augment_flip", "augment_jitter", "augment_background"):
            low, high = ranges.get(name, (0.0, 1.0))
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie in {low}..{high}, got {getattr(self, name)}.")

    @property
    def augments(self) -> bool:
        """Whether training pictures are changed at all."""
        return self.augment_crop < 1 or max(self.augment_flip, self.augment_jitter, self.augment_background) > 0


@dataclass
class RiceTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments, with RICE's defaults and the settings it adds."""

    output_dir: str = field(default="runs/rice", metadata={"help": "Folder for checkpoints and the final model."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator reads the rows."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Must stay on: the loss needs equal batches on every process."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, the best one among them."})
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "By default eval_fused_R@1, or eval_embedding_R@1 without a decoder."}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision encoder; as learning_rate by default."}
    )
    freeze_vision: bool = field(default=False, metadata={"help": "Train everything but the vision encoder."})
    eval_max_queries: int | None = field(
        default=None, metadata={"help": "Validation queries scored during training, evenly spread; all by default."}
    )

    def __post_init__(self):
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay false: the collator reads the rows' own columns.")
        if not self.dataloader_drop_last:
            raise ValueError("dataloader_drop_last must stay true: the loss needs equal batches on every process.")
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"


_CLASSES = (ModelArguments, DataArguments, RiceTrainingArguments)


def parse_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, RiceTrainingArguments]:
    """
    Parses `[recipe.yaml] [--name value ...] [--model.name value ...]`; the command line wins over the recipe.

    Exits with status 2 and one sentence for an unknown key, an unreadable recipe or a value of the wrong kind.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        _CLASSES, prog="train_rice.py", usage="%(prog)s [recipe.yaml] [--name value ...] [--model.name value ...]"
    )
    try:
        recipe, source = {}, ""
        if argv and not argv[0].startswith("-"):
            source = argv.pop(0)
            recipe = read_recipe(source)
        model = recipe.pop("model", None) or {}
        model, argv = _take_model_overrides(dict(model), argv)
        check_model_fields(model, source)
        options = _to_argv(recipe) + argv + (["--model", json.dumps(model)] if model else [])
        model_arguments, data_arguments, training_arguments, unknown = parser.parse_args_into_dataclasses(
            options, return_remaining_strings=True
        )
        if unknown:
            raise ValueError(f"unknown argument {unknown[0]}{_suggest(unknown[0].lstrip('-'), _field_names())}")
    except (ValueError, OSError) as error:
        parser.exit(2, f"train_rice.py: error: {error}\n")
    if isinstance(model_arguments.model, str):
        model_arguments.model = json.loads(model_arguments.model)
    model_arguments.model = model_arguments.model or {}
    return model_arguments, data_arguments, training_arguments


def read_recipe(path: str | Path) -> dict[str, Any]:
    """
    Reads a recipe: a flat YAML mapping of argument names, and `model:` with fields of `RiceConfig`.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for broken YAML or an unknown key, naming it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {path}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"the recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe {path} must be a mapping of names to values")
    names = _field_names()
    for key in recipe:
        if key not in names:
            raise ValueError(f"unknown key {key!r} in recipe {path}{_suggest(str(key), names)}")
    return recipe


def check_model_fields(model: dict[str, Any], source: str = "") -> None:
    """Raises `ValueError` for a key that `RiceConfig` does not have, naming the recipe it came from."""
    names = {f.name for f in dataclasses.fields(RiceConfig)}
    for key in model:
        if key not in names:
            where = f" in the model section of {source}" if source else ""
            raise ValueError(f"unknown model field {key!r}{where}{_suggest(key, names)}")


def _field_names() -> set[str]:
    return {f.name for cls in _CLASSES for f in dataclasses.fields(cls) if f.init}


def _suggest(name: str, names: set[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _take_model_overrides(model: dict[str, Any], argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """`--model.NAME VALUE` and `--model.NAME=VALUE` out of the command line, into the model section."""
    rest, words = [], iter(argv)
    for word in words:
        if not word.startswith("--model."):
            rest.append(word)
            continue
        name, equals, value = word.removeprefix("--model.").partition("=")
        if not equals:
            value = next(words, None)
            if value is None:
                raise ValueError(f"{word} needs a value")
        value = yaml.safe_load(value)
        *parents, name = name.split(".")
        section = model
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    return model, rest


def _to_argv(recipe: dict[str, Any]) -> list[str]:
    """The recipe as the command line it stands for, so that both go through one parser."""
    words = []
    for key, value in recipe.items():
        if value is None:
            continue
        words.append(f"--{key}")
        if isinstance(value, dict):
            words.append(json.dumps(value))
        elif isinstance(value, list):
            words += [str(item) for item in value]
        else:
            words.append(str(value))
    return words
