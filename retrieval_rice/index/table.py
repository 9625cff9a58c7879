"""A shop's encoded images as a LanceDB table: one row per image, one version per write, all of one model.

The state of the whole table (`State`) is in the metadata of its first column. So it changes with the rows in one
commit, and an older version is restored with its own state. Each row has a checksum, because the file format has none.
"""

import json
import os
import random
import re
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from .calibration import Calibration

TABLE = "images"
FORMAT = 2
KEPT_FOR = timedelta(days=7)
"""How long versions can be restored, and files of a killed writer are kept."""

RECORD = ("image_id", "product_id", "title", "image", "live_ids")
"""Columns of an image in search results: `live_ids` are the livestreams that sell it, `image` is its path as text of
`data_rice.paths.path_to_text`."""

_OWN = ("reason", "position", "content")
_STATE, _CHECKSUM = b"rice", b"rice.crc32"
_PRIMARY_KEY = {b"lance-schema:unenforced-primary-key": b"true"}
_AT_ONCE = 8192
_ATTEMPTS = 20
_encode = json.JSONEncoder(sort_keys=True).encode


@dataclass(frozen=True)
class State:
    """
    State of the whole table.

    Attributes:
        model_fingerprint, model_name, model_revision: Identify the model of the encodings.
        settings: Settings of the encoding, `index.build.ShopEncoder.settings`.
        dtype: Type of the stored encodings, "float16" or "float32".
        precision: Precision in which the model computed.
        complete: False while the shop is encoded for the first time.
        before: The version that answers until then, `None` if there is none.
        calibration: Calibration of confidences, `None` if there is none.
        approximate: `index.approximate.Settings` as a dict with the measured "recall@10"; `None` for exact search.
    """

    model_fingerprint: str | None
    model_name: str = ""
    model_revision: str | None = None
    settings: dict = field(default_factory=dict)
    dtype: str = "float16"
    precision: str = "float32"
    complete: bool = True
    before: int | None = None
    calibration: Calibration | None = None
    approximate: dict | None = None

    def to_metadata(self) -> dict[bytes, bytes]:
        text = json.dumps({"format": FORMAT, **asdict(self)}, allow_nan=False, sort_keys=True).encode()
        return {_STATE: text, _CHECKSUM: str(zlib.crc32(text)).encode()}

    @classmethod
    def from_metadata(cls, metadata: dict[bytes, bytes] | None) -> "State":
        """
        Raises:
            ValueError: the metadata was changed, has another format, or holds invalid values.
        """
        text = (metadata or {}).get(_STATE, b"")
        if (metadata or {}).get(_CHECKSUM) != str(zlib.crc32(text)).encode():
            raise ValueError("its metadata does not match the checksum")
        values = json.loads(text, parse_constant=_no_constant)
        version = values.pop("format", None) if isinstance(values, dict) else None
        if version != FORMAT:
            raise ValueError(f"its format is {version}, but this version of the project reads {FORMAT}")
        names = {one.name for one in fields(cls)}
        if values.keys() != names:
            raise ValueError(f"its metadata has {', '.join(sorted(values))} instead of {', '.join(sorted(names))}")
        kinds = {"complete": bool, "settings": dict, "dtype": str, "precision": str, "model_name": str}
        wrong = [name for name, kind in kinds.items() if not isinstance(values[name], kind)]
        if wrong:
            raise ValueError(f"its metadata has a value of the wrong kind for {', '.join(wrong)}")
        if values.get("calibration") is not None:
            values["calibration"] = Calibration.from_dict(values["calibration"])
        return cls(**values)


def _no_constant(name: str):
    raise ValueError(f"it holds {name}, which is not a number")


class Version(NamedTuple):
    """A version of the table that can be restored: its number, time and number of rows."""

    number: int
    time: datetime
    rows: int


def lancedb():
    """The library; raises `ValueError` if it is not installed."""
    try:
        import lancedb
    except ImportError as error:
        raise ValueError("an index needs LanceDB: pip install 'rice-retrieval[index]', or lancedb.") from error
    # Loader workers are forked, but do not use a table.
    warnings.filterwarnings("ignore", message="lancedb fork support", category=RuntimeWarning)
    return lancedb


