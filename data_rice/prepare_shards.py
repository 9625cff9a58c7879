"""Shard files of prepared rows: Parquet as `datasets` writes it, and tar files in the layout of webdataset."""

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence

import datasets
import pyarrow
import pyarrow.parquet

from processing_rice.media_rice import tar_member_path

from . import parsing
from .commands import one_line

# A row may hold a megabyte of pictures. Readers load whole row groups, and mix as many as fit into memory.
_ROW_GROUP = 16


def write_shard(path: str, rows: Sequence[tuple[int, dict]], features: datasets.Features) -> None:
    """Write ``(row number, row)`` with pictures as bytes; the suffix ``.parquet`` or ``.tar`` decides the format."""
    if path.endswith(".tar"):
        _write_tar(path, rows, features)
        return
    columns = {name: [row[name] for _, row in rows] for name in features}
    table = datasets.Dataset.from_dict(columns, features=features).data.table
    pyarrow.parquet.write_table(table, path, row_group_size=_ROW_GROUP, write_page_checksum=True)


def _write_tar(path: str, rows: Sequence[tuple[int, dict]], features: datasets.Features) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, row in rows:
            key = f"{number:09d}"
            row = {name: row[name] for name in features}
            if "frames" in row:
                row["frames"] = [
                    _add_picture(archive, f"{key}.frame{position:04d}", frame)
                    for position, frame in enumerate(row["frames"])
                ]
            if "image" in row:
                row["image"] = _add_picture(archive, f"{key}.image", row["image"])
            _add(archive, f"{key}.json", json.dumps(row, ensure_ascii=False, allow_nan=False).encode())


def _add_picture(archive: tarfile.TarFile, name: str, entry: dict) -> str | dict:
    if entry["bytes"] is None:
        return entry
    member = name + os.path.splitext(entry["path"])[1]
    _add(archive, member, entry["bytes"])
    return member


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def read_shard_rows(files: Sequence[str], state: object = None) -> Iterator[dict]:
    """Yield the rows of tar shards; pictures are paths into the tar file, see `processing_rice.media_rice.read_media`.

    Args:
        files: paths of the shards.
        state: not used; it makes a cache of the rows follow the files.

    Raises:
        ValueError: a shard is damaged, or holds a link or a name that leads elsewhere; the message names it.
    """
    for path in files:
        places: dict[str, str] = {}
        for name, offset, size in tar_members(path):
            if not name.endswith(".json"):
                places[name] = tar_member_path(path, offset, size)
                continue
            with open(path, "rb") as file:
                file.seek(offset)
                row = parsing.parse_json_object(file.read(size), f"{path}, member {name}")
            try:
                if "frames" in row:
                    row["frames"] = [_entry(frame, places) for frame in row["frames"]]
                if "image" in row:
                    row["image"] = _entry(row["image"], places)
            except KeyError as error:
                raise ValueError(f"{path}: the member {error} is missing; run prepare again.") from None
            places.clear()
            yield row


def check_parquet(path: str) -> None:
    """Check that a Parquet file is complete.

    Raises:
        ValueError: it is damaged; the message names it.
    """
    try:
        pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({one_line(error)}); delete it and run prepare again.") from None


def _entry(value: str | dict, places: dict[str, str]) -> dict:
    return {"bytes": None, "path": places[value]} if isinstance(value, str) else value


def tar_members(path: str) -> Iterator[tuple[str, int, int]]:
    """Yield ``(name, offset, size)`` of the files in an uncompressed tar file.

    Raises:
        ValueError: it holds a link, a folder or a name that leads elsewhere, or is damaged; the message names it.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile() or "/" in member.name or "\\" in member.name:
                    raise UnsafeTar(
                        f"{path}: the member {member.name!r} is a link, a folder or a path, which is not allowed in a "
                        "shard; fetch or prepare the shard again."
                    )
                # Without this, tarfile keeps every header of the archive in memory.
                archive.members = []
                # A negative size would send the reader backwards in an endless loop.
                if member.size < 0 or member.offset_data + member.size > os.path.getsize(path):
                    raise tarfile.ReadError("unexpected end of data")
                yield member.name, member.offset_data, member.size
    except UnsafeTar:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: damaged tar file ({error}); delete it and fetch or prepare it again.") from None


class UnsafeTar(ValueError):
    """A tar file with members that could lead out of its folder."""
