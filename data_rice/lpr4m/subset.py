"""Thinning of the largest categories to a budget of rows; small categories stay whole."""

import hashlib
import heapq
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


def water_filling(counts: Mapping[str, int], budget: int) -> dict[str, int]:
    """Limit every category to one number of rows, so that the sum is ``budget``.

    Categories below the limit stay whole. Rows that rounding leaves over go, one each, to the thinned categories that
    come first by name.

    Args:
        counts: rows per category.
        budget: rows to keep, at least 1.

    Returns:
        Rows to keep per category; their sum is ``min(budget, sum(counts))``.
    """
    kept: dict[str, int] = {}
    left = min(budget, sum(counts.values()))
    # From the smallest category up, each takes an equal share of the rest, or all of its rows.
    order = sorted(counts, key=lambda category: (counts[category], category))
    for position, category in enumerate(order):
        share = left // (len(order) - position)
        if counts[category] > share:
            head = sorted(order[position:])
            surplus = left - share * len(head)
            return kept | {name: share + (rank < surplus) for rank, name in enumerate(head)}
        kept[category] = counts[category]
        left -= counts[category]
    return kept


def row_key(row_id: str, seed: int) -> int:
    """Return a 64-bit number that depends only on the row's id and the seed; rows with small numbers are kept."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{row_id}".encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Subset:
    """The rows that a budget keeps.

    Attributes:
        thresholds: thinned category -> largest `row_key` that is kept.
        report: per category ``{"rows": before, "kept": after}``, the largest category first.
    """

    seed: int
    thresholds: dict[str, int]
    report: dict[str, dict[str, int]]

    def keeps(self, category: str, row_id: str) -> bool:
        """Return whether the row belongs to the subset."""
        threshold = self.thresholds.get(category)
        return threshold is None or row_key(row_id, self.seed) <= threshold


def choose_subset(rows: Iterable[tuple[str, str]], budget: int, seed: int) -> Subset:
    """Thin ``(category, row id)`` pairs to ``budget`` rows. The result depends on the seed, not on the order of rows.

    Within each category, a larger budget keeps all rows of a smaller one. Takes eight bytes of memory per row.
    """
    keys: dict[str, array] = {}
    for category, row_id in rows:
        keys.setdefault(category, array("Q")).append(row_key(row_id, seed))
    counts = {category: len(values) for category, values in keys.items()}
    kept = water_filling(counts, budget)
    thresholds = {
        category: heapq.nsmallest(kept[category], values)[-1] if kept[category] else -1
        for category, values in keys.items()
        if kept[category] < counts[category]
    }
    largest = sorted(counts, key=lambda category: (-counts[category], category))
    return Subset(seed, thresholds, {name: {"rows": counts[name], "kept": kept[name]} for name in largest})