def reason_of(error: BaseException) -> str:
    """The library's message without the position in its source code."""
    text = re.sub(r",? ?[^\s,]*\.rs:\d+(:\d+)?", "", str(error))
    return " ".join(text.split()).removesuffix(".")[:300]


class ShopTable:
    """
    A shop's table: opens its versions and writes new ones.

    Args:
        uri: Folder or URI (s3://bucket/shop) of the index; `None` keeps it in memory. Object storage uses the `AWS_*`
            (`GOOGLE_*`, `AZURE_*`) environment variables.
    """

    def __init__(self, uri: str | os.PathLike | None = None):
        self.uri = None if uri is None else os.fspath(uri)
        self._connection: Any = None

    def __str__(self) -> str:
        return "index in memory" if self.uri is None else f"index {self.uri}"

    @property
    def is_local(self) -> bool:
        return self.uri is not None and "://" not in self.uri

    @property
    def path(self) -> Path:
        """Folder of a local table."""
        return Path(self.uri or "", f"{TABLE}.lance")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A context that turns the library's read errors into one sentence."""
        try:
            yield
        except BaseException as error:
            if not _is_library(error):
                raise
            raise ValueError(
                f"the {self} cannot be read ({reason_of(error)}); if its files are damaged, `rice index` with "
                f"--overwrite builds it again."
            ) from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A context that turns the library's write errors into one sentence."""
        try:
            yield
        except BaseException as error:
            if not _is_library(error):
                raise
            raise OSError(
                f"the {self} could not be written ({reason_of(error)}); its previous version is unchanged, so make "
                f"room or choose another place, and run the same command again."
            ) from error

    @property
    def connection(self) -> Any:
        if self._connection is None:
            every = timedelta(0)
            self._connection = lancedb().connect(self.uri or "memory://", read_consistency_interval=every)
        return self._connection

    def exists(self) -> bool:
        """
        Raises:
            ValueError: the folder holds an index of an earlier format, or cannot be read.
        """
        if self.is_local:
            if not self.path.is_dir() and Path(self.uri or "", "index.json").is_file():
                raise ValueError(
                    f"the {self} was written by an earlier version, whose format is not supported; delete the "
                    f"folder or name another one, and build it again with `rice index`."
                )
            return any(self.path.glob("_versions/*.manifest"))
        with self.reading():
            return TABLE in self.connection.list_tables().tables

    def _open(self, version: int | None = None) -> Any:
        if not self.exists():
            if self.uri is None:
                raise ValueError("the index has no images yet; add some first.")
            raise FileNotFoundError(f"there is no index in {self.uri}; build one with `rice index SHOP_DIR`.")
        with self.reading():
            return self.connection.open_table(TABLE, version=version)

    @property
    def version(self) -> int:
        """Number of the newest version."""
        table = self._open()
        with self.reading():
            return table.version

    def snapshot(self, version: int | None = None) -> "Snapshot":
        """
        A fixed version, by default the newest.

        Raises:
            FileNotFoundError: there is no index.
            ValueError: the version does not exist, or cannot be read.
        """
        table = self._open()
        with self.reading():
            numbers = {entry["version"] for entry in table.list_versions()} if version is not None else {table.version}
        if version is not None and version not in numbers:
            raise ValueError(f"the {self} has no version {version}; `rice index --versions` lists the existing ones.")
        number = numbers.pop() if version is None else version
        return Snapshot(self, self._open(number), number)

    def create(self, fields: dict[str, pa.Field], state: State, replace: bool = False) -> None:
        """
        Creates a table without rows.

        Args:
            fields: Columns of the encodings, from `columns_of`.
            state: State of the table.
            replace: Replace an existing table. Its versions stay, unless it cannot be opened.

        Raises:
            FileExistsError: there is a table, and `replace` is false.
            OSError: the table cannot be written.
        """
        schema = schema_of(fields, state)
        exists = self.exists()
        if exists and not replace:
            raise FileExistsError(f"the {self} exists already; pass overwrite=True (--overwrite) to replace it.")
        if exists and self.is_local and not self._opens():
            exists = False
        with self.writing():
            if not exists and self.is_local:
                # The rest of a broken table, which prevents a new one.
                shutil.rmtree(self.path, ignore_errors=True)
            self.connection.create_table(TABLE, schema=schema, mode="overwrite" if exists else "create")

    def _opens(self) -> bool:
        """Whether there is a manifest for a new version, even if rows are damaged."""
        try:
            self._open()
        except ValueError:
            return False
        return True

    def commit(self, write: Callable[[Any], None]) -> None:
        """
        Writes a new version on top of the newest one, with retries if others write at the same time.

        Raises:
            OSError: the table cannot be written, or all retries failed; the table is unchanged.
        """
        table = self._open()
        for attempt in range(_ATTEMPTS):
            try:
                with self.writing():
                    return write(table)
            except OSError as error:
                if "commit conflict" not in str(error) or attempt == _ATTEMPTS - 1:
                    raise
                # A random pause, so that two writers do not collide again.
                time.sleep(0.02 * (attempt + random.random()))

    def upsert(self, rows: pa.Table) -> None:
        """
        Writes rows in one commit; a row of an existing image replaces it.

        Raises:
            OSError: as `commit`.
        """

        def write(table: Any) -> None:
            merge = table.merge_insert("image_id").when_matched_update_all().when_not_matched_insert_all()
            # With the column's index, two writers of one new image do not see each other, and it would be added twice.
            merge.use_index(False).execute(rows, on_bad_vectors="null", timeout=timedelta(minutes=10))

        self.commit(write)

    def delete(self, image_ids: Sequence[str]) -> None:
        """Deletes the rows of images."""
        for start in range(0, len(image_ids), _AT_ONCE):
            wanted = lancedb().expr.col("image_id").isin(list(image_ids[start : start + _AT_ONCE]))
            self.commit(lambda table: table.delete(wanted))

    def write_state(self, state: State) -> None:
        """Writes the state of the table."""
        metadata = {key.decode(): value.decode() for key, value in state.to_metadata().items()}
        self.commit(lambda table: table.update_field_metadata({"path": "image_id", "metadata": metadata}))

    def versions(self) -> list[Version]:
        """The versions that can be restored (existing and complete), oldest first."""
        table = self._open()
        with self.reading():
            entries = table.list_versions()
        return [
            Version(entry["version"], entry["timestamp"], int(entry["metadata"]["total_rows"]))
            for entry in entries
            if Snapshot(self, self._open(entry["version"]), entry["version"]).state.complete
        ]

    def restore(self, version: int) -> None:
        """
        Makes an older version the newest, with its state.

        Raises:
            ValueError: the version does not exist, or was not complete.
        """
        if not self.snapshot(version).state.complete:
            raise ValueError(
                f"the {self} was not complete in version {version}; `rice index --versions` lists those that were."
            )
        self.commit(lambda table: table.restore(version))

    def compact(self, kept_for: timedelta = KEPT_FOR) -> None:
        """Joins small files, adds new rows to the indexes, and deletes versions older than `kept_for`."""
        self.commit(lambda table: table.optimize(cleanup_older_than=kept_for))

    def index_columns(self, live_ids: bool) -> None:
        """Builds the indexes for finding rows by livestream or image, unless they exist."""
        configs = lancedb().index
        wanted = {"image_id": configs.BTree()} | ({"live_ids": configs.LabelList()} if live_ids else {})
        for column in wanted.keys() - self._indexed().keys():
            self.commit(lambda table: table.create_index(column, config=wanted[column]))

    def index_embeddings(self, config: Any) -> None:
        """Replaces the approximate index of the embeddings; `None` deletes it."""
        if config is not None:
            self.commit(lambda table: table.create_index("embeds", config=config, replace=True))
        elif "embeds" in self._indexed():
            self.commit(lambda table: table.drop_index(self._indexed()["embeds"]))

    def _indexed(self) -> dict[str, str]:
        """Column -> name of its index."""
        table = self._open()
        with self.reading():
            return {index.columns[0]: index.name for index in table.list_indices()}


