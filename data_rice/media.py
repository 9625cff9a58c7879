"""The encoded bytes of a row's image entry, wherever they lie: in the row, in a file, or inside a tar shard.

A member of an uncompressed tar file is written as the path ``FILE.tar#OFFSET,SIZE``: one read at that place gives its
bytes, without opening the archive as such. Rows stay small and sortable, and nothing has to be unpacked.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

_TAR_MEMBER = re.compile(r"(?P<file>.+\.tar)#(?P<offset>[0-9]{1,15}),(?P<size>[0-9]{1,12})", re.DOTALL)


def tar_member_path(tar_file: str, offset: int, size: int) -> str:
    """Return the path of the ``size`` bytes at ``offset`` of ``tar_file``, as `read_media` reads it."""
    return f"{tar_file}#{offset},{size}"


def split_tar_member(path: str) -> tuple[str, int, int] | None:
    """Return ``(tar file, offset, size)`` of a path made by `tar_member_path`, or None for any other path."""
    match = _TAR_MEMBER.fullmatch(path)
    return (match["file"], int(match["offset"]), int(match["size"])) if match else None


def read_media(entry: Mapping[str, Any]) -> bytes:
    """Return the encoded bytes of an image entry ``{"path", "bytes"}``.

    Args:
        entry: ``bytes`` when the row carries them; else ``path``, a file or a member of a tar file
            (see `tar_member_path`).

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: it cannot be read, or the tar file ends before the member does.
        ValueError: the entry has neither bytes nor a path.
    """
    if entry.get("bytes") is not None:
        return entry["bytes"]
    path = entry.get("path")
    if not path:
        raise ValueError("The image entry has neither bytes nor a path; give it one of them.")
    member = split_tar_member(path)
    if member is None:
        with open(path, "rb") as file:
            return file.read()
    tar_file, offset, size = member
    # The size of the file first: a damaged path must not make `read` allocate what is not there.
    with open(tar_file, "rb") as file:
        if offset + size > os.fstat(file.fileno()).st_size:
            raise OSError(f"{path}: the tar file ends before this member does; fetch the shard again")
        file.seek(offset)
        return file.read(size)


def media_exists(path: str) -> bool:
    """Return whether the file, or the tar file that should hold the member, is there."""
    member = split_tar_member(path)
    return os.path.isfile(path if member is None else member[0])
