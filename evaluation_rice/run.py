"""Runs one evaluation: from a method and a data set to the content of results.json."""

import argparse
import time
from dataclasses import asdict
from functools import partial
from typing import Any

from data_rice import gallery_scope
from data_rice.asr_noise import with_asr
from data_rice.box_files import BoxFile, count_boxes
from hub_rice.checkpoint import weights_fingerprint
from modeling_rice.scoring_rice import KINDS, FusionWeights, default_ranking, pair_kinds

from .baselines import run_baselines
from .breakdown import count_training_rows
from .protocol import Rankings, RetrievalTask, breakdown
from .recall import interval_words
from .report.heatmap import aligns, has_maps, heat_pictures
from .report.html_report import Evaluation
from .report.results import library_versions
from .retrieval import Loading, Retriever, retrieve
from .speed import TimedRetriever
from .weights import LoadViews, choose_fusion


def measure(
    options: argparse.Namespace, retriever: Retriever, baseline: dict | None, load_views: LoadViews, started: float
) -> Evaluation:
    """
    Ranks the queries and collects the results.

    Args:
        options: options of eval_rice.py.
        retriever: the method.
        baseline: the entry of a baseline in results.json, `None` for a model.
        load_views: returns the views of a split.
        started: `time.perf_counter()` at the beginning of the evaluation.

    Raises:
        ValueError, OSError: bad input, in one sentence.
    """
    queries, gallery = load_views(options.split, options.data_dir)
    # Weights are fitted on validation clips with their own ASR, because the noise of the test is unknown.
    queries = with_asr(queries, options.asr)
    scope = gallery_scope(options.dataset, options.data_dir)
    task = RetrievalTask.from_datasets(queries, gallery, scope)
    model = None if baseline else retriever.model
    rank_by = _rank_by(options, model)
    retriever, loading = TimedRetriever(retriever), Loading(options.batch_size, options.num_workers)
    weights, fusion = FusionWeights(), None
    if pair_kinds(model):
        weights, fusion = choose_fusion(options, retriever, scope, loading, load_views)
    rankings, failures = retrieve(retriever, task, queries, gallery, loading=loading, weights=weights)
    rankings = {kind: rankings[kind] for kind in KINDS if kind in rankings}
    beside = _beside(options, baseline, task, queries, gallery, loading, retriever.num_frames, failures)
    method = {"num_frames": retriever.num_frames, "rank_by": rank_by, "ranking_depth": rankings["embedding"].depth}
    method |= _describe_method(options, model, fusion, queries)
    results = {
        "protocol": {**describe_protocol(options, task, scope), **method},
        "num_queries": len(task.query_ids),
        "gallery_size": task.gallery_size(),
        "scores": {kind: ranked.summary() for kind, ranked in rankings.items()},
        **asdict(weights),
        **beside,
        **_groups(options, queries, rankings),
        **_origin(options, baseline, retriever),
        "seconds": time.perf_counter() - started,
        "ties": {kind: ranked.tie_summary() for kind, ranked in rankings.items()},
    }
    heat = partial(heat_pictures, model, retriever.collator) if has_maps(model) else None
    heat_words = "has similar patches" if aligns(model) else "was reconstructed from"
    return Evaluation(results, task, rankings, queries, gallery, heat, heat_words)


def describe_protocol(options: argparse.Namespace, task: RetrievalTask, scope: str) -> dict[str, Any]:
    """The part of `protocol` in results.json that does not depend on the method."""
    names = set(task.query_scopes)
    return {
        "split": options.split,
        "gallery_scope": scope,
        "gallery_images": options.gallery_images or "as the data set's default",
        "num_galleries": len(names),
        "num_gallery_images": len({image for name in names for image in task.scopes.get(name, [])}),
        "task_sha256": task.fingerprint(),
        "duplicate_gallery_rows": task.num_duplicate_rows,
        "queries_without_relevant_in_gallery": task.num_unreachable(),
        "hit": "any relevant image among the first k",
        "denominator": "every query; one that could not be read is a miss",
        "tie_order": "gallery order",
        "interval": interval_words(task.shops),
        "boxes": options.boxes,
        "precision": options.precision,
    }


def describe_boxes(path: str, queries) -> dict[str, Any]:
    """The source of the boxes and the number of frames with a box, for results.json."""
    header = BoxFile(path).header
    names = ("detector", "detector_sha256", "threshold", "labels", "frames_per_clip")
    return {"file": path, **{name: header.get(name) for name in names}, **count_boxes(queries)}


def _origin(options: argparse.Namespace, baseline: dict | None, retriever: TimedRetriever) -> dict[str, Any]:
    """Method, data set, cost and library versions."""
    return {
        "model": options.model or baseline["model"] or baseline["name"],
        "model_sha256": weights_fingerprint(options.model or baseline["model"] or ""),
        "baseline": baseline,
        "parameters": retriever.num_parameters(),
        "dataset": options.dataset,
        "speed": retriever.summary(),
        "versions": library_versions(),
    }


def _rank_by(options: argparse.Namespace, model) -> str:
    if options.rank_by is None:
        return "embedding" if model is None else default_ranking(model.config)
    kinds = pair_kinds(model)
    if options.rank_by not in ("embedding", *kinds, *["fused"][: len(kinds)]):
        needs = {"matching": "a matching decoder", "alignment": "an alignment"}
        needed = needs.get(options.rank_by, " or ".join(needs.values()))
        name = options.model or options.baseline
        raise ValueError(f"--rank_by {options.rank_by} needs {needed}, which {name} does not have; leave it out.")
    return options.rank_by


def _describe_method(options: argparse.Namespace, model, fusion: dict | None, queries) -> dict[str, Any]:
    """The part of `protocol` that depends on the method: text, a detector's boxes, a fused score."""
    entries: dict[str, Any] = {}
    if getattr(getattr(model, "config", None), "text_config", None) is not None:
        entries["text"] = {"used": options.text, "score_weight": model.config.text_score_weight}
        entries["asr"] = options.asr if options.text else "none"
    if options.boxes == "detector":
        entries["detector"] = describe_boxes(options.boxes_file, queries)
    return entries if fusion is None else {**entries, "fusion": fusion}


def _beside(
    options, baseline: dict | None, task: RetrievalTask, queries, gallery, loading: Loading, num_frames, failures
) -> dict[str, Any]:
    """The other baselines, and all failures: those of the method first, each file once."""
    names = [name for name in options.baselines if baseline is None or name != baseline["name"]]
    scores, failed = run_baselines(names, task, queries, gallery, loading=loading, num_frames=num_frames or 10)
    known = {(failure["kind"], failure["id"]) for failure in failures}
    failures = [{"method": baseline["name"] if baseline else "model", **failure} for failure in failures]
    failures += [failure for failure in failed if (failure["kind"], failure["id"]) not in known]
    return {"baselines": scores, "failures": failures}


def _groups(options: argparse.Namespace, queries, rankings: dict[str, Rankings]) -> dict[str, Any]:
    """The breakdown by attribute, and the rule for head and tail categories."""
    settings = (options.dataset, options.data_dir, options.cache_dir)
    train_rows, head_tail = count_training_rows(queries, options.model, *settings)
    return {"by": breakdown(queries, rankings, train_rows), "head_tail": head_tail}
