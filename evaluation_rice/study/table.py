"""
One Markdown table of many results: recall with intervals, and what each method costs.

    python -m evaluation_rice.study.table runs/demo "SEAM-style=runs/baselines_mini/seam_style" runs/baselines/clip

Each argument is a folder with the results.json of eval_rice.py, or an arm of a study (`ARM/seed0/eval/results.json`,
...), whose seeds become one row; `TITLE=FOLDER` names the row, and is listed as not run where there is no result yet.
Published models that no result is of are listed as not run too. Results of unlike protocols are refused.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hub_rice.files import check_output, write_output
from hub_rice.model_card import breakdown_table, dataset_name, gallery_words
from hub_rice.tables import TITLES, markdown_table, percent, shown_scores
from modeling_rice.scoring_rice import KINDS

from ..paired import hits_of, mean_interval, read_ranks
from ..pretrained_baselines import FAMILIES

NOT_RUN = "not run"
_SAME = ("split", "gallery_scope", "gallery_images", "num_galleries", "num_gallery_images", "task_sha256")


@dataclass(frozen=True)
class Entry:
    """One method of the table.

    Attributes:
        title: what the first column says.
        folders: where its results.json files are, one per seed.
        results: their contents; empty for a method that was not run.
    """

    title: str
    folders: tuple[Path, ...] = ()
    results: tuple[dict, ...] = ()


def read_entry(argument: str) -> Entry:
    """
    Reads `FOLDER` or `TITLE=FOLDER`.

    Raises:
        FileNotFoundError: a folder without a title has no results.json.
        ValueError: a results.json is cut short.
    """
    title, _, folder = argument.rpartition("=")
    entry = read_folder(folder, title)
    if entry.folders or title:
        return entry
    raise FileNotFoundError(f"{folder} has no results.json: run eval_rice.py, or name the row as TITLE={folder}.")


def read_folder(folder: str | Path, title: str = "") -> Entry:
    """
    The results of an evaluation or of an arm with seeds; those of none where there are none.

    Raises:
        ValueError: a results.json is cut short.
    """
    path = Path(folder)
    folders = [path] if (path / "results.json").is_file() else []
    folders = folders or sorted(file.parent for file in path.glob("seed*/eval/results.json"))
    folders = folders or ([path / "eval"] if (path / "eval" / "results.json").is_file() else [])
    results = tuple(_read(file / "results.json") for file in folders)
    return Entry(title or (_title(path, results[0]) if results else str(path)), tuple(folders), results)


def _read(path: Path) -> dict:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in ("protocol", "scores", "dataset", "num_queries") if name not in results]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no whole results file ({error}): run eval_rice.py again.") from error
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: run eval_rice.py again.")
    return results


def _title(path: Path, results: Mapping) -> str:
    baseline = results.get("baseline")
    if baseline is None:
        return f"RICE ({path.parent.name if path.name == 'eval' else path.name})"
    if not baseline["model"]:
        return TITLES.get(baseline["name"], baseline["name"])
    model = baseline["model"]
    return f"{baseline['name']} ({Path(model).name if Path(model).is_dir() else model}), frozen"


def check_alike(entries: Sequence[Entry]) -> None:
    """
    Refuses results that must not stand in one table. Boxes, frames and ASR may differ: the table has columns for them.

    Raises:
        ValueError: naming two results and the first setting in which they differ.
    """
    seen: tuple[Path, dict] | None = None
    for entry in entries:
        for folder, results in zip(entry.folders, entry.results, strict=True):
            settings = {"dataset": dataset_name(results), "num_queries": results["num_queries"]}
            settings |= {name: results["protocol"].get(name) for name in _SAME}
            seen = seen or (folder, settings)
            for name, value in settings.items():
                if value != seen[1][name]:
                    raise ValueError(
                        f"{seen[0]} and {folder} are of unlike protocols: {name} is {seen[1][name]!r} and {value!r}; "
                        f"make a table of each."
                    )


def read_hits(entry: Entry, kind: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """
    Query ids in order, and hits at 1 of each seed, 1.0 or 0.0, `(num_queries,)`, by the name of the seed's folder.

    Raises:
        FileNotFoundError: a folder has no query_ranks.jsonl.
        ValueError: a file is broken, holds other clips than the first, or has no such score.
    """
    ids, hits = [], {}
    for folder in entry.folders:
        path, ranks = folder / "query_ranks.jsonl", read_ranks(folder)
        values, names = hits_of(ranks, kind), list(ranks)
        if values is None:
            known = ", ".join(next(iter(ranks.values()))) or "none"
            raise ValueError(f"{path} has no score {kind!r} of every clip, but {known}: name one.")
        if ids and names != ids:
            raise ValueError(f"{path} is of other clips than {entry.folders[0]}: evaluate both on the same.")
        ids, hits[folder.parent.name] = names, values
    return ids, hits


def _figures(entry: Entry, kind: str) -> dict:
    """R@k as the mean over seeds, and the interval of R@1 with a query's seeds drawn together."""
    scores = [results["scores"][kind] for results in entry.results]
    figures = {name: float(np.mean([s[name] for s in scores])) for name, value in scores[0].items() if "_" not in name}
    interval = scores[0].get("R@1_ci95") if len(scores) == 1 else mean_interval(read_hits(entry, kind)[1])[1]
    return {**figures, "R@1_ci95": interval}


def _mean_cost(entry: Entry, name: str) -> float | None:
    values = [results.get("speed", {}).get(name, results.get(name)) for results in entry.results]
    return None if any(value is None for value in values) else float(np.mean(values))


def _count(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,.0f}"


def _joined(entry: Entry, name: str) -> str:
    return ", ".join(dict.fromkeys(str(results["protocol"].get(name)) for results in entry.results))


