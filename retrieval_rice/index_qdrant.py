"""Encoded shop images in Qdrant: the embedded engine of its client, or a server or cluster by its URL.

```python
store = QdrantStore("http://qdrant:6333", "shop", model=model)
store.upload(index.store)
index = GalleryIndex(model, store, processor, calibration=index.calibration)
```

Each image is one point with its embedding, which is indexed, every other tensor of its encoding, which is only stored,
and its record. Qdrant proposes candidates; the model scores them as it scores those of a `LocalStore`. Needs
`pip install qdrant-client`.
"""

import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm

from .index_files import check_fingerprint
from .index_store import Candidates, LocalStore, Scope

BATCH = 256
"""Points per request, which stays below the server's limit of 32 MB at a thousand numbers per image."""

_NAMESPACE = uuid.UUID("6d1e2c60-9a53-4a0b-8a70-0f6f2a5c1b11")
_MARGIN = 16
_LIVES = "live_ids"


class QdrantStore:
    """
    Args:
        location: ":memory:" or a folder for the embedded engine, which searches exactly; else the URL of a server.
        collection: Name of the collection; created when the first images come.
        model: The one that encodes; a collection of another model is refused.
        api_key: Of the server.
        exact: Let a server compare every image, instead of searching its HNSW graph.
        shards, replicas: Of a new collection on a cluster.
        quantization: Of a new collection on a server: "int8" or "product" keep small codes in memory and the
            embeddings on the disk, which then decide among the candidates.
        timeout: Seconds to wait for a server.

    Raises:
        ValueError: the client is not installed, a setting is unknown, or the collection is another model's.
        ConnectionError: the server does not answer.
        BlockingIOError: another process has the embedded engine's folder open.
    """

    def __init__(
        self,
        location: str,
        collection: str,
        model: Any,
        *,
        api_key: str | None = None,
        exact: bool = False,
        shards: int | None = None,
        replicas: int | None = None,
        quantization: str | None = None,
        timeout: int = 60,
    ):
        if quantization not in (None, "int8", "product"):
            raise ValueError(f'quantization must be "int8", "product" or None, got {quantization!r}.')
        self.location, self.collection, self.model, self.exact = str(location), collection, model, exact
        self._cluster = {"shard_number": shards, "replication_factor": replicas}
        self._quantization = quantization
        self.skipped: list[dict] = []
        self._order = 0
        self._qdrant = _qdrant()
        self.is_embedded = "://" not in self.location
        self.client = self._connect(api_key, timeout)
        with self._errors():
            if self.client.collection_exists(collection):
                about = self.client.get_collection(collection).config.metadata or {}
                check_fingerprint(about.get("model_fingerprint"), model, f"{collection} at {self.location}")

    def _connect(self, api_key: str | None, timeout: int):
        client_class = self._qdrant.QdrantClient
        with self._errors():
            if self.location == ":memory:":
                return client_class(":memory:")
            if self.is_embedded:
                return client_class(path=self.location)
            # The version is asked for in the background otherwise, with a warning in the place of an error.
            return client_class(url=self.location, api_key=api_key, timeout=timeout, check_compatibility=False)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What the client raises, as one sentence."""
        from qdrant_client.http.exceptions import ApiException

        try:
            with warnings.catch_warnings():
                # The embedded engine notes at each call that it searches exactly and keeps no payload indexes.
                warnings.filterwarnings("ignore", module="qdrant_client")
                warnings.filterwarnings("ignore", message=".*[Ll]ocal (mode|Qdrant).*")
                yield
        except ApiException as error:
            reason = " ".join(str(error).split())[:300]
            raise ConnectionError(f"Qdrant at {self.location} did not do it ({reason}); check the server.") from error
        except RuntimeError as error:
            if "already accessed" not in str(error):
                raise
            raise BlockingIOError(
                f"another process has the folder {self.location} open; wait for its end, or run a Qdrant server."
            ) from None

    def close(self) -> None:
        """Lets go of the connection, or of the embedded engine's folder."""
        self.client.close()

    def __len__(self) -> int:
        with self._errors():
            if not self.client.collection_exists(self.collection):
                return 0
            return self.client.count(self.collection, exact=True).count

    def _create(self, features) -> None:
        """A collection for encodings of this shape."""
        models = self._qdrant.models
        vectors = {}
        for name, width in _widths(features).items():
            indexed = name == "embeds"
            vectors[name] = models.VectorParams(
                size=width,
                # Embeddings are of length 1; a cosine would divide by it again, and round.
                distance=models.Distance.DOT,
                datatype=models.Datatype.FLOAT16 if features.embeds.dtype == torch.float16 else None,
                on_disk=not indexed or self._quantization is not None,
                hnsw_config=None if indexed else models.HnswConfigDiff(m=0),
                quantization_config=self._codes() if indexed else None,
            )
        self.client.create_collection(
            self.collection,
            vectors_config=vectors,
            metadata={"model_fingerprint": features.model_fingerprint},
            **{name: value for name, value in self._cluster.items() if value is not None},
        )
        # Keeps the images of a livestream together, so that reading them is one place on the disk.
        index = models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD, is_tenant=True)
        self.client.create_payload_index(self.collection, _LIVES, index)

    def _codes(self):
        models = self._qdrant.models
        if self._quantization == "int8":
            settings = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, quantile=0.99, always_ram=True)
            return models.ScalarQuantization(scalar=settings)
        if self._quantization == "product":
            settings = models.ProductQuantizationConfig(compression=models.CompressionRatio.X32, always_ram=True)
            return models.ProductQuantization(product=settings)
        return None

    def put(self, records: list[dict], features, skipped: list[dict] = ()) -> None:
        """Writes images in batches; those that are here already are replaced."""
        self.skipped += skipped
        if not records:
            return
        check_fingerprint(features.model_fingerprint, self.model, f"{self.collection} at {self.location}")
        # Grows from one call, and one process, to the next: the order of the gallery, which decides between equals.
        self._order = max(self._order, time.time_ns() // 1000)
        with self._errors():
            if not self.client.collection_exists(self.collection):
                self._create(features)
            tensors = {name: getattr(features, name).float().cpu() for name in _widths(features)}
            for start in range(0, len(records), BATCH):
                points = [
                    self._qdrant.models.PointStruct(
                        id=point_id(records[row]["image_id"]),
                        vector={name: tensor[row].tolist() for name, tensor in tensors.items()},
                        payload={**records[row], "order": self._order + row},
                    )
                    for row in range(start, min(start + BATCH, len(records)))
                ]
                self.client.upsert(self.collection, points, wait=True)
        self._order += len(records)

    def upload(self, store: LocalStore, progress: bool = True) -> None:
        """Writes all images of a local index, which may be repeated after an interruption."""
        with tqdm(total=len(store), desc="uploading", unit="image", disable=not progress) as bar:
            for rows, features in store.chunks():
                self.put(store.records(rows), features)
                bar.update(len(rows))
        self.skipped += store.skipped

    def search(self, model, clips, scopes: Sequence[Scope], k: int | None) -> list[Candidates]:
        """As `LocalStore.search`."""
        if len(self) == 0:
            return [Candidates(None, []) for _ in scopes]
        models = self._qdrant.models
        params = models.SearchParams(exact=self.exact or k is None)
        requests = [
            models.QueryRequest(
                query=embed.tolist(),
                using="embeds",
                filter=self._filter(scope),
                limit=self._count(scope) if k is None else k + _MARGIN,
                params=params,
                with_payload=True,
                with_vector=True,
            )
            for embed, scope in zip(clips.embeds.float().cpu(), scopes)
        ]
        with self._errors():
            answers = self.client.query_batch_points(self.collection, requests)
        return [self._candidates(model, clips[i], answer.points, k) for i, answer in enumerate(answers)]

    def _filter(self, scope: Scope):
        models = self._qdrant.models
        if scope is None:
            return None
        return models.Filter(must=[models.FieldCondition(key=_LIVES, match=models.MatchAny(any=list(scope)))])

    def _count(self, scope: Scope) -> int:
        with self._errors():
            return max(1, self.client.count(self.collection, self._filter(scope), exact=True).count)

    def _candidates(self, model, clip, points: list, k: int | None) -> Candidates:
        """In the order of the model's own similarity, which the engine's arithmetic approaches."""
        if not points:
            return Candidates(None, [])
        points = sorted(points, key=lambda point: point.payload["order"])
        features = self._features(model, points)
        similarity = model.similarity(clip, features.to(clip.embeds.device))[0].float().cpu()
        order = similarity.argsort(descending=True, stable=True)[:k]
        names = ("image_id", "product_id", "live_ids", "title", "image")
        return Candidates(features[order], [{name: points[i].payload[name] for name in names} for i in order.tolist()])

    def _features(self, model, points: list):
        from modeling_rice import RiceGallery

        tensors = {
            name: torch.tensor([point.vector[name] for point in points])
            for name in RiceGallery.fields
            if name in points[0].vector
        }
        return RiceGallery(model_fingerprint=model.fingerprint(), **tensors)

    def get(self, image_ids: Sequence[str]) -> dict[str, dict]:
        """Records of those of the images that are here."""
        found: dict[str, dict] = {}
        if not image_ids or len(self) == 0:
            return found
        with self._errors():
            for start in range(0, len(image_ids), BATCH):
                ids = [point_id(image_id) for image_id in image_ids[start : start + BATCH]]
                for point in self.client.retrieve(self.collection, ids, with_payload=True):
                    found[point.payload["image_id"]] = {k: v for k, v in point.payload.items() if k != "order"}
        return {image_id: found[image_id] for image_id in image_ids if image_id in found}

    def remove(self, image_ids: Sequence[str]) -> list[str]:
        """Takes images out and returns the ids that were not here."""
        known = self.get(image_ids)
        if known:
            selector = self._qdrant.models.PointIdsList(points=[point_id(image_id) for image_id in known])
            with self._errors():
                self.client.delete(self.collection, selector, wait=True)
        return [image_id for image_id in image_ids if image_id not in known]

    def live_ids(self) -> list[str]:
        """The livestreams that have images here, sorted; the first million of them."""
        if len(self) == 0:
            return []
        with self._errors():
            hits = self.client.facet(self.collection, _LIVES, limit=1_000_000, exact=True).hits
        return sorted(hit.value for hit in hits)


def point_id(image_id: str) -> str:
    """The point's UUID, the same in every process, so that an image written twice is one point."""
    return str(uuid.uuid5(_NAMESPACE, image_id))


def _widths(features) -> dict[str, int]:
    """Width of every tensor that an image's encoding consists of."""
    tensors = {name: getattr(features, name) for name in features.fields}
    return {name: tensor.shape[1] for name, tensor in tensors.items() if tensor is not None}


def _qdrant():
    try:
        import qdrant_client
    except ImportError as error:
        raise ValueError("this index is in Qdrant, which needs its client: pip install qdrant-client.") from error
    return qdrant_client
