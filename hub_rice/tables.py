"""Recall tables, as plain text and as Markdown."""

from collections.abc import Mapping

TITLES = {
    "embedding": "RICE, embedding",
    "matching": "RICE, matching",
    "alignment": "RICE, alignment",
    "fused": "RICE, fused",
    "color_histogram": "colour histogram",
    "chance": "chance",
    "pixels_8x8": "8 x 8 pixels",
    "color_histogram_in_box": "colour histogram in the box",
}
ATTRIBUTES = {
    "category": "category",
    "head_tail": "head and tail categories",
    "product_scale": "product scale",
    "visible_duration": "visible duration",
    "product_number": "number of products",
    "source": "source",
}
"""Titles of the attributes of clips, by their names in `by` of results.json."""


def percent(value: float) -> str:
    """A fraction as a percentage with one decimal."""
    return f"{100 * value:.1f}"


def shown_scores(results: Mapping) -> dict[str, Mapping]:
    """The rows of a results table: the model's scores (or a baseline's, under its name), then the other baselines."""
    baseline = results.get("baseline")
    own = results["scores"] if baseline is None else {baseline["name"]: results["scores"]["embedding"]}
    return {**own, **results["baselines"]}


def table_cells(scores: Mapping[str, Mapping]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a recall table, in percent.

    Args:
        scores: Method name -> `{"R@1": ..., "R@1_ci95": [low, high]}`; the interval is optional.
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
    """Recall in percent as a Markdown table, one method per line."""
    header, rows = table_cells(scores)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
