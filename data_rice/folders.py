"""What lies in a folder: its pictures in natural order, and by name what was left out.

One rule for all folders: hidden entries and those that operating systems, network drives and editors make are left
out; a picture is what has the suffix of a format that is read; and a link to a file or a folder may not lead out.
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
    """Return whether a file or folder is hidden, or was made by an operating system, a network drive or an editor."""
    if name.startswith((".", "~$")) or name.endswith("~") or (name.startswith("#") and name.endswith("#")):
        return True
    return name.lower() in _SYSTEM_NAMES


def is_picture_name(name: str) -> bool:
    """Return whether a file's name has the suffix of a picture that is read, in capitals or not."""
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def is_video_name(name: str) -> bool:
    """Return whether a file's name has the suffix of a video, in capitals or not."""
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def natural_key(name: str) -> tuple:
    """Sort key of a name by which 2 comes before 10, in the digits of any script; numbers may have any length."""
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
        # A circled or raised digit is a number by itself, whatever stands beside it.
        return f"\0{int(value)}\0"
    return character


@dataclass
class Listing:
    """
    Attributes:
        folder: what was looked through.
        pictures: paths in natural order; they may hold bytes that are no UTF-8, as `os.fsdecode` gives them.
        left_out: per reason the entries that were left out, relative to the folder.
    """

    folder: str
    pictures: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def note(self) -> str:
        """Return a sentence that counts and names what was left out, "" where that is nothing."""
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
        folder: where to look.
        below: also look into the folders below. A folder is read once, whatever links lead to it.

    Raises:
        FileNotFoundError, OSError: the folder is missing or cannot be opened.
        ValueError: a picture or folder is a link that leads out of ``folder``; the message names it.
    """
    root = os.fspath(folder)
    listing = Listing(root)
    real_folders: set[str] = set()
    # Links to folders come last, so that pictures are listed under the name of their own folder where that is below.
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
    The pictures below a folder as gallery rows, named after their place in it, and a note on what was left out.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a link leads out of the folder.
    """
    listing, rows = list_pictures(folder, below=True), []
    for path in map(Path, listing.pictures):
        # No table holds bytes that are no UTF-8, and a title is for people.
        title = os.fsencode(path.stem).decode("utf-8", "replace").replace("_", " ")
        image_id = path_to_text(path.relative_to(folder).as_posix())
        rows.append({"image_id": image_id, "title": title, "image": str(path)})
    if not rows:
        left_out = f" ({listing.note()})" if listing.left_out else ""
        raise FileNotFoundError(
            f"{folder} has neither pictures nor the files of a data set{left_out}; docs/data.md shows what a shop "
            "looks like."
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
    # A pipe or a device would be waited for; a link to nothing is a picture that is missing, which its reader tells.
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
    """Return the sorted names of the pictures (or of the folders) right inside ``folder``, [] if it is missing.

    Raises:
        ValueError: one of them is a link that leads out of ``folder``, and out of ``root`` where that is given, or has
            a name that is no UTF-8.
    """
    names = []
    for entry in _own_entries(folder):
        if _is_folder(entry) if folders else is_picture_name(entry.name) and not _is_folder(entry):
            if entry.is_symlink():
                check_link(entry.path, folder, root or folder)
            if parsing.SURROGATE.search(entry.name):
                raise ValueError(f"{path_to_text(entry.path)}: the name is no UTF-8; rename the file or folder.")
            names.append(entry.name)
    return names


def list_paths(folder: str | os.PathLike) -> list[str]:
    """Return the sorted paths of everything right inside ``folder``, [] if it is missing.

    Raises:
        ValueError: one of them is a link that leads out of ``folder``.
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
    """Refuse a path whose real place lies in none of ``roots``.

    Raises:
        ValueError: it leads elsewhere; the message names it.
    """
    real = os.path.realpath(path)
    for root in roots:
        top = os.path.realpath(root)
        if real == top or real.startswith(top.rstrip(os.sep) + os.sep):
            return
    raise ValueError(
        f"{path_to_text(path)} is a link that leads out of {path_to_text(roots[-1])}; put the files themselves there."
    )
