"""Recipes: YAML files of arguments, which are checked and converted to a command line."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import yaml
from transformers import CONFIG_MAPPING, HfArgumentParser

from modeling_rice import RiceConfig

# Beside this file in an installed package; in configs/ in a checkout, also in an editable installation.
_INSTALLED = Path(__file__).with_name("recipes")
RECIPES = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).resolve().parents[1] / "configs"


class _RecipeLoader(yaml.SafeLoader):
    """Scalars of YAML 1.2: `1e-3` is a number and `no` a text. PyYAML's YAML 1.1 reads them as text and false."""


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


def find_recipe(name: str | Path, names: Collection[str]) -> Path:
    """
    The file of a recipe: `name` itself, else the project's recipe of that name, with or without `configs/`.

    Raises:
        FileNotFoundError: there is no such recipe; the message lists the project's recipes.
    """
    path = Path(name)
    if path.is_file():
        return path
    packaged = RECIPES / path.name
    if packaged.is_file() and path.parent in (Path("."), Path("configs")):
        return packaged
    # The folder also holds studies, which are not recipes.
    known = [file.name for file in sorted(RECIPES.glob("*.yaml")) if _is_recipe(file, names)]
    raise FileNotFoundError(f"there is no recipe {name}: name a YAML file, or one of {', '.join(known)}.")


def _is_recipe(path: Path, names: Collection[str]) -> bool:
    return _load_yaml(path.read_text(encoding="utf-8")).keys() <= set(names)


def read_recipe(path: str | Path, names: Collection[str]) -> dict[str, Any]:
    """
    Reads a recipe: a flat YAML mapping of argument names (those of `names`), and `model:` with fields of `RiceConfig`.

    Raises:
        FileNotFoundError: as `find_recipe`.
        ValueError: the YAML is invalid or a key is unknown; the message names it.
    """
    path = find_recipe(path, names)
    try:
        recipe = _load_yaml(path.read_text(encoding="utf-8")) or {}
    except ValueError as error:
        raise ValueError(f"the recipe {path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe {path} must be a mapping of names to values")
    for key in recipe:
        if key not in names:
            raise ValueError(f"unknown key {key!r} in recipe {path}{suggest(str(key), names)}")
    if not isinstance(recipe.get("model") or {}, dict):
        raise ValueError(f"model in the recipe {path} must be a mapping of RiceConfig's fields to values")
    return recipe


def _load_yaml(text: str) -> Any:
    try:
        return yaml.load(text, _RecipeLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def check_model_fields(model: dict[str, Any], source: str = "") -> None:
    """Raises `ValueError` for a key that the encoder's config or `RiceConfig` lacks; the message names the recipe."""
    where = f" in the model section of {source}" if source else ""
    names = {f.name for f in dataclasses.fields(RiceConfig)}
    for key in model:
        if key not in names:
            raise ValueError(f"unknown model field {key!r}{where}{suggest(str(key), names)}")
    for part, default in (("vision_config", "clip_vision_model"), ("text_config", "bert")):
        if isinstance(model.get(part), dict):
            _check_encoder_fields(model[part], part, default, where)


def _check_encoder_fields(encoder: dict[str, Any], part: str, default: str, where: str) -> None:
    model_type = encoder.get("model_type", default)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"unknown model_type {model_type!r} of {part}{where}{suggest(model_type, CONFIG_MAPPING)}")
    config_class = CONFIG_MAPPING[model_type]
    names = {f.name for f in dataclasses.fields(config_class)} | {*config_class.attribute_map, "model_type"}
    for key in encoder:
        if key not in names and not hasattr(config_class, str(key)):
            raise ValueError(f"unknown field {key!r} of {part} ({model_type}){where}{suggest(str(key), names)}")


def suggest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def take_model_overrides(model: dict[str, Any], argv: list[str]) -> list[str]:
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


def to_argv(recipe: dict[str, Any], parser: HfArgumentParser, kinds: dict[str, Any], source: str) -> list[str]:
    """
    Converts a recipe to a command line, so that one parser checks both. Values that a command line cannot express
    (null, lists, mappings) become defaults of the parser if `kinds`, name -> annotation, allows them.
    """
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
