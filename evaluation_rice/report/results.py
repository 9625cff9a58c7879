"""Writes results.json, rankings.jsonl and query_ranks.jsonl."""

import json
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from data_rice.files import write_atomically

from ..protocol import Rankings, RetrievalTask


def library_versions() -> dict[str, str]:
    """Versions of the libraries on which the figures depend."""
    result = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "transformers", "datasets", "numpy", "pillow"):
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            result[name] = "absent"
    return result


def write_results(output_dir: str | os.PathLike, results: Mapping) -> None:
    """Writes `results.json`, with fractions that are not rounded."""
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(Path(output_dir) / "results.json", text + "\n")


def write_rankings(output_dir: str | os.PathLike, task: RetrievalTask, ranked: Rankings) -> None:
    """Writes `rankings.jsonl`: `query_id`, `live_id` (may be empty), `ranking`, `relevant`."""
    lines = ({"ranking": ranking, "relevant": task.relevant[q]} for q, ranking in ranked.complete().rankings.items())
    _write_lines(Path(output_dir) / "rankings.jsonl", task, lines)


def write_query_ranks(output_dir: str | os.PathLike, rankings: Mapping[str, Rankings]) -> None:
    """Writes `query_ranks.jsonl`, for comparing two methods query by query.

    A line has `query_id`, `live_id` (may be empty), and per kind of score the rank (from 1) of the query's first
    relevant image, null if the kept part of the ranking has none.
    """
    ranks = {kind: ranked.first_relevant_ranks() for kind, ranked in rankings.items()}
    task = next(iter(rankings.values())).task
    lines = ({kind: values[query] for kind, values in ranks.items()} for query in task.query_ids)
    _write_lines(Path(output_dir) / "query_ranks.jsonl", task, lines)


def _write_lines(path: Path, task: RetrievalTask, entries: Iterable[dict]) -> None:
    """One line per query in file order."""
    columns = zip(task.query_ids, task.shops, entries, strict=True)
    rows = ({"query_id": query, "live_id": shop, **row} for query, shop, row in columns)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
