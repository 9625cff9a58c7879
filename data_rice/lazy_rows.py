"""Rows that are read on demand, from annotation files, Arrow tables or Parquet files.

All three classes are `torch.utils.data` data sets with random access. They also give the start of each *shard*, a run
of rows that are stored together and best read together.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from .commands import one_line
from .line_index import LineIndex

# Rows per shard if rows can be read singly: enough for one disk read-ahead, few enough to mix well.
_SHARD_ROWS = 64


class LazyRows(torch.utils.data.Dataset):
    """Base of the classes.

    Attributes:
        shard_starts: first row of each shard, and the number of rows, int64 ``(num_shards + 1,)``.
        shards_per_block: number of shards that can be mixed without reading any of them twice.
    """

    shard_starts: np.ndarray
    # With 64 rows per shard this mixes 16,384 rows.
    shards_per_block: int = 256

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    def __getitem__(self, row: int) -> dict:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict]:
        """Return the rows with these numbers, in this order."""
        raise NotImplementedError

    def column_codes(self, column: str) -> tuple[np.ndarray, bool]:
        """Number the distinct values of a text column.

        Returns:
            The number of each row's value, int64 ``(num_rows,)``, and whether any value is not "".

        Raises:
            ValueError: the rows cannot be grouped by this column.
        """
        raise NotImplementedError


def _even_shards(num_rows: int) -> np.ndarray:
    return np.append(np.arange(0, num_rows, _SHARD_ROWS, dtype=np.int64), num_rows)


class LineRows(LazyRows):
    """Rows of annotation files, each parsed on demand.

    Args:
        index: where the rows begin.
        parse: called as ``parse(file, line number, text)``; returns the builder's row.
        group_columns: columns by which the index groups rows.
        features: columns of the rows, see `data_rice.features`.
    """

    def __init__(
        self,
        index: LineIndex,
        parse: Callable[[str, int, str], dict],
        group_columns: Sequence[str],
        features: datasets.Features,
    ):
        self.index = index
        self.parse = parse
        self.group_columns = tuple(group_columns)
        self.features = features
        self.shard_starts = _even_shards(len(index))

    def __getitems__(self, rows: Sequence[int]) -> list[dict]:
        """See `LazyRows`; raises ValueError with the file and line of a malformed row."""
        return [as_stored(self.parse(*self.index.read(row)), self.features) for row in rows]

    def column_codes(self, column: str) -> tuple[np.ndarray, bool]:
        """See `LazyRows.column_codes`."""
        if column not in self.group_columns:
            raise ValueError(f"These rows can be grouped by {', '.join(self.group_columns)}, not by {column}.")
        place = self.group_columns.index(column)
        return self.index.records["groups"][:, place].astype(np.int64), self.index.grouped[place]


class ArrowRows(LazyRows):
    """Rows of a memory-mapped `datasets.Dataset`, such as `load_dataset_view` or `load_from_disk` return."""

    def __init__(self, dataset: datasets.Dataset):
        self.dataset = dataset
        self.shard_starts = _even_shards(len(dataset))

    def __getitems__(self, rows: Sequence[int]) -> list[dict]:
        """See `LazyRows`."""
        return self.dataset.__getitems__(list(rows))

    def column_codes(self, column: str) -> tuple[np.ndarray, bool]:
        """See `LazyRows.column_codes`."""
        return _codes(self.dataset.select_columns([column]).with_format("arrow")[:][column])


def _codes(values: pyarrow.ChunkedArray) -> tuple[np.ndarray, bool]:
    encoded = values.combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), any(encoded.dictionary.to_pylist())


class ParquetRows(LazyRows):
    """Rows of Parquet files with the pictures inside. The shards are the files' row groups.

    A group is read whole and kept until ``shards_per_block`` other groups have been read. Read an epoch in blocks, as
    `data_rice.samplers.BlockOrder` does. Small groups mix better than large ones.

    Args:
        files: Parquet files with the columns of a view.
        memory: maximum bytes of row groups that each reading process holds; it always holds at least one group.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is not Parquet, or there are no rows.
    """

    def __init__(self, files: Sequence[str | os.PathLike], memory: int = 256 * 1024 * 1024):
        self.files = [os.fspath(file) for file in files]
        self.groups: list[tuple[int, int]] = []
        sizes, largest = [0], 1
        for number, path in enumerate(self.files):
            try:
                metadata = pyarrow.parquet.read_metadata(path)
            except FileNotFoundError:
                raise FileNotFoundError(f"{path} does not exist; put the Parquet file there.") from None
            except (OSError, pyarrow.ArrowException) as error:
                raise ValueError(f"{path} is not a Parquet file ({one_line(error)}); write it again.") from None
            for group in range(metadata.num_row_groups):
                self.groups.append((number, group))
                sizes.append(metadata.row_group(group).num_rows)
                largest = max(largest, metadata.row_group(group).total_byte_size)
        self.shard_starts = np.cumsum(sizes, dtype=np.int64)
        if len(self) == 0:
            raise ValueError(f"{', '.join(self.files) or 'The list of Parquet files'} holds no row; add some.")
        self.shards_per_block = max(1, memory // largest)
        self._tables: OrderedDict[int, pyarrow.Table] = OrderedDict()

    def __getstate__(self):
        return self.__dict__ | {"_tables": OrderedDict()}

    def __getitems__(self, rows: Sequence[int]) -> list[dict]:
        """See `LazyRows`; raises ValueError with the file of a row group that cannot be read."""
        shards = (np.searchsorted(self.shard_starts, rows, side="right") - 1).tolist()
        places = (np.asarray(rows) - self.shard_starts[shards]).tolist()
        return [self._group(shard).slice(place, 1).to_pylist()[0] for shard, place in zip(shards, places)]

    def _group(self, shard: int) -> pyarrow.Table:
        if shard not in self._tables:
            number, group = self.groups[shard]
            # Before the next read, so that memory never holds one group too many.
            while len(self._tables) >= self.shards_per_block:
                self._tables.popitem(last=False)
            try:
                with pyarrow.parquet.ParquetFile(self.files[number], page_checksum_verification=True) as file:
                    self._tables[shard] = file.read_row_group(group)
            except (OSError, pyarrow.ArrowException) as error:
                raise ValueError(
                    f"{self.files[number]}, row group {group}: {one_line(error)}; write the file again."
                ) from None
        self._tables.move_to_end(shard)
        return self._tables[shard]

    def column_codes(self, column: str) -> tuple[np.ndarray, bool]:
        """Always raises ValueError, see `LazyRows.column_codes`."""
        raise ValueError(
            "Parquet files do not support batches of chosen rows, because every read loads a whole row group; "
            "prepare tar shards (--file_format tar), or leave streaming off."
        )


def as_stored(row: dict, features: datasets.Features) -> dict:
    """Convert a builder's row to the form of its Arrow table: media as entries, numbers in single precision."""
    return {name: _stored(row.get(name), feature) for name, feature in features.items()}


def _stored(value, feature):
    if value is None:
        return None
    if isinstance(feature, datasets.List):
        return [_stored(item, feature.feature) for item in value]
    if isinstance(feature, datasets.Image):
        return value if isinstance(value, dict) else {"bytes": None, "path": value}
    if feature.dtype == "float32":
        return float(np.float32(value))
    return value
