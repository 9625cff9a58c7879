"""R@k on a validation split, computed by all processes together."""

import dataclasses
import logging
from functools import partial
from typing import Any

import numpy as np
import torch.distributed as dist

from evaluation_rice.fusion import EMBEDDING_TEXT, TEXT_WEIGHTS, edge_words
from evaluation_rice.protocol import RetrievalTask
from evaluation_rice.recall import DEFAULT_KS
from evaluation_rice.retrieval import Loading, ModelRetriever, add_text_scores, all_scores, rank_scores
from modeling_rice.scoring_rice import pair_kinds

from .processes import are_several, on_first_process

logger = logging.getLogger(__name__)


def metric_names(model: Any) -> list[str]:
    """Metrics that `validate_together` measures for a model and that can select checkpoints, such as "fused_R@1"."""
    kinds = ["embedding", *pair_kinds(model)]
    kinds += ["fused"] * (len(kinds) > 1)
    return [f"{kind}_R@{k}" for kind in kinds for k in DEFAULT_KS]


def share_of(task: RetrievalTask, rank: int, world_size: int) -> RetrievalTask:
    """
    A process's part of a task: whole galleries with their queries, in which the largest goes first to the process with
    the least work. If all queries search one gallery: a part of the queries, and the whole gallery.

    Args:
        task: The whole task; queries and images keep their numbers.
        rank, world_size: Number of this part and number of parts.

    Returns:
        A task in which the other queries have no gallery and the other images have no rows to read.
    """
    counts = dict.fromkeys(task.scopes, 0)
    for name in task.query_scopes:
        if name in counts:
            counts[name] += 1
    if len(task.scopes) == 1:
        query_scopes = [name if i % world_size == rank else None for i, name in enumerate(task.query_scopes)]
        return dataclasses.replace(task, query_scopes=query_scopes)
    loads, owner = [0] * world_size, {}
    work = {name: counts[name] + len(images) for name, images in task.scopes.items() if counts[name]}
    for name in sorted(work, key=work.get, reverse=True):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += work[name]
    scopes = {name: images for name, images in task.scopes.items() if owner.get(name) == rank}
    needed = {image for images in scopes.values() for image in images}
    image_rows = [rows if image in needed else [] for image, rows in enumerate(task.image_rows)]
    return dataclasses.replace(task, scopes=scopes, image_rows=image_rows)


def validate_together(
    model: Any, collator: Any, task: RetrievalTask, queries, gallery, loading: Loading
) -> tuple[dict[str, float], float | None, list[dict[str, str]]]:
    """
    As `evaluation_rice.retrieval.validate`, with each process on its share; all processes must call it.

    Returns:
        `{kind}_{name}` such as `fused_R@1` -> value, the fusion weight or `None`, and the failures; equal on every
        process. The values include the weights fitted here: `text_score_weight` (embedding score) and
        `fused_text_weight` (fused score) with a score-level text term, and `alignment_weight` with an alignment.

    Raises:
        ValueError, OSError: a process could not read any image of its galleries, or the first process could not
            compute the recall; raised on every process, so that no process waits.
    """
    several = are_several()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    retriever = ModelRetriever(model, collator)
    share = share_of(task, rank, world_size) if several else task
    failures: list[dict[str, str]] = []
    scores, problem = {}, None
    try:
        if any(name in share.scopes for name in share.query_scopes):
            # As arrays, because a pickled tensor includes its whole batch.
            scores = {
                query: {kind: np.asarray(row) for kind, row in values.items()}
                for query, values in all_scores(retriever, share, queries, gallery, loading, failures).items()
            }
    except ValueError as error:
        problem = str(error)
    # Parts of other processes do not count as missing.
    left_out = share.without_gallery()
    failures = [failure for failure in failures if failure not in left_out]
    parts = [(scores, failures, problem)]
    if several:
        parts = [None] * world_size
        dist.all_gather_object(parts, (scores, failures, problem))
    for _, _, problem in parts:
        if problem is not None:
            raise ValueError(problem)
    failures = [failure for _, part, _ in parts for failure in part] + task.without_gallery()
    # In file order, so that the order of ties does not depend on the distribution to processes.
    merged = dict(sorted((query, values) for part, _, _ in parts for query, values in part.items()))
    metrics, weight = on_first_process(partial(_measure, task, merged))
    return metrics, weight, failures


def _measure(task: RetrievalTask, scores: dict[int, dict[str, np.ndarray]]) -> tuple[dict[str, float], float | None]:
    """Recall, fitted weights and the fusion weight; a weight at an end of its grid is logged."""
    scores, text_weight = add_text_scores(task, scores)
    rankings, fitted = rank_scores(task, scores)
    metrics = {
        f"{kind}_{name}": value
        for kind, ranked in rankings.items()
        for name, value in ranked.summary().items()
        if isinstance(value, float)
    }
    edges = []
    if text_weight is not None:
        metrics["text_score_weight"] = text_weight
        edges.append(edge_words(EMBEDDING_TEXT, text_weight, TEXT_WEIGHTS))
    if fitted is not None:
        edges += fitted.edges()
        for name in ("fused_text_weight", "alignment_weight"):
            if getattr(fitted.weights, name) is not None:
                metrics[name] = getattr(fitted.weights, name)
    for words in filter(None, edges):
        logger.warning("Validation: %s.", words)
    return metrics, None if fitted is None else fitted.weights.fusion_weight
