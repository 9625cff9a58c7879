"""The files of figures: results.json, rankings.jsonl and query_ranks.jsonl."""

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from data_rice.files import write_atomically

from ..protocol import Rankings, RetrievalTask


def library_versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    result = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "transformers", "datasets", "numpy", "pillow"):
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            result[name] = "absent"
    return result


def write_results(output_dir: str | os.PathLike, results: Mapping) -> None:
    """Writes `results.json`: fractions, unrounded."""
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(Path(output_dir) / "results.json", text + "\n")


def write_rankings(output_dir: str | os.PathLike, task: RetrievalTask, book: Rankings) -> None:
    """Writes `rankings.jsonl`, one line per query in file order: `query_id`, `ranking`, `relevant`."""
    lines = (
        json.dumps({"query_id": q, "ranking": ranking, "relevant": task.relevant[q]}, ensure_ascii=False) + "\n"
        for q, ranking in book.complete().rankings.items()
    )
    write_atomically(Path(output_dir) / "rankings.jsonl", "".join(lines))


def write_query_ranks(output_dir: str | os.PathLike, books: Mapping[str, Rankings]) -> None:
    """Writes `query_ranks.jsonl`, on which two methods are compared query by query.

    One line per query in file order: `query_id`, and per kind of score the rank (from 1) of its first relevant image,
    null where that is not among those kept.
    """
    ranks = {kind: book.first_relevant_ranks() for kind, book in books.items()}
    task = next(iter(books.values())).task
    lines = (
        json.dumps({"query_id": query, **{kind: values[query] for kind, values in ranks.items()}}, ensure_ascii=False)
        + "\n"
        for query in task.query_ids
    )
    write_atomically(Path(output_dir) / "query_ranks.jsonl", "".join(lines))
