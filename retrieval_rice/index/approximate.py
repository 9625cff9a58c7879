"""Approximate search for shops of hundreds of thousands of images: LanceDB's HNSW graphs, or IVF with product codes.

The index proposes candidates and the stored encodings decide among them, so that what is lost is only what was not
proposed, and codes cost no accuracy in the order of what was.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .calibration import check_depth
from .table import lancedb

KINDS = ("hnsw", "ivfpq")
# Of the learning of lists and codes: with the library's own, 50 and 256, it takes 2.5 times as long and finds no more.
_ITERATIONS, _SAMPLE_RATE = 15, 64

SAMPLE = 64
"""Images of the shop by which the recall is measured."""


@dataclass
class Settings:
    """
    Args:
        kind: "hnsw" (a graph over 8-bit vectors: about 1 byte per dimension and 200 per image) or "ivfpq" (lists of
            product codes: `code_bytes` + 8 per image).
        links: Neighbours per node of the graph.
        ef_construction: Effort of building the graph.
        ef_search: Candidates that the graph search keeps at least; more is slower and finds more.
        lists: Of the inverted file; by default about the root of the number of images.
        probes: Lists that are looked into; by default an eighth of them, at least 8.
        code_bytes: Bytes of a product code, a divisor of the embedding's width; by default an eighth of it.
        oversample: Candidates proposed per candidate wanted; by default 4 for product codes, which are coarse, else 1.

    Raises:
        ValueError: for another kind, or a number below 1.
    """

    kind: str = "hnsw"
    links: int = 20
    ef_construction: int = 150
    ef_search: int = 128
    lists: int | None = None
    probes: int | None = None
    code_bytes: int | None = None
    oversample: int | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        if self.oversample is None:
            self.oversample = 4 if self.kind == "ivfpq" else 1
        for name, value in asdict(self).items():
            if name != "kind":
                check_depth(name, value, least=1)

    def config(self, count: int, width: int) -> Any:
        """
        LanceDB's own settings for `count` embeddings of `width` numbers.

        Raises:
            ValueError: no images, or a code that does not divide the width.
        """
        if count == 0:
            raise ValueError("the index has no images to search approximately; add some first.")
        if self.kind == "hnsw":
            return lancedb().index.HnswSq(
                distance_type="cosine", m=self.links, ef_construction=self.ef_construction, num_partitions=1
            )
        code = self.code_bytes or max(1, width // 8)
        if width % code:
            raise ValueError(f"code_bytes is {code}, which does not divide the {width} embedding numbers.")
        return lancedb().index.IvfPq(
            distance_type="cosine",
            num_partitions=self._lists(count),
            num_sub_vectors=code,
            max_iterations=_ITERATIONS,
            sample_rate=_SAMPLE_RATE,
        )

    def _lists(self, count: int) -> int:
        # Each list is learned from some images.
        return self.lists or max(1, min(round(count**0.5), count // 40))

    def searching(self, count: int) -> dict:
        """How `search.Rooms` asks the index: candidates per candidate wanted, and the query's own settings."""
        if self.kind == "hnsw":
            effort = {"ef": self.ef_search, "nprobes": 1}
        else:
            lists = self._lists(count)
            effort = {"nprobes": min(lists, self.probes or max(8, lists // 8))}
        return {"oversample": self.oversample, "effort": effort}


def sample_of(rooms: Any) -> Any:
    """Some of the shop's own embeddings, spread over the gallery, as clips that look for their like."""
    from modeling_rice import RiceClips

    rows = np.linspace(0, rooms.num_images - 1, min(SAMPLE, rooms.num_images)).astype(np.int64)
    positions = np.sort(rooms.snapshot.read(["position"], "reason IS NULL")["position"].to_numpy())[rows]
    where = f"reason IS NULL AND position IN ({', '.join(map(str, positions))})"
    embeds = rooms.snapshot.features(rooms.snapshot.read(None, where), rooms.features_class, ["embeds"]).embeds
    return RiceClips(embeds=embeds.float().to(getattr(rooms.model, "device", "cpu")))


def recall(found: list[list[str]], exact: list[list[str]]) -> float:
    """Share of the exact answers that were found, 0 to 1."""
    return float(np.mean([len(set(one) & set(other)) / len(other) for one, other in zip(found, exact) if other]))
