"""A shop's images, encoded once and searched for ever: nearest by embedding, re-ranked by matching, with a confidence.

```python
index = GalleryIndex.build(model, processor, shop_rows, output_dir="shop.index")
answer = index.search(model.encode_clips(**processor(videos=[frames])), live_id="live-7")[0]
```
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_rice.collator import RiceCollator
from data_rice.parsing import id_text
from modeling_rice.fingerprint_rice import same_state
from modeling_rice.scoring_rice import best_first, ranked_scores

from . import index_build, index_files
from .calibration import PRESENCE_PRIOR, Calibration, ScoredClip, check_decision, fit_calibration, product_shares
from .index_store import Candidates, LocalStore, Scope, Store, live_of, scopes_of

DEPTH = 100
"""Candidates per clip, to which scores and confidences are relative."""


@dataclass
class Hit:
    """
    An image that was found.

    Attributes:
        image_id, product_id, title: As the shop's rows name them; without a product id, the image id.
        live_id: The livestream that was searched, or the first that sells the image; "" where there are none.
        image: Path of the picture as `data_rice.paths.path_to_text` writes it, "" where it came as bytes.
        score: By which hits are ranked, the kind that `config.ranking` of the model says.
        embedding_score: `model.similarity`, a cosine.
        matching_score: `model.match`, `None` where it was not asked for.
        confidence: Probability that the hit's product is the clip's, 0 to 1; see `GalleryIndex.calibrate`.
    """

    image_id: str
    product_id: str
    live_id: str
    title: str
    image: str
    score: float
    embedding_score: float
    matching_score: float | None
    confidence: float


@dataclass
class Answer:
    """
    What is known of one clip.

    Attributes:
        hits: Best first; empty where the searched livestreams have no images.
        no_product: The clip shows none of the shop's products: the confidence is below the calibrated threshold.
        confidence: Of the first hit, 0 to 1.
        timings: Milliseconds of "search_ms" (embedding search) and "match_ms" (matching), a clip's share of its batch.
    """

    hits: list[Hit]
    no_product: bool
    confidence: float
    timings: dict[str, float] = field(default_factory=dict)


class GalleryIndex:
    """
    Args:
        model: A `RiceModel` in eval mode; clips must come from it too.
        store: Encoded images: `LocalStore`, or `index_qdrant.QdrantStore` for more than one machine holds.
        processor: Saved with the model; `add` and `calibrate` with rows need it.
        calibration: From `calibrate` of another index of the same model.
    """

    def __init__(
        self,
        model: Any,
        store: Store | None = None,
        processor: Any = None,
        calibration: Calibration | None = None,
    ):
        self.model = model
        self.store = LocalStore() if store is None else store
        self.processor = processor
        self.calibration = calibration
        self.dtype = "float16"
        self._saved: tuple[Path, str] | None = None

    def __len__(self) -> int:
        return len(self.store)

    @property
    def skipped(self) -> list[dict]:
        """Images that were left out, with `id`, `file` and `reason`."""
        return getattr(self.store, "skipped", [])

    @classmethod
    def build(
        cls,
        model: Any,
        processor: Any,
        shop_rows: Sequence[dict],
        *,
        batch_size: int = 64,
        output_dir: str | Path | None = None,
        num_workers: int = 0,
        progress: bool = True,
        dtype: str = "float16",
        shard_size: int = index_build.SHARD_SIZE,
        process_index: int | None = None,
        num_processes: int | None = None,
        overwrite: bool = False,
    ) -> "GalleryIndex | None":
        """
        Encodes a shop.

        Into a folder it goes shard by shard: the same call again goes on where one was interrupted, and a call for a
        changed shop encodes the shards that changed. Under `accelerate launch` each process encodes its share, and all
        return the whole index. So do processes that know nothing of each other, told their number, in a
        folder that all see.

        Args:
            model: In eval mode.
            processor: Saved with the model.
            shop_rows: Gallery rows with `image_id`, `image` (a path, a PIL image or `{"path", "bytes"}`) and, where
                there are any, `live_id`, `title` and `product_id`, as dicts or a table (pandas, Arrow, `datasets`). An
                id is text or a whole number. Rows of one id are one image of several livestreams.
            batch_size: Images per batch.
            output_dir: The index's folder; by default it is built in memory.
            num_workers: Processes that decode.
            progress: Show a bar.
            dtype: "float16" or "float32", of the stored encodings.
            shard_size: Images per shard, which bounds the memory.
            process_index, num_processes: By default as `accelerate` says, else 0 of 1.
            overwrite: Replace an index of another shop or model, or one that was changed after it was built.

        Returns:
            The index. `None` in a process that was told its number, while others have not finished; the last one
            gets it.

        Raises:
            ValueError: no rows, a bad row (told before encoding), no readable image, or an argument out of range.
            FileExistsError: the folder holds another index.
            BlockingIOError: another process is writing to the folder.
            OSError: the folder cannot be written.
        """
        if model.training:
            raise ValueError("the model is in training mode; call model.eval() before building an index.")
        encoder = index_build.ShopEncoder(model, processor, batch_size, num_workers, progress, dtype)
        shop_rows = index_build.as_rows(shop_rows)
        group = index_build.process_group() if num_processes is None else None
        index, count = group or (process_index or 0, num_processes or 1)
        if not 0 <= index < count or shard_size < 1:
            raise ValueError(f"process {index} of {count} with {shard_size} images per shard is not possible.")
        if output_dir is None:
            if count > 1:
                raise ValueError("several processes need a folder to meet in; pass output_dir.")
            _, shards = index_build.encode_shards(encoder, shop_rows, None, shard_size, 0, 1)
            return cls._of_shards(encoder, shards)
        folder = Path(output_dir)
        if count == 1:
            with index_files.write_lock(folder):
                keys = cls._encode_into(folder, encoder, shop_rows, shard_size, 0, 1, overwrite)
                return cls._finish(folder, encoder, keys)
        with index_files.write_lock(folder, shared=True):
            keys = cls._encode_into(folder, encoder, shop_rows, shard_size, index, count, overwrite)
        return _meet(cls, folder, encoder, keys, group)

    @classmethod
    def _encode_into(cls, folder, encoder, rows, shard_size, process_index, num_processes, overwrite) -> list[str]:
        if not overwrite and (folder / index_files.MANIFEST).exists():
            manifest, _ = index_files.read_manifest(folder)
            images = index_build.collect_images(rows)
            reader = index_build.ShopReader(encoder.collator, rows)
            keys = [encoder.key(piece, reader) for piece in index_build.shards_of(images, shard_size)]
            if [shard["key"] for shard in manifest["shards"]] != keys:
                raise FileExistsError(
                    f"{folder} holds an index of other images, another model or other settings, or one that was "
                    f"changed since; pass overwrite=True (--overwrite) to replace it, or name another folder."
                )
        keys, _ = index_build.encode_shards(encoder, rows, folder, shard_size, process_index, num_processes)
        return keys

    @classmethod
    def _of_shards(cls, encoder: index_build.ShopEncoder, shards: list) -> "GalleryIndex":
        result = cls(encoder.model, LocalStore(shards), encoder.processor)
        result.dtype = encoder.dtype
        skipped = result.skipped
        if len(result) == 0:
            raise ValueError(f"not one of the {len(skipped)} images could be read; the first: {skipped[0]['reason']}.")
        index_build.report_skipped(skipped, len(result) + len(skipped))
        return result

    @classmethod
    def _finish(cls, folder: Path, encoder: index_build.ShopEncoder, keys: list[str]) -> "GalleryIndex":
        calibration = None
        if index_files.manifest_digest(folder) is not None:
            manifest, _ = index_files.read_manifest(folder)
            calibration = manifest.get("calibration")
            if [shard["key"] for shard in manifest["shards"]] == keys:
                return cls.load(folder, encoder.model, encoder.processor)
        features_class = _features_class(encoder.model)
        result = cls._of_shards(encoder, list(index_build.stored_shards(folder, keys, features_class)))
        if calibration and same_state(manifest["model_fingerprint"], encoder.model.fingerprint()):
            result.calibration = Calibration(**calibration)
        result._write_manifest(folder)
        return result

    def _write_manifest(self, folder: Path, approximate: dict | None = None) -> None:
        config = self.model.config
        manifest = {
            "model_fingerprint": self.model.fingerprint(),
            "model_name": getattr(self.model, "name_or_path", "") or getattr(config, "_name_or_path", ""),
            "model_revision": getattr(config, "_commit_hash", None),
            "dtype": self.dtype,
            "num_images": len(self),
            "num_skipped": len(self.skipped),
            "shards": [{"key": shard.key, "num_images": len(shard)} for shard in self.store.shards],
            "approximate": approximate,
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
        }
        self._saved = (folder.resolve(), index_files.write_manifest(folder, manifest))

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """
        Writes the index; what was in the folder before stays whole until the new state is complete.

        Args:
            folder: Created when it is missing.
            overwrite: Replace an index that this one was not loaded from or saved to.

        Raises:
            FileExistsError: there is another index, or this one after somebody else changed it.
            BlockingIOError: another process is writing to the folder.
            OSError: it cannot be written, for instance because the disk is full.
            ValueError: the images are in a database.
        """
        folder = Path(folder)
        store = self._local("be saved to a folder")
        with index_files.write_lock(folder):
            self._check_replaceable(folder, overwrite)
            new: list[Path] = []
            try:
                for shard in store.shards:
                    new += index_files.write_shard(folder, shard)
                approximate = self._write_approximate(folder, new)
                self._write_manifest(folder, approximate)
            except OSError:
                for path in new:
                    path.unlink(missing_ok=True)
                raise

    def _check_replaceable(self, folder: Path, overwrite: bool) -> None:
        there = index_files.manifest_digest(folder)
        if overwrite or there is None:
            return
        if self._saved is None or self._saved[0] != folder.resolve():
            raise FileExistsError(f"{folder} holds an index already; pass overwrite=True to replace it.")
        if self._saved[1] != there:
            raise FileExistsError(
                f"the index {folder} was changed by another process since it was loaded here; load it again and "
                f"repeat the change, or pass overwrite=True to lose theirs."
            )

    def _write_approximate(self, folder: Path, new: list[Path]) -> dict | None:
        approximate = self.store.approximate
        if approximate is None:
            return None
        key = index_files.keys_digest(shard.key for shard in self.store.shards)
        path = folder / f"approximate-{approximate.settings.kind}-{key}.faiss"
        with index_files.written(path) as temporary:
            about = approximate.save(temporary)
        new.append(path)
        return {"file": path.name, **about}

    @classmethod
    def load(cls, folder: str | Path, model: Any, processor: Any = None) -> "GalleryIndex":
        """
        Opens an index; encodings are read from the files as they are needed.

        Args:
            folder: Written by `build` or `save`.
            model: The one that encoded it, in eval mode.
            processor: Only for `add` and for `calibrate` with rows.

        Raises:
            FileNotFoundError: there is no index, or a file of it is missing.
            ValueError: it is damaged, or was encoded by another model.
        """
        folder = Path(folder)
        try:
            return cls._load(folder, model, processor)
        except FileNotFoundError:
            # A writer may have replaced the index, and deleted its former files, while it was being read.
            return cls._load(folder, model, processor)

    @classmethod
    def _load(cls, folder: Path, model: Any, processor: Any) -> "GalleryIndex":
        manifest, digest = index_files.read_manifest(folder)
        index_files.check_fingerprint(
            manifest.get("model_fingerprint"), model, str(folder), manifest.get("model_name")
        )
        features_class = _features_class(model)
        shards = [index_files.read_shard(folder, shard["key"], features_class) for shard in manifest["shards"]]
        calibration = manifest.get("calibration")
        result = cls(model, LocalStore(shards), processor, Calibration(**calibration) if calibration else None)
        result.dtype = manifest["dtype"]
        result._saved = (folder.resolve(), digest)
        approximate = manifest.get("approximate")
        if approximate:
            from .index_faiss import FaissIndex

            path = folder / approximate["file"]
            result.store.approximate = FaissIndex.load(path, approximate["settings"], approximate["removed"])
        return result

    def to(self, *args, **kwargs) -> "GalleryIndex":
        """Moves or casts the encodings, as `Tensor.to` does; on the model's device a search copies nothing."""
        store = self._local("be moved")
        store.to(*args, **kwargs)
        if len(store):
            self.dtype = str(store.take(np.zeros(1, dtype=np.int64)).embeds.dtype).removeprefix("torch.")
        return self

    def live_ids(self) -> list[str]:
        """The livestreams that have images here."""
        return self.store.live_ids()

    def add(self, rows: Sequence[dict], batch_size: int = 64) -> list[dict]:
        """
        Encodes more images. One that is here already is encoded anew and keeps its livestreams beside the new ones.

        Args:
            rows: As `shop_rows` of `build`.
            batch_size: Images per batch.

        Returns:
            The images that could not be read, with `id`, `file` and `reason`; `skipped` lists them too.

        Raises:
            ValueError: as `build` for the rows, or an index that was opened without a processor.
        """
        processor = self._processor_for("adding images")
        encoder = index_build.ShopEncoder(self.model, processor, batch_size, progress=False, dtype=self.dtype)
        reader = index_build.ShopReader(encoder.collator, index_build.as_rows(rows))
        images = index_build.collect_images(reader.rows)
        known = self.store.get([image.image_id for image in images])
        for image in images:
            before = known.get(image.image_id, {}).get("live_ids", [])
            image.live_ids = list(dict.fromkeys([*before, *image.live_ids]))
        for piece in index_build.shards_of(images, index_build.SHARD_SIZE):
            shard = encoder.encode(piece, reader)
            self.store.put(shard.records.to_pylist(), shard.features, shard.skipped)
            index_build.report_skipped(shard.skipped, len(piece))
        added = {image.image_id for image in images}
        return [failure for failure in self.skipped if failure["id"] in added]

    def remove(self, image_ids: Sequence[str]) -> list[str]:
        """Takes images out and returns the ids that were not here."""
        if isinstance(image_ids, str):
            raise ValueError("image_ids is a single text; pass a list of ids.")
        return self.store.remove(list(dict.fromkeys(map(id_text, image_ids))))

    def approximate(self, kind: str | None = "hnsw", progress: bool = True, **settings) -> "GalleryIndex":
        """
        Searches the whole index by FAISS from now on; livestreams are still searched exactly, and so are images that
        are added later, until this is called again.

        Args:
            kind: "hnsw", "ivfpq", or `None` to go back to exact search.
            progress: Show a bar.
            settings: Of `index_faiss.FaissSettings`.

        Raises:
            ValueError: FAISS is not installed, the index is empty, or a setting is out of range.
        """
        store = self._local("be searched by FAISS")
        if kind is None:
            store.approximate = None
            return self
        from .index_faiss import FaissIndex, FaissSettings

        store.approximate = FaissIndex.build(store, FaissSettings(kind=kind, **settings), progress)
        return self

    def _local(self, purpose: str) -> LocalStore:
        if not isinstance(self.store, LocalStore):
            raise ValueError(f"the images are in a database, which cannot {purpose}.")
        return self.store

    def search(
        self,
        clips: Any,
        live_id: str | Sequence[str | Sequence[str] | None] | None = None,
        top_k: int = 10,
        rerank: int | None = DEPTH,
    ) -> list[Answer]:
        """
        Finds the images that clips show.

        Args:
            clips: `RiceClips` of this model.
            live_id: Search one livestream's images; or a list with an entry per clip, each an id, several ids, or
                `None` for the whole index.
            top_k: Hits per clip at most.
            rerank: Nearest images that are scored by more than their embeddings, at least `top_k`; fused scores and
                confidences are relative to these. `None`: the whole scope. 0: rank by embedding alone.

        Returns:
            One answer per clip.

        Raises:
            ValueError: a count below 1, a list of another length, or clips of another model.
        """
        if top_k < 1 or (rerank is not None and rerank < 0):
            raise ValueError(f"top_k must be at least 1 and rerank at least 0, got {top_k} and {rerank}.")
        scopes = scopes_of(live_id, len(clips))
        if not scopes:
            return []
        depth = None if rerank is None else max(top_k, rerank or DEPTH)
        found, search_ms = self._candidates(clips, scopes, depth)
        return [
            self._answer(clips[i], candidates, scopes[i], top_k, rerank != 0, search_ms / len(found))
            for i, candidates in enumerate(found)
        ]

    @torch.no_grad()
    def _candidates(self, clips, scopes: list[Scope], k: int | None) -> tuple[list[Candidates], float]:
        start = time.perf_counter()
        found = self.store.search(self.model, clips, scopes, k)
        return found, 1000 * (time.perf_counter() - start)

    def _answer(self, clip, candidates: Candidates, scope: Scope, top_k: int, match: bool, search_ms: float) -> Answer:
        timings = {"search_ms": search_ms, "match_ms": 0.0}
        if not candidates.records:
            return Answer([], True, 0.0, timings)
        start = time.perf_counter()
        embedding, matching, ranked_by = self._scores(clip, candidates, match)
        timings["match_ms"] = 1000 * (time.perf_counter() - start)
        products = [record["product_id"] for record in candidates.records]
        if self.calibration is None:
            confidence = product_shares(ranked_by, 1.0, products)
        else:
            confidence = self.calibration.confidences(embedding, matching, ranked_by, products)
        order = best_first(torch.from_numpy(ranked_by), top_k)
        if not order:
            return Answer([], True, 0.0, timings)
        hits = [
            Hit(
                **{name: candidates.records[i][name] for name in ("image_id", "product_id", "title", "image")},
                live_id=live_of(candidates.records[i], scope),
                score=float(ranked_by[i]),
                embedding_score=float(embedding[i]),
                matching_score=None if matching is None else float(matching[i]),
                confidence=float(confidence[i]),
            )
            for i in order
        ]
        no_product = self.calibration is not None and hits[0].confidence < self.calibration.threshold
        return Answer(hits, no_product, hits[0].confidence, timings)

    @torch.no_grad()
    def _scores(self, clip, candidates: Candidates, match: bool) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Embedding and matching scores of the candidates, and those that they are ranked by, each `(k,)`."""
        features = candidates.features.to(clip.embeds.device)
        ranked_by, known = ranked_scores(self.model, clip, features, None if match else "embedding")
        embedding, matching, ranked_by = (
            None if scores is None else scores[0].cpu().numpy()
            for scores in (known["embedding"], known.get("matching"), ranked_by)
        )
        return embedding, matching, ranked_by

    def calibrate(
        self,
        queries: Any,
        relevant: Sequence[Sequence[str]] | None = None,
        live_id: str | Sequence | None = None,
        *,
        presence_prior: float = PRESENCE_PRIOR,
        false_accept_rate: float | None = None,
        rerank: int | None = DEPTH,
        use_boxes: bool = False,
        batch_size: int = 16,
        num_workers: int = 0,
        progress: bool = True,
    ) -> dict:
        """
        Fits confidences and the "no product" threshold on validation clips of this index's shop, and keeps them.

        Each clip is searched in its shop, and in its shop without its product. A confidence is then the probability
        that the hit is right where a share `presence_prior` of the clips show a product of the shop.

        Args:
            queries: Query rows (`clip_id`, `frames` or `video`, `relevant`, `live_id`), or `RiceClips`.
            relevant: With `RiceClips`, the image ids that answer each clip.
            live_id: With `RiceClips`, as in `search`; rows name their own where the index has livestreams.
            presence_prior: Share of clips in use whose product is in the shop, above 0 and below 1.
            false_accept_rate: Share of clips without their product that may be answered with one, 0 to 1. By default
                a clip is answered where the answer is likelier right than wrong, at a confidence of 0.5.
            rerank: As in `search`, which should use the same.
            use_boxes, batch_size, num_workers, progress: How rows are read.

        Returns:
            What was measured on clips that the fit had not seen: `num_present`, `num_absent`, `presence_prior`,
            `threshold`, `false_accepts` (share of clips without their product that are answered), `answered` (share of
            the others), `right_when_answered` (of these), `expected_calibration_error` (under the prior), and
            `unreadable`, the clips that could not be read.

        Raises:
            ValueError: too few clips, a prior or rate outside its range, lists of unequal length, or rows without a
                processor.
        """
        check_decision(presence_prior, false_accept_rate)
        unreadable: list[dict] = []
        if hasattr(queries, "embeds"):
            if relevant is None or len(relevant) != len(queries):
                raise ValueError(f"relevant must list the image ids of each of the {len(queries)} clips.")
            answers = [[id_text(image_id) for image_id in images] for images in relevant]
            batches = [(queries, answers, scopes_of(live_id, len(queries)))]
        else:
            collator = RiceCollator(self._processor_for("reading clips"), use_boxes=use_boxes)
            reading = (self.live_ids(), (batch_size, num_workers, progress), unreadable)
            batches = index_build.encoded_queries(self.model, collator, queries, *reading)
        scored = [one for batch in batches for one in self._scored(*batch, rerank)]
        self.calibration = fit_calibration(
            scored, presence_prior=presence_prior, false_accept_rate=false_accept_rate, rerank=rerank
        )
        return {**self.calibration.report, "unreadable": unreadable}

    def _processor_for(self, purpose: str):
        if self.processor is None:
            raise ValueError(f"the index was opened without a processor, which {purpose} needs; pass one to load.")
        return self.processor

    def _scored(self, clips, answers: list, scopes: list[Scope], rerank: int | None) -> list[ScoredClip]:
        known = self.store.get(list(dict.fromkeys(image for images in answers for image in images)))
        # As many more candidates as the product may take away.
        limit = None if rerank is None else rerank or DEPTH
        depth = None if limit is None else limit + max(map(len, answers), default=0) + 16
        scored = []
        for i, candidates in enumerate(self._candidates(clips, scopes, depth)[0]):
            if not candidates.records:
                continue
            own = {known[image]["product_id"] for image in answers[i] if image in known}
            relevant = np.array(
                [record["image_id"] in answers[i] or record["product_id"] in own for record in candidates.records]
            )
            group = min(own, default=f"clip {len(scored)}")
            for gone in (False, True):
                kept = np.flatnonzero(~(relevant & gone))[:limit]
                if len(kept):
                    chosen = Candidates(
                        candidates.features[torch.from_numpy(kept)], [candidates.records[row] for row in kept]
                    )
                    scores = self._scores(clips[i], chosen, rerank != 0)
                    products = [record["product_id"] for record in chosen.records]
                    missed = bool(own) and len(kept) == limit and not gone and not relevant[kept].any()
                    scored.append(ScoredClip(*scores, relevant[kept], products, group, missed))
        return scored


def _features_class(model: Any) -> type:
    from modeling_rice import RiceGallery

    return getattr(model, "gallery_class", RiceGallery)


def _meet(cls, folder: Path, encoder, keys: list[str], group: tuple[int, int] | None) -> GalleryIndex | None:
    """The end of a build by several processes: the first of a group, or the last of strangers, writes the manifest."""
    if group is None:
        if not all(index_files.has_shard(folder, key) for key in keys):
            return None
        try:
            with index_files.write_lock(folder):
                return cls._finish(folder, encoder, keys)
        except BlockingIOError:
            # Somebody is still at it, and will come here after.
            return None
    from accelerate import PartialState

    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        with index_files.write_lock(folder):
            cls._finish(folder, encoder, keys)
    state.wait_for_everyone()
    return cls.load(folder, encoder.model, encoder.processor)
