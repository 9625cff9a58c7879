"""Plots of recall as SVG elements for an HTML page; every text is escaped."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from hub_rice.tables import percent

INK, FAINT, GRID, BAR = "#222", "#6b6b6b", "#e2e2e2", "#4878a8"
ROW = 22
LABEL_WIDTH, PLOT_WIDTH, VALUE_WIDTH = 180, 260, 100


@dataclass(frozen=True)
class Bar:
    """One bar of a plot: R@1 as a fraction, its 95 % interval, and its number of clips."""

    label: str
    value: float
    interval: tuple[float, float] | None = None
    num_queries: int | None = None


def group_bars(groups: Mapping[str, Mapping], kind: str) -> list[Bar]:
    """A bar per group of one attribute of `results["by"]`, for one kind of score."""
    bars = []
    for name, values in groups.items():
        if kind in values:
            interval = values[kind].get("R@1_ci95")
            bars.append(Bar(name, values[kind]["R@1"], interval and tuple(interval), values["num_queries"]))
    return bars


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width:g}" />'
    )


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _shorten(text: str, length: int = 24) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def bar_plot(bars: Sequence[Bar], title: str) -> str:
    """Horizontal bars from 0 to 100 %, each with its interval as a whisker, its value and its number of clips."""
    height = ROW * len(bars) + 24
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = LABEL_WIDTH + share * PLOT_WIDTH
        parts += [_line(x, 0, x, height - 20, GRID), _text(x, height - 6, f"{100 * share:g}", "middle", FAINT)]
    for i, bar in enumerate(bars):
        top = i * ROW
        middle = top + ROW / 2
        parts.append(_text(LABEL_WIDTH - 8, middle + 4, _shorten(bar.label), "end"))
        width = bar.value * PLOT_WIDTH
        parts.append(
            f'<rect x="{LABEL_WIDTH}" y="{top + 4}" width="{width:.1f}" height="{ROW - 8}" fill="{BAR}">'
            f"<title>{escape(bar.label)}</title></rect>"
        )
        if bar.interval:
            low, high = (LABEL_WIDTH + bound * PLOT_WIDTH for bound in bar.interval)
            parts += [_line(low, middle, high, middle, INK, 1.4)]
            parts += [_line(x, middle - 4, x, middle + 4, INK, 1.4) for x in (low, high)]
        count = "" if bar.num_queries is None else f" of {bar.num_queries}"
        parts.append(_text(LABEL_WIDTH + PLOT_WIDTH + 12, middle + 4, percent(bar.value) + count))
    return _svg(LABEL_WIDTH + PLOT_WIDTH + VALUE_WIDTH, height, title, parts)


def curve_plot(curve: Sequence[Mapping[str, float]], chosen: float, title: str) -> str:
    """R@1 over the fusion weight (logarithmic), the chosen weight marked."""
    width, height, left, bottom, top = 560, 240, 50, 36, 14
    weights, values = [point["weight"] for point in curve], [point["R@1"] for point in curve]
    low, high = math.log(min(weights)), math.log(max(weights))
    floor = math.floor(20 * min(values)) / 20
    ceiling = max(math.ceil(20 * max(values)) / 20, floor + 0.05)

    def x_of(weight: float) -> float:
        return left + (width - left - 20) * (math.log(weight) - low) / ((high - low) or 1)

    def y_of(value: float) -> float:
        return top + (height - top - bottom) * (ceiling - value) / (ceiling - floor)

    parts = []
    for step in range(round(20 * floor), round(20 * ceiling) + 1):
        y = y_of(step / 20)
        parts += [_line(left, y, width - 20, y, GRID), _text(left - 8, y + 4, f"{5 * step}", "end", FAINT)]
    for weight in weights:
        if any(abs(weight - mark) < 1e-9 for mark in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)):
            parts.append(_text(x_of(weight), height - bottom + 18, f"{weight:g}", "middle", FAINT))
    points = " ".join(f"{x_of(w):.1f},{y_of(v):.1f}" for w, v in zip(weights, values))
    parts.append(f'<polyline points="{points}" fill="none" stroke="{BAR}" stroke-width="2" />')
    for weight, value in zip(weights, values):
        colour, radius = ("#d9480f", 6) if weight == chosen else (BAR, 3)
        parts.append(f'<circle cx="{x_of(weight):.1f}" cy="{y_of(value):.1f}" r="{radius}" fill="{colour}" />')
    parts.append(_text((left + width) / 2, height - 4, "weight of matching", "middle", FAINT))
    return _svg(width, height, title, parts)
