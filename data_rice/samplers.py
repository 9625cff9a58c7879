"""Orders of an epoch: blocks of shards, batches from one livestream, and balanced categories.

A sampler is a list of row numbers. Every ``batch_size`` consecutive rows are one *global* batch: the rows that all
processes together use in one step. `torch.utils.data.BatchSampler` and accelerate's ``BatchSamplerShard`` split it
into the batches of the processes, in order. The order is a pure function of (seed, epoch), so all processes agree on
it and a resumed run finds its position by counting.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import datasets
import numpy as np
from torch.utils.data import Sampler
from tqdm.auto import tqdm

from .lazy_rows import ArrowRows, LazyRows

# Maximum number of groups to skip when searching a product that the batch does not have yet.
_LOOK_AHEAD = 1024
# Below this number of rows an order takes at most a few seconds.
_PROGRESS_ROWS = 1_000_000


class GlobalBatchSampler(Sampler[int]):
    """Base of the samplers; yields row numbers for whole global batches.

    Args:
        num_rows: rows of the data set.
        batch_size: rows of a global batch: per process, times processes.
        seed: decides the order, together with the epoch.

    Raises:
        ValueError: there are fewer rows than one global batch.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int):
        if batch_size < 1:
            raise ValueError(f"The global batch size must be at least 1, not {batch_size}.")
        if num_rows < batch_size:
            raise ValueError(f"{num_rows} rows are fewer than one global batch of {batch_size}; lower the batch size.")
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self._latest: tuple[int, np.ndarray] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        order = self.order(self.epoch)
        for start in range(0, len(order), 65536):
            yield from order[start : start + 65536].tolist()

    def order(self, epoch: int) -> np.ndarray:
        """Return the row numbers of an epoch, int64 ``(len(self),)``."""
        if self._latest is None or self._latest[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._latest = (epoch, self._batches(rng).reshape(-1))
        return self._latest[1]

    def _batches(self, rng: np.random.Generator) -> np.ndarray:
        raise NotImplementedError

    def describe(self) -> str:
        """Return one line on the content of an epoch, with the figures of the first one."""
        raise NotImplementedError


class SameLiveSampler(GlobalBatchSampler):
    """Batches of few livestreams, so that negatives come from the same shop as in evaluation.

    A livestream with at least ``batch_size`` products fills whole batches by itself. Its remaining rows and the
    smaller livestreams form groups that show each product once and are as large as possible. Groups are joined to
    batches; a group is split where a batch is full. A batch repeats a product only if none of the next groups has
    another row for it. Every row occurs once per epoch, except the ``num_rows % batch_size`` rows that fill no whole
    batch; these differ in each epoch.

    Args:
        live_ids: number of each row's livestream, ``(num_rows,)``.
        product_ids: number of each row's product, ``(num_rows,)``.
        batch_size: rows of a global batch.
        seed: see `GlobalBatchSampler`.
    """

    def __init__(self, live_ids: np.ndarray, product_ids: np.ndarray, batch_size: int, seed: int = 0):
        super().__init__(len(live_ids), batch_size, seed)
        self.live_ids = np.asarray(live_ids)
        self.product_ids = np.asarray(product_ids)
        if self.live_ids.shape != self.product_ids.shape or self.live_ids.ndim != 1:
            raise ValueError(
                f"live_ids and product_ids need one number per row each, not shapes {self.live_ids.shape} and "
                f"{self.product_ids.shape}."
            )

    def _batches(self, rng: np.random.Generator) -> np.ndarray:
        by_live = np.argsort(self.live_ids, kind="stable")
        borders = np.flatnonzero(np.diff(self.live_ids[by_live])) + 1
        whole, parts = [], []
        lives = tqdm(
            np.split(by_live, borders),
            desc="Grouping rows by livestream",
            unit="live",
            disable=self.num_rows < _PROGRESS_ROWS,
        )
        for rows in lives:
            for group in _distinct_groups(rows, self.product_ids, self.batch_size, rng):
                (whole if len(group) == self.batch_size else parts).append(group)
        parts = [parts[i] for i in rng.permutation(len(parts))]
        joined = tqdm(
            _join(parts, self.product_ids, self.batch_size),
            desc="Joining groups to batches",
            unit="batch",
            total=sum(map(len, parts)) // self.batch_size,
            disable=self.num_rows < _PROGRESS_ROWS,
        )
        batches = np.array([*whole, *joined], dtype=np.int64)
        # Each process takes a slice of the batch. For batch norm, a slice should not hold one livestream only.
        return rng.permuted(rng.permutation(batches), axis=1)

    def describe(self) -> str:
        """See `GlobalBatchSampler.describe`."""
        batches = self.order(0).reshape(-1, self.batch_size)
        lives, negatives, repeats = 0, 0, 0
        for batch in batches:
            _, counts = np.unique(self.live_ids[batch], return_counts=True)
            lives += len(counts)
            negatives += int((counts * (counts - 1)).sum())
            repeats += self.batch_size - len(np.unique(self.product_ids[batch]))
        return (
            f"same_live: {len(batches):,} global batches of {self.batch_size} an epoch, from "
            f"{lives / len(batches):.1f} livestreams each; {negatives / batches.size:.1f} other rows of its own "
            f"livestream beside each row, {repeats:,} repeated products; {self.num_rows - batches.size:,} of "
            f"{self.num_rows:,} rows left out, different ones in each epoch"
        )


def _distinct_groups(
    rows: np.ndarray, product_ids: np.ndarray, size: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield one livestream's rows in groups of at most ``size`` different products, large groups first.

    Products with the most remaining rows come first, so that they do not remain alone at the end.
    """
    rows = rng.permutation(rows)
    rows = rows[np.argsort(product_ids[rows], kind="stable")]
    _, start, left = np.unique(product_ids[rows], return_index=True, return_counts=True)
    while len(left) > 1:
        taken = np.arange(len(left))
        if len(left) > size:
            taken = np.argpartition(-(left + rng.random(len(left))), size - 1)[:size]
        left[taken] -= 1
        yield rows[start[taken] + left[taken]]
        start, left = start[left > 0], left[left > 0]
    if len(left):
        yield from rows[start[0] : start[0] + left[0], None]


def _join(groups: Iterable[np.ndarray], product_ids: np.ndarray, size: int) -> Iterator[list[int]]:
    """Join groups of different products to batches of ``size`` rows; the last incomplete batch is left out."""
    queue = deque(group.tolist() for group in groups)
    num_left = sum(map(len, queue))
    while num_left >= size:
        batch: list[int] = []
        shown: set[int] = set()
        passed: list[list[int]] = []
        while queue and len(batch) < size and len(passed) < _LOOK_AHEAD:
            group, rest = queue.popleft(), []
            for row, product in zip(group, product_ids[group].tolist()):
                if product in shown or len(batch) == size:
                    rest.append(row)
                else:
                    batch.append(row)
                    shown.add(product)
            if rest:
                passed.append(rest)
        queue.extendleft(reversed(passed))
        while len(batch) < size:
            group = queue.popleft()
            batch.append(group.pop())
            if group:
                queue.appendleft(group)
        num_left -= size
        yield batch


class ClassBalancedSampler(GlobalBatchSampler):
    """Oversamples rare categories and undersamples frequent ones, for long-tailed data.

    A row of a category with n rows has the weight n ** -alpha. Alpha 0 changes nothing, 0.5 is the usual square root,
    and 1 shows all categories equally often. An epoch is as long as the data set (in whole batches). It holds each row
    in proportion to its weight, rounded up or down at random: a row of a frequent category at most once, a row of a
    rare category several times, spread evenly over the epoch. Unlike independent draws with replacement, this does not
    repeat some rows and miss others by chance.

    Args:
        categories: number of each row's category, ``(num_rows,)``.
        batch_size: rows of a global batch.
        seed: see `GlobalBatchSampler`.
        alpha: 0 to 1.
    """

    def __init__(self, categories: np.ndarray, batch_size: int, seed: int = 0, alpha: float = 0.5):
        super().__init__(len(categories), batch_size, seed)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in 0..1, not {alpha}.")
        _, category, counts = np.unique(categories, return_inverse=True, return_counts=True)
        weights = counts[category] ** -float(alpha)
        self.alpha = alpha
        self.categories = category
        self.counts = counts
        # Expected number of occurrences of each row in an epoch.
        self.expected = weights * (len(self) / weights.sum())

    def _batches(self, rng: np.random.Generator) -> np.ndarray:
        rows = rng.permutation(self.num_rows)
        # Category by category, so that the share of each is exact to one row.
        rows = rows[np.argsort(self.categories[rows], kind="stable")]
        borders = np.cumsum(self.expected[rows])
        # Systematic sampling: one random offset for all rows, so the copies add up to the length of the epoch.
        borders[-1] = len(self)
        copies = np.diff(np.floor(borders + rng.random()), prepend=0).astype(np.int64)
        drawn = np.repeat(rows, copies)
        of_row = np.repeat(copies, copies)
        number = np.arange(len(drawn)) - np.repeat(np.cumsum(copies) - copies, copies)
        # A row with c copies occurs once in each c-th part of the epoch, at a random position.
        place = (number + np.repeat(rng.random(len(rows)), copies)) / of_row
        return drawn[np.argsort(place)].reshape(-1, self.batch_size)

    def describe(self) -> str:
        """See `GlobalBatchSampler.describe`."""
        drawn = len(np.unique(self.order(0)))
        return (
            f"class_balanced: {len(self) // self.batch_size:,} global batches of {self.batch_size} an epoch, rows of "
            f"the rarest category {self.expected.max():.2f} times, of the most frequent one {self.expected.min():.2f} "
            f"times (alpha {self.alpha:g}, {len(self.counts)} categories); {self.num_rows - drawn:,} of "
            f"{self.num_rows:,} rows do not occur in the first epoch"
        )


class BlockOrder:
    """The order of one epoch by blocks of shards.

    Args:
        shard_starts: first row of each shard, and the number of rows, ``(num_shards + 1,)``.
        shards_per_block: number of shards whose rows are mixed.
        seed, epoch: decide the permutations.
        shuffle: False for the order of the rows themselves.
    """

    def __init__(
        self,
        shard_starts: np.ndarray,
        shards_per_block: int,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
    ):
        self.shard_starts = shard_starts
        self.shards_per_block = shards_per_block
        self.seed = (seed, epoch)
        self.shuffle = shuffle
        num_shards = len(shard_starts) - 1
        self.shards = np.random.default_rng(self.seed).permutation(num_shards) if shuffle else np.arange(num_shards)
        ends = np.cumsum(np.diff(shard_starts)[self.shards])
        # Start positions of the blocks, and the number of rows.
        self.block_starts = np.concatenate([[0], ends[shards_per_block - 1 : -1 : shards_per_block], ends[-1:]])
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return int(self.block_starts[-1])

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return the rows at the positions ``start`` to ``stop``, int64."""
        stop = min(stop, len(self))
        found = []
        while start < stop:
            number = int(np.searchsorted(self.block_starts, start, side="right")) - 1
            begin, end = self.block_starts[number : number + 2].tolist()
            found.append(self._rows_of_block(number)[start - begin : stop - begin])
            start = end
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _rows_of_block(self, number: int) -> np.ndarray:
        if self._block[0] != number:
            shards = self.shards[number * self.shards_per_block : (number + 1) * self.shards_per_block]
            rows = np.concatenate([np.arange(*self.shard_starts[shard : shard + 2]) for shard in shards])
            if self.shuffle:
                rows = np.random.default_rng([*self.seed, 1 + number]).permutation(rows)
            self._block = (number, rows)
        return self._block[1]


class BlockSampler(GlobalBatchSampler):
    """The order of a `StreamingView`, for a loader over the rows themselves such as the trainer's.

    Every row occurs once per epoch, except the ``num_rows % batch_size`` rows at the end of the order; these differ in
    each epoch.

    Args:
        rows: the rows, which give the shards.
        batch_size: rows of a global batch: per process, times processes.
        seed: decides the order, together with the epoch.
    """

    def __init__(self, rows: LazyRows, batch_size: int, seed: int = 0):
        super().__init__(len(rows), batch_size, seed)
        self.rows = rows

    def __iter__(self) -> Iterator[int]:
        order = self._order(self.epoch)
        for start in range(0, len(self), 16384):
            yield from order.rows(start, min(start + 16384, len(self))).tolist()

    def order(self, epoch: int) -> np.ndarray:
        """See `GlobalBatchSampler.order`."""
        return self._order(epoch).rows(0, len(self))

    def _order(self, epoch: int) -> BlockOrder:
        return BlockOrder(self.rows.shard_starts, self.rows.shards_per_block, self.seed, epoch)

    def describe(self) -> str:
        """See `GlobalBatchSampler.describe`."""
        return (
            f"streaming: {len(self) // self.batch_size:,} global batches of {self.batch_size} an epoch; "
            f"{self.num_rows - len(self):,} of {self.num_rows:,} rows left out, different ones in each epoch"
        )


def build_sampler(
    kind: str, rows: datasets.Dataset | LazyRows, batch_size: int, seed: int = 0, alpha: float = 0.5
) -> GlobalBatchSampler:
    """Build the sampler ``kind`` for the rows of a ``pairs`` view.

    Args:
        kind: "random", "same_live" or "class_balanced".
        rows: with the columns ``live_id`` and ``product_id``, or ``category``.
        batch_size: rows of a global batch: per process, times processes.
        seed: see `GlobalBatchSampler`.
        alpha: see `ClassBalancedSampler`; for "class_balanced" only.

    Raises:
        ValueError: the kind is unknown, or the rows have no livestream or category.
    """
    rows = rows if isinstance(rows, LazyRows) else ArrowRows(rows)
    if kind == "random":
        return BlockSampler(rows, batch_size, seed)
    if kind not in ("same_live", "class_balanced"):
        raise ValueError(f"There is no sampler {kind!r}; choose random, same_live or class_balanced.")
    column = "live_id" if kind == "same_live" else "category"
    codes, carried = rows.column_codes(column)
    if not carried:
        raise ValueError(f"The rows have no {column}, which the {kind} sampler needs; use the random sampler.")
    if kind == "class_balanced":
        return ClassBalancedSampler(codes, batch_size, seed, alpha)
    products, named = rows.column_codes("product_id")
    # A row without a product counts as its own product, as in the losses.
    return SameLiveSampler(codes, products if named else np.arange(len(products)), batch_size, seed)
