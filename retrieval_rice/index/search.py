"""Exact search in encoded images, which stay in memory after reading, and exact ranking of approximate proposals."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from data_rice.parsing import id_text

from .calibration import check_depth
from .table import RECORD, Snapshot, bytes_of

CHUNK = 32_768
"""Number of images compared at a time; limits the memory of a search."""

CACHE_BYTES = 2**30
"""Default maximum bytes of encodings in memory."""

# Rooms without images need memory too, and requests may name any number of livestreams.
_PER_ROOM, _PER_RECORD = 4096, 256

ENCODED = "reason IS NULL"
"""Filter for the rows of readable images."""

Scope = tuple[str, ...] | None
"""The livestreams to search; `None` is the whole index."""


@dataclass
class Candidates:
    """Images found for one clip, most similar first: their encodings (a `RiceGallery`) and their records."""

    features: Any
    records: list[dict]

    @property
    def products(self) -> list[str]:
        return [record["product_id"] for record in self.records]

    def take(self, rows: np.ndarray) -> "Candidates":
        """Selects candidates by row number."""
        return Candidates(self.features[torch.from_numpy(rows)], [self.records[row] for row in rows])


def best_rows(scores: Tensor, k: int) -> Tensor:
    """Positions of the `k` largest `scores` `(n,)`, best first; ties keep their order, also at position `k`."""
    if k >= len(scores):
        return scores.argsort(descending=True, stable=True)
    # torch.topk alone would choose arbitrarily among ties for the last position.
    kept = (scores >= scores.topk(k).values[-1]).nonzero().flatten()
    return kept[scores[kept].argsort(descending=True, stable=True)][:k]


Piece = tuple[np.ndarray, np.ndarray, Any]
"""Positions in the gallery (ascending), names of the rows, and encodings."""


def nearest(model: Any, clips: Any, pieces: Iterable[Piece], k: int) -> list[np.ndarray]:
    """
    The names of the `k` images most similar to each clip, most similar first; ties by their position.

    Args:
        model: Model with `similarity`.
        clips: `RiceClips`.
        pieces: Pieces of the gallery, in any order.
        k: Maximum number of images.
    """
    scores = [np.zeros(0, dtype=np.float32)] * len(clips)
    places = [np.zeros(0, dtype=np.int64)] * len(clips)
    best = [np.zeros(0, dtype=np.int64)] * len(clips)
    for where, names, features in pieces:
        block = model.similarity(clips, features).float().cpu()
        for i in range(len(clips)):
            kept = best_rows(block[i], k).numpy()
            scores[i] = np.concatenate([scores[i], block[i].numpy()[kept]])
            places[i] = np.concatenate([places[i], where[kept]])
            best[i] = np.concatenate([best[i], names[kept]])
            order = np.lexsort((places[i], -scores[i]))[:k]
            scores[i], places[i], best[i] = scores[i][order], places[i][order], best[i][order]
    return best


def compared(names: Iterable[str]) -> list[str]:
    """The fields of a `RiceGallery` that `similarity` reads; the others are for pair scores of few images."""
    return [name for name in names if name.endswith("embeds")]


@dataclass
class Room:
    """
    The images of a scope in memory, in the gallery's order.

    Attributes:
        features: Their encodings; a large scope keeps only the compared fields.
        row_ids: Their rows in the table, for reading the other fields.
        records: Columns for hits as an Arrow table; `None` if they are read with the other fields.
        num_bytes: Approximate size in memory.
    """

    features: Any
    row_ids: np.ndarray
    records: Any
    num_bytes: int

    def pieces(self) -> Iterator[Piece]:
        for start in range(0, len(self.row_ids), CHUNK):
            rows = np.arange(start, min(start + CHUNK, len(self.row_ids)))
            yield rows, rows, self.features[start : start + CHUNK]


class Rooms:
    """
    Search in one version of a table. The last used scopes stay in memory up to a number of bytes. Larger scopes are
    read again for each search. Thread-safe.

    Args:
        snapshot: The version.
        model: The model of the encodings.
        features_class: `RiceGallery`, or a class in its place.
        num_bytes: Maximum bytes of encodings in memory.
    """

    def __init__(self, snapshot: Snapshot, model: Any, features_class: type, num_bytes: int = CACHE_BYTES):
        self.snapshot, self.model, self.features_class, self.num_bytes = snapshot, model, features_class, num_bytes
        self.num_images = snapshot.count(ENCODED)
        self._rooms: OrderedDict[Scope, Room] = OrderedDict()
        self._live_ids: list[str] | None = None
        self._lock = threading.Lock()

    @property
    def cached_bytes(self) -> int:
        """Bytes of encodings in memory."""
        with self._lock:
            return sum(room.num_bytes for room in self._rooms.values())

    def live_ids(self) -> list[str]:
        """The livestreams that have images here, in the order of the gallery."""
        if self._live_ids is None:
            rows = self.snapshot.read(["live_ids", "position"], ENCODED).sort_by("position")
            self._live_ids = list(dict.fromkeys(pc.list_flatten(rows["live_ids"]).to_pylist()))
        return self._live_ids

    def column(self, name: str, scope: Scope = None) -> list:
        """What a column says of the images in a scope, in the order of the gallery."""
        where = ENCODED if scope is None else f"({live_filter(scope)}) AND {ENCODED}"
        return self.snapshot.read([name, "position"], where).sort_by("position")[name].to_pylist()

    def records(self, image_ids: Sequence[str]) -> dict[str, dict]:
        """Image id -> record, for the given images that are in the index."""
        rows = self.snapshot.find(image_ids, [*RECORD, "reason"])
        return {record["image_id"]: record for record in _records(rows.filter(pc.is_null(rows["reason"])))}

    def search(self, clips: Any, scopes: Sequence[Scope], k: int | None) -> list[Candidates]:
        """
        Args:
            clips: `RiceClips`, one scope each.
            scopes: The livestreams that each clip searches.
            k: Maximum number of candidates per clip; `None` for its whole scope.
        """
        found = [Candidates(None, [])] * len(scopes)
        for scope in dict.fromkeys(scopes):
            members = [i for i, other in enumerate(scopes) if other == scope]
            group = clips if len(members) == len(scopes) else clips[members]
            for member, candidates in zip(members, self._search(group, scope, k)):
                found[member] = candidates
        return found

    def _search(self, clips: Any, scope: Scope, k: int | None) -> list[Candidates]:
        settings = self.snapshot.state.approximate
        if scope is None and settings is not None and k is not None:
            return [self._approximately(clips[i], k, settings) for i in range(len(clips))]
        room = self._room(scope)
        k = self.num_images if k is None else k
        if room is None:
            return [self._taken(row_ids) for row_ids in nearest(self.model, clips, self._streamed(), k)]
        found = nearest(self.model, clips, room.pieces(), k)
        if room.records is None:
            return [self._taken(room.row_ids[rows]) for rows in found]
        return [
            Candidates(room.features[torch.from_numpy(rows)], _records(room.records.take(rows)))
            if len(rows)
            else _nothing()
            for rows in found
        ]

    def _approximately(self, clip: Any, k: int, settings: dict) -> Candidates:
        """The best proposals of the approximate index, ranked by the model's similarity."""
        vector = clip.embeds[0].float().cpu().numpy()
        proposed = self.snapshot.nearest(vector, settings["oversample"] * k, settings["effort"])
        rows = self.snapshot.take(proposed).sort_by("position")
        features = self.snapshot.features(rows, self.features_class)
        kept = nearest(self.model, clip, [(np.arange(len(rows)), np.arange(len(rows)), features)], k)[0]
        return Candidates(features[torch.from_numpy(kept)], _records(rows.take(kept))) if len(kept) else _nothing()

    def _taken(self, row_ids: np.ndarray) -> Candidates:
        if not len(row_ids):
            return _nothing()
        rows = self.snapshot.take(row_ids)
        return Candidates(self.snapshot.features(rows, self.features_class), _records(rows))

    def _streamed(self) -> Iterator[Piece]:
        """The whole table, a piece at a time."""
        names = compared(self.snapshot.fields)
        for rows in self.snapshot.batches([*names, "position", "reason"], CHUNK):
            rows = rows.filter(pc.is_null(rows["reason"])).sort_by("position")
            if len(rows):
                yield (
                    rows["position"].to_numpy(),
                    rows["_rowid"].to_numpy().astype(np.int64),
                    self._features(rows, names),
                )

    def _room(self, scope: Scope) -> Room | None:
        """The scope in memory; `None` if it does not fit."""
        with self._lock:
            room = self._rooms.get(scope)
            if room is not None:
                self._rooms.move_to_end(scope)
                return room
        if scope is None and self.num_images * self._bytes(compared(self.snapshot.fields)) > self.num_bytes:
            return None
        room = self._read(scope)
        with self._lock:
            self._rooms[scope] = room
            while len(self._rooms) > 1 and sum(one.num_bytes for one in self._rooms.values()) > self.num_bytes:
                self._rooms.popitem(last=False)
        return room

    def _read(self, scope: Scope) -> Room:
        names = list(self.snapshot.fields)
        # For the whole index, only the compared fields are read; the others are read for the few best images.
        whole = scope is not None or self.num_images * self._bytes(names) <= self.num_bytes // 4
        columns = None if whole else [*compared(names), "position", "reason"]
        rows = self.snapshot.read(columns, None if scope is None else live_filter(scope))
        rows = rows.filter(pc.is_null(rows["reason"])).sort_by("position")
        names = names if whole else compared(names)
        features = self._features(rows, names) if len(rows) else None
        records = rows.select(list(RECORD)).combine_chunks() if whole else None
        num_bytes = _PER_ROOM + len(rows) * (_PER_RECORD + self._bytes(names))
        return Room(features, rows["_rowid"].to_numpy(), records, num_bytes)

    def _features(self, rows: Any, names: Sequence[str]) -> Any:
        features = self.snapshot.features(rows, self.features_class, names)
        if not features.embeds.isfinite().all():
            raise ValueError(
                f"the {self.snapshot.table} is damaged: it holds embeddings that are not finite; run the same "
                f"`rice index` again, which encodes them again."
            )
        return features.to(getattr(self.model, "device", "cpu"))

    def _bytes(self, names: Iterable[str]) -> int:
        return sum(bytes_of(self.snapshot.fields[name]) for name in names)


