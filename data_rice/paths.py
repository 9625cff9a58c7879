"""Paths from annotations, which must stay below their data folder, and conversion of paths to text."""

import os
import re
import unicodedata
from collections.abc import Callable
from os import path as osp

from . import parsing


def path_to_text(path: str | os.PathLike) -> str:
    r"""Return a path as text that can be printed and stored; file names may hold any bytes.

    In a name that is not UTF-8, each byte beyond ASCII becomes an escape such as ``\xc8``. A backslash that would read
    as such an escape becomes ``\x5c``. So `text_to_path` restores the path, and different files have different texts.
    Other paths do not change.
    """
    text = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\x5c", os.fspath(path))
    return "/".join(_escape(name) if parsing.SURROGATE.search(name) else name for name in text.split("/"))


def _escape(name: str) -> str:
    try:
        data = os.fsencode(name)
    except UnicodeEncodeError:
        # Other halves of surrogate pairs represent no byte, so no file has such a name.
        data = name.encode("utf-8", "surrogatepass")
    try:
        # The name is valid text if the locale supports ASCII only.
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(chr(byte) if byte < 0x80 else f"\\x{byte:02x}" for byte in data)


def text_to_path(text: str) -> str:
    """Return the path, for `open`, that `path_to_text` converted to ``text``."""
    pattern = rb"\\x([89a-f][0-9a-f]|5c)"
    return os.fsdecode(re.sub(pattern, lambda match: bytes.fromhex(match[1].decode()), text.encode()))


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _uncased(name: str) -> str:
    return _composed(name).casefold()


class MediaRoot:
    """Converts paths from annotations to absolute paths, and refuses those that lead out of the folder.

    If a path does not exist as written, the file with the same name in another notation is used: with Windows
    backslashes, or with accents in the other Unicode form (NFC or NFD).

    Args:
        root: the data folder; it may itself be a link.
    """

    def __init__(self, root: str):
        self.root = osp.abspath(root)
        self._real_root = osp.realpath(root)
        self._folders: dict[str, bool] = {}
        self._names: dict[tuple[Callable, str], dict[str, str]] = {}

    def _inside(self, path: str) -> bool:
        real = osp.realpath(path)
        return real == self._real_root or real.startswith(self._real_root.rstrip("/\\") + osp.sep)

    def path(self, value: object, what: str) -> str:
        """Return the absolute path of ``value``, even if it does not exist.

        Args:
            value: the path in the annotation.
            what: its description for the message, such as "image path".

        Raises:
            ValueError: it is not a relative path, or it leads out of the folder, also through a link (without file
                and line, which the caller adds).
        """
        path = osp.join(self.root, parsing.check_relative_path(value, what))
        if not osp.lexists(path):
            path = self._respell(value)
        folder = osp.dirname(path)
        # Resolving every path of a large folder takes minutes, so only its few folders are resolved.
        if folder not in self._folders:
            self._folders[folder] = self._inside(folder)
        if not self._folders[folder] or (osp.islink(path) and not self._inside(path)):
            raise ValueError(f"the {what} {value!r} leads out of the data folder through a link; put the files there")
        return path

    def near(self, path: str) -> str | None:
        """Return an existing path, relative to the root, that differs from ``path`` only in case, or None."""
        found = self._find(osp.relpath(path, self.root), _uncased)
        return None if found is None else osp.relpath(found, self.root)

    def _respell(self, value: str) -> str:
        forward = value.replace("\\", "/")
        for spelling in dict.fromkeys((value, forward)):
            found = self._find(spelling, _composed)
            if found is not None:
                return found
        return osp.join(self.root, forward)

    def _find(self, value: str, form: Callable[[str], str]) -> str | None:
        """Follow a path part by part: by the exact name, else by an entry with the same ``form``."""
        place = self.root
        for part in value.split("/"):
            if part in ("", "."):
                continue
            if not osp.lexists(osp.join(place, part)):
                part = self._names_in(place, form).get(form(part))
                if part is None:
                    return None
            place = osp.join(place, part)
        return place

    def _names_in(self, folder: str, form: Callable[[str], str]) -> dict[str, str]:
        """Form -> name of a folder's entries; cached, because a folder may hold hundreds of thousands."""
        if (form, folder) not in self._names:
            try:
                names = sorted(os.listdir(folder), reverse=True)
            except OSError:
                names = []
            self._names[form, folder] = {form(name): name for name in names}
        return self._names[form, folder]
