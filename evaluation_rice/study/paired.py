"""Comparison of two methods on the same queries: differences of hits, paired by query and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_rice.parsing import read_json_lines
from modeling_rice.scoring_rice import KINDS

from ..recall import hit_interval, interval_words


@dataclass(frozen=True)
class QueryRanks:
    """
    The query_ranks.jsonl of an evaluation, in order of the query ids.

    Attributes:
        query_ids: ids of the queries.
        shops: per query, its livestream's id; `None` if the file has none (files of earlier versions).
        ranks: per query, kind of score -> rank of its first relevant image, `None` if that was not found.
    """

    query_ids: list[str]
    shops: list[str] | None
    ranks: list[dict[str, int | None]]

    def hits(self, kind: str) -> np.ndarray | None:
        """Hits at 1, 1.0 or 0.0, `(num_queries,)`; `None` if a query has no score of this kind."""
        if any(kind not in row for row in self.ranks):
            return None
        return np.array([float(row[kind] == 1) for row in self.ranks])

    def kinds(self) -> str:
        """The kinds of score of the first query, for a message."""
        return ", ".join(self.ranks[0])


def read_ranks(folder: str | Path) -> QueryRanks:
    """
    Reads the query_ranks.jsonl of an evaluation.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged or empty, a query occurs twice, or an id or a rank has another type.
    """
    path = Path(folder) / "query_ranks.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run eval_rice.py again.")
    rows = {}
    try:
        for number, row in read_json_lines(path):
            query = _id(row.pop("query_id", None), f"{path}, line {number}: query_id")
            if query is None or query in rows:
                raise ValueError(f"{path}, line {number}: {'no query_id' if query is None else f'{query!r} twice'}")
            shop = _id(row.pop("live_id", None), f"{path}, line {number}: live_id")
            for kind in KINDS:
                rank = row.get(kind)
                if rank is not None and (type(rank) is not int or rank < 1):
                    raise ValueError(f"{path}, line {number}: the {kind} rank {rank!r} must be an integer from 1 on")
            rows[query] = shop, row
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}: run eval_rice.py again.") from error
    if not rows:
        raise ValueError(f"{path} holds no clips: run eval_rice.py again.")
    rows = dict(sorted(rows.items()))
    shops = [shop for shop, _ in rows.values()]
    return QueryRanks(list(rows), None if None in shops else shops, [ranks for _, ranks in rows.values()])


def _id(value: object, where: str) -> str | None:
    """An id as text, `None` if there is none. Raises `ValueError` unless it is a string or an integer."""
    if value is None or isinstance(value, str):
        return value
    if type(value) is not int:
        raise ValueError(f"{where} is {value!r}, but an id is a string or an integer")
    return str(value)


def mean_interval(hits: Mapping[int, np.ndarray], shops: Sequence[str] | None = None) -> tuple[float, list[float]]:
    """Mean over seeds and queries, and its 95 % interval over shops and their queries.

    The bootstrap draws all seeds of a query together. Runs with different seeds fail on the same hard clips, so
    treating them as independent queries would make the interval too narrow.

    Args:
        hits: seed -> float array `(num_queries,)`, 1 for a hit and 0 for a miss, queries in one order.
        shops: per query, its shop, as in `evaluation_rice.recall.bootstrap_interval`.

    Raises:
        ValueError: there is no seed, or the seeds differ in their number of queries.
    """
    values = _stack(hits).mean(axis=0)
    return float(values.mean()), hit_interval(values, shops)


def paired_difference(
    left: Mapping[int, np.ndarray], right: Mapping[int, np.ndarray], shops: Sequence[str] | None = None
) -> dict:
    """The difference of R@1 between `left` and `right` on the same queries with the same seeds.

    Args:
        left, right, shops: as in `mean_interval`; only common seeds are compared.

    Returns:
        `difference` (fraction), `ci95` (paired bootstrap), `interval` (its rule in words), `by_seed` (one difference
        per seed), `seeds` and `num_queries` (queries times seeds).

    Raises:
        ValueError: there is no common seed, or the numbers of queries differ.
    """
    seeds = sorted(set(left) & set(right))
    if not seeds:
        raise ValueError("the two methods have no seed in common: evaluate both with the same seeds.")
    ours, theirs = (_stack({seed: side[seed] for seed in seeds}) for side in (left, right))
    if ours.shape != theirs.shape:
        raise ValueError(
            f"the two methods answer {ours.shape[1]} and {theirs.shape[1]} queries: they must be the same."
        )
    gaps = ours - theirs
    return {
        "difference": float(gaps.mean()),
        "ci95": hit_interval(gaps.mean(axis=0), shops, lowest=-1.0),
        "interval": interval_words(shops),
        "by_seed": [float(gap.mean()) for gap in gaps],
        "seeds": seeds,
        "num_queries": int(gaps.size),
    }


def verdict(difference: Mapping) -> str:
    """The result of `paired_difference` in words, by its interval."""
    low, high = difference["ci95"]
    if low > 0:
        return "better"
    return "worse" if high < 0 else "no difference shown"


def _stack(hits: Mapping[int, np.ndarray]) -> np.ndarray:
    if not hits:
        raise ValueError("there are no results for any seed.")
    sizes = {len(values) for values in hits.values()}
    if len(sizes) > 1:
        raise ValueError(f"the seeds answer different numbers of queries ({sorted(sizes)}); evaluate them again.")
    return np.stack([np.asarray(hits[seed], dtype=np.float64) for seed in sorted(hits)])


def draw_intervals(path: str | Path, rows: Sequence[tuple[str, str, float, Sequence[float]]], xlabel: str) -> None:
    """Draws one point with its interval per row, grouped by label.

    Args:
        path: picture to write.
        rows: `(label, series, value, [low, high])`, fractions; labels from top to bottom in order of appearance.
        xlabel: name of the axis, which is in percent.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for label, *_ in rows))
    series = list(dict.fromkeys(name for _, name, *_ in rows))
    figure = Figure(figsize=(7.5, 1.2 + 0.45 * len(labels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, name in enumerate(series):
        chosen = [row for row in rows if row[1] == name]
        offset = 0.22 * (number - (len(series) - 1) / 2)
        values = [100 * row[2] for row in chosen]
        errors = [[100 * (row[2] - row[3][0]) for row in chosen], [100 * (row[3][1] - row[2]) for row in chosen]]
        axes.errorbar(
            values, [labels.index(row[0]) + offset for row in chosen], xerr=errors, fmt="o", capsize=2, label=name
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", alpha=0.3)
    if len(series) > 1:
        axes.legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=150)