def _is_library(error: BaseException) -> bool:
    # Panics of Rust are not an `Exception`.
    kinds = (RuntimeError, OSError, ValueError, pa.ArrowException)
    return isinstance(error, kinds) or type(error).__name__ in ("PanicException", "RustPanic")


class Snapshot:
    """One version of a table: rows as Arrow tables with `_rowid`, checked when they are read."""

    def __init__(self, table: ShopTable, handle: Any, version: int):
        self.table, self.version, self._handle = table, version, handle
        with table.reading():
            schema = handle.schema
            self.state = State.from_metadata(schema.field(0).metadata)
            own = {*RECORD, *_OWN, "checksum"}
            self.fields = {f.name: f for f in schema if f.name not in own}
            for name in self.fields:
                _shape_of(self.fields[name])

    def count(self, where: str | None = None) -> int:
        with self.table.reading():
            return self._handle.count_rows(where)

    @property
    def row_bytes(self) -> int:
        """Bytes of the encodings of one image."""
        return sum(bytes_of(one) for one in self.fields.values())

    def read(self, columns: Sequence[str] | None = None, where: Any = None) -> pa.Table:
        """Reads rows; rows with all columns are checked against their checksums."""
        with self.table.reading():
            query = self._handle.search().with_row_id(True)
            query = query if columns is None else query.select(list(columns))
            rows = (query if where is None else query.where(where)).to_arrow()
        if columns is None:
            self._check(rows)
        return rows

    def batches(self, columns: Sequence[str] | None = None, size: int = _AT_ONCE) -> Iterator[pa.Table]:
        """All rows in pieces, without checks."""
        with self.table.reading():
            query = self._handle.search().with_row_id(True)
            for batch in (query if columns is None else query.select(list(columns))).to_batches(size):
                yield pa.Table.from_batches([batch])

    def take(self, row_ids: np.ndarray) -> pa.Table:
        """Rows by `_rowid`, in that order, checked."""
        with self.table.reading():
            rows = self._handle.take_row_ids(row_ids.tolist()).with_row_id().to_arrow()
        place = {row_id: i for i, row_id in enumerate(rows["_rowid"].to_pylist())}
        rows = rows.take(pa.array([place[row_id] for row_id in row_ids.tolist()], pa.int64()))
        self._check(rows)
        return rows

    def find(self, image_ids: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of images, in any order."""
        parts = []
        for start in range(0, max(1, len(image_ids)), _AT_ONCE):
            wanted = list(image_ids[start : start + _AT_ONCE])
            parts.append(self.read(columns, lancedb().expr.col("image_id").isin(wanted) if wanted else "false"))
        return pa.concat_tables(parts)

    def last_position(self) -> int:
        """The highest position in the gallery, -1 without rows."""
        highest = pc.max(self.read(["position"])["position"]).as_py()
        return -1 if highest is None else highest

    def nearest(self, vector: np.ndarray, k: int, effort: dict) -> np.ndarray:
        """Row ids of `k` images that the approximate index proposes for an embedding, in any order."""
        with self.table.reading():
            query = self._handle.search(vector, vector_column_name="embeds").distance_type("cosine").limit(k)
            for name, value in effort.items():
                query = getattr(query, name)(max(value, k) if name == "ef" else value)
            return query.select(["_distance"]).with_row_id(True).to_arrow()["_rowid"].to_numpy()

    def _check(self, rows: pa.Table) -> None:
        damaged = damaged_rows(rows, self.fields)
        if len(damaged):
            raise ValueError(
                f"the {self.table} is damaged: {len(damaged)} row(s) do not match their checksums, "
                f"such as {rows['image_id'][int(damaged[0])].as_py()!r}; run the same `rice index` again, which "
                f"encodes them again."
            )

    def features(self, rows: pa.Table, features_class: type, names: Sequence[str] | None = None) -> Any:
        """Encodings of rows as a `RiceGallery`, all or some of its fields."""
        tensors = {
            name: tensor_of(rows[name], self.fields[name])
            for name in (self.fields if names is None else names)
            if name in features_class.fields
        }
        return features_class(model_fingerprint=self.state.model_fingerprint, **tensors)


def columns_of(features: Any) -> dict[str, pa.Field]:
    """A column for each tensor of a `RiceGallery`: numbers if Arrow has the type, else bytes."""
    columns = {}
    for name in features.fields:
        tensor = getattr(features, name)
        if tensor is None:
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        number = {"float16": pa.float16(), "float32": pa.float32()}.get(dtype, pa.uint8())
        width = tensor[:1].numel() if len(tensor) else int(np.prod(tensor.shape[1:]))
        width *= tensor.element_size() if number == pa.uint8() else 1
        about = {"shape": json.dumps(list(tensor.shape[1:])), "dtype": dtype}
        columns[name] = pa.field(name, pa.list_(number, width), metadata=about)
    return columns


def schema_of(fields: dict[str, pa.Field], state: State) -> pa.Schema:
    first = pa.field("image_id", pa.string(), nullable=False, metadata=_PRIMARY_KEY | state.to_metadata())
    texts = [pa.field(name, pa.string()) for name in ("product_id", "title", "image")]
    own = [
        pa.field("live_ids", pa.list_(pa.string())),
        # Reason for missing encodings.
        pa.field("reason", pa.string()),
        # Position in the gallery, which breaks ties.
        pa.field("position", pa.int64()),
        # Digest of the encoded picture and text.
        pa.field("content", pa.string()),
        pa.field("checksum", pa.int64()),
    ]
    return pa.schema([first, *texts, *own, *fields.values()])


def rows_of(records: Sequence[dict], features: Any, fields: dict[str, pa.Field]) -> pa.Table:
    """
    Rows for `ShopTable.upsert`.

    Args:
        records: `RECORD` and, if known, `reason`, `position` and `content`.
        features: `RiceGallery` of the records without a reason, in their order; `None` if there are none.
        fields: Columns of the encodings.
    """
    good = [record for record in records if record.get("reason") is None]
    bad = [record for record in records if record.get("reason") is not None]
    parts = []
    for group, encodings in ((good, features), (bad, None)):
        if not group:
            continue
        columns = {name: [record.get(name) for record in group] for name in (*RECORD, *_OWN)}
        schema = schema_of({}, _NO_STATE)
        rows = pa.table({**columns, "checksum": pa.nulls(len(group), pa.int64())}, schema=schema)
        for name, one in fields.items():
            array = pa.nulls(len(group), one.type) if encodings is None else _array_of(getattr(encodings, name), one)
            rows = rows.append_column(one, array)
        parts.append(rows)
    rows = pa.concat_tables(parts)
    return rows.set_column(rows.schema.get_field_index("checksum"), "checksum", pa.array(checksums(rows, fields)))


_NO_STATE = State(None)


def _array_of(tensor: torch.Tensor, one: pa.Field) -> pa.Array:
    tensor = tensor.detach().cpu().contiguous()
    numbers = tensor.view(torch.uint8) if one.type.value_type == pa.uint8() else tensor
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers.numpy().reshape(-1)), one.type.list_size)


def _shape_of(one: pa.Field) -> tuple[list[int], torch.dtype]:
    about = one.metadata or {}
    dtype = getattr(torch, about.get(b"dtype", b"").decode() or "none", None)
    if not isinstance(dtype, torch.dtype) or not pa.types.is_fixed_size_list(one.type):
        raise ValueError(f"its column {one.name} lacks the type of its encodings")
    return json.loads(about.get(b"shape", b"null")), dtype


def tensor_of(column: pa.ChunkedArray, one: pa.Field) -> torch.Tensor:
    """A column of encodings as `(n, ...)`; none of its rows may be empty."""
    shape, dtype = _shape_of(one)
    numbers = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(numbers.copy()).view(dtype).reshape(len(column), *shape)


def bytes_of(one: pa.Field) -> int:
    """Bytes of a row in a column of encodings."""
    return one.type.list_size * one.type.value_type.bit_width // 8


def checksums(rows: pa.Table, fields: dict[str, pa.Field]) -> np.ndarray:
    """CRC-32 of each row, records and encodings, `(n,)` int64."""
    texts = rows.select([*RECORD, *_OWN]).to_pylist()
    sums = [zlib.crc32(_encode(record).encode()) for record in texts]
    for name in sorted(fields):
        column = rows[name].combine_chunks()
        whole = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        if not len(whole):
            continue
        data = column.drop_null().flatten().to_numpy(zero_copy_only=False)
        data = np.ascontiguousarray(data).view(np.uint8).reshape(len(whole), -1)
        for place, row in zip(whole.tolist(), data):
            sums[place] = zlib.crc32(row, sums[place])
    return np.array(sums, dtype=np.int64)


def damaged_rows(rows: pa.Table, fields: dict[str, pa.Field]) -> np.ndarray:
    """Positions of rows that differ from their checksums."""
    stored = rows["checksum"].combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False)
    return np.flatnonzero(checksums(rows, fields) != stored)