def _nothing() -> Candidates:
    return Candidates(None, [])


def _records(rows: Any) -> list[dict]:
    return rows.select(list(RECORD)).to_pylist()


def live_filter(scope: tuple[str, ...]) -> str:
    """SQL filter for the rows of livestreams."""
    quoted = ["'" + live.replace("'", "''") + "'" for live in scope]
    return " OR ".join(f"array_has(live_ids, {live})" for live in quoted) or "false"


def scopes_of(live_id: Any, count: int) -> list[Scope]:
    """The scope of each clip."""
    if live_id is None or isinstance(live_id, (str, Number)):
        live_id = [live_id] * count
    live_id = list(live_id)
    if len(live_id) != count:
        raise ValueError(f"live_id has {len(live_id)} entries for {count} clips; give one per clip, or one text.")
    return [None if one is None else _scope([one] if isinstance(one, (str, Number)) else one) for one in live_id]


def _scope(live_ids: Iterable) -> Scope:
    return tuple(live_id if isinstance(live_id, str) else id_text(live_id) for live_id in live_ids)


def check_search(top_k: Any, rerank: Any) -> None:
    """Raises `ValueError` for a `top_k` below 1, a `rerank` below 0, or values that are not whole numbers."""
    check_depth("top_k", 0 if top_k is None else top_k, least=1)
    check_depth("rerank", rerank)