def _asr(entry: Entry) -> str:
    """What was read as ASR; nothing for a method that reads no text."""
    return ", ".join(dict.fromkeys(results["protocol"].get("asr", "") for results in entry.results))


def _costs(entry: Entry) -> list[str]:
    times = [_mean_cost(entry, name) for name in ("clip_ms", "image_ms")]
    shown = ["" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in times]
    return [_joined(entry, "boxes"), _joined(entry, "num_frames"), _count(_mean_cost(entry, "parameters")), *shown]


def _beside(entries: Sequence[Entry]) -> list[tuple[str, dict]]:
    """What stands beside every result (colour histogram, chance), once, unless it has a row of its own."""
    own = {(results.get("baseline") or {}).get("name") for entry in entries for results in entry.results}
    beside = {}
    for entry in entries:
        for results in entry.results:
            for name, scores in results.get("baselines", {}).items():
                if name not in own:
                    beside.setdefault(name, scores)
    return list(beside.items())


def missing_models(entries: Sequence[Entry]) -> list[str]:
    """Published models of `pretrained_baselines.FAMILIES` that no result is of."""
    run = {(results.get("baseline") or {}).get("model") for entry in entries for results in entry.results}
    return [f"{name} ({family.default}), frozen" for name, family in FAMILIES.items() if family.default not in run]


def markdown(entries: Sequence[Entry], list_missing: bool = True) -> str:
    """
    The table, with a line above that names the protocol; recall in percent, times in milliseconds.

    Args:
        entries: methods in the order of the rows.
        list_missing: also list published models that were not run.

    Raises:
        ValueError: the results are of unlike protocols, or there is none.
    """
    check_alike(entries)
    first = next((results for entry in entries for results in entry.results), None)
    if first is None:
        raise ValueError("there is no result yet, only methods that were not run: run eval_rice.py first.")
    columns = [name for name in next(iter(first["scores"].values())) if name.startswith("R@") and "_" not in name]
    header = ["method", "score", columns[0], f"95 % of {columns[0]}", *columns[1:]]
    header += ["boxes", "frames", "parameters", "ms per clip", "ms per image", "seeds"]
    if any(_asr(entry) not in ("", "own") for entry in entries):
        header.append("ASR")
    rows = []
    for entry in entries:
        kinds = [kind for kind in KINDS if any(kind in results["scores"] for results in entry.results)]
        for kind in kinds:
            seeds = str(len(entry.results)) if entry.results[0].get("baseline") is None else ""
            row = [entry.title, kind, *_recall(_figures(entry, kind), columns), *_costs(entry), seeds, _asr(entry)]
            rows.append(row[: len(header)])
        if not kinds:
            rows.append([entry.title, NOT_RUN])
    rows += [[TITLES.get(name, name), "", *_recall(scores, columns)] for name, scores in _beside(entries)]
    rows += [[title, NOT_RUN] for title in (missing_models(entries) if list_missing else [])]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    width = len(header)
    table = "\n".join("| " + " | ".join([*line, *[""] * (width - len(line))]) + " |" for line in lines)
    title = f"{first['num_queries']} clips of {dataset_name(first)} ({first['protocol']['split']}); "
    return f"{title}{gallery_words(first)}. Recall in percent.{_time_words(entries)}\n\n{table}\n"


def baseline_page(results: Mapping) -> str:
    """README.md of a baseline's result: what was run, its recall and the breakdown, in Markdown."""
    name, model = results["baseline"]["name"], results["baseline"]["model"]
    what = f"The published or given model `{model}`, as it is" if model else "A descriptor without parameters"
    lines = [
        f"# Baseline {name}",
        "",
        f"{what}: nothing was trained here. {results['num_queries']} clips of {dataset_name(results)} "
        f"({results['protocol']['split']}); {gallery_words(results)}. Boxes at test time: "
        f"{results['protocol']['boxes']}. Recall in percent.",
        "",
        markdown_table(shown_scores(results)),
    ]
    for column, groups in results["by"].items():
        lines += ["", f"## By {column.replace('_', ' ')}", "", breakdown_table(groups)]
    return "\n".join([*lines, "", "Command:", "", "```", results["command"], "```"]) + "\n"


def _recall(figures: Mapping, columns: Sequence[str]) -> list[str]:
    interval = figures.get("R@1_ci95")
    spread = f"{percent(interval[0])} to {percent(interval[1])}" if interval else ""
    values = [percent(figures[name]) for name in columns]
    return [values[0], spread, *values[1:]]


def _time_words(entries: Sequence[Entry]) -> str:
    """Times of unlike machines must not pass for a comparison."""
    speeds = [results["speed"] for entry in entries for results in entry.results if results.get("speed")]
    places = dict.fromkeys(
        f"{speed['device']} with {speed['threads']} thread{'s' * (speed['threads'] != 1)}" for speed in speeds
    )
    if not places:
        return ""
    words = " Times: encoding without decoding, as measured in each run, on "
    return words + ", ".join(places) + ("; not comparable across these." if len(places) > 1 else ".")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation_rice.study.table",
        description="One Markdown table of the results of many methods under one protocol.",
    )
    parser.add_argument("results", nargs="+", help="folders with results.json or arms of a study; TITLE=FOLDER")
    parser.add_argument("--output", help="file for the table, which is printed in any case")
    parser.add_argument("--only_run", action="store_true", help="do not list published models that were not run")
    options = parser.parse_args(arguments)
    try:
        if options.output:
            check_output(options.output)
        text = markdown([read_entry(argument) for argument in options.results], not options.only_run)
        if options.output:
            write_output(options.output, text)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(text)


if __name__ == "__main__":
    main()
