"""The build of an index: finds the images of a shop to encode, encodes them, and estimates the time."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from data_rice.collator import failure_words
from modeling_rice.fingerprint_rice import same_state
from processing_rice.media_rice import path_of, split_tar_member

from .build import (
    Batch,
    ShopEncoder,
    ShopImage,
    ShopReader,
    as_rows,
    collect_images,
    record_of,
    report_skipped,
)
from .table import RECORD, ShopTable, Snapshot, bytes_of, columns_of, damaged_rows, rows_of

COMMIT_EVERY = 2048
"""Images per commit: the maximum loss by a kill, and the number of images in memory."""

_KNOWN = (*RECORD, "position", "content", "reason")
_TIMED, _WEIGHED = 8, 64


class Job:
    """
    The build of one shop's table. Several processes may work on it, each on its share.

    Args:
        table: Table to write.
        encoder: Encoder with the model.
        rows: Rows of the shop, from `as_rows`.
        commit_every: Images per commit.
        overwrite: Replace encodings of another model, delete more than half of the images, or replace a damaged table.

    Raises:
        ValueError: there are no rows, a row has no id, or a number is below 1.
    """

    def __init__(
        self,
        table: ShopTable,
        encoder: ShopEncoder,
        rows: Sequence[dict],
        commit_every: int = COMMIT_EVERY,
        overwrite: bool = False,
    ):
        if commit_every < 1:
            raise ValueError(f"commit_every must be at least 1, got {commit_every}.")
        self.table, self.encoder, self.rows = table, encoder, rows
        self.commit_every, self.overwrite = commit_every, overwrite
        self.images = collect_images(rows)
        self.known: dict[str, dict] = {}
        self._started_at = 0

    def check(self) -> Snapshot | None:
        """
        The table to continue, `None` if there is none.

        Raises:
            FileExistsError: replacing the table needs `overwrite`.
            ValueError: the table cannot be read.
        """
        if not self.table.exists():
            return None
        try:
            snapshot = self.table.snapshot()
            self._read(snapshot)
        except ValueError:
            if not self.overwrite:
                raise
            return None
        differs = self._difference(snapshot)
        if differs and not self.overwrite:
            raise FileExistsError(
                f"the {self.table} was encoded {differs}; pass overwrite=True (--overwrite) to encode it again, or "
                f"name another folder."
            )
        if differs:
            self.known = {}
            return None
        gone = len(self.known.keys() - {image.image_id for image in self.images})
        if snapshot.state.complete and 2 * gone > len(self.known) and not self.overwrite:
            raise FileExistsError(
                f"the {self.table} holds another shop: {gone} of its {len(self.known)} images are not in this one; "
                f"pass overwrite=True (--overwrite) to delete them, or name another folder."
            )
        return snapshot

    def _difference(self, snapshot: Snapshot) -> str:
        state, own = snapshot.state, self.encoder.state()
        if not same_state(state.model_fingerprint, own.model_fingerprint):
            name = f" ({state.model_name})" if state.model_name else ""
            return f"by another model{name}, fingerprint {state.model_fingerprint}, not {own.model_fingerprint}"
        changed = sorted(
            name
            for name in state.settings.keys() | own.settings.keys()
            if state.settings.get(name) != own.settings.get(name)
        )
        return f"with other settings ({', '.join(changed)})" if changed else ""

    def _read(self, snapshot: Snapshot) -> None:
        """Reads the known images of the table; rows that are damaged or lack a field do not count."""
        self.known = {}
        for rows in snapshot.batches():
            good = np.ones(len(rows), dtype=bool)
            good[damaged_rows(rows, snapshot.fields)] = False
            rows = rows.filter(pa.array(good)).select([*_KNOWN, "_rowid"])
            self.known |= {record["image_id"]: record for record in rows.to_pylist()}
        self._started_at = snapshot.version

    def open(self, may_replace: bool = True) -> Snapshot:
        """
        The table to write to; it is created if there is none.

        Args:
            may_replace: Whether this process may replace a table.

        Raises:
            FileExistsError, ValueError: as `check`; ValueError also if another process must replace the table first.
            OSError: the table cannot be written.
        """
        snapshot = self.check()
        if snapshot is not None:
            return snapshot
        there = self.table.exists()
        if there and not may_replace:
            raise ValueError(f"process 0 must replace the {self.table} first; start the other processes after it.")
        before = self._last_complete() if there else None
        state = self.encoder.state(complete=False, before=before)
        try:
            self.table.create(columns_of(self.encoder.encode_blank()), state, replace=there)
        except (FileExistsError, OSError):
            # Another process of the same build may have created it.
            if there or not self.table.exists():
                raise
        self.overwrite = False
        return self.open(may_replace=False)

    def _last_complete(self) -> int | None:
        """The version that answers while the table is replaced."""
        try:
            snapshot = self.table.snapshot()
        except ValueError:
            return None
        return snapshot.version if snapshot.state.complete else snapshot.state.before

    def positions(self) -> Iterator[int]:
        """
        The position of each image, ascending. Known images keep their position if possible, so that few rows are
        written when a shop changes.
        """
        last = -1
        for image in self.images:
            known = self.known.get(image.image_id)
            last = last + 1 if known is None else max(known["position"], last + 1)
            yield last

    def run(self, snapshot: Snapshot, process_index: int = 0, num_processes: int = 1) -> None:
        """Encodes and writes every `num_processes`-th image that is new or has changed."""
        places = {image.image_id: place for image, place in zip(self.images, self.positions())}
        mine = self.images[process_index::num_processes]
        contents = {name: record["content"] for name, record in self.known.items()}
        reader = ShopReader(self.encoder.collator, self.rows, contents)
        title = "encoding" if num_processes == 1 else f"encoding ({process_index + 1} of {num_processes})"
        part = _Part(self, snapshot, places)
        with tqdm(total=len(mine), desc=title, unit="image", disable=not self.encoder.progress) as bar:
            for batch, features in self.encoder.batches(mine, reader):
                part.add(batch, features)
                if part.size >= self.commit_every:
                    part.write()
                bar.update(len(batch.images))
        part.write()

    def is_whole(self) -> bool:
        """Whether every image of the shop is in the table, encoded or marked as unreadable."""
        there = set(self.table.snapshot().read(["image_id"])["image_id"].to_pylist())
        return there.issuperset(image.image_id for image in self.images)

    def finish(self) -> None:
        """
        Deletes images that are no longer in the shop, marks the index as complete, and compacts its files.

        Raises:
            ValueError: no image could be read.
        """
        snapshot = self.table.snapshot()
        rows = snapshot.read(["image_id", "reason", "live_ids"])
        shop = {image.image_id for image in self.images}
        gone = [name for name in rows["image_id"].to_pylist() if name not in shop]
        skipped = snapshot.read([*_KNOWN], "reason IS NOT NULL").to_pylist()
        skipped = [failure_of(record) for record in skipped if record["image_id"] in shop]
        if len(skipped) == len(shop):
            raise ValueError(
                f"not one of the {len(shop)} images could be read; the first: {failure_words(skipped[0])}."
            )
        report_skipped(skipped, len(shop))
        self.table.delete(gone)
        state = snapshot.state
        if not state.complete:
            self.table.write_state(replace(state, complete=True, before=None))
        if gone or not state.complete or snapshot.version != self._started_at:
            self.table.index_columns(live_ids=bool(pc.any(pc.greater(pc.list_value_length(rows["live_ids"]), 0))))
            self.table.compact()


def build_together(job: Job, process_index: int, num_processes: int) -> None:
    """Builds with the processes of one launch: all check before the first one changes anything."""
    from accelerate import PartialState

    state = PartialState()
    job.check()
    state.wait_for_everyone()
    snapshot = job.open() if state.is_main_process else None
    state.wait_for_everyone()
    job.run(snapshot or job.open(may_replace=False), process_index, num_processes)
    state.wait_for_everyone()
    if state.is_main_process:
        job.finish()
    state.wait_for_everyone()


def failure_of(record: dict) -> dict:
    """A row without encodings in the form of `index.skipped`."""
    return {"id": record["image_id"], "file": record["image"], "reason": record["reason"]}


class _Part:
    """The content of the next commit."""

    def __init__(self, job: Job, snapshot: Snapshot, places: dict[str, int]):
        self.job, self.snapshot, self.places = job, snapshot, places
        self._clear()

    def _clear(self) -> None:
        self.records: list[dict] = []
        self.features: list[Any] = []
        self.moved: list[tuple[int, dict]] = []

    @property
    def size(self) -> int:
        return len(self.records) + len(self.moved)

    def add(self, batch: Batch, features: Any) -> None:
        encoded: dict[str, dict] = {}
        for image, content, paths in zip(batch.images, batch.contents, batch.places):
            place, name = self.places[image.image_id], image.image_id
            if name in batch.paths:
                encoded[name] = record_of(image, batch.paths[name], place, content)
            elif name in batch.failures:
                failure = batch.failures[name]
                self.records.append(record_of(image, failure["file"] or "", place, content, failure["reason"]))
            else:
                self._keep(image, paths, place, content)
        # In the order of the encodings.
        self.records += [encoded[name] for name in batch.paths]
        if features is not None:
            self.features.append(features)

    def _keep(self, image: ShopImage, paths: list[str], place: int, content: str) -> None:
        """An image with a known picture, whose other fields may have changed."""
        known = self.job.known[image.image_id]
        path = known["image"] if known["image"] in paths or not paths else paths[0]
        record = record_of(image, path, place, content, known["reason"])
        if any(record[name] != known[name] for name in _KNOWN):
            self.moved.append((known["_rowid"], record))

    def write(self) -> None:
        if not self.size:
            return
        encoded = [(row_id, record) for row_id, record in self.moved if record["reason"] is None]
        records = self.records + [record for _, record in self.moved if record["reason"] is not None]
        if encoded:
            row_ids, moved = zip(*encoded)
            stored = self.snapshot.take(np.array(row_ids, dtype=np.uint64))
            self.features.append(self.snapshot.features(stored, self._features_class()))
            records += moved
        features = type(self.features[0]).cat(self.features) if self.features else None
        self.job.table.upsert(rows_of(records, features, self.snapshot.fields))
        self._clear()

    def _features_class(self) -> type:
        return features_class_of(self.job.encoder.model)


def features_class_of(model: Any) -> type:
    """`RiceGallery`, or the model's class in its place."""
    from modeling_rice import RiceGallery

    return getattr(model, "gallery_class", RiceGallery)


