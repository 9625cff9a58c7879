"""
One Markdown table of many results: recall with intervals, and the cost of each method.

    python -m evaluation_rice.study.table runs/demo runs/baselines/clip runs/baselines/color_histogram

Each argument is a folder with the results.json of eval_rice.py, or an arm of a study (`ARM/seed0/eval/results.json`,
...), whose seeds become one row. `TITLE=FOLDER` gives the row a title; without a result it is listed as not run.
Published models without a result are also listed as not run. Results under different protocols are refused.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_rice.commands import mistakes_end, print_anywhere
from hub_rice.files import check_output, write_output
from hub_rice.model_card import breakdown_table, gallery_words
from hub_rice.results import dataset_name, read_results
from hub_rice.tables import ATTRIBUTES, TITLES, markdown_table, percent, shown_scores
from modeling_rice.scoring_rice import KINDS

from ..pretrained_baselines import FAMILIES
from ..recall import interval_words
from .paired import mean_interval, read_ranks

NOT_RUN = "not run"
_SAME = ("split", "gallery_scope", "gallery_images", "num_galleries", "num_gallery_images", "task_sha256")


@dataclass(frozen=True)
class Entry:
    """One method of the table.

    Attributes:
        title: text of the first column.
        folders: folders of its results.json files, one per seed.
        results: contents of these files; empty for a method that was not run.
    """

    title: str
    folders: tuple[Path, ...] = ()
    results: tuple[dict, ...] = ()


def read_entry(argument: str) -> Entry:
    """
    Reads `FOLDER` or `TITLE=FOLDER`.

    Raises:
        FileNotFoundError: a folder without a title has no results.json.
        ValueError: a results.json is incomplete.
    """
    title, _, folder = argument.rpartition("=")
    entry = read_folder(folder, title)
    if entry.folders or title:
        return entry
    raise FileNotFoundError(f"{folder} has no results.json: run eval_rice.py, or name the row as TITLE={folder}.")


def read_folder(folder: str | Path, title: str = "") -> Entry:
    """
    The results of an evaluation, or of an arm with seeds; an entry without results if there are none.

    Raises:
        ValueError: a results.json is incomplete.
    """
    path = Path(folder)
    folders = [path] if (path / "results.json").is_file() else []
    folders = folders or sorted(file.parent for file in path.glob("seed*/eval/results.json"))
    folders = folders or ([path / "eval"] if (path / "eval" / "results.json").is_file() else [])
    results = tuple(_read(file / "results.json") for file in folders)
    return Entry(title or (_title(path, results[0]) if results else str(path)), tuple(folders), results)


def _read(path: Path) -> dict:
    return read_results(path, ("protocol", "scores", "dataset", "num_queries"))


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
    Refuses results that must not be in one table. Boxes, frames and ASR may differ, because the table has columns for
    them.

    Raises:
        ValueError: the protocols of two results differ; the message names them and the first different setting.
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
                        f"{seen[0]} and {folder} have different protocols: {name} is {seen[1][name]!r} and {value!r}; "
                        f"make a separate table for each."
                    )


@dataclass(frozen=True)
class Hits:
    """
    The hits of an entry by one kind of score.

    Attributes:
        query_ids: queries in order.
        shops: per query, its shop; `None` if no file names them.
        by_seed: name of the seed's folder -> hits at 1, 1.0 or 0.0, `(num_queries,)`.
    """

    query_ids: list[str]
    shops: list[str] | None
    by_seed: dict[str, np.ndarray]


def read_hits(folders: Sequence[Path], kind: str) -> Hits:
    """
    Reads the hits from the query_ranks.jsonl of each folder, one folder per seed.

    Raises:
        FileNotFoundError: a folder has no query_ranks.jsonl.
        ValueError: a file is damaged, holds other clips than the first, or lacks the score.
    """
    read = {folder: read_ranks(folder) for folder in folders}
    first, by_seed = next(iter(read.values())), {}
    for folder, ranks in read.items():
        path, values = folder / "query_ranks.jsonl", ranks.hits(kind)
        if values is None:
            raise ValueError(
                f"{path} lacks {kind!r} scores of some clips; it has {ranks.kinds() or 'none'}: name one."
            )
        if ranks.query_ids != first.query_ids:
            raise ValueError(f"{path} has other clips than {folders[0]}: evaluate both on the same clips.")
        by_seed[folder.parent.name] = values
    shops = next((ranks.shops for ranks in read.values() if ranks.shops is not None), None)
    return Hits(first.query_ids, shops, by_seed)


def _figures(entry: Entry, kind: str) -> dict:
    """
    R@k by one kind of score: the mean over the seeds that have it, the interval of R@1 (all seeds of a query are drawn
    together), the rule of the interval, and the number of these seeds.
    """
    known = [(f, r) for f, r in zip(entry.folders, entry.results, strict=True) if kind in r["scores"]]
    scores = [results["scores"][kind] for _, results in known]
    names = [name for name in scores[0] if "_" not in name and all(name in figures for figures in scores)]
    figures = {name: float(np.mean([seed[name] for seed in scores])) for name in names}
    if len(scores) == 1:
        interval, rule = scores[0].get("R@1_ci95"), known[0][1]["protocol"].get("interval")
    else:
        hits = read_hits([folder for folder, _ in known], kind)
        interval, rule = mean_interval(hits.by_seed, hits.shops)[1], interval_words(hits.shops)
    return {**figures, "R@1_ci95": interval, "rule": rule, "seeds": len(scores)}


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
    """The kind of ASR; empty for a method that reads no text."""
    return ", ".join(dict.fromkeys(results["protocol"].get("asr", "") for results in entry.results))


def _costs(entry: Entry) -> list[str]:
    times = [_mean_cost(entry, name) for name in ("clip_ms", "image_ms")]
    shown = ["" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in times]
    return [_joined(entry, "boxes"), _joined(entry, "num_frames"), _count(_mean_cost(entry, "parameters")), *shown]


def _beside(entries: Sequence[Entry]) -> list[tuple[str, dict]]:
    """The baselines in every result (colour histogram, chance), once, unless they have their own row."""
    own = {(results.get("baseline") or {}).get("name") for entry in entries for results in entry.results}
    beside = {}
    for entry in entries:
        for results in entry.results:
            for name, scores in results.get("baselines", {}).items():
                if name not in own:
                    beside.setdefault(name, scores)
    return list(beside.items())


def missing_models(entries: Sequence[Entry]) -> list[str]:
    """Published models of `pretrained_baselines.FAMILIES` without a result."""
    run = {(results.get("baseline") or {}).get("model") for entry in entries for results in entry.results}
    return [f"{name} ({family.default}), frozen" for name, family in FAMILIES.items() if family.default not in run]


def markdown(entries: Sequence[Entry], list_missing: bool = True) -> str:
    """
    The table, below a line with the protocol; recall in percent, times in milliseconds.

    Args:
        entries: methods in the order of the rows.
        list_missing: also list published models that were not run.

    Raises:
        ValueError: the protocols of the results differ, or there is no result.
    """
    check_alike(entries)
    first = next((results for entry in entries for results in entry.results), None)
    if first is None:
        raise ValueError("there is no result yet: run eval_rice.py first.")
    columns = _columns(entries)
    header = ["method", "score", columns[0], f"95 % of {columns[0]}", *columns[1:]]
    header += ["boxes", "frames", "parameters", "ms per clip", "ms per image", "seeds"]
    if any(_asr(entry) not in ("", "own") for entry in entries):
        header.append("ASR")
    rows, rules = [], {}
    for entry in entries:
        kinds = [kind for kind in KINDS if any(kind in results["scores"] for results in entry.results)]
        for kind in kinds:
            figures = _figures(entry, kind)
            rules.setdefault(figures["rule"])
            row = [entry.title, kind, *_recall(figures, columns), *_costs(entry), _seeds(entry, figures), _asr(entry)]
            rows.append(row[: len(header)])
        if not kinds:
            rows.append([entry.title, NOT_RUN])
    rows += [[TITLES.get(name, name), "", *_recall(scores, columns)] for name, scores in _beside(entries)]
    rows += [[title, NOT_RUN] for title in (missing_models(entries) if list_missing else [])]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    width = len(header)
    table = "\n".join("| " + " | ".join([*line, *[""] * (width - len(line))]) + " |" for line in lines)
    title = f"{first['num_queries']} clips of {dataset_name(first)} ({first['protocol']['split']}); "
    words = f"Recall in percent.{_rule_words(rules)}{_time_words(entries)}"
    return f"{title}{gallery_words(first)}. {words}\n\n{table}\n"


def _columns(entries: Sequence[Entry]) -> list[str]:
    """The R@k of any result, by k."""
    scores = [figures for entry in entries for results in entry.results for figures in results["scores"].values()]
    names = {name for figures in scores for name in figures if name.startswith("R@") and "_" not in name}
    if not names:
        raise ValueError("the results have no recall by any score: run eval_rice.py again.")
    return sorted(names, key=lambda name: int(name[2:]))


def _seeds(entry: Entry, figures: Mapping) -> str:
    """Number of seeds in the mean of a row, and the total number if some seeds lack the score."""
    if entry.results[0].get("baseline") is not None:
        return ""
    total = len(entry.results)
    return str(total) if figures["seeds"] == total else f"{figures['seeds']} of {total}"


def _rule_words(rules: Iterable[str | None]) -> str:
    """Names the rules of the intervals, because different rules are not comparable."""
    return "".join(f" Interval: {rule}." for rule in rules if rule)


def baseline_page(results: Mapping) -> str:
    """README.md of a baseline's result in Markdown: the method, its recall and the breakdown."""
    name, model = results["baseline"]["name"], results["baseline"]["model"]
    what = f"The model `{model}` without further training" if model else "A descriptor without parameters"
    lines = [
        f"# Baseline {name}",
        "",
        f"{what}. {results['num_queries']} clips of {dataset_name(results)} "
        f"({results['protocol']['split']}); {gallery_words(results)}. Boxes at test time: "
        f"{results['protocol']['boxes']}. Recall in percent; the interval of R@1 is a "
        f"{results['protocol']['interval']}.",
        "",
        markdown_table(shown_scores(results)),
    ]
    for column, groups in results["by"].items():
        lines += ["", f"## By {ATTRIBUTES.get(column, column)}", "", breakdown_table(groups)]
    return "\n".join([*lines, "", "Command:", "", "```", results["command"], "```"]) + "\n"


