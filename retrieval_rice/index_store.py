"""Encoded shop images in memory or mapped from files, and exact search through them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data_rice.parsing import id_text

RECORD = pa.schema(
    [
        ("image_id", pa.string()),
        ("product_id", pa.string()),
        ("live_ids", pa.list_(pa.string())),
        ("title", pa.string()),
        ("image", pa.string()),
    ]
)
"""What is known of an image besides its encoding: `live_ids` are the livestreams that sell it, `image` is its path,
as `data_rice.paths.path_to_text` writes it."""

CHUNK = 32_768
"""Images compared with the clips at a time, which bounds the memory of a search."""

Scope = tuple[str, ...] | None
"""The livestreams to search; `None` is the whole index."""


@dataclass
class Candidates:
    """Images found for one clip, most similar first: their encodings (a `RiceGallery`) and records, row by row."""

    features: object
    records: list[dict]


@dataclass
class Shard:
    """Some images: records, encodings (`None` where there is no image), and images that could not be read.

    `key` names the content, and with it the files; `None` until it is saved.
    """

    records: pa.Table
    features: object | None
    skipped: list[dict] = field(default_factory=list)
    key: str | None = None

    def __len__(self) -> int:
        return self.records.num_rows

    def keep(self, rows: np.ndarray) -> "Shard":
        """The shard with only some of its rows."""
        features = self.features[torch.from_numpy(rows)] if len(rows) else None
        return Shard(self.records.take(pa.array(rows)), features, self.skipped)


class Store(Protocol):
    """Where encoded images are kept and found: `LocalStore`, or a vector database (`index_qdrant.QdrantStore`)."""

    def __len__(self) -> int: ...

    def search(self, model, clips, scopes: Sequence[Scope], k: int | None) -> list[Candidates]: ...

    def get(self, image_ids: Sequence[str]) -> dict[str, dict]: ...

    def put(self, records: list[dict], features, skipped: list[dict]) -> None: ...

    def remove(self, image_ids: Sequence[str]) -> list[str]: ...

    def live_ids(self) -> list[str]: ...


def best_rows(scores: Tensor, k: int) -> Tensor:
    """Positions of the `k` largest of `scores` `(n,)`, best first; equal ones keep their order, also at the cut."""
    if k >= len(scores):
        return scores.argsort(descending=True, stable=True)
    # torch.topk alone would choose freely among those that tie for the last place.
    kept = (scores >= scores.topk(k).values[-1]).nonzero().flatten()
    return kept[scores[kept].argsort(descending=True, stable=True)][:k]


class LocalStore:
    """
    Shards of encoded images with exact search; `approximate` may hold a FAISS index of the leading rows.

    Args:
        shards: In the gallery's order, which decides between equal scores.
    """

    def __init__(self, shards: Iterable[Shard] = ()):
        self.shards = list(shards)
        self.approximate = None
        self._changed()

    def _changed(self) -> None:
        self._offsets = np.cumsum([0, *(len(shard) for shard in self.shards)])
        self._rows: dict[str, int] | None = None
        self._lives: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self._offsets[-1])

    @property
    def skipped(self) -> list[dict]:
        """Images that could not be read: `id`, `file` and `reason`."""
        return [failure for shard in self.shards for failure in shard.skipped]

    def column(self, name: str) -> Iterator:
        """A column of the records, row by row."""
        for shard in self.shards:
            yield from shard.records.column(name).to_pylist()

    def row_of(self) -> dict[str, int]:
        """Row of every image."""
        if self._rows is None:
            self._rows = {image_id: row for row, image_id in enumerate(self.column("image_id"))}
        return self._rows

    def live_ids(self) -> list[str]:
        """The livestreams that have images here, in the order of the gallery."""
        return list(self._by_live())

    def _by_live(self) -> dict[str, np.ndarray]:
        if self._lives is None:
            rows: dict[str, list[int]] = {}
            for row, lives in enumerate(self.column("live_ids")):
                for live in lives:
                    rows.setdefault(live, []).append(row)
            self._lives = {live: np.array(members) for live, members in rows.items()}
        return self._lives

    def rows_in(self, scope: Scope) -> np.ndarray | None:
        """Rows of the given livestreams in ascending order, `None` for all rows."""
        if scope is None:
            return None
        found = [self._by_live()[live] for live in scope if live in self._by_live()]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)

    def _by_shard(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Shard number, places in `rows`, and rows within the shard."""
        owners = np.searchsorted(self._offsets, rows, side="right") - 1
        for number in np.unique(owners):
            places = np.flatnonzero(owners == number)
            yield int(number), places, rows[places] - self._offsets[number]

    def take(self, rows: np.ndarray):
        """Encodings of some rows in their order, as one `RiceGallery`."""
        parts, order = [], []
        for number, places, local in self._by_shard(rows):
            parts.append(self.shards[number].features[torch.from_numpy(local)])
            order.append(places)
        joined = parts[0] if len(parts) == 1 else type(parts[0]).cat(parts)
        back = np.argsort(np.concatenate(order), kind="stable")
        return joined if len(parts) == 1 else joined[torch.from_numpy(back)]

    def records(self, rows: np.ndarray) -> list[dict]:
        """Records of some rows in their order."""
        result: list[dict] = [{}] * len(rows)
        for number, places, local in self._by_shard(rows):
            for place, record in zip(places, self.shards[number].records.take(pa.array(local)).to_pylist()):
                result[place] = record
        return result

    def chunks(self, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, object]]:
        """Row numbers and encodings, `CHUNK` at most at a time, of all rows or some."""
        if rows is not None:
            for start in range(0, len(rows), CHUNK):
                part = rows[start : start + CHUNK]
                yield part, self.take(part)
            return
        for shard, offset in zip(self.shards, self._offsets):
            for start in range(0, len(shard), CHUNK):
                stop = min(start + CHUNK, len(shard))
                yield np.arange(offset + start, offset + stop), shard.features[start:stop]

    def search(self, model, clips, scopes: Sequence[Scope], k: int | None) -> list[Candidates]:
        """
        Args:
            model: Whose `similarity` compares.
            clips: `RiceClips`, one scope each.
            scopes: The livestreams that each clip searches.
            k: Candidates per clip at most; `None` for all of its scope.
        """
        if len(self) == 0:
            return [Candidates(None, []) for _ in scopes]
        found: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(scopes)
        for scope in dict.fromkeys(scopes):
            members = [i for i, other in enumerate(scopes) if other == scope]
            group = clips if len(members) == len(scopes) else clips[members]
            if scope is None and self.approximate is not None and k is not None:
                result = self._search_approximately(model, group, k)
            else:
                result = self.exact_rows(model, group, self.rows_in(scope), k)
            for member, rows in zip(members, result):
                found[member] = rows
        return [Candidates(self.take(rows) if len(rows) else None, self.records(rows)) for rows in found]

    def exact_rows(self, model, clips, rows: np.ndarray | None, k: int | None) -> list[np.ndarray]:
        """The `k` most similar of `rows` (`None`: of all) for each clip, most similar first."""
        k = len(self) if k is None else k
        scores = [torch.zeros(0)] * len(clips)
        best = [np.zeros(0, dtype=np.int64)] * len(clips)
        for numbers, features in self.chunks(rows):
            block = model.similarity(clips, _beside(features, clips)).float().cpu()
            for i in range(len(clips)):
                kept = best_rows(block[i], k)
                # Earlier chunks come first, so that a stable sort keeps the gallery's order among equals.
                merged = torch.cat([scores[i], block[i][kept]])
                order = merged.argsort(descending=True, stable=True)[:k]
                scores[i] = merged[order]
                best[i] = np.concatenate([best[i], numbers[kept.numpy()]])[order.numpy()]
        return best

    def _search_approximately(self, model, clips, k: int) -> list[np.ndarray]:
        found = self.approximate.search(clips.embeds.float().cpu().numpy(), k)
        # What was added since the approximate index was built is searched exactly.
        recent = np.arange(self.approximate.num_rows, len(self))
        result = []
        for i, rows in enumerate(found):
            rows = np.union1d(rows, recent).astype(np.int64)
            result.append(self.exact_rows(model, clips[i], rows, k)[0])
        return result

    def get(self, image_ids: Sequence[str]) -> dict[str, dict]:
        """Records of those of the images that are here."""
        rows = self.row_of()
        known = [image_id for image_id in image_ids if image_id in rows]
        numbers = np.array([rows[image_id] for image_id in known], dtype=np.int64)
        return dict(zip(known, self.records(numbers)))

    def put(self, records: list[dict], features, skipped: list[dict]) -> None:
        """Appends images; those that are here already are taken out first."""
        if records:
            self.remove([record["image_id"] for record in records])
            if len(self):
                features = features.to(next(self.chunks())[1].embeds.device)
        self.shards.append(Shard(pa.Table.from_pylist(records, schema=RECORD), features, list(skipped)))
        self._changed()

    def remove(self, image_ids: Sequence[str]) -> list[str]:
        """Takes images out and returns the ids that were not here."""
        rows = self.row_of()
        unknown = [image_id for image_id in image_ids if image_id not in rows]
        keep = np.ones(len(self), dtype=bool)
        keep[[rows[image_id] for image_id in image_ids if image_id in rows]] = False
        if keep.all():
            return unknown
        for number, (start, stop) in enumerate(zip(self._offsets, self._offsets[1:])):
            if not keep[start:stop].all():
                self.shards[number] = self.shards[number].keep(np.flatnonzero(keep[start:stop]))
        if self.approximate is not None:
            self.approximate.forget(keep)
        self._changed()
        return unknown

    def to(self, *args, **kwargs) -> None:
        """Moves or casts the encodings, as `Tensor.to` does."""
        for shard in self.shards:
            if shard.features is not None:
                moved = shard.features.to(*args, **kwargs)
                if moved.embeds.dtype != shard.features.embeds.dtype:
                    shard.key = None
                shard.features = moved


def _beside(features, clips):
    """Encodings on the clips' device; the decoder's states, which a comparison does not need, stay behind."""
    device = clips.embeds.device
    if features.embeds.device == device:
        return features
    needed = {name: getattr(features, name) for name in features.fields if name != "states"}
    return type(features)(model_fingerprint=features.model_fingerprint, **needed).to(device)


def scopes_of(live_id: Any, count: int) -> list[Scope]:
    """What each clip searches."""
    if live_id is None or isinstance(live_id, (str, Number)):
        live_id = [live_id] * count
    live_id = list(live_id)
    if len(live_id) != count:
        raise ValueError(f"live_id has {len(live_id)} entries for {count} clips; give one per clip, or one text.")
    return [None if one is None else _scope([one] if isinstance(one, (str, Number)) else one) for one in live_id]


def _scope(live_ids: Iterable) -> Scope:
    return tuple(live_id if isinstance(live_id, str) else id_text(live_id) for live_id in live_ids)


def live_of(record: dict, scope: Scope) -> str:
    lives = record["live_ids"]
    return next((live for live in lives if scope is not None and live in scope), lives[0] if lives else "")
