"""results.json: its fields, reading with a check of each field, and a version without local paths."""

import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from data_rice.commands import one_line
from data_rice.parsing import is_number, read_json_object

from .privacy import cut, is_local, last_part, paths_in, portable

NUMBER, TEXT, FLAG = "a number", "a string", "true or false"
TEXTS = [TEXT]
EACH = "..."
"""Key of an object that may have any names."""

_RECALL = {EACH: NUMBER, "R@1_ci95": [NUMBER, NUMBER]}
FIELDS = {
    "protocol": {
        "split": TEXT,
        "gallery_scope": ("live", "all"),
        "gallery_images": TEXT,
        "num_galleries": NUMBER,
        "num_gallery_images": NUMBER,
        "task_sha256": TEXT,
        "duplicate_gallery_rows": NUMBER,
        "queries_without_relevant_in_gallery": NUMBER,
        "hit": TEXT,
        "denominator": TEXT,
        "tie_order": TEXT,
        "interval": TEXT,
        "boxes": TEXT,
        "num_frames": NUMBER,
        "rank_by": TEXT,
        "ranking_depth": NUMBER,
        "precision": TEXT,
        "text": {"used": FLAG, "score_weight": NUMBER},
        "asr": TEXT,
        "detector": {
            **{"detector": TEXT, "detector_sha256": TEXT, "threshold": NUMBER, "labels": TEXTS},
            **{"frames_per_clip": (NUMBER, "all"), "boxes": NUMBER, "frames": NUMBER},
        },
        "fusion": {
            **{"rule": TEXT, "text_weight": NUMBER, "source": TEXT, "source_words": TEXT, "at_edge": FLAG},
            **{"edge_words": TEXTS, "curve": [{EACH: NUMBER}], "text_curve": [{EACH: NUMBER}]},
            "alignment_curve": [{EACH: NUMBER}],
        },
    },
    "num_queries": NUMBER,
    "gallery_size": {"min": NUMBER, "median": NUMBER, "max": NUMBER},
    "scores": {EACH: _RECALL},
    "fusion_weight": NUMBER,
    "alignment_weight": NUMBER,
    "fused_text_weight": NUMBER,
    "baselines": {EACH: _RECALL},
    "failures": [{"method": TEXT, "kind": TEXT, "id": TEXT, "file": TEXT, "reason": TEXT}],
    "by": {EACH: {EACH: {"num_queries": NUMBER, EACH: _RECALL}}},
    "head_tail": {
        **{"head": TEXTS, "num_categories": NUMBER, "train_rows": NUMBER, "rule": TEXT, "missing": TEXT},
        "dataset": TEXT,
    },
    "model": TEXT,
    "model_sha256": TEXT,
    "baseline": {"name": TEXT, "model": TEXT},
    "parameters": NUMBER,
    "dataset": TEXT,
    "speed": {"device": TEXT, EACH: NUMBER},
    "versions": {EACH: TEXT},
    "seconds": NUMBER,
    "ties": {EACH: {"share": NUMBER, "R@1_ties_at_random": NUMBER}},
    "command": TEXT,
}
"""Every published field and its kind: one of the kinds above, a choice of words or a number, an object, or a list."""

_OR_NULL = {"fusion_weight", "alignment_weight", "fused_text_weight", "baseline", "baseline.model", "model_sha256"}
_OR_NULL |= {"parameters", "protocol.task_sha256", "protocol.num_frames", "protocol.text.score_weight"}
_OR_NULL |= {"protocol.fusion.text_weight"}
_OR_NULL |= {f"protocol.detector.{name}" for name in FIELDS["protocol"]["detector"]}

NEEDED = ("protocol", "num_queries", "gallery_size", "scores", "baselines", "model", "dataset", "versions")
NEEDED += ("failures", "ties", "command")
"""Fields that a card needs."""

_NEEDED_WITHIN = {
    "protocol": ("split", "gallery_scope", "num_galleries", "num_gallery_images", "boxes"),
    "gallery_size": ("min", "median", "max"),
}


