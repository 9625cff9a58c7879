"""A shop's images, encoded once for search: nearest by embedding, re-ranked by pair scores, with a confidence.

```python
index = GalleryIndex.build(model, processor, shop_rows, output_dir="shop.index")
answer = index.search(model.encode_clips(**processor(videos=[frames])), live_id="live-7")[0]
```
"""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from data_rice.collator import RiceCollator
from data_rice.parsing import id_text
from modeling_rice.fingerprint_rice import same_state
from modeling_rice.scoring_rice import default_ranking

from .answers import Answer, answer_of, candidate_scores, relevance
from .approximate import Settings, recall, sample_of
from .build import (
    ShopEncoder,
    ShopReader,
    as_rows,
    collect_images,
    encoded_queries,
    finite_rows,
    has_words,
    process_group,
    record_of,
    report_skipped,
    state_of,
)
from .calibration import PRESENCE_PRIOR, Calibration, ScoredClip, check_decision, check_depth, fit_with_words
from .job import COMMIT_EVERY, Job, build_together, failure_of
from .newest import Newest
from .search import CACHE_BYTES, Candidates, Scope, check_search, scopes_of
from .table import KEPT_FOR, RECORD, ShopTable, Snapshot, Version, columns_of, rows_of

DEPTH = 100
"""Number of candidates per clip; scores and confidences are relative to them."""


