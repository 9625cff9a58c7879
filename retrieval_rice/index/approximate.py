"""Approximate search for shops of hundreds of thousands of images: LanceDB's HNSW graphs, or IVF with product codes.

The approximate index proposes candidates, and the stored encodings rank them exactly. So an image is lost only if it
is not proposed, and product codes do not change the order of the proposed images.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .calibration import check_depth
from .table import lancedb

KINDS = ("hnsw", "ivfpq")
# For training lists and codes. The library's defaults, 50 and 256, take 2.5 times as long and find no more.
_ITERATIONS, _SAMPLE_RATE = 15, 64

SAMPLE = 64
"""Number of shop images for measuring the recall."""


@dataclass
class Settings:
    """
    Args:
        kind: "hnsw" (a graph over 8-bit vectors: about 1 byte per dimension and 200 per image) or "ivfpq" (lists of
            product codes: `code_bytes` + 8 per image).
        links: Neighbours per node of the graph.
        ef_construction: Effort of building the graph.
        ef_search: Minimum number of candidates of the graph search; more is slower and finds more.
        lists: Number of lists of the inverted file; by default about the square root of the number of images.
        probes: Number of searched lists; by default an eighth of them, at least 8.
        code_bytes: Bytes of a product code, a divisor of the embedding's width; by default an eighth of it.
        oversample: Proposed candidates per requested candidate; by default 4 for product codes, which are coarse,
            else 1.

    Raises:
        ValueError: the kind is unknown, or a number is below 1.
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
        LanceDB's settings for `count` embeddings of `width` numbers.

        Raises:
            ValueError: there are no images, or `code_bytes` does not divide the width.
        """
        if count == 0:
            raise ValueError("the index has no images to search approximately; add some first.")
        if self.kind == "hnsw":
            return lancedb().index.HnswSq(
                distance_type="cosine", m=self.links, ef_construction=self.ef_construction, num_partitions=1
            )
        code = self.code_bytes or max(1, width // 8)
        if width % code:
            raise ValueError(
                f"code_bytes is {code}, which does not divide the {width} numbers of an embedding; choose a divisor."
            )
        return lancedb().index.IvfPq(
            distance_type="cosine",
            num_partitions=self._lists(count),
            num_sub_vectors=code,
            max_iterations=_ITERATIONS,
            sample_rate=_SAMPLE_RATE,
        )

    def _lists(self, count: int) -> int:
        # Each list needs some images for training.
        return self.lists or max(1, min(round(count**0.5), count // 40))

    def searching(self, count: int) -> dict:
        """Settings of a query by `search.Rooms`: proposed candidates per requested one, and LanceDB's settings."""
        if self.kind == "hnsw":
            effort = {"ef": self.ef_search, "nprobes": 1}
        else:
            lists = self._lists(count)
            effort = {"nprobes": min(lists, self.probes or max(8, lists // 8))}
        return {"oversample": self.oversample, "effort": effort}


def sample_of(rooms: Any) -> Any:
    """Some embeddings of the shop, spread over the gallery, as queries for measuring the recall."""
    from modeling_rice import RiceClips

    rows = np.linspace(0, rooms.num_images - 1, min(SAMPLE, rooms.num_images)).astype(np.int64)
    positions = np.sort(rooms.snapshot.read(["position"], "reason IS NULL")["position"].to_numpy())[rows]
    where = f"reason IS NULL AND position IN ({', '.join(map(str, positions))})"
    embeds = rooms.snapshot.features(rooms.snapshot.read(None, where), rooms.features_class, ["embeds"]).embeds
    return RiceClips(embeds=embeds.float().to(getattr(rooms.model, "device", "cpu")))


def recall(found: list[list[str]], exact: list[list[str]]) -> float:
    """Share of the exact results that were found, 0 to 1."""
    return float(np.mean([len(set(one) & set(other)) / len(other) for one, other in zip(found, exact) if other]))
