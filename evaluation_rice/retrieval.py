"""Runs a model or a baseline over queries and galleries: decode in workers, encode once, score each query's gallery.

The gallery is encoded once per unique image and kept. Clips are encoded in batches, scored and dropped, so memory
grows with the gallery but not with the number of clips.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from data_rice.collator import failure_words
from hub_rice.cores import PICTURES_PER_CORE, map_on_cores
from modeling_rice.scoring_rice import PARTS, FusionWeights, fuse, model_scores, pair_kinds, with_fused

from .fusion import (
    ALIGNMENT_WEIGHTS,
    DEFAULT_WEIGHTS,
    FUSED_TEXT_WEIGHTS,
    edge_words,
    fit_fusion_weight,
    fit_text_weight,
)
from .protocol import Rankings, RetrievalTask
from .recall import DEFAULT_KS

GALLERY_CHUNK = 2048
"""Number of gallery images scored at once against a batch of clips; limits the memory of matching."""
_NOTHING = torch.zeros(0)


class Retriever(Protocol):
    """Interface of a method for `retrieve`. `load_*` run in the loader's workers and must be picklable.

    `load_*` take a list of dataset rows and return `(inputs, positions of the readable rows, failures)`. A failure is
    a dict with `id`, `file` and `reason`. It has `outcome` if the row was loaded with other frames ("replaced") or
    fewer frames ("left out"). `encode_*` turn inputs into an object with `len` and slices. `cat` joins such objects.
    `scores` returns one CPU tensor `(num_clips, num_images)` per kind of score: "embedding", and the others in
    `modeling_rice.scoring_rice.model_scores` that the method has.
    """

    def load_gallery(self, rows: list[dict]) -> tuple[Any, list[int], list[dict]]: ...

    def load_clips(self, rows: list[dict]) -> tuple[Any, list[int], list[dict]]: ...

    def encode_gallery(self, inputs: Any) -> Any: ...

    def encode_clips(self, inputs: Any) -> Any: ...

    def cat(self, parts: list[Any]) -> Any: ...

    def scores(self, clips: Any, gallery: Any) -> dict[str, torch.Tensor]: ...


class ModelRetriever:
    """Any model with `encode_gallery`, `encode_clips` and `similarity`, and optionally `match` and `align`.

    Args:
        model: the model; `modeling_rice.scoring_rice.pair_kinds` reads its scores from its config.
        collator: object whose `collate_gallery(rows)` and `collate_queries(rows)` decode rows into model inputs.
        matching: False does not use the decoder.
    """

    def __init__(self, model, collator, matching: bool = True):
        self.model = model
        self.collator = collator
        self.device = model.device if hasattr(model, "device") else next(model.parameters()).device
        self.kinds = [kind for kind in pair_kinds(model) if matching or kind != "matching"]

    @property
    def num_frames(self) -> int | None:
        """Maximum number of frames per clip, from the processor; `None` if it has no such setting."""
        processor = getattr(self.collator, "processor", None)
        return getattr(getattr(processor, "video_processor", None), "num_frames", None)

    def num_parameters(self) -> int:
        """Number of parameters of the whole model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def load_gallery(self, rows):
        return self.collator.collate_gallery(rows)

    def load_clips(self, rows):
        return self.collator.collate_queries(rows)

    def _to_device(self, inputs):
        return {name: value.to(self.device) if hasattr(value, "to") else value for name, value in inputs.items()}

    def encode_gallery(self, inputs):
        return self._encode(self.model.encode_gallery, self._to_device(inputs))

    def encode_clips(self, inputs):
        return self._encode(self.model.encode_clips, self._to_device(inputs))

    def _encode(self, encode, inputs):
        parts = list(map_on_cores(lambda part: encode(**part), _parts(inputs, self.device), self.device))
        return self.cat(parts) if len(parts) > 1 else parts[0]

    def cat(self, parts):
        return type(parts[0]).cat(parts)

    def scores(self, clips, gallery):
        return {kind: values.cpu() for kind, values in model_scores(self.model, clips, gallery, self.kinds).items()}