class GalleryIndex:
    """
    The images of a shop or a platform in one LanceDB table, in a folder, in object storage or in memory.

    Each change (`add`, `remove`, `calibration`, `approximate`) is written at once as one new version. After a kill or
    on a full disk the previous version stays intact. Several processes may write at the same time; if two write the
    same image, the later one wins. `search` sees the changes of other processes within `refresh_s` seconds, or at once
    after `refresh`. A running search continues in its version.

    Any number of threads may search and change one index. All of them call the model, so its `similarity`, `match` and
    `align` must be thread-safe, as those of a `RiceModel` in eval mode are.

    Searched livestreams stay in memory, up to `cache_bytes`; so does the whole index if it fits.

    Args:
        model: A `RiceModel` in eval mode; the clips must come from the same model.
        table: Table of encoded images; by default an empty one in memory.
        processor: The processor saved with the model; `add` and `calibrate` with rows need it.
        cache_bytes: Maximum bytes of encodings in memory.
        refresh_s: Seconds after which `search` checks for a newer version.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it is damaged, of another model or of an earlier format; or an argument is out of range.
        OSError: a change cannot be written.
    """

    def __init__(
        self,
        model: Any,
        table: ShopTable | None = None,
        processor: Any = None,
        cache_bytes: int = CACHE_BYTES,
        refresh_s: float = 1.0,
    ):
        check_depth("cache_bytes", cache_bytes)
        self.model, self.processor = model, processor
        self._table = ShopTable() if table is None else table
        self._newest = Newest(self._table, model, cache_bytes, refresh_s)

    def __len__(self) -> int:
        return 0 if self._newest.is_empty() else self._newest.rooms().num_images

    @property
    def skipped(self) -> list[dict]:
        """Images that were left out, with `id`, `file` and `reason`."""
        if self._newest.is_empty():
            return []
        rows = self._newest.rooms().snapshot.read([*RECORD, "position", "reason"], "reason IS NOT NULL")
        return [failure_of(record) for record in rows.sort_by("position").to_pylist()]

    @property
    def calibration(self) -> Calibration | None:
        """The calibration of confidences, `None` if not fitted. Setting it writes it to the index."""
        return None if self._newest.is_empty() else self._newest.rooms().snapshot.state.calibration

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        self._newest.write_state(calibration=calibration)

    @property
    def approximate_kind(self) -> str | None:
        """ "hnsw" or "ivfpq" if the whole index is searched approximately, `None` for exact search."""
        settings = None if self._newest.is_empty() else self._newest.rooms().snapshot.state.approximate
        return settings and settings["kind"]

    @property
    def precision(self) -> str | None:
        """Precision of the encoding: "float32", "bfloat16", "float16" or "int8"; `None` without pictures."""
        return None if self._newest.is_empty() else self._newest.rooms().snapshot.state.precision

    @property
    def version(self) -> int:
        """Number of the searched version; 0 before the first write."""
        return 0 if self._newest.is_empty() else self._newest.rooms().snapshot.version

    @classmethod
    def build(
        cls,
        model: Any,
        processor: Any,
        shop_rows: Sequence[dict],
        *,
        batch_size: int | None = None,
        output_dir: str | os.PathLike | None = None,
        num_workers: int = 0,
        progress: bool = True,
        dtype: str = "float16",
        commit_every: int = COMMIT_EVERY,
        process_index: int | None = None,
        num_processes: int | None = None,
        overwrite: bool = False,
    ) -> "GalleryIndex | None":
        """
        Encodes a shop.

        In a folder or URI, `commit_every` images are written at a time, and the same call resumes an interrupted
        build. For a changed shop it encodes the pictures whose content changed, and deletes missing ones. Under
        `accelerate launch` each process encodes its share, and all return the whole index. Unconnected processes do
        the same with `process_index` and `num_processes`, in a place that all can access.

        Args:
            model: A model in eval mode.
            processor: The processor saved with the model.
            shop_rows: Gallery rows with `image_id`, `image` (a path, a PIL image or `{"path", "bytes"}`) and optional
                `live_id`, `title` and `product_id`, as dicts or a table (pandas, Arrow, `datasets`). An id is text or
                a whole number. Rows with the same id are one image in several livestreams.
            batch_size: Images per batch; by default 16 on a CPU, where every core encodes a batch of its own, else 64.
            output_dir: The index's folder or URI; by default it is built in memory.
            num_workers: Number of processes that decode.
            progress: Show a progress bar.
            dtype: Type of the stored encodings, "float16" or "float32".
            commit_every: Images per commit, which limits the memory and the loss by an interruption.
            process_index, num_processes: Number of this process and of all; by default from `accelerate`, else 0 of 1.
            overwrite: Replace an index of another model or other settings, or a damaged one, and allow deleting more
                than half of the images.

        Returns:
            The index. With `process_index` given, `None` until all processes have finished; the last one returns it.

        Raises:
            ValueError: no rows, a bad row (checked before encoding), no readable image, an argument out of range, or
                an index that cannot be read.
            FileExistsError: the place holds an index that only `overwrite` replaces.
            OSError: the index cannot be written.
        """
        if model.training:
            raise ValueError("the model is in training mode; call model.eval() before building an index.")
        encoder = ShopEncoder(model, processor, batch_size, num_workers, progress, dtype)
        group = process_group() if num_processes is None else None
        index, count = group or (process_index or 0, num_processes or 1)
        if not 0 <= index < count:
            raise ValueError(
                f"process_index must be from 0 to num_processes - 1, got {index} with num_processes {count}."
            )
        if output_dir is None and count > 1:
            raise ValueError("several processes need a common folder; pass output_dir.")
        table = ShopTable(output_dir)
        job = Job(table, encoder, as_rows(shop_rows), commit_every, overwrite)
        if group is not None and count > 1:
            build_together(job, index, count)
        else:
            job.run(job.open(may_replace=index == 0), index, count)
            if count > 1 and not job.is_whole():
                return None
            job.finish()
        return cls._opened(table, model, processor)

    @classmethod
    def _opened(cls, table: ShopTable, model: Any, processor: Any, **settings) -> "GalleryIndex":
        result = cls(model, table, processor, **settings)
        result.refresh()
        return result

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        model: Any,
        processor: Any = None,
        cache_bytes: int = CACHE_BYTES,
        refresh_s: float = 1.0,
    ) -> "GalleryIndex":
        """
        Opens an index; encodings are read on demand.

        Args:
            folder: Folder or URI, written by `build` or `save`.
            model: The model that encoded it, in eval mode.
            processor: Only for `add` and for `calibrate` with rows.
            cache_bytes, refresh_s: As `GalleryIndex`.

        Raises:
            FileNotFoundError: there is no index.
            ValueError: it is damaged, incomplete, of an earlier format or of another model.
        """
        return cls._opened(ShopTable(folder), model, processor, cache_bytes=cache_bytes, refresh_s=refresh_s)

    def save(self, folder: str | os.PathLike, overwrite: bool = False) -> None:
        """
        Writes a copy of the index without its older versions and its approximate index.

        Args:
            folder: Folder or URI; the index's own folder needs no saving.
            overwrite: Replace an existing index.

        Raises:
            FileExistsError: the folder holds another index.
            OSError: the index cannot be written, for example because the disk is full.
        """
        table, snapshot = ShopTable(folder), self._newest.rooms(at_once=True).snapshot
        if self._table.is_local and os.path.realpath(folder) == os.path.realpath(self._table.uri or ""):
            return
        state = replace(snapshot.state, approximate=None)
        table.create(snapshot.fields, replace(state, complete=False, before=None), replace=overwrite)
        for rows in snapshot.batches():
            table.upsert(rows.drop_columns("_rowid"))
        table.write_state(state)
        table.index_columns(live_ids=bool(self.live_ids()))

    def refresh(self) -> None:
        """
        Switches to the newest version.

        Raises:
            FileNotFoundError, ValueError: as `load`; then the previous version stays in use.
        """
        self._newest.rooms(at_once=True)

    def versions(self) -> list[Version]:
        """The versions that can be restored, oldest first: number, time and rows (including unreadable images)."""
        return self._table.versions()

    def restore(self, version: int) -> None:
        """
        Restores an older version with its calibration, as a new version.

        Raises:
            ValueError: the version does not exist, or was not complete.
        """
        self._table.restore(version)
        self.refresh()

    def compact(self, kept_for: timedelta = KEPT_FOR) -> None:
        """
        Joins the small files of many changes, and adds new images to the indexes.

        Args:
            kept_for: Versions older than this are deleted; they can no longer be restored or searched.

        Raises:
            OSError: the index cannot be written; it is unchanged.
        """
        self._table.index_columns(live_ids=bool(self.live_ids()))
        self._table.compact(kept_for)
        self.refresh()

    def live_ids(self) -> list[str]:
        """The livestreams with images in the index, in the order of the gallery."""
        return [] if self._newest.is_empty() else self._newest.rooms().live_ids()

    def records(self, image_ids: Sequence[str]) -> dict[str, dict]:
        """Image id -> its columns `table.RECORD`, for the given images that are in the index."""
        return {} if self._newest.is_empty() else self._newest.rooms().records(image_ids)

    def image_ids(self) -> list[str]:
        """All images, in the order of the gallery."""
        return [] if self._newest.is_empty() else self._newest.rooms().column("image_id")

    def titles(self, live_id: str | None = None) -> list[str]:
        """The titles of a livestream's images, by default of all, in the order of the gallery; "" for none."""
        return [] if self._newest.is_empty() else self._newest.rooms().column("title", scopes_of(live_id, 1)[0])

    def add(self, rows: Sequence[dict], batch_size: int | None = None) -> list[dict]:
        """
        Encodes more images, in one new version. An existing image is encoded again; it keeps its position, and its
        livestreams in addition to the new ones.

        Args:
            rows: As `shop_rows` of `build`.
            batch_size: As for `build`.

        Returns:
            The unreadable images with `id`, `file` and `reason`; `skipped` lists the new ones among them.

        Raises:
            ValueError: as `build` for the rows, or the index was opened without a processor.
            OSError: the images cannot be written.
        """
        processor = self._processor_for("adding images")
        dtype = "float16" if self._newest.is_empty() else self._newest.to_write().snapshot.state.dtype
        encoder = ShopEncoder(self.model, processor, batch_size, progress=False, dtype=dtype)
        rows = as_rows(rows)
        images = collect_images(rows)
        known = self.records([image.image_id for image in images])
        for image in images:
            before = known.get(image.image_id, {}).get("live_ids", [])
            image.live_ids = list(dict.fromkeys([*before, *image.live_ids]))
        records, parts, failures = [], [], []
        for batch, features in encoder.batches(images, ShopReader(encoder.collator, rows)):
            contents = {image.image_id: (image, content) for image, content in zip(batch.images, batch.contents)}
            for name, path in batch.paths.items():
                image, content = contents[name]
                records.append(record_of(image, path, 0, content))
            for name, failure in batch.failures.items():
                image, content = contents[name]
                failures.append({key: failure[key] for key in ("id", "file", "reason")})
                if name not in known:
                    records.append(record_of(image, failure["file"] or "", 0, content, failure["reason"]))
            parts += [] if features is None else [features]
        report_skipped(failures, len(images))
        if records:
            features = type(parts[0]).cat(parts) if parts else None
            self._put(records, features, encoder)
        return failures

    def put(self, records: Sequence[dict], features: Any) -> None:
        """
        Writes images that the index's model has encoded elsewhere, in one new version.

        Args:
            records: Per image, `image_id` and optional `product_id`, `title`, `image` (its path) and `live_ids`.
            features: `RiceGallery` with one row per record.

        Raises:
            ValueError: the number of rows differs, or the encodings are of another model or have other fields.
            OSError: the images cannot be written.
        """
        if len(records) != len(features):
            raise ValueError(f"there are {len(records)} records for {len(features)} encoded images; give one each.")
        empty = {"title": "", "image": "", "live_ids": [], "content": ""}
        self._put([{**empty, "product_id": record["image_id"], **record} for record in records], features, None)

    def _put(self, records: list[dict], features: Any, encoder: ShopEncoder | None) -> None:
        with self._newest.lock:
            if self._newest.is_empty():
                shown = encoder.encode_blank() if features is None else features
                dtype = str(shown.embeds.dtype).removeprefix("torch.")
                state = state_of(self.model, dtype=dtype) if encoder is None else encoder.state()
                self._table.create(columns_of(shown), state)
            snapshot = self._newest.to_write().snapshot
            if features is not None:
                _check_features(features, snapshot)
            there = snapshot.find([record["image_id"] for record in records], ["image_id", "position"]).to_pylist()
            places = {row["image_id"]: row["position"] for row in there}
            new = dict.fromkeys(record["image_id"] for record in records if record["image_id"] not in places)
            places |= {image_id: place for place, image_id in enumerate(new, snapshot.last_position() + 1)}
            placed = [{**record, "position": places[record["image_id"]]} for record in records]
            self._table.upsert(rows_of(placed, features, snapshot.fields))
            self.refresh()

    def remove(self, image_ids: Sequence[str]) -> list[str]:
        """
        Removes images, in one new version, and returns the ids that were not in the index.

        Raises:
            ValueError: `image_ids` is a single text instead of a list.
            OSError: the index cannot be written.
        """
        if isinstance(image_ids, str):
            raise ValueError("image_ids is a single text; pass a list of ids.")
        wanted = list(dict.fromkeys(map(id_text, image_ids)))
        if self._newest.is_empty():
            return wanted
        known = self._newest.to_write().records(wanted)
        if known:
            self._table.delete(list(known))
            self.refresh()
        return [name for name in wanted if name not in known]

    def approximate(self, kind: str | None = "hnsw", **settings) -> float | None:
        """
        Turns on approximate search of the whole index; livestreams are still searched exactly. Images added later are
        compared one by one until `compact` or the next call.

        Args:
            kind: "hnsw", "ivfpq", or `None` for exact search.
            settings: Fields of `approximate.Settings`.

        Returns:
            Recall of the 10 nearest images, 0 to 1, for up to 64 of the shop's own images (easier queries than clips).
            `None` without a kind.

        Raises:
            ValueError: the index is empty, or a setting is out of range.
            OSError: the index cannot be written.
        """
        if kind is None:
            self._table.index_embeddings(None)
            self._newest.write_state(approximate=None)
            return None
        chosen = Settings(kind, **settings)
        count = len(self)
        config = chosen.config(count, self._newest.rooms().snapshot.fields["embeds"].type.list_size if count else 0)
        clips = sample_of(self._newest.rooms())
        scopes = [None] * len(clips)
        self._newest.write_state(approximate=None)
        exact = self._newest.rooms().search(clips, scopes, 10)
        self._table.index_embeddings(config)
        self._newest.write_state(approximate=chosen.searching(count) | {"kind": kind})
        found = self._newest.rooms().search(clips, scopes, 10)
        names = [[[record["image_id"] for record in one.records] for one in answers] for answers in (found, exact)]
        share = recall(*names)
        self._newest.write_state(approximate={**self._newest.rooms().snapshot.state.approximate, "recall@10": share})
        return share

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
            live_id: Search one livestream's images; or a list with one entry per clip: an id, several ids, or `None`
                for the whole index.
            top_k: Maximum number of hits per clip.
            rerank: Number of nearest images that get pair scores, at least `top_k`; fused scores and confidences are
                relative to these images. `None`: the whole scope. 0: rank by embedding only.

        Returns:
            One answer per clip.

        Raises:
            ValueError: a count is not a whole number or below 1, a list has another length, the clips are of another
                model, the index is calibrated for another kind of score, or its data are damaged.
        """
        check_search(top_k, rerank)
        scopes = scopes_of(live_id, len(clips))
        if not scopes:
            return []
        depth = None if rerank is None else max(top_k, rerank or DEPTH)
        # One version for the whole search, even if a new one is written meanwhile.
        rooms = None if self._newest.is_empty() else self._newest.rooms()
        calibration = None if rooms is None else rooms.snapshot.state.calibration
        if calibration is not None:
            calibration.check_ranking(self._ranking(rerank))
        with torch.no_grad():
            start = time.perf_counter()
            found = [Candidates(None, [])] * len(scopes) if rooms is None else rooms.search(clips, scopes, depth)
            search_ms = 1000 * (time.perf_counter() - start) / len(found)
            answers = []
            for i, candidates in enumerate(found):
                start = time.perf_counter()
                scores = None
                if candidates.records:
                    scores = candidate_scores(self.model, clips[i], candidates, rerank != 0)
                timings = {"search_ms": search_ms, "match_ms": 1000 * (time.perf_counter() - start)}
                of_clip = None if calibration is None else calibration.of_clip(has_words(clips, i))
                answers.append(answer_of(candidates, scores, scopes[i], top_k, of_clip, timings))
        return answers

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
        Fits confidences and the "no product" threshold on validation clips of this index's shop, and stores them.

        Each clip is searched in its shop, and in its shop without its product. A confidence is the probability that
        the hit is right, if the share `presence_prior` of the clips show a product of the shop. If the model scores
        texts, clips with a transcript are also searched with it, for a separate calibration.

        Args:
            queries: Query rows (`clip_id`, `frames` or `video`, `relevant`, `live_id`, `asr`), or `RiceClips`.
            relevant: With `RiceClips`, the relevant image ids of each clip.
            live_id: With `RiceClips`, as in `search`; rows have their own if the index has livestreams.
            presence_prior: Share of clips in use whose product is in the shop, above 0 and below 1.
            false_accept_rate: Maximum share of clips without their product that get an answer, 0 to 1. By default a
                clip is answered if the answer is more likely right than wrong, at a confidence of 0.5.
            rerank: As in `search`, which should use the same number.
            use_boxes, batch_size, num_workers, progress: Settings for reading rows.

        Returns:
            Figures from cross-validation: `num_present`, `num_absent`, `presence_prior`, `threshold`, `false_accepts`
            (share of answered clips among those without their product), `answered` (share of answered clips among the
            others), `right_when_answered` (share of right ones among these), `expected_calibration_error` (under the
            prior), `said` (the same for clips with transcripts, if any), and `unreadable`, the unreadable clips.

        Raises:
            ValueError: too few clips; a prior, rate or count out of its range; lists of unequal length; rows without a
                processor; or a result that would answer none of the clips.
        """
        check_decision(presence_prior, false_accept_rate)
        check_depth("rerank", rerank)
        unreadable: list[dict] = []
        if hasattr(queries, "embeds"):
            if relevant is None or len(relevant) != len(queries):
                raise ValueError(f"relevant must list the image ids of each of the {len(queries)} clips.")
            answers = [[id_text(image_id) for image_id in images] for images in relevant]
            batches = [(queries, answers, scopes_of(live_id, len(queries)), False)]
        else:
            names = ("text_config", "text_score_weight")
            use_text = all(getattr(self.model.config, name, None) is not None for name in names)
            collator = RiceCollator(self._processor_for("reading clips"), use_boxes=use_boxes, use_text=use_text)
            reading = (self.live_ids(), (batch_size, num_workers, progress), unreadable)
            batches = encoded_queries(self.model, collator, queries, *reading)
        scored: dict[bool, list[ScoredClip]] = {False: [], True: []}
        for *batch, said in batches:
            scored[said] += self._scored(*batch, rerank)
        self.calibration = fit_with_words(
            scored[False],
            scored[True],
            presence_prior=presence_prior,
            false_accept_rate=false_accept_rate,
            rerank=rerank,
            ranking=self._ranking(rerank),
        )
        return {**self.calibration.report, "unreadable": unreadable}

    def _ranking(self, rerank: int | None) -> str:
        """The kind of score of the ranking."""
        return "embedding" if rerank == 0 else default_ranking(self.model.config)

    def _processor_for(self, purpose: str) -> Any:
        if self.processor is None:
            raise ValueError(f"the index was opened without a processor, which {purpose} needs; pass one to load.")
        return self.processor

    @torch.no_grad()
    def _scored(self, clips, answers: list, scopes: list[Scope], rerank: int | None) -> list[ScoredClip]:
        """Each clip in its shop, and in the shop without its product."""
        rooms = self._newest.rooms()
        known = rooms.records(list(dict.fromkeys(image for images in answers for image in images)))
        # More candidates, because the images of the product are removed.
        limit = None if rerank is None else rerank or DEPTH
        depth = None if limit is None else limit + max(map(len, answers), default=0) + 16
        scored: list[ScoredClip] = []
        for i, candidates in enumerate(rooms.search(clips, scopes, depth)):
            if candidates.records:
                own = {known[image]["product_id"] for image in answers[i] if image in known}
                group = min(own, default=f"clip {len(scored)}")
                relevant = relevance(candidates, answers[i], own)
                for gone in (False, True):
                    kept = np.flatnonzero(~(relevant & gone))[:limit]
                    if len(kept):
                        chosen = candidates.take(kept)
                        scores = candidate_scores(self.model, clips[i], chosen, rerank != 0)
                        missed = bool(own) and len(kept) == limit and not gone and not relevant[kept].any()
                        kinds = (scores.embedding, scores.pairs, scores.ranked_by)
                        scored.append(ScoredClip(*kinds, relevant[kept], chosen.products, group, missed))
        return scored


def _check_features(features: Any, snapshot: Snapshot) -> None:
    if not same_state(features.model_fingerprint, snapshot.state.model_fingerprint):
        raise ValueError("the images were encoded by another model; encode them with the index's.")
    if not finite_rows(features).all():
        raise ValueError("some of the images have encodings that are not finite; leave out these images.")
    columns = columns_of(features)
    if {name: one.type for name, one in columns.items()} != {n: one.type for n, one in snapshot.fields.items()}:
        raise ValueError(
            f"the images have the encodings {', '.join(columns)} and the index {', '.join(snapshot.fields)}, or "
            f"others in width or dtype; encode them with the same settings."
        )
