"""Data sets of any size in constant memory, as an iterable over shards that can start at any position.

The order of an epoch is a pure function of (seed, epoch). The shards are permuted, then the rows within each block of
consecutive shards. The row at any position is found without reading the rows before it, so a run resumes at once.
`StreamingView` distributes this order to processes and loader workers, batch by batch. In the trainer, `BlockSampler`
gives the same order over the same rows.
"""

import os
from collections.abc import Iterator

import torch
from torch.utils.data import IterableDataset, get_worker_info

from .features import view_name
from .lazy_rows import ArrowRows, LazyRows, ParquetRows
from .lpr4m import Lpr4m
from .lpr4m.line_rows import training_rows
from .prepare import check_options, shard_files
from .published import is_published, published_files, refuse_options
from .samplers import BlockOrder
from .views import load_dataset_view, prepared_folder, resolve


class StreamingView(IterableDataset):
    """One process's share of a view, batch by batch, from any position on.

    The order of the epoch is cut into global batches of ``batch_size * num_processes`` rows. Process p takes the p-th
    part of each global batch. Worker w of W takes every W-th of these parts. So a `DataLoader` with this
    ``batch_size`` and any number of workers gives the same batches in the same order. No row is repeated. With
    ``drop_last`` the last rows that fill no global batch are left out (different ones in each epoch), so all processes
    take equally many steps, see `describe`. Without it they are distributed too, and some processes get fewer rows.
    Nothing is padded.

    Args:
        rows: source of the rows.
        batch_size: rows per process and step; the ``batch_size`` of the loader.
        seed: decides the order, together with the epoch.
        num_processes, process_index: identify this process's share.
        shuffle: False for the rows' own order.
        drop_last: see above.

    Raises:
        ValueError: an argument is out of range, or there are fewer rows than one global batch (with ``drop_last``).

    Example:
        >>> view = stream_dataset_view("mini_lpr4m", "pairs", "train", batch_size=8)
        >>> loader = DataLoader(view, batch_size=8, num_workers=2, collate_fn=list)
        >>> for number, batch in enumerate(loader, start=1):
        ...     if number == 10:
        ...         state = view.state_dict(batches=number)
        ...         break
        >>> view.load_state_dict(state)  # the loader continues with the eleventh batch
    """

    def __init__(
        self,
        rows: LazyRows,
        batch_size: int,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
    ):
        if batch_size < 1 or num_processes < 1 or not 0 <= process_index < num_processes:
            raise ValueError(
                f"batch_size ({batch_size}) and num_processes ({num_processes}) must be at least 1, and process_index "
                f"({process_index}) must lie in 0..{num_processes - 1}."
            )
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index
        self.shuffle = shuffle
        self.drop_last = drop_last
        if drop_last and len(rows) < self.global_batch_size:
            raise ValueError(
                f"{len(rows)} rows are fewer than one global batch of {self.global_batch_size}; lower the batch size."
            )
        # Epoch, batches to skip, rows to skip in the next batch. In shared memory, because persistent loader workers
        # hold a copy of this object.
        self._place = torch.zeros(3, dtype=torch.int64).share_memory_()
        self._yielded = 0

    @property
    def global_batch_size(self) -> int:
        """Rows of all processes in one step."""
        return self.batch_size * self.num_processes

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration yields."""
        return int(self._place[0])

    @property
    def num_batches(self) -> int:
        """Batches of an epoch, the same for all processes."""
        whole, rest = divmod(len(self.rows), self.global_batch_size)
        return whole if self.drop_last else whole + (rest > 0)

    def __len__(self) -> int:
        """Rows of this process in a whole epoch."""
        whole = len(self.rows) // self.global_batch_size * self.batch_size
        if self.drop_last:
            return whole
        rest = len(self.rows) % self.global_batch_size - self.process_index * self.batch_size
        return whole + min(max(rest, 0), self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; a new epoch starts at its first row."""
        if epoch != self.epoch:
            self._place[:] = torch.tensor([epoch, 0, 0])
            self._yielded = 0

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        epoch, first, passed = self._place.tolist()
        if passed and num_workers > 1:
            raise ValueError(
                "The saved position lies within a batch, which several loader workers cannot share; continue without "
                "workers, or save positions between batches."
            )
        order = BlockOrder(self.rows.shard_starts, self.rows.shards_per_block, self.seed, epoch, self.shuffle)
        self._yielded = first * self.batch_size + passed
        for batch in range(first + number, self.num_batches, num_workers):
            start = batch * self.global_batch_size + self.process_index * self.batch_size
            rows = order.rows(start, start + self.batch_size)[passed:].tolist()
            passed = 0
            for row in self.rows.__getitems__(rows):
                self._yielded += 1
                yield row

    def describe(self) -> str:
        """Return one line on how an epoch is divided."""
        left_out = len(self.rows) % self.global_batch_size if self.drop_last else 0
        return (
            f"{len(self.rows):,} rows, {self.num_batches:,} steps of {self.num_processes} process(es) x "
            f"{self.batch_size} rows; {left_out} rows left out, different ones in each epoch"
        )

    def state_dict(self, batches: int | None = None) -> dict[str, int]:
        """Return the position in the epoch.

        Args:
            batches: number of batches that a `DataLoader` over this view returned since the start of the epoch or the
                loaded position. None counts the rows that this object has yielded, which is correct only without
                loader workers (a loader with workers reads ahead).
        """
        epoch, first, passed = self._place.tolist()
        if batches is None:
            first, passed = divmod(self._yielded, self.batch_size)
        else:
            first += batches
        return {
            "epoch": epoch,
            "batches": first,
            "rows_into_batch": passed,
            "seed": self.seed,
            "num_rows": len(self.rows),
            "global_batch_size": self.global_batch_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a saved position: the next iteration starts there, unless `set_epoch` chooses another epoch.

        The number of loader workers may differ. The number of processes may differ if the global batch is the same.

        Raises:
            ValueError: the state belongs to other rows, another seed or another global batch.
        """
        current = self.state_dict(0)
        for name in ("seed", "num_rows", "global_batch_size"):
            if state.get(name) != current[name]:
                raise ValueError(
                    f"The saved position has {name}={state.get(name)}, not {current[name]}; continue with the same "
                    "data and settings, or start the epoch again."
                )
        self._place[:] = torch.tensor([state["epoch"], state["batches"], state["rows_into_batch"]])
        self._yielded = state["batches"] * self.batch_size + state["rows_into_batch"]


def open_dataset_view(
    dataset: str | os.PathLike,
    view: str,
    split: str,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    boxes_file: str | os.PathLike | None = None,
    **builder_options,
) -> LazyRows:
    """Open the rows of one view for reading one by one, in constant memory.

    The pairs of LPR4M's training lists are parsed on demand, through an index of the lists that is built once and
    cached. Prepared and published Parquet files are read by row groups. All other views are read from the
    memory-mapped Arrow table of `load_dataset_view`.

    Args:
        dataset, view, split, data_dir, cache_dir, builder_options: as `load_dataset_view`.
        boxes_file: as `load_dataset_view`, only for rows from an Arrow table.

    Raises:
        FileNotFoundError, ValueError: as `load_dataset_view`; ValueError also for a ``boxes_file`` with other rows.
    """
    given, view = {name: value for name, value in builder_options.items() if value is not None}, view_name(view)
    prepared = prepared_folder(dataset, data_dir)
    if prepared is not None:
        check_options(prepared, given)
        files = shard_files(prepared, view, split)
        if files[0].endswith(".parquet"):
            _refuse_boxes_file(boxes_file)
            return ParquetRows(files)
        return ArrowRows(load_dataset_view(dataset, view, split, data_dir, cache_dir, boxes_file, **given))
    if is_published(dataset, data_dir):
        refuse_options(dataset if data_dir is None else data_dir, given)
        _refuse_boxes_file(boxes_file)
        return ParquetRows(published_files(dataset, data_dir, view, split))
    builder_class, folder, options = resolve(dataset, data_dir)
    if builder_class is Lpr4m and view == "pairs" and split in ("train", "validation"):
        _refuse_boxes_file(boxes_file)
        return training_rows(Lpr4m(view, cache_dir=cache_dir, data_dir=folder, **(options | given)), split)
    return ArrowRows(load_dataset_view(dataset, view, split, data_dir, cache_dir, boxes_file, **given))


def _refuse_boxes_file(boxes_file: str | os.PathLike | None) -> None:
    if boxes_file is not None:
        raise ValueError(
            "Streamed rows do not support boxes_file, because it replaces a column of a table; leave it out, or use "
            "load_dataset_view."
        )


def stream_dataset_view(
    dataset: str | os.PathLike,
    view: str,
    split: str,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    *,
    batch_size: int,
    seed: int = 0,
    num_processes: int = 1,
    process_index: int = 0,
    shuffle: bool = True,
    drop_last: bool = True,
    **builder_options,
) -> StreamingView:
    """Open one view as an iterable data set; see `open_dataset_view` and `StreamingView`.

    Raises:
        FileNotFoundError, ValueError: as `open_dataset_view` and `StreamingView`.
    """
    rows = open_dataset_view(dataset, view, split, data_dir, cache_dir, **builder_options)
    return StreamingView(rows, batch_size, seed, num_processes, process_index, shuffle, drop_last)
