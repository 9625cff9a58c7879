"""Index from a frame id or image id to the file, or the bytes of a tar shard, that img2dataset fetched.

The published url lists hold one address per line, whose last part is the frame id or image id. img2dataset names
files by a running number. It keeps the address in a json file beside each picture and in one parquet file per shard.
The index is a SQLite table from id to place, filled shard by shard.
"""

import hashlib
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet
from tqdm.auto import tqdm

from processing_rice.media_rice import tar_member_path

from .. import folders, parsing
from ..commands import one_line
from ..prepare_shards import UnsafeTar, tar_members

_STATS_FILE = re.compile(r"(\d+)_stats\.json")
_SHARD = re.compile(r"(\d+)(\.tar)?")
_META_COLUMNS = ["url", "key", "status", "original_width", "original_height"]
_TABLES = """
CREATE TABLE IF NOT EXISTS shard (number INTEGER PRIMARY KEY, path TEXT UNIQUE, state TEXT);
CREATE TABLE IF NOT EXISTS media (id TEXT PRIMARY KEY, shard INTEGER, name TEXT, start INTEGER, size INTEGER,
    width INTEGER, height INTEGER) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one picture lies.

    Attributes:
        path: a file, or a member of a tar file in the notation of `processing_rice.media_rice.read_media`.
        original_size: (width, height) before img2dataset resized the picture, or None. Pixel boxes refer to this size.
    """

    path: str
    original_size: tuple[int, int] | None


def id_of_url(url: object) -> str:
    """Return the frame id or image id at the end of an address of the url lists.

    Raises:
        ValueError: the address does not end in an id (without file and line, which the caller adds).
    """
    if not isinstance(url, str):
        raise ValueError(f"the url {url!r} is not a string")
    name = unquote(urlsplit(url.strip()).path).rpartition("/")[2]
    stem, suffix = os.path.splitext(name)
    return parsing.check_name(stem if suffix.lower() in folders.PICTURE_SUFFIXES else name, f"id in the url {url!r}")


def shard_folders(root: str) -> list[str]:
    """Return img2dataset's output folders in ``ROOT/img2dataset``: those with a ``00000_stats.json`` or the like."""
    top = os.path.join(root, "img2dataset")
    return [folder for folder in [top, *folders.list_paths(top)] if any(list_stats(folder))]


def list_stats(folder: str) -> list[str]:
    """Return the sorted paths of the ``*_stats.json`` that img2dataset writes when a shard is complete."""
    return [os.path.join(folder, name) for name in _list(folder) if _STATS_FILE.fullmatch(name)]