def _parts(inputs: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """Inputs of a batch, on a CPU with several threads in parts of a few pictures."""
    # Processes that share one model must call it equally often.
    is_shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    if device.type != "cpu" or torch.get_num_threads() == 1 or is_shared:
        return [inputs]
    rows = len(next(iter(inputs.values())))
    frames = inputs["frame_mask"].shape[1] if "frame_mask" in inputs else 1
    size = max(1, PICTURES_PER_CORE // frames)
    return [{name: value[i : i + size] for name, value in inputs.items()} for i in range(0, rows, size)]


@dataclass(frozen=True)
class Loading:
    """
    Settings of reading: `batch_size` rows at a time, in `num_workers` processes that start with `worker_init`, with or
    without progress bars.
    """

    batch_size: int = 32
    num_workers: int = 0
    quiet: bool = False
    worker_init: Callable[[int], None] | None = None

    def batches(self, dataset, rows: list[int], load, title: str) -> Iterator[tuple[list[int], Any, list[dict]]]:
        """Yields `(numbers of readable rows, inputs, failures)` for each batch of `rows`, in order."""
        loader = DataLoader(
            Subset(dataset, rows),
            self.batch_size,
            shuffle=False,
            num_workers=self.num_workers,
            collate_fn=load,
            worker_init_fn=self.worker_init,
        )
        done = 0
        with tqdm(total=len(rows), desc=title, unit="row", disable=self.quiet or not rows) as bar:
            for inputs, loaded, failures in loader:
                asked = rows[done : done + self.batch_size]
                done += len(asked)
                yield [asked[i] for i in loaded], inputs, failures
                bar.update(len(asked))


@contextmanager
def evaluating(model):
    """
    The model in eval mode without gradients. Afterwards each of its modules has its former mode, so training can
    continue, also with parts that are frozen in eval mode.
    """
    modes = [(module, module.training) for module in model.modules()] if hasattr(model, "modules") else []
    trains = any(training for _, training in modes)
    if trains:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if trains:
            model.train(modes[0][1])
            for module, training in modes:
                module.training = training


def _encode_gallery(retriever, task: RetrievalTask, gallery, loading: Loading):
    """Encodes every unique image once; returns encodings, image position -> encoding position, and failures.

    An image of several livestreams is read from the first readable row.
    """
    parts, places, failures = [], {}, []
    attempt = 0
    while True:
        waiting = {
            rows[attempt]: i for i, rows in enumerate(task.image_rows) if i not in places and attempt < len(rows)
        }
        if not waiting:
            break
        for loaded, inputs, failed in loading.batches(gallery, list(waiting), retriever.load_gallery, "gallery"):
            failures += [{"kind": "gallery", **failure, "id": str(failure["id"])} for failure in failed]
            if loaded:
                parts.append(retriever.encode_gallery(inputs))
                places.update((waiting[row], len(places)) for row in loaded)
        attempt += 1
    return retriever.cat(parts) if parts else None, places, failures


def _take(retriever, encodings, positions: list[int]):
    """The encodings at `positions`, joined from slices, because encodings need not support lists of indices."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([position, position + 1])
    slices = [encodings[start:stop] for start, stop in runs]
    return retriever.cat(slices) if len(slices) > 1 else slices[0]


def iter_scores(
    retriever: Retriever, task: RetrievalTask, queries, gallery, loading: Loading, failures: list[dict]
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Yields `(query number, {score name: tensor over the query's gallery})`, livestream by livestream.

    An unreadable image has the score NaN. A query without a readable frame is not yielded. Both are appended to
    `failures`, and so are single unreadable frames. Raises `ValueError` if no gallery image could be read.
    """
    encodings, places, failed = _encode_gallery(retriever, task, gallery, loading)
    failures += failed
    failures += task.without_gallery()
    if encodings is None:
        reason = failure_words(failed[0]) if failed else "the gallery is empty"
        raise ValueError(f"not one of the {len(task.image_ids)} gallery images could be read; the first: {reason}.")
    scope_order = {name: i for i, name in enumerate(task.scopes)}
    rows = [i for i, name in enumerate(task.query_scopes) if name in scope_order]
    rows.sort(key=lambda i: scope_order[task.query_scopes[i]])
    current, shop, kept = None, None, []
    for loaded, inputs, failed in loading.batches(queries, rows, retriever.load_clips, "clips"):
        # Ids of the task are texts, those of the rows may be numbers.
        failed = [{**failure, "id": str(failure["id"])} for failure in failed]
        failures += [{"kind": "query", **failure} for failure in failed]
        if not loaded:
            continue
        clips, start = retriever.encode_clips(inputs), 0
        # A frame that was replaced or left out is listed, but its query is not a miss.
        damaged = {failure["id"] for failure in failed if failure.get("outcome", "skipped") == "skipped"}
        for name, group in groupby(loaded, key=lambda i: task.query_scopes[i]):
            group = list(group)
            if name != current:
                current = name
                kept = [i for i, image in enumerate(task.scopes[name]) if image in places]
                shop = _take(retriever, encodings, [places[task.scopes[name][i]] for i in kept]) if kept else None
            block = clips[start : start + len(group)]
            start += len(group)
            scores = _score(retriever, block, shop, kept, len(task.scopes[name]))
            for row, query in enumerate(group):
                if task.query_ids[query] in damaged:
                    continue
                failures += _not_finite(task.query_ids[query], {k: v[row, kept] for k, v in scores.items()})
                yield query, {kind: values[row] for kind, values in scores.items()}


def _score(retriever, clips, shop, kept: list[int], size: int) -> dict[str, torch.Tensor]:
    """Scores over the whole gallery of a scope, `(num_clips, size)`, NaN for unreadable images."""
    if shop is None:
        return {"embedding": torch.full((len(clips), size), torch.nan)}
    parts = [retriever.scores(clips, shop[i : i + GALLERY_CHUNK]) for i in range(0, len(kept), GALLERY_CHUNK)]
    result = {}
    for kind in parts[0]:
        values = torch.cat([part[kind] for part in parts], dim=1)
        if len(kept) < size:
            full = values.new_full((len(values), size), torch.nan)
            full[:, kept] = values
            values = full
        result[kind] = values
    return result


def _not_finite(query_id: str, scores: dict[str, torch.Tensor]) -> list[dict]:
    failures = []
    for kind, values in scores.items():
        bad = int((~values.isfinite()).sum())
        if bad:
            reason = f"{bad} of {len(values)} {kind} scores are not finite: those images cannot be retrieved"
            failures.append({"kind": "query", "id": query_id, "file": "", "reason": reason})
    return failures


def retrieve(
    retriever: Retriever,
    task: RetrievalTask,
    queries,
    gallery,
    *,
    loading: Loading = Loading(),
    weights: FusionWeights = FusionWeights(),
    ks=DEFAULT_KS,
    depth: int = 100,
) -> tuple[dict[str, Rankings], list[dict]]:
    """Ranks every query's gallery by each score that the method has.

    Args:
        retriever: a model or a baseline.
        task: queries and galleries, from `RetrievalTask.from_datasets(queries, gallery, scope)`.
        queries: the query view.
        gallery: the gallery view.
        loading: batch size, workers and progress.
        weights: weights of the fused score, which is added if the method has the scores for it.
        ks: cut-offs of the recall.
        depth: entries kept per ranking.

    Returns:
        score name -> rankings of every query (empty for one that failed), and the list of failures: dicts with
        `kind` ("query" or "gallery"), `id`, `file` and `reason`.

    Raises:
        ValueError: no gallery image could be read.
    """
    rankings: dict[str, Rankings] = {}
    failures: list[dict] = []
    with evaluating(getattr(retriever, "model", None)):
        for query, scores in iter_scores(retriever, task, queries, gallery, loading, failures):
            for kind, values in with_fused(scores, weights).items():
                if kind not in PARTS:
                    rankings.setdefault(kind, Rankings(task, ks, depth)).add(query, values)
    if not rankings:
        rankings["embedding"] = Rankings(task, ks, depth)
    return {kind: ranked.complete() for kind, ranked in rankings.items()}, failures


def _default_collator(processor, use_boxes: bool):
    from data_rice.collator import RiceCollator

    return RiceCollator(processor, use_boxes=use_boxes)


def evaluate_retrieval(
    model,
    processor,
    queries,
    gallery,
    *,
    scope: str = "live",
    weights: FusionWeights | None = None,
    use_boxes: bool = False,
    collator=None,
    batch_size: int = 32,
    num_workers: int = 0,
    matching: bool = True,
    ks=DEFAULT_KS,
    quiet: bool = False,
) -> dict[str, dict[str, float | list[float]]]:
    """R@k of a model, for instance on a validation split during training; the model's mode is restored afterwards.

    Args:
        model: as for `ModelRetriever`.
        processor: turns images and clips into model inputs.
        queries: query view of a dataset.
        gallery: gallery view of the same dataset.
        scope: "live" (each query searches its livestream's images) or "all".
        weights: weights of the fused score; by default those of the model's config.
        use_boxes: pass the clips' boxes to the processor (intended product detection at test time).
        collator: decodes rows; by default `data_rice.collator.RiceCollator`.
        batch_size: rows per batch.
        num_workers: loader processes that decode.
        matching: False does not use the decoder.
        ks: cut-offs of the recall.
        quiet: no progress bars.

    Returns:
        `{"embedding": {"R@1": ..., "R@1_ci95": [low, high]}, "matching": {...}, "fused": {...}}`, fractions, with the
        scores that the model has.

    Raises:
        ValueError: there are no queries, a gallery is empty, or an argument is out of range.
    """
    task = RetrievalTask.from_datasets(queries, gallery, scope)
    retriever = ModelRetriever(model, collator or _default_collator(processor, use_boxes), matching)
    loading = Loading(batch_size, num_workers, quiet)
    if weights is None:
        weights = FusionWeights.of(getattr(model, "config", None))
    rankings, _ = retrieve(retriever, task, queries, gallery, loading=loading, ks=ks, weights=weights)
    return {kind: ranked.summary() for kind, ranked in rankings.items()}


class FittedFusion(NamedTuple):
    """Weights of the fused score with their validation curves (`fit_fusion_weight`), `None` for missing scores.

    `curve` is the curve of matching.
    """

    weights: FusionWeights
    curve: list[dict[str, float]] | None
    text_curve: list[dict[str, float]] | None = None
    alignment_curve: list[dict[str, float]] | None = None

    def edges(self) -> list[str]:
        """Warnings for weights at an end of their grid (`evaluation_rice.fusion.edge_words`)."""
        fitted = (
            ("fusion weight", self.weights.fusion_weight, self.curve),
            ("alignment weight", self.weights.alignment_weight, self.alignment_curve),
            ("text weight in the fused score", self.weights.fused_text_weight, self.text_curve),
        )
        words = [
            edge_words(name, weight, [point["weight"] for point in curve])
            for name, weight, curve in fitted
            if curve is not None
        ]
        return [sentence for sentence in words if sentence]

    def curves(self) -> dict[str, list[dict[str, float]]]:
        """The existing curves, under their names in results.json."""
        named = {"curve": self.curve, "alignment_curve": self.alignment_curve, "text_curve": self.text_curve}
        return {name: curve for name, curve in named.items() if curve is not None}


def fit_fusion(
    retriever: Retriever, task: RetrievalTask, queries, gallery, *, loading: Loading = Loading(), **options
) -> FittedFusion:
    """Scores a validation split and fits the weights of the fused score on it.

    The weights are fitted one after another: first alignment beside the visual score (may be 0), then matching, both
    with `fit_fusion_weight` and without text; then text with `fit_text_weight`. So the visual weights are also the
    best ones for clips without ASR.

    A query that could not be read or has no gallery counts as a miss at every weight. Raises `ValueError` if the
    method has neither matching nor alignment scores.
    """
    return _fit(task, all_scores(retriever, task, queries, gallery, loading), **options)


def validate(
    retriever: Retriever,
    task: RetrievalTask,
    queries,
    gallery,
    *,
    loading: Loading = Loading(),
    ks=DEFAULT_KS,
    failures: list[dict] | None = None,
) -> tuple[dict[str, Rankings], FittedFusion | None]:
    """Scores a validation split once, fits the fused score on it (`fit_fusion`), and ranks by every score.

    Unreadable media are appended to `failures`, in the form of `retrieve`.

    Returns:
        score name -> rankings of every query, and the weights (`None` if the method has only one score). The fused
        figure is optimistic, because the weights were chosen on the same queries.
    """
    scores = all_scores(retriever, task, queries, gallery, loading, failures)
    return rank_scores(task, scores, ks)


def rank_scores(
    task: RetrievalTask,
    scores: dict[int, dict[str, torch.Tensor]],
    ks=DEFAULT_KS,
) -> tuple[dict[str, Rankings], FittedFusion | None]:
    """The result of `validate` from the scores of all queries (`all_scores`)."""
    fitted = _fit(task, scores) if _to_fit(scores) else None
    weights = FusionWeights() if fitted is None else fitted.weights
    rankings: dict[str, Rankings] = {"embedding": Rankings(task, ks)}
    for query, values in scores.items():
        for kind, row in with_fused(values, weights).items():
            if kind not in PARTS:
                rankings.setdefault(kind, Rankings(task, ks)).add(query, row)
    return {kind: ranked.complete() for kind, ranked in rankings.items()}, fitted


def add_text_scores(
    task: RetrievalTask, scores: dict[int, dict[str, torch.Tensor]]
) -> tuple[dict[int, dict[str, torch.Tensor]], float | None]:
    """Fits the weight of the text in the embedding scores, and computes these again with it.

    Args:
        task: the scored queries with their galleries.
        scores: result of `all_scores`.

    Returns:
        the scores, in which "embedding" is "visual" plus weight times "text" for queries with text; and the weight,
        `None` if no query has text.
    """
    texts = {query: values["text"] for query, values in scores.items() if "text" in values}
    if not texts:
        return scores, None
    visual = [scores[query]["visual"] for query in texts]
    weight, _ = fit_text_weight(visual, list(texts.values()), [task.relevant_positions(query) for query in texts])
    joined = {
        query: {**scores[query], "embedding": scores[query]["visual"] + weight * text} for query, text in texts.items()
    }
    return scores | joined, weight


def all_scores(
    retriever, task: RetrievalTask, queries, gallery, loading: Loading, failures: list[dict] | None = None
) -> dict[int, dict[str, torch.Tensor]]:
    """Query number -> score name -> tensor over the query's gallery; see `iter_scores`."""
    failures = [] if failures is None else failures
    with evaluating(getattr(retriever, "model", None)):
        return dict(iter_scores(retriever, task, queries, gallery, loading, failures))


# Pair scores with a weight in the fused score, in the order of fitting, with the grid of the weight.
_FITTED = {"alignment": ("alignment_weight", ALIGNMENT_WEIGHTS), "matching": ("fusion_weight", DEFAULT_WEIGHTS)}


def _to_fit(scores: dict[int, dict[str, torch.Tensor]]) -> list[str]:
    return [kind for kind in _FITTED if any(kind in values for values in scores.values())]


def _fit(task: RetrievalTask, scores: dict[int, dict[str, torch.Tensor]], **options) -> FittedFusion:
    kinds = _to_fit(scores)
    if not kinds:
        raise ValueError("the model has neither matching nor alignment scores, so there is no fusion weight to fit.")
    rows = [scores.get(i, {}) for i in range(len(task.query_ids))]
    nothing = dict.fromkeys(("embedding", *kinds), _NOTHING)
    rows = [values if set(kinds) <= values.keys() else nothing for values in rows]
    relevant = [task.relevant_positions(i) if len(values[kinds[0]]) else [] for i, values in enumerate(rows)]
    # Without text, see `fit_fusion`.
    silent = [{**values, "embedding": values.get("visual", values["embedding"])} for values in rows]
    weights, curves = FusionWeights(), {}
    for kind in kinds:
        name, grid = _FITTED[kind]
        others = [fuse(values, weights) for values in silent]
        settings = {"weights": grid, "name": name, **options}
        weight, curves[kind] = fit_fusion_weight(others, [values[kind] for values in rows], relevant, **settings)
        weights = replace(weights, **{name: weight})
    text_curve = None
    if any("text" in values for values in rows):
        fused = [fuse(values, weights) for values in silent]
        texts = [values.get("text", torch.zeros(len(row))) for values, row in zip(rows, fused)]
        text_weight, text_curve = fit_text_weight(fused, texts, relevant, FUSED_TEXT_WEIGHTS)
        weights = replace(weights, fused_text_weight=text_weight)
    return FittedFusion(weights, curves.get("matching"), text_curve, curves.get("alignment"))
