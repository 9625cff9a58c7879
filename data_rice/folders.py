"""Lists the pictures of a folder in natural order, and names the entries that are left out.

All folders follow one rule. Hidden entries and those of operating systems, network drives and editors are left out. A
picture is a file with the suffix of a supported format. A link may not lead out of the folder.
"""

import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import parsing
from .paths import path_to_text

PICTURE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .pjpeg .pjp .mpo .png .apng .webp .gif .bmp .dib .tif .tiff .avif .avifs .ppm .pgm .pbm "
    ".pnm .pfm".split()
)

VIDEO_SUFFIXES = frozenset(".mp4 .m4v .mov .mkv .webm .avi .flv .wmv .mpg .mpeg .ts .mts .m2ts .3gp .ogv".split())

# Names without a leading dot, in lower case.
_SYSTEM_NAMES = frozenset(
    {
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "icon\r"),
        *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000", "lost+found", "lost.dir"),
        *("__macosx", "network trash folder", "temporary items", "__pycache__"),
        *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "@sharesnap", "#recycle", "#snapshot"),
    }
)

NOT_A_PICTURE = "no suffix of a picture"
SYSTEM = "hidden or made by the system"
FOLDERS = "folders are not looked into"
UNREADABLE = "cannot be opened"
LISTED = "leads to a folder that is listed already"
_NAMED = 3


def is_system_entry(name: str) -> bool:
    """Return whether an entry is hidden, or was made by an operating system, a network drive or an editor."""
    if name.startswith((".", "~$")) or name.endswith("~") or (name.startswith("#") and name.endswith("#")):
        return True
    return name.lower() in _SYSTEM_NAMES


def is_picture_name(name: str) -> bool:
    """Return whether a file's name has the suffix of a supported picture format, in any case."""
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def is_video_name(name: str) -> bool:
    """Return whether a file's name has the suffix of a video, in any case."""
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def natural_key(name: str) -> tuple:
    """Sort key that puts 2 before 10, with digits of any script and numbers of any length."""
    plain = name if name.isascii() else "".join(map(_plain_digits, name))
    parts: list = re.split(r"([0-9]+)", plain)
    for i in range(1, len(parts), 2):
        digits = parts[i].lstrip("0")
        parts[i] = (len(digits), digits)
    return parts, name


def _plain_digits(character: str) -> str:
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if unicodedata.category(character) == "No" and float(value := unicodedata.numeric(character)).is_integer():
        # A circled or superscript digit is a number by itself, separate from its neighbours.
        return f"\0{int(value)}\0"
    return character


@dataclass
class Listing:
    """
    Attributes:
        folder: the folder that was listed.
        pictures: paths in natural order; they may hold bytes that are not UTF-8, as `os.fsdecode` returns them.
        left_out: reason -> the entries that were left out, relative to the folder.
    """

    folder: str
    pictures: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def note(self) -> str:
        """Return a sentence that counts and names the entries left out, "" if there are none."""
        if not self.left_out:
            return ""
        total = sum(map(len, self.left_out.values()))
        parts = []
        for reason, names in self.left_out.items():
            shown = ", ".join(map(path_to_text, sorted(names, key=natural_key)[:_NAMED]))
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            parts.append(f"{shown}{more} ({reason})")
        what = "1 entry was" if total == 1 else f"{total} entries were"
        return f"{path_to_text(self.folder)}: {what} left out: {'; '.join(parts)}"


def list_pictures(folder: str | os.PathLike, below: bool = False) -> Listing:
    """Find the pictures of a folder.

    Args:
        folder: the folder to list.
        below: also list its subfolders. A folder is read once, even if several links lead to it.

    Raises:
        FileNotFoundError, OSError: the folder is missing or cannot be opened.
        ValueError: a picture or subfolder is a link that leads out of ``folder``; the message names it.
    """
    root = os.fspath(folder)
    listing = Listing(root)
    real_folders: set[str] = set()
    # Links to folders come last, so that a picture is listed under its real folder where that is listed too.
    places, links = [root], []
    while places or links:
        place = places.pop() if places else links.pop(0)
        real = os.path.realpath(place)
        if real in real_folders:
            _leave_out(listing, LISTED, place)
            continue
        real_folders.add(real)
        try:
            entries = _entries(place)
        except OSError:
            if place == root:
                raise
            _leave_out(listing, UNREADABLE, place)
            continue
        for entry in entries:
            if is_system_entry(entry.name):
                _leave_out(listing, SYSTEM, entry.path)
            elif not _is_folder(entry):
                _take_file(listing, entry)
            elif not below:
                _leave_out(listing, FOLDERS, entry.path)
            elif entry.is_symlink():
                check_link(entry.path, root)
                links.append(entry.path)
            else:
                places.append(entry.path)
    listing.pictures.sort(key=natural_key)
    return listing