@dataclass
class Estimate:
    """
    Estimated cost of building an index.

    Attributes:
        images: Number of images of the shop.
        known: Number of these that are in the index already; their pictures may have changed.
        picture_bytes: Bytes of all pictures, from a sample.
        index_bytes: Bytes of the table.
        seconds_per_image: Seconds for reading and encoding in this process, from a sample.
    """

    images: int
    known: int
    picture_bytes: int
    index_bytes: int
    seconds_per_image: float

    def __str__(self) -> str:
        new = self.images - self.known
        known = f", {self.known:,} of them in the index already" if self.known else ""
        return (
            f"{self.images:,} images{known}; about {_size(self.picture_bytes)} of pictures, "
            f"{_size(self.index_bytes)} of index, and {_duration(new * self.seconds_per_image)} to encode {new:,} at "
            f"{1000 * self.seconds_per_image:.0f} ms each in one process"
        )


def estimate(table: ShopTable, encoder: ShopEncoder, rows: Sequence[dict]) -> Estimate:
    """
    Measures a few images of a shop, and writes nothing.

    Raises:
        ValueError: there are no rows, or a row has no id.
    """
    rows = as_rows(rows)
    images = collect_images(rows)
    there: set[str] = set()
    if table.exists():
        try:
            there = set(table.snapshot().read(["image_id"])["image_id"].to_pylist())
        except ValueError:
            # Damage is reported when the table is used.
            there = set()
    known = sum(image.image_id in there for image in images)
    spread = [images[i] for i in np.linspace(0, len(images) - 1, min(_WEIGHED, len(images))).astype(int)]
    sizes = [_picture_size(rows[image.rows[0]]["image"]) for image in spread]
    row_bytes = 300 + sum(map(bytes_of, columns_of(encoder.encode_blank()).values()))
    sample = spread[:_TIMED]
    timed = replace(encoder, num_workers=0, batch_size=len(sample), progress=False)
    start = time.perf_counter()
    for _ in timed.batches(sample, ShopReader(timed.collator, rows)):
        pass
    seconds = (time.perf_counter() - start) / len(sample)
    return Estimate(len(images), known, round(np.mean(sizes) * len(images)), row_bytes * len(images), seconds)


def _picture_size(picture: Any) -> int:
    if isinstance(picture, Mapping) and picture.get("bytes") is not None:
        return len(picture["bytes"])
    member = split_tar_member(path_of(picture))
    if member is not None:
        return member[2]
    try:
        return os.path.getsize(path_of(picture))
    except OSError:
        return 0


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
