"""Recall at k by the `evaluate` metric, the expectation of a random order, and intervals over shops and clips."""

import sys
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from math import comb, sqrt
from pathlib import Path
from types import ModuleType

import numpy as np

DEFAULT_KS = (1, 3, 5, 10)
NUM_RESAMPLES = 10_000
Z_95 = 1.959963984540054
_ONE_AT_A_TIME = threading.Lock()


def metric_path() -> Path:
    """Folder of the `evaluate` metric: in the package where that is installed, else in the repository."""
    package = Path(__file__).resolve().parent
    installed = package / "metrics" / "livestream_recall"
    return installed if installed.is_dir() else package.parent / "metrics" / "livestream_recall"


@cache
def _metric():
    # Importing `evaluate` takes seconds, which commands that measure nothing need not wait for.
    import evaluate

    return evaluate.load(str(metric_path()), keep_in_memory=True)


def _rules() -> ModuleType:
    """The metric's own module, whose functions say what an id, a cut-off and a hit are."""
    return sys.modules[type(_metric()).__module__]


def check_ks(ks: Iterable[int]) -> tuple[int, ...]:
    """`ks` as a tuple; raises `ValueError` when it is empty or holds anything but whole numbers of at least 1."""
    return _rules().check_ks(ks)


def first_rank(ranking: Sequence[str], relevant: Iterable[str]) -> int | None:
    """Rank (from 1) of the first image of a ranking that is relevant, `None` where there is none."""
    return _rules().first_rank(ranking, relevant)


def read_ids(name: str, ids: Iterable[str | int], ordered: bool = False) -> list[str]:
    """Ids as texts: 7 is the same id as "7".

    Args:
        name: what they are, for the message.
        ids: a list, or where they are not `ordered` also a set.
        ordered: whether their order matters.

    Raises:
        ValueError: it is no list, or holds anything but texts and whole numbers.
    """
    return _rules().read_ids(name, ids, ordered)


def _read_lists(name: str, lists: Mapping[str, Sequence[str]], ordered: bool) -> dict[str, list[str]]:
    if not isinstance(lists, Mapping):
        raise ValueError(f"{name} must map a query id to a list of image ids, not be a {type(lists).__name__}.")
    return {query: read_ids(f"{name}[{query!r}]", ids, ordered) for query, ids in lists.items()}


def recall_at_k(
    rankings: Mapping[str, Sequence[str]],
    relevant: Mapping[str, Sequence[str]],
    ks: Iterable[int] = DEFAULT_KS,
) -> dict[str, float]:
    """Share of queries with a relevant image among the first k of their ranking (RICE, ICCV 2023, section 4).

    The figures come from the metric in `metric_path()`, by `evaluate`.

    Args:
        rankings: query id -> image ids, best first. A ranking may be empty or shorter than k; positions are counted
            as they stand, so an id that occurs twice takes two places. An id is a text or a whole number, and 7 is
            the same id as "7".
        relevant: query id -> the images that count as a hit. These are the queries of the denominator: one without a
            ranking is a miss, and so is one with an empty list.
        ks: the cut-offs.

    Returns:
        `{"R@1": ..., "R@3": ...}`, fractions in [0, 1].

    Raises:
        ValueError: `relevant` is empty, a value is a string in place of a list or holds anything but ids, a ranking
            belongs to no query of `relevant`, or a k is not a whole number of at least 1.
    """
    ks = check_ks(ks)
    rankings = _read_lists("rankings", rankings, ordered=True)
    relevant = _read_lists("relevant", relevant, ordered=False)
    if not relevant:
        raise ValueError("relevant is empty: recall needs at least one query.")
    stray = next((query_id for query_id in rankings if query_id not in relevant), None)
    if stray is not None:
        raise ValueError(f"rankings holds query {stray!r}, which relevant does not: give its relevant images.")
    return compute_recall([rankings.get(query, []) for query in relevant], list(relevant.values()), ks)


def compute_recall(
    rankings: Sequence[Sequence[str]],
    relevant: Sequence[Sequence[str]],
    ks: tuple[int, ...],
    groups: Sequence[str] | None = None,
) -> dict:
    """What the metric computes of rankings and relevant images in one order, one of each per query.

    Args:
        rankings, relevant, ks: as `recall_at_k`.
        groups: per query the name of its group; the result then also holds `by_livestream`, group ->
            `{"num_clips": n, "R@1": ...}`.
    """
    depth = max(ks)
    # The metric is one object that stores the queries until it has counted them.
    with _ONE_AT_A_TIME:
        return _metric().compute(
            predictions=[ranking[:depth] for ranking in rankings], references=relevant, ks=ks, live_ids=groups
        )


