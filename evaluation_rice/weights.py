"""The weights of the fused score in an evaluation: from the checkpoint, fitted on validation, or from an argument."""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from data_rice.commands import one_line
from modeling_rice.scoring_rice import FusionWeights, pair_kinds

from .fusion import (
    ALIGNMENT_WEIGHTS,
    DEFAULT_WEIGHTS,
    EMBEDDING_TEXT,
    FUSED_TEXT_WEIGHTS,
    TEXT_WEIGHTS,
    edge_words,
)
from .protocol import RetrievalTask
from .retrieval import FittedFusion, Loading, Retriever, fit_fusion

LoadViews = Callable[[str, str | None], tuple[Any, Any]]
"""Split and data_dir -> queries and gallery."""


def choose_fusion(
    options: argparse.Namespace, retriever: Retriever, scope: str, loading: Loading, load_views: LoadViews
) -> tuple[FusionWeights, dict[str, Any]]:
    """
    The weights of the fused score, and the entry `protocol.fusion` of results.json.

    Args:
        options: options of eval_rice.py.
        retriever: a model with more scores than the embedding score.
        scope: scope of the galleries.
        loading: settings for reading the validation split if a weight is fitted.
        load_views: returns that split.

    Raises:
        ValueError: a fit is requested, but there is no validation split.
    """
    config = retriever.model.config
    weights = FusionWeights.of(config)
    has_matching = "matching" in pair_kinds(retriever.model)
    is_fitted = weights.fusion_weight is not None or not has_matching
    if not has_matching and isinstance(options.fusion_weight, float):
        raise ValueError(
            f"--fusion_weight {options.fusion_weight:g} is the weight of matching, but {options.model} has no "
            f"matching decoder; leave it out, or use fit to fit the weight of the alignment."
        )
    fitted = None
    if options.fusion_weight == "fit" or (options.fusion_weight == "auto" and not is_fitted):
        fitted, record = _fit(options, retriever, scope, loading, load_views)
        weights = replace(weights, fusion_weight=1.0) if fitted is None else fitted.weights
    elif options.fusion_weight == "auto":
        words = "the weight is the checkpoint's own" + ", fitted when it was trained" * has_matching
        record = {"source": "checkpoint", "source_words": words}
    else:
        weights = replace(weights, fusion_weight=options.fusion_weight)
        record = {"source": "argument", "source_words": "the weight was given by hand"}
    if not _reads_text_score(options, config):
        weights = replace(weights, fused_text_weight=None)
    elif weights.fused_text_weight is None:
        record["source_words"] += "; text has no separate weight, because it is part of the embedding score"
    edges = _edges(weights, fitted, record["source"])
    if _reads_text_score(options, config):
        edges.append(edge_words(EMBEDDING_TEXT, config.text_score_weight, TEXT_WEIGHTS))
    edges = [words for words in edges if words]
    record |= {"at_edge": bool(edges), "edge_words": edges}
    return weights, {"rule": weights.rule(), "text_weight": weights.fused_text_weight, **record}


def _edges(weights: FusionWeights, fitted: FittedFusion | None, source: str) -> list[str | None]:
    """Warnings for weights at an end of their grid, except for a weight that was given by hand or is the default."""
    if fitted is not None:
        return list(fitted.edges())
    grids = {
        "fusion_weight": ("fusion weight", DEFAULT_WEIGHTS),
        "alignment_weight": ("alignment weight", ALIGNMENT_WEIGHTS),
        "fused_text_weight": ("text weight in the fused score", FUSED_TEXT_WEIGHTS),
    }
    if source != "checkpoint":
        del grids["fusion_weight"]
    values = {name: getattr(weights, name) for name in grids}
    return [edge_words(words, values[name], grid) for name, (words, grid) in grids.items() if values[name] is not None]


def _reads_text_score(options: argparse.Namespace, config) -> bool:
    """Whether the cosine of ASR and title is one of the scores."""
    has_text = getattr(config, "text_config", None) is not None
    return options.text and has_text and config.text_score_weight is not None


def _fit(
    options: argparse.Namespace, retriever: Retriever, scope: str, loading: Loading, load_views: LoadViews
) -> tuple[FittedFusion | None, dict[str, Any]]:
    """The weights from the validation split, `None` if it is not available, and their source."""
    folder = options.fit_data_dir or options.data_dir
    try:
        same = options.fit_data_dir is None or _same_folder(options.fit_data_dir, options.data_dir)
        if options.split == "validation" and same:
            raise ValueError("the split to evaluate is the validation split itself")
        queries, gallery = load_views("validation", folder)
        task = RetrievalTask.from_datasets(queries, gallery, scope)
    except (ValueError, OSError) as error:
        reason = one_line(error).rstrip(".")
        if options.fusion_weight == "fit":
            raise ValueError(f"--fusion_weight fit: the weight cannot be fitted ({reason}).") from error
        print(f"fusion weight 1: the checkpoint has none, and it cannot be fitted ({reason})")
        return None, {"source": "default", "source_words": "the weight is the default, not fitted"}
    fitted = fit_fusion(retriever, task, queries, gallery, loading=loading)
    where = f" of {folder}" if options.fit_data_dir else ""
    words = f"the weight was fitted on the validation split{where} ({len(queries)} clips)"
    return fitted, {"source": "validation", "source_words": words, **fitted.curves()}


def _same_folder(one: str, other: str | None) -> bool:
    return other is not None and os.path.realpath(one) == os.path.realpath(other)
