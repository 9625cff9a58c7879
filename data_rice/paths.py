"""Paths that annotations name, which must stay below their data folder, and paths as text."""

import os
import re
import unicodedata
from collections.abc import Callable
from os import path as osp

from . import parsing


def path_to_text(path: str | os.PathLike) -> str:
    r"""Return a path as text that can be printed and stored, although a file may have any bytes for its name.

    In a name that is no UTF-8 each byte beyond ASCII becomes ``\xc8``. A backslash that would read as one of these
    becomes ``\x5c``, so that `text_to_path` gives the path back and no two files have one text. Other paths stay as
    they are.
    """
    text = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\x5c", os.fspath(path))
    return "/".join(_escape(name) if parsing.SURROGATE.search(name) else name for name in text.split("/"))


def _escape(name: str) -> str:
    try:
        data = os.fsencode(name)
    except UnicodeEncodeError:
        # Halves of surrogate pairs that stand for no byte; no file has such a name.
        data = name.encode("utf-8", "surrogatepass")
    try:
        # What is text after all, where the locale knows ASCII alone.
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(chr(byte) if byte < 0x80 else f"\\x{byte:02x}" for byte in data)


def text_to_path(text: str) -> str:
    """Return the path of which `path_to_text` made ``text``, as `open` takes it."""
    pattern = rb"\\x([89a-f][0-9a-f]|5c)"
    return os.fsdecode(re.sub(pattern, lambda match: bytes.fromhex(match[1].decode()), text.encode()))


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _uncased(name: str) -> str:
    return _composed(name).casefold()


class MediaRoot:
    """Turns paths that annotations name into absolute ones; refuses those that lead out of the folder.

    A path that is not there as it is written may have been written elsewhere: with the backslashes of Windows, or with
    accents as one character where the disk has two (the Unicode forms NFC and NFD). Then that file is meant.

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
        """Return the absolute path of ``value``, whether or not anything lies there.

        Args:
            value: what the annotation names.
            what: a name for it, such as "image path", for the message.

        Raises:
            ValueError: it is no relative path, or it leads out of the folder, if only through a link (without file and
                line, which the caller adds).
        """
        path = osp.join(self.root, parsing.check_relative_path(value, what))
        if not osp.lexists(path):
            path = self._respell(value)
        folder = osp.dirname(path)
        # Resolving every path of a large folder takes minutes; its folders are few.
        if folder not in self._folders:
            self._folders[folder] = self._inside(folder)
        if not self._folders[folder] or (osp.islink(path) and not self._inside(path)):
            raise ValueError(f"the {what} {value!r} leads out of the data folder through a link; put the files there")
        return path

    def near(self, path: str) -> str | None:
        """Return what is in the folder where ``path`` is not, relative to the root and but for capitals the same."""
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
        """Go down a path part by part, by the names as they are and else by what has the same ``form``."""
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
        """Form -> name of a folder's entries, listed once: a folder may hold hundreds of thousands."""
        if (form, folder) not in self._names:
            try:
                names = sorted(os.listdir(folder), reverse=True)
            except OSError:
                names = []
            self._names[form, folder] = {form(name): name for name in names}
        return self._names[form, folder]
