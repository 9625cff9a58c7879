"""Arguments of train_rice.py: three dataclasses, readable from a YAML recipe and overridable on the command line."""

import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import CONFIG_MAPPING, HfArgumentParser, TrainingArguments

from modeling_rice import RiceConfig


@dataclass
class ModelArguments:
    """Where the model comes from."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "RICE checkpoint (folder or Hub id) to start from; the model section changes its config."},
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
    published_optimizer: bool = field(
        default=False,
        metadata={"help": "BertAdam, its schedule and groups as in the older official recipe, instead of optim."},
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


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.2's scalars, where `1e-3` is a number and `no` a word; PyYAML's 1.1 takes them for text and false."""


_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), None
)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    None,
)


def parse_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, RiceTrainingArguments]:
    """
    Parses `[recipe.yaml] [--name value ...] [--model.name value ...]`; the command line wins over the recipe.

    Exits with status 2 and one sentence for an unknown key, an unreadable recipe or a value of the wrong kind.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        _CLASSES,
        prog="train_rice.py",
        usage="%(prog)s [recipe.yaml] [--name value ...] [--model.name value ...]",
        allow_abbrev=False,
    )
    try:
        recipe, source = {}, ""
        if argv and not argv[0].startswith("-"):
            source = argv.pop(0)
            recipe = read_recipe(source)
        model = dict(recipe.pop("model", None) or {})
        check_model_fields(model, source)
        argv = _take_model_overrides(model, argv)
        check_model_fields(model)
        model_arguments, data_arguments, training_arguments, unknown = parser.parse_args_into_dataclasses(
            _to_argv(recipe, parser, source) + argv, return_remaining_strings=True
        )
        if unknown:
            name = unknown[0].lstrip("-").partition("=")[0]
            raise ValueError(f"unknown argument {unknown[0]}{_suggest(name, _field_names())}")
    except (ValueError, OSError) as error:
        parser.exit(2, f"train_rice.py: error: {' '.join(str(error).splitlines())}\n")
    model_arguments.model = model
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
        recipe = _load_yaml(path.read_text(encoding="utf-8")) or {}
    except ValueError as error:
        raise ValueError(f"the recipe {path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe {path} must be a mapping of names to values")
    names = _field_names()
    for key in recipe:
        if key not in names:
            raise ValueError(f"unknown key {key!r} in recipe {path}{_suggest(str(key), names)}")
    if not isinstance(recipe.get("model") or {}, dict):
        raise ValueError(f"model in the recipe {path} must be a mapping of RiceConfig's fields to values")
    return recipe


def _load_yaml(text: str) -> Any:
    try:
        return yaml.load(text, _RecipeLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def check_model_fields(model: dict[str, Any], source: str = "") -> None:
    """Raises `ValueError` for a key that the encoder's config or `RiceConfig` lacks, naming the recipe it is from."""
    where = f" in the model section of {source}" if source else ""
    names = {f.name for f in dataclasses.fields(RiceConfig)}
    for key in model:
        if key not in names:
            raise ValueError(f"unknown model field {key!r}{where}{_suggest(str(key), names)}")
    vision = model.get("vision_config")
    if not isinstance(vision, dict):
        return
    model_type = vision.get("model_type", "clip_vision_model")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"unknown model_type {model_type!r} of vision_config{where}{_suggest(model_type, CONFIG_MAPPING)}"
        )
    config_class = CONFIG_MAPPING[model_type]
    names = {f.name for f in dataclasses.fields(config_class)} | {*config_class.attribute_map, "model_type"}
    for key in vision:
        if key not in names and not hasattr(config_class, str(key)):
            raise ValueError(
                f"unknown field {key!r} of vision_config ({model_type}){where}{_suggest(str(key), names)}"
            )


def _field_names() -> set[str]:
    return {f.name for cls in _CLASSES for f in dataclasses.fields(cls) if f.init}


def _suggest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _take_model_overrides(model: dict[str, Any], argv: list[str]) -> list[str]:
    """Moves `--model.NAME VALUE` and `--model MAPPING` from the command line into `model`; returns the other words."""
    rest, words = [], iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option != "--model" and not option.startswith("--model."):
            rest.append(word)
            continue
        if not equals:
            value = next(words, None)
            if value is None:
                raise ValueError(f"{option} needs a value")
        try:
            value = _load_yaml(value)
        except ValueError as error:
            raise ValueError(f"{option} is not valid YAML: {error}") from error
        if option == "--model":
            if not isinstance(value, dict):
                raise ValueError("--model needs a mapping, such as '{projection_dim: 256}'")
            model.update(value)
            continue
        *parents, name = option.removeprefix("--model.").split(".")
        section = model
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise ValueError(f"{option}: {parent} has no fields of its own")
        section[name] = value
    return rest


def _to_argv(recipe: dict[str, Any], parser: HfArgumentParser, source: str) -> list[str]:
    """
    The recipe as the command line it stands for, so that both go through one parser. What no command line can say
    (null, lists, mappings) becomes the parser's default.
    """
    kinds = {name: hint for cls in _CLASSES for name, hint in typing.get_type_hints(cls).items()}
    words = []
    for key, value in recipe.items():
        if value is not None and not isinstance(value, (list, dict)):
            words.append(f"--{key}={value}")
        elif type(value) in _kinds(kinds[key]):
            parser.set_defaults(**{key: value})
        else:
            what = {type(None): "null", list: "a list", dict: "a mapping"}[type(value)]
            raise ValueError(f"{key} in the recipe {source} cannot be {what}; give it one value or leave it out")
    return words


def _kinds(hint: Any) -> set[type]:
    """The plain types that an annotation allows: `list[str] | None` -> list and NoneType."""
    origin = typing.get_origin(hint)
    if origin in (list, dict):
        return {origin}
    arguments = typing.get_args(hint)
    return set().union(*(_kinds(argument) for argument in arguments)) if arguments else {hint}
