"""Study files: the arms with their arguments for training and evaluation, and the comparisons."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modeling_rice.scoring_rice import KINDS

_KEYS = {"recipe", "render", "seeds", "max_minutes", "start", "train", "eval", "arms", "comparisons"}
_ARM_KEYS = {"train", "eval", "model_of", "note", "seeds"}


@dataclass(frozen=True)
class Arm:
    """
    One arm: its changes of training and evaluation, or the arm whose model it evaluates again; and its seeds, a subset
    of the study's.
    """

    name: str
    train: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)
    model_of: str | None = None
    note: str = ""
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """`left` against `right`, each an arm and a kind of score."""

    left: tuple[str, str]
    right: tuple[str, str]


@dataclass(frozen=True)
class Study:
    """A study file. `start`, `train` and `eval` are arguments of train_rice.py and eval_rice.py."""

    recipe: str
    seeds: list[int]
    max_minutes: float
    start: dict[str, Any]
    train: dict[str, Any]
    eval: dict[str, Any]
    arms: dict[str, Arm]
    comparisons: list[Comparison]
    render: dict[str, dict[str, Any]]


def read_study(path: str | Path) -> Study:
    """
    Reads a study file. Its keys are `recipe`, `seeds`, `max_minutes`, `start`, `train`, `eval`, `arms`, `comparisons`,
    and `render` (mini LPR4M folders to render first, with their arguments). Values are passed on as written.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: invalid YAML, an unknown key, a value of the wrong kind or an unknown arm; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no study {path}: name a YAML file such as configs/ablation_mini.yaml.")
    try:
        # All scalars as text, so that `no`, `1e-3` and `007` reach the command line as written.
        content = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the study {path} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ValueError(f"the study {path} nests its values too deeply: write at most a few levels.") from None
    _check_keys(content, _KEYS, f"the study {path}")
    for key in ("recipe", "arms"):
        if not content.get(key):
            raise ValueError(f"the study {path} lacks {key!r}: add it.")
    where = f"the study {path}"
    seeds = _seeds(content.get("seeds", ["0", "1", "2"]), where)
    arms = _arms(content["arms"], path, seeds)
    comparisons = content.get("comparisons") or []
    if not isinstance(comparisons, list):
        raise ValueError(f"{where}: comparisons must be a list of [ARM/SCORE, ARM/SCORE]")
    render = {key: _settings(content["render"], key, f"{where}: render") for key in _mapping(content, "render", where)}
    return Study(
        recipe=_text(content, "recipe", where),
        seeds=seeds,
        max_minutes=read_minutes(content.get("max_minutes", "75"), f"{where}: max_minutes"),
        start=_settings(content, "start", where),
        train=_settings(content, "train", where),
        eval=_settings(content, "eval", where),
        arms=arms,
        comparisons=[_comparison(entry, arms, path) for entry in comparisons],
        render=render,
    )


def _arms(content: Any, path: Path, study_seeds: list[int]) -> dict[str, Arm]:
    arms: dict[str, Arm] = {}
    for name, arm in _mapping({"arms": content}, "arms", f"the study {path}").items():
        where, arm = f"arm {name!r} of {path}", arm or {}
        if name in ("", ".", "..", "start") or "/" in name or "\\" in name:
            raise ValueError(f"{where}: the name is used for a folder: choose a plain name other than 'start'")
        _check_keys(arm, _ARM_KEYS, where)
        train, evaluate = _settings(arm, "train", where), _settings(arm, "eval", where)
        model_of = _text(arm, "model_of", where) if "model_of" in arm else None
        if model_of is not None and (train or model_of not in arms or arms[model_of].model_of):
            raise ValueError(f"{where}: model_of must name an earlier arm that trains, without train")
        known = study_seeds if model_of is None else list(arms[model_of].seeds)
        seeds = _seeds(arm["seeds"], where) if "seeds" in arm else known
        if unknown := [seed for seed in seeds if seed not in known]:
            whose = "the study" if model_of is None else f"arm {model_of!r}"
            raise ValueError(f"{where}: {whose} has no seed {unknown[0]}, but {', '.join(map(str, known))}")
        arms[name] = Arm(name, train, evaluate, model_of, _text(arm, "note", where), tuple(seeds))
    return arms


def _text(content: Mapping[str, Any], key: str, where: str) -> str:
    value = content.get(key, "")
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be text, not {value!r}")
    return value


def _mapping(content: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {key} must be a mapping of names to values, not {value!r}")
    return value


def _settings(content: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """A mapping whose values, at any depth, are texts or lists of texts, which a command line can take."""
    value = _mapping(content, key, where)
    for name, part in flatten(value).items():
        if isinstance(part, list) and not all(isinstance(item, str) for item in part):
            raise ValueError(f"{where}: {key}: {name} must be one value or a list of plain values, not {part!r}")
    return value


def _seeds(content: Any, where: str) -> list[int]:
    try:
        seeds = [int(seed) for seed in content] if isinstance(content, list) else []
    except (TypeError, ValueError):
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"{where}: seeds must be at least one whole number, each once, such as [0, 1], not {content!r}"
        )
    return seeds


def read_minutes(content: Any, where: str) -> float:
    """
    Reads a time limit in minutes.

    Raises:
        ValueError: it is not a number of at least 0; the message starts with `where`.
    """
    try:
        minutes = float(content)
    except (TypeError, ValueError):
        minutes = math.nan
    if not minutes >= 0:
        raise ValueError(f"{where} must be a number of at least 0, not {content!r}")
    return minutes


def _check_keys(content: Any, known: set[str], where: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a mapping with some of {', '.join(sorted(known))}")
    unknown = sorted(set(content) - known)
    if unknown:
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; it may have {', '.join(sorted(known))}")


def _comparison(entry: Any, arms: Mapping[str, Arm], path: Path) -> Comparison:
    if not isinstance(entry, list) or len(entry) != 2:
        raise ValueError(f"the study {path}: a comparison is [ARM/SCORE, ARM/SCORE], not {entry!r}")
    sides = []
    for side in entry:
        name, _, kind = str(side).partition("/")
        if name not in arms or kind not in KINDS:
            raise ValueError(f"the study {path}: {side!r} is not ARM/SCORE; SCORE is one of {', '.join(KINDS)}")
        sides.append((name, kind))
    return Comparison(*sides)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names: `{"model": {"use_decoder": "true"}}` -> `{"model.use_decoder": "true"}`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def to_arguments(*settings: Mapping[str, Any]) -> list[str]:
    """Command-line arguments of settings; later settings override earlier ones of the same name."""
    merged: dict[str, Any] = {}
    for part in settings:
        merged |= flatten(part)
    return [
        text
        for name, value in merged.items()
        for text in [f"--{name}", *(value if isinstance(value, list) else [value])]
    ]
