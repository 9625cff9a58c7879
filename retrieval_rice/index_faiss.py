"""Approximate search with FAISS for shops of hundreds of thousands of images: HNSW graphs, or IVF with product codes.

FAISS proposes candidates and the stored encodings decide among them, so that what is lost is only what was not
proposed, and product codes cost no accuracy in the order of what was. Needs `pip install faiss-cpu`.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .index_store import LocalStore

KINDS = ("hnsw", "ivfpq")


@dataclass
class FaissSettings:
    """
    Args:
        kind: "hnsw" (a graph over half-precision vectors: about 2 bytes per dimension and 270 per image) or "ivfpq"
            (lists of product codes: `code_bytes` + 8 per image).
        links: Neighbours per node of the graph.
        ef_construction: Effort of building the graph.
        ef_search: Candidates that the graph search keeps; more is slower and finds more.
        lists: Of the inverted file; by default about 4 times the root of the number of images.
        probes: Lists that are looked into; by default a 16th of them, at least 8.
        code_bytes: Bytes of a product code, a divisor of the embedding's width.
        oversample: Candidates proposed per candidate wanted; by default 4 for product codes, which are coarse, else 1.
        train_size: Images that the lists and codes are learned from.
        seed: Of the choice of those.
    """

    kind: str = "hnsw"
    links: int = 32
    ef_construction: int = 80
    ef_search: int = 128
    lists: int | None = None
    probes: int | None = None
    code_bytes: int = 64
    oversample: int | None = None
    train_size: int = 100_000
    seed: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        if self.oversample is None:
            self.oversample = 4 if self.kind == "ivfpq" else 1
        for name in ("links", "ef_construction", "ef_search", "code_bytes", "oversample", "train_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


class FaissIndex:
    """A FAISS index of the leading rows of a `LocalStore`. Removed rows are kept in mind, added ones are not in it."""

    def __init__(self, index, settings: FaissSettings, rows: np.ndarray):
        self.index, self.settings = index, settings
        # FAISS keeps the numbers of the time it was built; -1 where an image was taken out since.
        self.rows = rows
        self._tune()

    @property
    def num_rows(self) -> int:
        """Rows of the store that it covers, the first ones."""
        return int((self.rows >= 0).sum())

    @classmethod
    def build(cls, store: LocalStore, settings: FaissSettings, progress: bool = True) -> "FaissIndex":
        """
        Raises:
            ValueError: an empty store, or a code that does not divide the embeddings' width.
        """
        faiss = _faiss()
        count = len(store)
        if count == 0:
            raise ValueError("the index has no images to search approximately; add some first.")
        width = next(features.embeds.shape[1] for _, features in store.chunks())
        index = faiss.index_factory(width, _recipe(settings, count, width), faiss.METRIC_INNER_PRODUCT)
        if settings.kind == "hnsw":
            index.hnsw.efConstruction = settings.ef_construction
        else:
            chosen = np.random.default_rng(settings.seed).permutation(count)[: settings.train_size]
            index.train(_vectors(store.take(np.sort(chosen))))
        with tqdm(total=count, desc=f"faiss {settings.kind}", unit="image", disable=not progress) as bar:
            for _, features in store.chunks():
                vectors = _vectors(features)
                # Small pieces, so that the bar of a graph, which takes minutes, moves.
                for start in range(0, len(vectors), 4096):
                    index.add(vectors[start : start + 4096])
                    bar.update(len(vectors[start : start + 4096]))
        return cls(index, settings, np.arange(count))

    def _tune(self) -> None:
        faiss, settings = _faiss(), self.settings
        if settings.kind == "hnsw":
            self.index.hnsw.efSearch = settings.ef_search
        else:
            inverted = faiss.extract_index_ivf(self.index)
            inverted.nprobe = min(inverted.nlist, settings.probes or max(8, inverted.nlist // 16))

    def search(self, embeds: np.ndarray, k: int) -> list[np.ndarray]:
        """Rows of the store proposed for `embeds` `(c, D)` float32, in no order; `oversample` times `k` at most."""
        # Taken-out rows must not use up the places.
        wanted = min(len(self.rows), self.settings.oversample * k + int((self.rows < 0).sum()))
        if self.settings.kind == "hnsw":
            self.index.hnsw.efSearch = max(self.settings.ef_search, wanted)
        found = self.index.search(np.ascontiguousarray(embeds, dtype=np.float32), wanted)[1]
        result = []
        for numbers in found:
            rows = self.rows[numbers[numbers >= 0]]
            result.append(rows[rows >= 0])
        return result

    def forget(self, keep: np.ndarray) -> None:
        """Follows the removal of rows; `keep` `(n,)` bool tells which rows of the store stay."""
        new = np.where(keep, np.cumsum(keep) - 1, -1)
        held = self.rows >= 0
        self.rows = self.rows.copy()
        self.rows[held] = new[self.rows[held]]

    def save(self, path: Path) -> dict:
        """Writes the FAISS index, and returns what `load` needs besides."""
        try:
            _faiss().write_index(self.index, str(path))
        except RuntimeError as error:
            raise OSError(" ".join(str(error).split())) from error
        return {"settings": asdict(self.settings), "removed": np.flatnonzero(self.rows < 0).tolist()}

    @classmethod
    def load(cls, path: Path, settings: dict, removed: list[int]) -> "FaissIndex":
        """
        Args:
            path: Written by `save`, which returned the rest.

        Raises:
            FileNotFoundError, ValueError: the file is missing or damaged.
        """
        if not path.is_file():
            raise FileNotFoundError(f"the index lacks {path}; call `approximate` and save it again.")
        try:
            index = _faiss().read_index(str(path))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is damaged ({reason}); call `approximate` and save the index again.") from error
        held = np.ones(index.ntotal, dtype=bool)
        held[removed] = False
        return cls(index, FaissSettings(**settings), np.where(held, np.cumsum(held) - 1, -1))


def _recipe(settings: FaissSettings, count: int, width: int) -> str:
    if settings.kind == "hnsw":
        return f"HNSW{settings.links},SQfp16"
    if width % settings.code_bytes:
        raise ValueError(f"code_bytes is {settings.code_bytes}, which does not divide the {width} embedding numbers.")
    # Codes of 8 bits and lists need some vectors each to be learned from.
    bits = 8 if count >= 10_000 else max(1, min(8, int(math.log2(max(2, count // 39)))))
    trained = min(count, settings.train_size)
    lists = settings.lists or max(1, min(int(4 * math.sqrt(count)), trained // 39))
    return f"IVF{lists},PQ{settings.code_bytes}x{bits}"


def _vectors(features) -> np.ndarray:
    # FAISS takes single precision only.
    return np.ascontiguousarray(features.embeds.float().cpu().numpy())


def _faiss():
    try:
        import faiss
    except ImportError as error:
        raise ValueError("approximate search needs FAISS: pip install faiss-cpu.") from error
    return faiss