def _list(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def index_path(cache_dir: str, folders: Sequence[str]) -> str:
    """Return the path of the index of these folders, below ``cache_dir``."""
    key = hashlib.sha256("\0".join(os.path.realpath(folder) for folder in folders).encode("utf-8", "surrogateescape"))
    return os.path.join(cache_dir, "lpr4m_media", f"{key.hexdigest()[:16]}.sqlite")


class MediaIndex:
    """Places of pictures by id.

    After `update`, ``problems`` lists ``(shard, reason)`` of unfinished and damaged shards, which are left out.

    Args:
        path: the SQLite file; created if it does not exist.

    Raises:
        ValueError: the file is not a media index.
    """

    def __init__(self, path: str):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.path = path
        self.problems: list[tuple[str, str]] = []
        # Several processes may update the same index; one does, and the others wait.
        self._database = sqlite3.connect(path, timeout=86400, isolation_level=None)
        try:
            self._database.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is not a media index ({error}); delete the file.") from None

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def update(self, folders: Iterable[str]) -> None:
        """Index new and changed shards, and remove those that no longer exist.

        Raises:
            ValueError: a shard holds a link or a name that leads elsewhere; the message names it.
        """
        self.problems = []
        found = dict(shard for folder in folders for shard in self._find_shards(folder))
        with closing(self._database.cursor()) as cursor:
            cursor.execute("BEGIN IMMEDIATE")
            known = {path: (number, state) for number, path, state in cursor.execute("SELECT * FROM shard")}
            for path, (number, state) in known.items():
                if found.get(path) != state:
                    cursor.execute("DELETE FROM media WHERE shard = ?", (number,))
                    cursor.execute("DELETE FROM shard WHERE number = ?", (number,))
            cursor.execute("COMMIT")
            new = [path for path, state in found.items() if known.get(path, (0, ""))[1] != state]
            for path in tqdm(new, desc="Indexing shards", unit="shard", disable=len(new) < 8):
                self._add_shard(cursor, path, found[path])

    def _add_shard(self, cursor: sqlite3.Cursor, path: str, state: str) -> None:
        cursor.execute("BEGIN IMMEDIATE")
        try:
            # Another process may have added it already.
            cursor.execute("INSERT OR IGNORE INTO shard (path, state) VALUES (?, ?)", (path, state))
            if cursor.rowcount:
                number = cursor.lastrowid
                rows = ((row[0], number, *row[1:]) for row in read_shard(path))
                cursor.executemany("INSERT OR IGNORE INTO media VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            cursor.execute("COMMIT")
        except DamagedShard as error:
            cursor.execute("ROLLBACK")
            self.problems.append((path, str(error)))
        except BaseException:
            cursor.execute("ROLLBACK")
            raise

    def _find_shards(self, folder: str) -> Iterator[tuple[str, str]]:
        """Yield ``(path, state)`` of the complete shards of a folder, and record the others as problems."""
        names = _list(folder)
        whole = {match[1] for match in map(_STATS_FILE.fullmatch, names) if match}
        for name in names:
            match = _SHARD.fullmatch(name)
            if not match:
                continue
            path = os.path.join(folder, name)
            if os.path.islink(path):
                folders.check_link(path, folder)
            if match[1] not in whole:
                self.problems.append((path, "unfinished: run fetch again"))
                continue
            stats = os.path.join(folder, f"{match[1]}_stats.json")
            yield path, parsing.fingerprint([stats, path])

    def find(self, ids: Sequence[str]) -> dict[str, Place]:
        """Return the places of the fetched pictures among ``ids``."""
        places: dict[str, Place] = {}
        for start in range(0, len(ids), 500):
            part = ids[start : start + 500]
            condition = f"id IN ({', '.join('?' * len(part))})"
            places.update(self._select(condition, part))
        return places

    def find_frames(self, clip_id: str) -> dict[str, Place]:
        """Return the places of the fetched frames of a clip, by frame id."""
        return dict(self._select("id > ? AND id < ?", (f"{clip_id}-", f"{clip_id}.")))

    def tar_files(self) -> list[str]:
        """Return the paths of the tar shards, sorted."""
        paths = (path for (path,) in self._database.execute("SELECT path FROM shard ORDER BY path"))
        return [path for path in paths if path.endswith(".tar")]

    def _select(self, condition: str, values: Sequence[str]) -> Iterator[tuple[str, Place]]:
        query = "SELECT id, path, name, start, size, width, height FROM media JOIN shard ON shard = number WHERE "
        for media_id, shard, name, start, size, width, height in self._database.execute(query + condition, values):
            path = tar_member_path(shard, start, size) if name is None else os.path.join(shard, name)
            yield media_id, Place(path, (width, height) if width and height else None)


class DamagedShard(ValueError):
    """A shard that cannot be read to its end."""


def read_shard(path: str) -> Iterator[tuple]:
    """Yield ``(id, file name or None, offset or None, size or None, original width, original height)`` of a shard.

    Args:
        path: a folder ``00000``, or a tar file ``00000.tar``. The addresses come from ``00000.parquet`` beside it
            if it exists, else from the json files inside.

    Raises:
        DamagedShard: the tar file, the parquet file or a json file is damaged.
        ValueError: the shard holds a link or a name that leads elsewhere.
    """
    is_tar = path.endswith(".tar")
    pictures, metas = _scan_tar(path) if is_tar else _scan_folder(path)
    parquet = f"{path.removesuffix('.tar')}.parquet"
    rows = _read_parquet(parquet) if os.path.isfile(parquet) else _read_json(path, metas)
    for url, key, width, height in rows:
        if key not in pictures:
            raise DamagedShard(f"holds no picture for {url}; delete its _stats.json and fetch it again")
        try:
            yield (id_of_url(url), *pictures[key], _pixels(width), _pixels(height))
        except ValueError as error:
            raise ValueError(f"{path}, key {key}: {error}; fetch the shard again from the published lists.") from None


def _scan_folder(path: str) -> tuple[dict[str, tuple], dict[str, str]]:
    pictures: dict[str, tuple] = {}
    metas: dict[str, str] = {}
    for file in folders.list_paths(path):
        key, suffix = os.path.splitext(os.path.basename(file))
        if suffix.lower() in folders.PICTURE_SUFFIXES:
            pictures[key] = (os.path.basename(file), None, None)
        elif suffix == ".json":
            metas[key] = file
    return pictures, metas


def _scan_tar(path: str) -> tuple[dict[str, tuple], dict[str, tuple[int, int]]]:
    pictures: dict[str, tuple] = {}
    metas: dict[str, tuple[int, int]] = {}
    try:
        for name, offset, size in tar_members(path):
            key, suffix = os.path.splitext(name)
            if suffix.lower() in folders.PICTURE_SUFFIXES:
                pictures[key] = (None, offset, size)
            elif suffix == ".json":
                metas[key] = (offset, size)
    except UnsafeTar:
        raise
    except ValueError as error:
        raise DamagedShard(str(error)) from None
    return pictures, metas


def _read_parquet(path: str) -> Iterator[tuple]:
    try:
        table = pyarrow.parquet.read_table(path, columns=_META_COLUMNS)
        columns = [table[name].to_pylist() for name in _META_COLUMNS]
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise DamagedShard(f"has an unreadable {os.path.basename(path)} ({one_line(error)}); fetch it again") from None
    for url, key, status, width, height in zip(*columns):
        if status == "success":
            yield url, key, width, height


def _read_json(path: str, metas: dict) -> Iterator[tuple]:
    for key in sorted(metas):
        if isinstance(metas[key], str):
            where = metas[key]
            with open(where, "rb") as file:
                data = file.read()
        else:
            offset, size = metas[key]
            where = tar_member_path(path, offset, size)
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        try:
            meta = parsing.parse_json_object(data, where)
        except ValueError as error:
            raise DamagedShard(f"has a bad json file ({error})") from None
        if meta.get("status") == "success":
            yield meta.get("url"), key, meta.get("original_width"), meta.get("original_height")


def _pixels(value: object) -> int | None:
    """Return a side of a picture in pixels, or None; LPR4M's documentation writes it as a string."""
    text = str(value)
    return int(text) if text.isascii() and text.isdecimal() and 0 < len(text) < 7 else None