def _recall(figures: Mapping, columns: Sequence[str]) -> list[str]:
    interval = figures.get("R@1_ci95")
    spread = f"{percent(interval[0])} to {percent(interval[1])}" if interval else ""
    values = [percent(figures[name]) if name in figures else "" for name in columns]
    return [values[0], spread, *values[1:]]


def _time_words(entries: Sequence[Entry]) -> str:
    """Names the devices of the times, because times of different machines are not comparable."""
    speeds = [results["speed"] for entry in entries for results in entry.results if results.get("speed")]
    places = dict.fromkeys(
        f"{speed['device']} with {speed['threads']} thread{'s' * (speed['threads'] != 1)}" for speed in speeds
    )
    if not places:
        return ""
    words = " Times: encoding without decoding, as measured in each run, on "
    return words + ", ".join(places) + ("; not comparable across these." if len(places) > 1 else ".")


def main(arguments: list[str] | None = None) -> None:
    print_anywhere()
    parser = argparse.ArgumentParser(
        prog="python -m evaluation_rice.study.table",
        description="One Markdown table of the results of many methods under one protocol.",
    )
    parser.add_argument("results", nargs="+", help="folders with results.json or arms of a study; TITLE=FOLDER")
    parser.add_argument("--output", help="file for the table, which is always printed too")
    parser.add_argument("--only_run", action="store_true", help="do not list published models that were not run")
    options = parser.parse_args(arguments)
    with mistakes_end(parser):
        if options.output:
            check_output(options.output)
        text = markdown([read_entry(argument) for argument in options.results], not options.only_run)
        if options.output:
            write_output(options.output, text)
    print(text)


if __name__ == "__main__":
    main()
