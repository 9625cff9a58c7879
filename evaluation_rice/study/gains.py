r"""Clips that only one of two evaluations gets right: the difference of R@1 by group of clips.

    python -m evaluation_rice.study.gains runs/ablation/icl_pmd_pfr runs/ablation/icl --score fused \
        --right_score embedding

Each side is a folder with the results.json and query_ranks.jsonl of eval_rice.py, or an arm of a study
(`ARM/seed0/eval`, ...). The seeds of an arm are paired by name, and the bootstrap draws all seeds of a clip together.
The groups are those of the breakdown (docs/baselines.md), read from the evaluated data set.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_rice.commands import mistakes_end, print_anywhere
from hub_rice.files import check_output, write_output
from hub_rice.tables import ATTRIBUTES, percent

from .paired import paired_difference, verdict
from .table import check_alike, read_folder, read_hits

SHOWN = 5


def group_gains(
    left: Mapping[Any, np.ndarray],
    right: Mapping[Any, np.ndarray],
    groups: Mapping[str, Sequence[str]],
    shops: Sequence[str] | None = None,
) -> list[dict]:
    """
    The difference of R@1 between `left` and `right` in each group, the largest gain first.

    Args:
        left, right: seed -> hits `(num_queries,)`, see `evaluation_rice.study.paired.paired_difference`.
        groups: column -> group of each query.
        shops: per query, its shop, as in `evaluation_rice.recall.bootstrap_interval`.

    Returns:
        Dicts with `column`, `group`, `num_queries` (without seeds), `left`, `right` (R@1), `difference`, `ci95`.
    """
    rows = []
    for column, names in groups.items():
        names = np.array(names)
        for group in np.unique(names):
            chosen = names == group
            sides = [{seed: hits[chosen] for seed, hits in side.items()} for side in (left, right)]
            compared = paired_difference(*sides, None if shops is None else np.array(shops)[chosen])
            means = [float(np.mean([side[seed] for seed in compared["seeds"]])) for side in sides]
            row = {"column": column, "group": str(group), "num_queries": int(chosen.sum())}
            row |= {"left": means[0], "right": means[1]}
            rows.append(row | {name: compared[name] for name in ("difference", "ci95")})
    return sorted(rows, key=lambda row: -row["difference"])


def one_sided(ids: Sequence[str], left: Mapping[Any, np.ndarray], right: Mapping[Any, np.ndarray]) -> dict[str, Any]:
    """
    Numbers of answers (queries times common seeds) that `both`, `left_only`, `right_only` or `neither` get right. Also
    `left_queries` and `right_queries`, the queries that only this side gets right: `{"query_id", "seeds"}` with the
    number of such seeds, largest first.
    """
    seeds = sorted(set(left) & set(right))
    ours, theirs = (np.stack([side[seed] for seed in seeds]).astype(bool) for side in (left, right))
    won, lost = (ours & ~theirs), (theirs & ~ours)

    def queries(gained: np.ndarray, given: np.ndarray) -> list[dict]:
        counts = np.where(given.any(axis=0), 0, gained.sum(axis=0))
        order = sorted(np.flatnonzero(counts), key=lambda i: (-counts[i], i))
        return [{"query_id": ids[i], "seeds": int(counts[i])} for i in order]

    return {
        "both": int((ours & theirs).sum()),
        "left_only": int(won.sum()),
        "right_only": int(lost.sum()),
        "neither": int((~ours & ~theirs).sum()),
        "left_queries": queries(won, lost),
        "right_queries": queries(lost, won),
    }


def load_groups(results: Mapping, ids: Sequence[str], data_dir: str | None, cache_dir: str | None) -> dict[str, list]:
    """
    The groups of the queries with these ids, from the data set in results.json, without opening pictures. Head and
    tail follow the training rows of the evaluated model, or of that data set if the model has no record.

    Raises:
        FileNotFoundError, ValueError: the data set is missing or has other clips.
    """
    from data_rice import load_dataset_view

    from ..breakdown import count_training_rows
    from ..protocol import query_groups

    dataset = results["dataset"]
    queries = load_dataset_view(dataset, "query", results["protocol"]["split"], data_dir, cache_dir)
    places = {query: i for i, query in enumerate(queries["clip_id"])}
    if set(places) != set(ids):
        raise ValueError(
            f"{data_dir or dataset} has other clips than the evaluation: name the evaluated folder with --data_dir."
        )
    train_rows, _ = count_training_rows(queries, results.get("model"), dataset, data_dir, cache_dir)
    groups = query_groups(queries, train_rows)
    return {column: [names[places[query]] for query in ids] for column, names in groups.items()}


def compare(
    left: str,
    right: str,
    score: str,
    right_score: str | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """
    Compares two finished evaluations, each a folder for `evaluation_rice.study.table.read_folder`.

    Returns:
        `all` (see `paired_difference`), `groups` (see `group_gains`) and `answers` (see `one_sided`).

    Raises:
        FileNotFoundError, ValueError: a side has no results, the protocols differ, the score is missing, no seed is
            common, or the data set cannot be read.
    """
    entries = [read_folder(side) for side in (left, right)]
    for side, entry in zip((left, right), entries, strict=True):
        if not entry.folders:
            raise FileNotFoundError(
                f"{side} has no results.json: name the folder of an evaluation by eval_rice.py, or of an arm."
            )
    check_alike(entries)
    sides = [
        read_hits(entry.folders, kind) for entry, kind in zip(entries, (score, right_score or score), strict=True)
    ]
    ids, (ours, theirs) = sides[0].query_ids, [side.by_seed for side in sides]
    if ids != sides[1].query_ids:
        raise ValueError(f"{left} and {right} have different clips: evaluate both on the same clips.")
    if len(ours) == len(theirs) == 1:
        theirs = dict(zip(ours, theirs.values(), strict=True))
    shops = next((side.shops for side in sides if side.shops is not None), None)
    groups = load_groups(entries[0].results[0], ids, data_dir, cache_dir)
    return {
        "all": paired_difference(ours, theirs, shops),
        "groups": group_gains(ours, theirs, groups, shops),
        "answers": one_sided(ids, ours, theirs),
    }


def format_gains(result: Mapping[str, Any]) -> str:
    """The table of groups in Markdown, R@1 in percent and differences in points, then the one-sided queries."""
    lines = ["| attribute | group | clips | left R@1 | right R@1 | difference | 95 % interval |"]
    lines.append("|---|---|---:|---:|---:|---:|---|")
    for row in result["groups"]:
        low, high = row["ci95"]
        attribute = ATTRIBUTES.get(row["column"], row["column"])
        lines.append(
            f"| {attribute} | {row['group']} | {row['num_queries']} | {percent(row['left'])} | "
            f"{percent(row['right'])} | {100 * row['difference']:+.1f} | {100 * low:+.1f} to {100 * high:+.1f} |"
        )
    total, answers, count = result["all"], result["answers"], len(result["groups"])
    low, high = total["ci95"]
    clear = sum(verdict(row) != "no difference shown" for row in result["groups"])
    lines += [
        "",
        f"all: {100 * total['difference']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}), "
        f"{len(total['seeds'])} seed(s); {clear} of {count} intervals exclude 0; about {count / 20:.0f} would by "
        f"chance without any difference",
        f"intervals: {total['interval']}",
        f"answers: both right {answers['both']}, only left {answers['left_only']}, only right "
        f"{answers['right_only']}, neither {answers['neither']}",
    ]
    for side in ("left", "right"):
        queries = answers[f"{side}_queries"]
        first = ", ".join(f"{query['query_id']} ({query['seeds']})" for query in queries[:SHOWN])
        lines.append(f"clips that only {side} gets right: {len(queries)}; first, with seeds: {first or 'none'}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    print_anywhere()
    parser = argparse.ArgumentParser(prog="python -m evaluation_rice.study.gains", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("left", help="folder of an evaluation, or of an arm with seeds")
    add("right", help="folder of the evaluation or arm to compare with")
    add("--score", default="embedding", help="embedding (default), matching or fused")
    add("--right_score", help="score of the right side; default: as the left")
    add("--data_dir", help="folder of the data set's files, if eval_rice.py had one")
    add("--cache_dir", help="folder for the cached tables of the data set")
    add("--output", help="JSON file to write")
    options = parser.parse_args(arguments)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    with mistakes_end(parser):
        if options.output:
            check_output(options.output)
        result = compare(**settings)
        if options.output:
            write_output(options.output, json.dumps({**settings, **result}, indent=1, allow_nan=False) + "\n")
    print(format_gains(result))


if __name__ == "__main__":
    main()
