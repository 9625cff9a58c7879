"""What is a path on this machine, and texts without any."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import PureWindowsPath

# A path inside a text: from the root, the home or a drive, or of at least three parts; no address, and no R@1/R@5.
_ROOTED = r"(?:file://)?(?:(?:~[\w-]*|\.{1,2}|[A-Za-z]:)?[/\\])[^\s'\",;()\[\]{}<>|]+"
_RELATIVE = r"(?:[\w.~-]+[/\\]){2,}[\w.~-]+"
_PATH = re.compile(rf"(?<![\w:/\\.@-])(?:{_ROOTED}|{_RELATIVE})")


def is_local(name: str) -> bool:
    """Whether the name of a model or data set is a path on this machine rather than a plain name or an id."""
    return bool(name) and (os.path.exists(name) or name.count("/") > 1 or _is_rooted(name))


def _is_rooted(text: str) -> bool:
    return text.startswith((".", "/", "~", "\\", "file:")) or PureWindowsPath(text).drive != ""


def last_part(path: str) -> str:
    """The name at a path's end, which is all that others may know of it."""
    # It knows both kinds of slash.
    return PureWindowsPath(path).name


def without_paths(text: str, known: Iterable[str] = ()) -> str:
    """
    A text in which only the last part is left of every path.

    Args:
        text: A path by itself, which may have blanks in it, or words with paths among them.
        known: Paths that are known to be some, which may have blanks in them anywhere.
    """
    if _is_rooted(text) or (os.path.exists(text) and "/" in text):
        return last_part(text)
    return _PATH.sub(lambda match: last_part(match[0]), cut(text, known))


def cut(text: str, known: Iterable[str]) -> str:
    """A text in which of known paths the last part is left."""
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(path, last_part(path))
    return text


def paths_in(value) -> set[str]:
    """The texts of a JSON value that are rooted paths as a whole."""
    if isinstance(value, Mapping):
        return set().union(*(paths_in(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(paths_in(item) for item in value))
    return {value} if isinstance(value, str) and len(value) > 1 and _is_rooted(value) else set()


def portable(value, known: Iterable[str] = ()):
    """A JSON value in which no text holds a path, keys included; see `without_paths`."""
    if isinstance(value, Mapping):
        return {without_paths(key, known): portable(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item, known) for item in value]
    return without_paths(value, known) if isinstance(value, str) else value