def picture_rows(folder: str | os.PathLike) -> tuple[list[dict], str]:
    """
    Return the pictures below a folder as gallery rows, named after their relative paths, and `Listing.note`.

    Raises:
        FileNotFoundError: the folder holds no picture.
        ValueError: a link leads out of the folder.
    """
    listing, rows = list_pictures(folder, below=True), []
    for path in map(Path, listing.pictures):
        # Tables cannot store bytes that are not UTF-8, and people read titles.
        title = os.fsencode(path.stem).decode("utf-8", "replace").replace("_", " ")
        image_id = path_to_text(path.relative_to(folder).as_posix())
        rows.append({"image_id": image_id, "title": title, "image": str(path)})
    if not rows:
        left_out = f" ({listing.note()})" if listing.left_out else ""
        raise FileNotFoundError(
            f"{folder} holds neither pictures nor the files of a data set{left_out}; docs/data.md shows the layout "
            "of a shop."
        )
    return rows, listing.note()


def _entries(folder: str | os.PathLike) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _leave_out(listing: Listing, reason: str, path: str) -> None:
    listing.left_out.setdefault(reason, []).append(os.path.relpath(path, listing.folder))


def _is_folder(entry: os.DirEntry) -> bool:
    # A link that leads to itself makes `DirEntry.is_dir` raise.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _take_file(listing: Listing, entry: os.DirEntry) -> None:
    # Reading a pipe or a device would block. A broken link is kept: its reader reports the missing picture.
    is_link = entry.is_symlink()
    special = not (os.path.isfile(entry.path) or not os.path.exists(entry.path)) if is_link else not entry.is_file()
    if special or not is_picture_name(entry.name):
        _leave_out(listing, NOT_A_PICTURE, entry.path)
        return
    if is_link:
        check_link(entry.path, listing.folder)
    listing.pictures.append(entry.path)


def list_names(
    folder: str | os.PathLike, *, folders: bool = False, root: str | os.PathLike | None = None
) -> list[str]:
    """Return the sorted names of the pictures (or of the folders) directly in ``folder``, [] if it is missing.

    Raises:
        ValueError: an entry is a link that leads out of ``folder`` (and out of ``root`` if given), or its name is not
            UTF-8.
    """
    names = []
    for entry in _own_entries(folder):
        if _is_folder(entry) if folders else is_picture_name(entry.name) and not _is_folder(entry):
            if entry.is_symlink():
                check_link(entry.path, folder, root or folder)
            if parsing.SURROGATE.search(entry.name):
                raise ValueError(f"{path_to_text(entry.path)}: the name is not UTF-8; rename the file or folder.")
            names.append(entry.name)
    return names


def list_paths(folder: str | os.PathLike) -> list[str]:
    """Return the sorted paths of all entries directly in ``folder``, [] if it is missing.

    Raises:
        ValueError: an entry is a link that leads out of ``folder``.
    """
    paths = []
    for entry in _own_entries(folder):
        if entry.is_symlink():
            check_link(entry.path, folder)
        paths.append(entry.path)
    return paths


def _own_entries(folder: str | os.PathLike) -> Iterator[os.DirEntry]:
    try:
        entries = _entries(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from (entry for entry in entries if not is_system_entry(entry.name))


def check_link(path: str | os.PathLike, *roots: str | os.PathLike) -> None:
    """Refuse a path that resolves to a place outside all ``roots``.

    Raises:
        ValueError: the path leads elsewhere; the message names it.
    """
    real = os.path.realpath(path)
    for root in roots:
        top = os.path.realpath(root)
        if real == top or real.startswith(top.rstrip(os.sep) + os.sep):
            return
    raise ValueError(
        f"{path_to_text(path)} is a link that leads out of {path_to_text(roots[-1])}; put the files themselves there."
    )