def expected_hit(num_images: int, num_relevant: int, k: int) -> float:
    """Probability that the first `k` of `num_images` in random order hold one of `num_relevant` (hypergeometric)."""
    if num_relevant <= 0 or k <= 0:
        return 0.0
    k = min(k, num_images)
    return 1.0 - comb(num_images - num_relevant, k) / comb(num_images, k)


def bootstrap_interval(
    values: Sequence[float],
    groups: Sequence[str] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    confidence: float = 0.95,
) -> list[float]:
    """Percentile bootstrap interval of the mean over queries, `[low, high]`, by shop where there are several.

    A resample draws as many shops as there are, with replacement, then from each drawn shop as many of its queries as
    it has, with replacement, and takes the mean over them: clips of one shop are alike, and a new shop is what a
    figure is wanted for. With one shop this is the plain bootstrap over queries.

    Args:
        values: one number per query, such as 1.0 for a hit and 0.0 for a miss, or a paired difference.
        groups: per query its shop, the livestream's id; `None` takes all for queries of one shop.
        num_resamples: resamples drawn.
        seed: seed of the generator; the same values, shops and seed give the same interval.
        confidence: mass inside the interval, in (0, 1).

    Raises:
        ValueError: there are no values, `groups` has another length, or `confidence` is not in (0, 1).
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("values is empty: an interval needs at least one query.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}: it must lie between 0 and 1.")
    if groups is not None and len(groups) != values.size:
        raise ValueError(f"groups has {len(groups)} entries for {values.size} queries: give each its shop.")
    _, shops = np.unique(np.zeros(values.size) if groups is None else groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    order = np.lexsort((values, shops))
    # Shops with the same values are drawn as one kind, of which there are few even where each query has its own shop.
    kinds = Counter(map(tuple, np.split(values[order], np.flatnonzero(np.diff(shops[order])) + 1)))
    num_shops = kinds.total()
    times = rng.multinomial(num_shops, np.array(list(kinds.values())) / num_shops, size=num_resamples)
    sums, sizes = np.zeros(num_resamples), np.zeros(num_resamples)
    for own, drawn in zip(kinds, times.T):
        sizes += drawn * len(own)
        sums += _resampled_sums(own, drawn * len(own), rng)
    tail = (1 - confidence) / 2
    return np.quantile(sums / sizes, [tail, 1 - tail]).tolist()


def _resampled_sums(values: Sequence[float], sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Per resample the sum of `sizes` of the values drawn with replacement, `(num_resamples,)`.

    Drawing draws a multinomial count for each distinct value, so the counts are drawn directly; for hits and misses
    that is one binomial per resample.
    """
    levels, counts = np.unique(values, return_counts=True)
    chunk = max(1, 4_000_000 // levels.size)  # bounds the table of counts to 32 MB
    shares = counts / counts.sum()
    parts = [rng.multinomial(sizes[i : i + chunk], shares) @ levels for i in range(0, len(sizes), chunk)]
    return np.concatenate(parts)


def interval_words(groups: Sequence[str] | None) -> str:
    """By which rule `bootstrap_interval` resamples queries of these shops; `None` where the shops are not known."""
    resamples = f"{NUM_RESAMPLES} resamples, seed 0"
    if groups is None:
        return (
            f"percentile bootstrap over clips as if they were independent, since the files name no shops: run "
            f"eval_rice.py again ({resamples})"
        )
    shops = len(set(groups))
    if shops < 2:
        return f"percentile bootstrap over clips, since no two shops are told apart ({resamples})"
    return f"percentile bootstrap over {shops} shops, then over the clips of each ({resamples})"


def hit_interval(hits: Sequence[float], groups: Sequence[str] | None = None) -> list[float]:
    """95 % interval of R@1, from one value in [0, 1] per query, its share of hits over seeds.

    It is `bootstrap_interval`'s, except where every query is a hit, or every one a miss: resampling then has no spread
    however few they are, and it is `wilson_interval`'s over queries.
    """
    share = float(np.mean(hits)) if len(hits) else 0.5
    return list(wilson_interval(share, len(hits))) if share in (0, 1) else bootstrap_interval(hits, groups)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` independent trials (Wilson score), for groups too small to resample."""
    centre = share + Z_95**2 / (2 * count)
    spread = Z_95 * sqrt(share * (1 - share) / count + (Z_95 / (2 * count)) ** 2)
    scale = 1 + Z_95**2 / count
    # Where no trial or every one succeeded, the bound is the share itself, and rounding must not pass it.
    return min(share, max(0.0, (centre - spread) / scale)), max(share, min(1.0, (centre + spread) / scale))
