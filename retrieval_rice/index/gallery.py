"""A shop's images, encoded once and searched for ever: nearest by embedding, re-ranked in pairs, with a confidence.

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
"""Candidates per clip, to which scores and confidences are relative."""


class GalleryIndex:
    """
    The images of a shop or a platform in one LanceDB table, in a folder, in object storage or in memory.

    Changes (`add`, `remove`, `calibration`, `approximate`) are written when they are made, each as one new version: a
    kill or a full disk leaves the version before, whole. Several processes may write at the same time; of two that
    write the same image the later one counts. What another process wrote is seen by `search` within `refresh_s`
    seconds, or at once after `refresh`; a search that began before goes on in the version that it began with.

    One index may be searched and changed by any number of threads. The model is called by all of them, so its
    `similarity`, `match` and `align` must be safe to call at the same time, as a `RiceModel`'s in eval mode are.

    Livestreams that were searched stay in memory, `cache_bytes` of them at most; so does the whole index where
    it fits.

    Args:
        model: A `RiceModel` in eval mode; clips must come from it too.
        table: Encoded images; by default none, in memory.
        processor: Saved with the model; `add` and `calibrate` with rows need it.
        cache_bytes: Encodings kept in memory.
        refresh_s: Seconds after which `search` looks for a newer version.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it is damaged, of another model, or of an earlier format; or an argument is out of range.
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
        """How scores become confidences, `None` where that was not fitted. Setting it writes it to the index."""
        return None if self._newest.is_empty() else self._newest.rooms().snapshot.state.calibration

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        self._newest.write_state(calibration=calibration)

    @property
    def approximate_kind(self) -> str | None:
        """ "hnsw" or "ivfpq" where the whole index is searched so, `None` where it is searched exactly."""
        settings = None if self._newest.is_empty() else self._newest.rooms().snapshot.state.approximate
        return settings and settings["kind"]

    @property
    def precision(self) -> str | None:
        """In which the pictures were encoded: "float32", "bfloat16", "float16" or "int8"; `None` without pictures."""
        return None if self._newest.is_empty() else self._newest.rooms().snapshot.state.precision

    @property
    def version(self) -> int:
        """Number of the version that is searched; 0 before anything was written."""
        return 0 if self._newest.is_empty() else self._newest.rooms().snapshot.version

    @classmethod
    def build(
        cls,
        model: Any,
        processor: Any,
        shop_rows: Sequence[dict],
        *,
        batch_size: int = 64,
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

        Into a folder or URI images go `commit_every` at a time: the same call again goes on where one was interrupted.
        For a changed shop it encodes the pictures that changed, by their content, and deletes those that are gone.
        Under `accelerate launch` each process encodes its share, and all return the whole index. Processes that know
        nothing of each other do the same when told their number; the place must be one that all see.

        Args:
            model: In eval mode.
            processor: Saved with the model.
            shop_rows: Gallery rows with `image_id`, `image` (a path, a PIL image or `{"path", "bytes"}`) and, where
                there are any, `live_id`, `title` and `product_id`, as dicts or a table (pandas, Arrow, `datasets`). An
                id is text or a whole number. Rows of one id are one image of several livestreams.
            batch_size: Images per batch.
            output_dir: The index's folder or URI; by default it is built in memory.
            num_workers: Processes that decode.
            progress: Show a bar.
            dtype: "float16" or "float32", of the stored encodings.
            commit_every: Images per commit, which bounds the memory and what an interruption costs.
            process_index, num_processes: By default as `accelerate` says, else 0 of 1.
            overwrite: Replace what another model or other settings encoded, or an index that is damaged, and delete
                images even where they are more than half.

        Returns:
            The index. `None` in a process that was told its number, while others have not finished; the last one
            gets it.

        Raises:
            ValueError: no rows, a bad row (told before encoding), not one readable image, an argument out of range, or
                an index that cannot be read.
            FileExistsError: the place holds what only `overwrite` replaces.
            OSError: it cannot be written.
        """
        if model.training:
            raise ValueError("the model is in training mode; call model.eval() before building an index.")
        encoder = ShopEncoder(model, processor, batch_size, num_workers, progress, dtype)
        group = process_group() if num_processes is None else None
        index, count = group or (process_index or 0, num_processes or 1)
        if not 0 <= index < count:
            raise ValueError(f"process {index} of {count} is not possible.")
        if output_dir is None and count > 1:
            raise ValueError("several processes need a folder to meet in; pass output_dir.")
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
        Opens an index; encodings are read as they are needed.

        Args:
            folder: Folder or URI, written by `build` or `save`.
            model: The one that encoded it, in eval mode.
            processor: Only for `add` and for `calibrate` with rows.
            cache_bytes, refresh_s: As `GalleryIndex`.

        Raises:
            FileNotFoundError: there is no index.
            ValueError: it is damaged, of an earlier format, not complete yet, or was encoded by another model.
        """
        return cls._opened(ShopTable(folder), model, processor, cache_bytes=cache_bytes, refresh_s=refresh_s)

    def save(self, folder: str | os.PathLike, overwrite: bool = False) -> None:
        """
        Writes a copy of the index, without its older versions and its approximate index.

        Args:
            folder: Folder or URI; that of the index itself needs no saving.
            overwrite: Replace an index that is there.

        Raises:
            FileExistsError: there is another index.
            OSError: it cannot be written, for instance because the disk is full.
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
        Searches the newest version from now on.

        Raises:
            FileNotFoundError, ValueError: as `load`; the version that was searched before stays in use.
        """
        self._newest.rooms(at_once=True)

    def versions(self) -> list[Version]:
        """The versions that can be restored, oldest first: number, time and rows, unreadable images included."""
        return self._table.versions()

    def restore(self, version: int) -> None:
        """
        Goes back to an older version, with its calibration, as a new version.

        Raises:
            ValueError: there is no such version, or it was not complete.
        """
        self._table.restore(version)
        self.refresh()

    def compact(self, kept_for: timedelta = KEPT_FOR) -> None:
        """
        Joins the small files that many changes leave, and takes new images into the indexes.

        Args:
            kept_for: Older versions are deleted, and can be neither restored nor searched any more.

        Raises:
            OSError: it cannot be written; what was there is unchanged.
        """
        self._table.index_columns(live_ids=bool(self.live_ids()))
        self._table.compact(kept_for)
        self.refresh()

    def live_ids(self) -> list[str]:
        """The livestreams that have images here, in the order of the gallery."""
        return [] if self._newest.is_empty() else self._newest.rooms().live_ids()

    def records(self, image_ids: Sequence[str]) -> dict[str, dict]:
        """What is known of those of the images that are here, by their id: `table.RECORD`."""
        return {} if self._newest.is_empty() else self._newest.rooms().records(image_ids)

    def image_ids(self) -> list[str]:
        """All images, in the order of the gallery."""
        return [] if self._newest.is_empty() else self._newest.rooms().column("image_id")

    def titles(self, live_id: str | None = None) -> list[str]:
        """The titles of a livestream's images, by default of all, in the order of the gallery; "" for none."""
        return [] if self._newest.is_empty() else self._newest.rooms().column("title", scopes_of(live_id, 1)[0])

    def add(self, rows: Sequence[dict], batch_size: int = 64) -> list[dict]:
        """
        Encodes more images, in one new version. One that is here already is encoded anew, and keeps its place and its
        livestreams beside the new ones.

        Args:
            rows: As `shop_rows` of `build`.
            batch_size: Images per batch.

        Returns:
            The images that could not be read, with `id`, `file` and `reason`; `skipped` lists those that are new.

        Raises:
            ValueError: as `build` for the rows, or an index that was opened without a processor.
            OSError: they cannot be written.
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
        Writes images that were encoded elsewhere by this index's model, in one new version.

        Args:
            records: Of each image `image_id` and, where there are any, `product_id`, `title`, `image` (its path) and
                `live_ids`.
            features: `RiceGallery` of as many rows.

        Raises:
            ValueError: another number of rows, or encodings of another model or with other fields.
            OSError: they cannot be written.
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
        Takes images out, in one new version, and returns the ids that were not here.

        Raises:
            ValueError: a text in the place of a list.
            OSError: it cannot be written.
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
        Searches the whole index approximately from now on; livestreams are still searched exactly. Images that are
        added later are compared one by one until `compact` or the next call.

        Args:
            kind: "hnsw", "ivfpq", or `None` to go back to exact search.
            settings: Of `approximate.Settings`.

        Returns:
            Share of the 10 nearest images that is found, 0 to 1: for up to 64 of the shop's own images, which is
            easier than for clips. `None` without a kind.

        Raises:
            ValueError: the index is empty, or a setting is out of range.
            OSError: it cannot be written.
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
            live_id: Search one livestream's images; or a list with an entry per clip, each an id, several ids, or
                `None` for the whole index.
            top_k: Hits per clip at most.
            rerank: Nearest images that are scored by more than their embeddings, at least `top_k`; fused scores and
                confidences are relative to these. `None`: the whole scope. 0: rank by embedding alone.

        Returns:
            One answer per clip.

        Raises:
            ValueError: a count that is no whole number or below 1, a list of another length, clips of another model,
                an index that is calibrated for another kind of score, or is damaged where it is read.
        """
        check_search(top_k, rerank)
        scopes = scopes_of(live_id, len(clips))
        if not scopes:
            return []
        depth = None if rerank is None else max(top_k, rerank or DEPTH)
        # One version for the whole search, whatever is written meanwhile.
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
        Fits confidences and the "no product" threshold on validation clips of this index's shop, and keeps them.

        Each clip is searched in its shop, and in its shop without its product. A confidence is then the probability
        that the hit is right where a share `presence_prior` of the clips show a product of the shop. Where the model
        scores texts, clips with a transcript are searched with it, too, for a calibration of their own.

        Args:
            queries: Query rows (`clip_id`, `frames` or `video`, `relevant`, `live_id`, `asr`), or `RiceClips`.
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
            the others), `right_when_answered` (of these), `expected_calibration_error` (under the prior), `said` (the
            same of clips with transcripts, where there are any), and `unreadable`, the clips that could not be read.

        Raises:
            ValueError: too few clips, a prior, rate or count outside its range, lists of unequal length, rows without
                a processor, or a result that would answer none of the clips.
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
        """The kind of score that candidates are ranked by."""
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
        # As many more candidates as the product may take away.
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
        raise ValueError("some of the images have encodings that are not finite; leave these out.")
    columns = columns_of(features)
    if {name: one.type for name, one in columns.items()} != {n: one.type for n, one in snapshot.fields.items()}:
        raise ValueError(
            f"the images have the encodings {', '.join(columns)} and the index {', '.join(snapshot.fields)}, or "
            f"others in width or dtype; encode them alike."
        )
