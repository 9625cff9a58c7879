"""Recognises local paths and removes them from texts that are published."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import PureWindowsPath

# A path inside a text: rooted (also at the home folder or a drive), or with at least three parts. URLs and R@1/R@5 are
# no paths.
_ROOTED = r"(?:file://)?(?:(?:~[\w-]*|\.{1,2}|[A-Za-z]:)?[/\\])[^\s'\",;()\[\]{}<>|]+"
_RELATIVE = r"(?:[\w.~-]+[/\\]){2,}[\w.~-]+"
_PATH = re.compile(rf"(?<![\w:/\\.@-])(?:{_ROOTED}|{_RELATIVE})")


def is_local(name: str) -> bool:
    """Whether the name of a model or data set is a path on this machine rather than a plain name or an id."""
    return bool(name) and (os.path.exists(name) or name.count("/") > 1 or _is_rooted(name))


def _is_rooted(text: str) -> bool:
    return text.startswith((".", "/", "~", "\\", "file:")) or PureWindowsPath(text).drive != ""


def last_part(path: str) -> str:
    """The last part of a path, the only part that is published."""
    # PureWindowsPath splits at both kinds of slash.
    return PureWindowsPath(path).name


def without_paths(text: str, known: Iterable[str] = ()) -> str:
    """
    A text in which every path is replaced by its last part.

    Args:
        text: A single path, which may contain spaces, or words with paths among them.
        known: Known paths, which may contain spaces.
    """
    if _is_rooted(text) or (os.path.exists(text) and "/" in text):
        return last_part(text)
    return _PATH.sub(lambda match: last_part(match[0]), cut(text, known))


def cut(text: str, known: Iterable[str]) -> str:
    """A text in which known paths are replaced by their last part."""
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(path, last_part(path))
    return text


def paths_in(value) -> set[str]:
    """The strings of a JSON value that are rooted paths."""
    if isinstance(value, Mapping):
        return set().union(*(paths_in(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(paths_in(item) for item in value))
    return {value} if isinstance(value, str) and len(value) > 1 and _is_rooted(value) else set()


def portable(value, known: Iterable[str] = ()):
    """A JSON value without paths in its strings and keys; see `without_paths`."""
    if isinstance(value, Mapping):
        return {without_paths(key, known): portable(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item, known) for item in value]
    return without_paths(value, known) if isinstance(value, str) else value
