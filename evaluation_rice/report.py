"""What an evaluation leaves behind: the R@1 table on the screen, results.json and rankings.jsonl."""

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .protocol import Rankings, RetrievalTask

TITLES = {
    "embedding": "RICE, embedding",
    "matching": "RICE, matching",
    "fused": "RICE, fused",
    "color_histogram": "colour histogram",
    "chance": "chance",
    "pixels_8x8": "8 x 8 pixels",
    "color_histogram_in_box": "colour histogram in the box",
}


def percent(value: float) -> str:
    """A fraction as a percentage with one decimal."""
    return f"{100 * value:.1f}"


def shown_scores(results: Mapping) -> dict[str, Mapping]:
    """The rows of a result's table: its own scores, those of a baseline under the baseline's name, then the others."""
    baseline = results.get("baseline")
    own = results["scores"] if baseline is None else {baseline["name"]: results["scores"]["embedding"]}
    return {**own, **results["baselines"]}


def table_cells(scores: Mapping[str, Mapping]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a recall table, in percent.

    Args:
        scores: method name -> `{"R@1": ..., "R@1_ci95": [low, high]}`; the interval may be missing.
    """
    columns = [name for name in next(iter(scores.values()), {}) if name.startswith("R@") and "_" not in name]
    rows = []
    for name, values in scores.items():
        interval = values.get("R@1_ci95")
        spread = f"{percent(interval[0])} to {percent(interval[1])}" if interval else ""
        rows.append([TITLES.get(name, name), *(percent(values[column]) for column in columns), spread])
    return ["method", *columns, "95 % of R@1"], rows


def format_table(scores: Mapping[str, Mapping]) -> str:
    """Recall in percent as an aligned plain-text table, one method per line."""
    header, rows = table_cells(scores)
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in [header, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(scores: Mapping[str, Mapping]) -> str:
    """The same as a Markdown table."""
    header, rows = table_cells(scores)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def library_versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    result = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "transformers", "datasets", "numpy", "pillow"):
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            result[name] = "absent"
    return result


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Writes a text file so that a reader sees the old one or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def check_output(path: str | Path) -> None:
    """
    Refuses a file that cannot be written there, before the work.

    Raises:
        ValueError: it is a folder, or in something that is none.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: name a file in it.")
    blocked = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)
    if blocked:
        raise ValueError(f"--output {path} cannot be written, as {blocked} is a file: name another folder.")


def write_output(path: str | Path, text: str) -> None:
    """
    Writes the file of `--output`, with its folder.

    Raises:
        ValueError: it cannot be written.
    """
    check_output(path)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise ValueError(f"--output {path} cannot be written ({error.strerror}): name another file.") from error


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