def read_results(results_file: str | os.PathLike, needed: Iterable[str] = NEEDED) -> dict:
    """
    Reads a results.json. Unknown fields are dropped.

    Args:
        results_file: Path of the file.
        needed: Fields that it must have; by default those that a card shows.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, lacks a field, or a field has the wrong kind.
    """
    path = Path(results_file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: run eval_rice.py to make it.")
    try:
        results = read_json_object(path)
    except ValueError as error:
        reason = one_line(error).rstrip(".")
        raise ValueError(f"{path} is not a complete results file: run eval_rice.py again ({reason}).") from error
    missing = [name for name in needed if results.get(name) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: run eval_rice.py again.")
    allowed = _allowed(results, FIELDS, str(path), "")
    if needed is NEEDED:
        _check_shown(allowed, str(path))
    return allowed


def _check_shown(results: Mapping, file: str) -> None:
    """Raises `ValueError` for objects and tables with missing entries, which a card cannot show."""
    for part, names in _NEEDED_WITHIN.items():
        for name in names:
            _check(results[part].get(name) is not None, f"an object with {name}", file, part)
    columns = [name for name in next(iter(results["scores"].values()), {}) if name.startswith("R@")]
    rows = {f"scores.{kind}": values for kind, values in results["scores"].items()}
    rows |= {f"baselines.{name}": values for name, values in results["baselines"].items()}
    for attribute, groups in results.get("by", {}).items():
        kinds = list(next(iter(groups.values()), {}))
        for name, group in groups.items():
            same = kinds == list(group) and "num_queries" in kinds
            _check(same, "an object with the fields of the other groups", file, f"by.{attribute}.{name}")
            for kind in kinds:
                recall = kind == "num_queries" or "R@1" in group[kind]
                _check(recall, "an object with R@1", file, f"by.{attribute}.{name}.{kind}")
    _check("R@1" in columns, "a table with R@1", file, "scores")
    for where, values in rows.items():
        _check({name for name in columns if "_" not in name} <= set(values), "a complete table row", file, where)
    for kind, tie in results["ties"].items():
        _check("share" in tie, "an object with share", file, f"ties.{kind}")
    if any(results.get(name) is not None for name in ("fusion_weight", "alignment_weight")):
        words = (results["protocol"].get("fusion") or {}).get("source_words")
        _check(words is not None, "an object with source_words", file, "protocol.fusion")


def complete(results: Mapping) -> dict:
    """Results with the fields that an evaluation may omit, and without attributes that have no groups."""
    by = {attribute: groups for attribute, groups in (results.get("by") or {}).items() if groups}
    return {"fusion_weight": None, "alignment_weight": None, **results, "by": by}


def portable_results(results: Mapping, repo_id: str) -> dict:
    """Results for publication: known fields only, the model named by its id, and paths cut to their last part."""
    local, command = str(results["model"]), str(results.get("command", ""))
    known = paths_in(results) | paths_in(_words(command))
    command = cut(command, known - {local} if local in _words(command) else known)
    command = [repo_id if word == local else _short(word) for word in _words(command)]
    own = {"model": repo_id, "dataset": dataset_name(results), "command": shlex.join(command)}
    return portable(_allowed(results, FIELDS, "the results", "") | own, known)


def dataset_name(results: Mapping) -> str:
    """Name of the data set; for a local folder only its last part, since paths are private."""
    name = str(results["dataset"])
    return last_part(name) if is_local(name) else name


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        # An unclosed quotation mark.
        return command.split()


def _short(word: str) -> str:
    """A word of a command line, its path cut to the last part; `--name=path` too."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + (last_part(value) if "/" in value or "\\" in value else value)


def _allowed(value, kind, file: str, where: str):
    """A value without the fields that `kind` does not have. Raises `ValueError` for a value of another kind."""
    if value is None and where in _OR_NULL:
        return None
    if isinstance(kind, dict):
        _check(isinstance(value, Mapping), "an object", file, where)
        known = {name: kind.get(name, kind.get(EACH)) for name in value}
        inside = f"{where}." if where else ""
        return {n: _allowed(value[n], part, file, f"{inside}{n}") for n, part in known.items() if part is not None}
    if isinstance(kind, list):
        fits = isinstance(value, list) and len(kind) in (1, len(value))
        _check(fits, "a list" if len(kind) == 1 else f"a list of {len(kind)}", file, where)
        return [_allowed(item, kind[0], file, where) for item in value]
    if isinstance(kind, tuple):
        fits = value in kind if isinstance(value, str) else NUMBER in kind and is_number(value)
        _check(fits, f"one of {', '.join(kind)}", file, where)
    elif kind == NUMBER:
        _check(is_number(value), kind, file, where)
    else:
        _check(isinstance(value, str if kind == TEXT else bool), kind, file, where)
    return value


def _check(holds: bool, kind: str, file: str, where: str) -> None:
    if not holds:
        raise ValueError(f"{file}: {where} is not {kind}: run eval_rice.py again.")
