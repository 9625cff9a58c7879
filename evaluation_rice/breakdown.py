"""The breakdown of a result by attribute: training rows per category, and a plot."""

import os
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import pyarrow.parquet

from data_rice import open_dataset_view
from data_rice.commands import one_line
from data_rice.files import replacing
from data_rice.lazy_rows import ParquetRows
from hub_rice.tables import ATTRIBUTES
from hub_rice.training_record import trained_on

from .protocol import HEAD_TAIL_RULE, head_categories

MAX_DRAWN = 40
"""Maximum number of groups per attribute in the plot; it shows the largest ones."""


def train_rows_by_category(dataset: str, data_dir: str | None = None, cache_dir: str | None = None) -> dict[str, int]:
    """
    Category -> number of training rows of a data set. No picture is opened; rows without a category are left out.

    Raises:
        FileNotFoundError, ValueError: the data set has no training split, or its rows cannot be read.
    """
    rows = open_dataset_view(dataset, "pairs", "train", data_dir, cache_dir)
    if isinstance(rows, ParquetRows):
        # Reading their rows would load all pictures of a row group.
        names = pyarrow.parquet.read_table(rows.files, columns=["category"])["category"].to_pylist()
        return dict(Counter(name for name in names if name))
    codes, known = rows.column_codes("category")
    if not known:
        return {}
    _, first, counts = np.unique(codes, return_index=True, return_counts=True)
    names = [row["category"] for row in rows.__getitems__(first.tolist())]
    return {name: int(count) for name, count in zip(names, counts, strict=True) if name}


def count_training_rows(
    queries, model: str | None, dataset: str, data_dir: str | None = None, cache_dir: str | None = None
) -> tuple[dict[str, int] | None, dict[str, Any]]:
    """
    Category -> number of training rows for the breakdown by head and tail (`None` if they are unknown; a read error is
    printed); and the rule, or what is missing.

    Args:
        queries: the query view of the breakdown.
        model: the model whose training rows count; without that record, those of the evaluated data set count.
        dataset, data_dir, cache_dir: the evaluated data set.
    """
    if "category" not in queries.column_names or not any(queries["category"]):
        return None, {"missing": "the clips have no category"}
    dataset, data_dir = trained_on(model) or (dataset, data_dir)
    source = {"dataset": dataset, "data_dir": data_dir}
    try:
        rows = train_rows_by_category(dataset, data_dir, cache_dir)
    except (ValueError, OSError) as error:
        print(f"the training rows of {data_dir or dataset} cannot be counted: {one_line(error)}")
        return None, {"missing": "the training rows cannot be counted", **source}
    if not rows:
        return None, {"missing": "the training rows have no category", **source}
    record = {"head": sorted(head_categories(rows)), "num_categories": len(rows), "train_rows": sum(rows.values())}
    return rows, {"rule": HEAD_TAIL_RULE, **source, **record}


def can_draw() -> bool:
    """Whether matplotlib, the optional extra `plot`, is installed."""
    return find_spec("matplotlib") is not None


def draw_breakdown(path: str | os.PathLike, by: Mapping[str, Mapping[str, Mapping]], title: str) -> None:
    """
    Draws R@1 of every group with its interval into a picture, one panel per attribute.

    Args:
        path: file to write, such as breakdown.png.
        by: result of `evaluation_rice.protocol.breakdown`.
        title: heading.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no attribute to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not by:
        raise ValueError("the breakdown is empty: the rows of the data set have no attribute such as category.")
    shown = {column: _largest(groups) for column, groups in by.items()}
    heights = [0.9 + 0.26 * len(groups) for groups in shown.values()]
    figure = Figure(figsize=(7.5, 0.6 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="medium")
    panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (column, groups) in zip(panels, shown.items(), strict=True):
        _draw_groups(axes, groups)
        axes.set_title(ATTRIBUTES.get(column, column), loc="left", fontsize="small")
    panels[0].legend(loc="best", fontsize="x-small")
    panels[-1].set_xlabel("R@1 in percent, with 95 % intervals")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _largest(groups: Mapping[str, Mapping]) -> dict[str, Mapping]:
    """The groups to draw, by name, or the largest ones by size if there are too many."""
    if len(groups) <= 8:
        return dict(groups)
    return dict(sorted(groups.items(), key=lambda item: (-item[1]["num_queries"], item[0]))[:MAX_DRAWN])


def _draw_groups(axes, groups: Mapping[str, Mapping]) -> None:
    kinds = [name for name in next(iter(groups.values())) if name != "num_queries"]
    for number, kind in enumerate(kinds):
        values = np.array([100 * group[kind]["R@1"] for group in groups.values()])
        errors = np.abs(100 * np.array([group[kind]["R@1_ci95"] for group in groups.values()]).T - values)
        places = np.arange(len(groups)) + 0.22 * (number - (len(kinds) - 1) / 2)
        axes.errorbar(values, places, xerr=errors, fmt="o", markersize=3, linewidth=1, capsize=1.5, label=kind)
    labels = [f"{name} ({group['num_queries']})" for name, group in groups.items()]
    axes.set_yticks(range(len(groups)), labels, fontsize="x-small")
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(-2, 102)
    axes.grid(axis="x", alpha=0.3)
