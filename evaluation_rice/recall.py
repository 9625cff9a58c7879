"""Recall at k by the `evaluate` metric, the expectation of a random order, and intervals over shops and clips."""

import sys
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from math import comb, sqrt
from numbers import Integral
from pathlib import Path
from types import ModuleType

import numpy as np

DEFAULT_KS = (1, 3, 5, 10)
NUM_RESAMPLES = 10_000
Z_95 = 1.959963984540054
_ONE_AT_A_TIME = threading.Lock()


def metric_path() -> Path:
    """Folder of the `evaluate` metric: in the installed package, else in the repository."""
    package = Path(__file__).resolve().parent
    installed = package / "metrics" / "livestream_recall"
    return installed if installed.is_dir() else package.parent / "metrics" / "livestream_recall"


@cache
def _metric():
    # Importing `evaluate` takes seconds, so only commands that measure recall import it.
    import evaluate

    return evaluate.load(str(metric_path()), keep_in_memory=True)


def _rules() -> ModuleType:
    """The metric's module, whose functions define ids, cut-offs and hits."""
    return sys.modules[type(_metric()).__module__]


def check_ks(ks: Iterable[int]) -> tuple[int, ...]:
    """`ks` as a tuple; raises `ValueError` if it is empty or a k is not a whole number of at least 1."""
    return _rules().check_ks(ks)


def first_rank(ranking: Sequence[str], relevant: Iterable[str]) -> int | None:
    """Rank (from 1) of the first relevant image of a ranking, `None` if there is none."""
    return _rules().first_rank(ranking, relevant)


def read_ids(name: str, ids: Iterable[str | int], ordered: bool = False) -> list[str]:
    """Ids as texts: 7 is the same id as "7".

    Args:
        name: name of the argument, for the message.
        ids: a list; if not `ordered`, also a set.
        ordered: whether their order matters.

    Raises:
        ValueError: `ids` is not a list, or an id is neither text nor a whole number.
    """
    return _rules().read_ids(name, ids, ordered)


def _read_lists(name: str, lists: Mapping[str, Sequence[str]], ordered: bool) -> dict[str, list[str]]:
    if not isinstance(lists, Mapping):
        raise ValueError(f"{name} must map a query id to a list of image ids, but is a {type(lists).__name__}.")
    result: dict[str, list[str]] = {}
    for query, ids in lists.items():
        own = str(query) if isinstance(query, Integral) else query
        if own in result:
            raise ValueError(f"{name} holds the query {own!r} twice, as a string and as an integer: give it once.")
        result[own] = read_ids(f"{name}[{query!r}]", ids, ordered)
    return result


def recall_at_k(
    rankings: Mapping[str, Sequence[str]],
    relevant: Mapping[str, Sequence[str]],
    ks: Iterable[int] = DEFAULT_KS,
) -> dict[str, float]:
    """Share of queries with a relevant image among the first k of their ranking (RICE, ICCV 2023, section 4).

    The metric in `metric_path()` computes the figures through `evaluate`.

    Args:
        rankings: query id -> image ids, best first. A ranking may be empty or shorter than k. An id that occurs twice
            takes two positions. An id, also that of a query, is a text or a whole number, and 7 is the same id as "7".
        relevant: query id -> the images that count as a hit. Its queries are the denominator. A query without a
            ranking, or with an empty list, is a miss.
        ks: the cut-offs.

    Returns:
        `{"R@1": ..., "R@3": ...}`, fractions in [0, 1].

    Raises:
        ValueError: `relevant` is empty, a value is a string instead of a list or holds other values than ids, a query
            of `rankings` is not in `relevant`, a query occurs as a text and as a number, or a k is not a whole number
            of at least 1.
    """
    ks = check_ks(ks)
    rankings = _read_lists("rankings", rankings, ordered=True)
    relevant = _read_lists("relevant", relevant, ordered=False)
    if not relevant:
        raise ValueError("relevant is empty: recall needs at least one query.")
    stray = next((query_id for query_id in rankings if query_id not in relevant), None)
    if stray is not None:
        raise ValueError(f"rankings holds the query {stray!r}, but relevant does not: give its relevant images.")
    return compute_recall([rankings.get(query, []) for query in relevant], list(relevant.values()), ks)


def compute_recall(
    rankings: Sequence[Sequence[str]],
    relevant: Sequence[Sequence[str]],
    ks: tuple[int, ...],
    groups: Sequence[str] | None = None,
) -> dict:
    """The metric's result for lists of rankings and relevant images, with one entry per query.

    Args:
        rankings, relevant, ks: as `recall_at_k`.
        groups: per query, the name of its group. The result then also holds `by_livestream`, group ->
            `{"num_clips": n, "R@1": ...}`.
    """
    depth = max(ks)
    # The metric is one object that stores the queries until it has computed the result.
    with _ONE_AT_A_TIME:
        return _metric().compute(
            predictions=[ranking[:depth] for ranking in rankings], references=relevant, ks=ks, live_ids=groups
        )


def expected_hit(num_images: int, num_relevant: int, k: int) -> float:
    """Probability that `k` of `num_images` random images include one of `num_relevant` (hypergeometric)."""
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
    """Percentile bootstrap interval of the mean over queries, `[low, high]`; with several shops it resamples shops.

    A resample draws shops with replacement, as many as there are. From each drawn shop it draws queries with
    replacement, as many as the shop has, and takes the mean over all of them. Clips of one shop are not independent,
    and the figure should hold for a new shop. With one shop this is the plain bootstrap over queries.

    Args:
        values: one number per query, such as 1.0 for a hit and 0.0 for a miss, or a paired difference.
        groups: per query, its shop (the livestream's id); `None` means one shop. Queries without an id (None or "")
            are one shop together.
        num_resamples: number of resamples.
        seed: seed of the generator; the same values, shops and seed give the same interval.
        confidence: probability of the interval, in (0, 1).

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
    _, shops = np.unique(np.zeros(values.size) if groups is None else _shop_names(groups), return_inverse=True)
    rng = np.random.default_rng(seed)
    order = np.lexsort((values, shops))
    # Shops with equal values are drawn as one kind. There are few kinds, even if each query has its own shop.
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
    """Per resample, the sum of `sizes` values drawn with replacement, `(num_resamples,)`.

    The counts of the distinct values are multinomial, so they are drawn directly. For hits and misses this is one
    binomial draw per resample.
    """
    levels, counts = np.unique(values, return_counts=True)
    chunk = max(1, 4_000_000 // levels.size)  # bounds the table of counts to 32 MB
    shares = counts / counts.sum()
    parts = [rng.multinomial(sizes[i : i + chunk], shares) @ levels for i in range(0, len(sizes), chunk)]
    return np.concatenate(parts)


def interval_words(groups: Sequence[str] | None) -> str:
    """The resampling rule of `bootstrap_interval` for these shops, in words; `None` means unknown shops."""
    resamples = f"{NUM_RESAMPLES} resamples, seed 0"
    if groups is None:
        return (
            f"percentile bootstrap over clips as if they were independent, since the files name no shops: run "
            f"eval_rice.py again ({resamples})"
        )
    shops = _num_shops(groups)
    if shops < 2:
        return f"percentile bootstrap over clips, since the data has no separate shops ({resamples})"
    return f"percentile bootstrap over {shops} shops, then over the clips of each ({resamples})"


def _shop_names(groups: Sequence[str]) -> list[str]:
    # As ids: a number is its text. Numbers beside texts or None have no order.
    return ["" if name is None else str(name) for name in groups]


def _num_shops(groups: Sequence[str]) -> int:
    return len(set(_shop_names(groups)))


def hit_interval(values: Sequence[float], groups: Sequence[str] | None = None, lowest: float = 0.0) -> list[float]:
    """95 % interval of R@1, or of a difference of R@1.

    This is `bootstrap_interval`. If all values are equal, as when all queries are hits, resampling has no spread.
    Then `wilson_interval` gives the least share of queries that have this value, and the others may have any value.
    Its trials are the shops if there are several, since clips of one shop are not independent, else the queries.

    Args:
        values: one value from `lowest` to 1 per query: its share of hits over seeds, or a difference of such shares.
        groups: as `bootstrap_interval`.
        lowest: 0 for hits, -1 for differences.
    """
    if not len(values) or np.ptp(values) > 0:
        return bootstrap_interval(values, groups)
    shops = 1 if groups is None else _num_shops(groups)
    other = 1 - wilson_interval(1.0, shops if shops > 1 else len(values))[0]
    value = float(values[0])
    return [value - other * (value - lowest), value + other * (1 - value)]


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` independent trials (Wilson score), for groups too small to resample."""
    centre = share + Z_95**2 / (2 * count)
    spread = Z_95 * sqrt(share * (1 - share) / count + (Z_95 / (2 * count)) ** 2)
    scale = 1 + Z_95**2 / count
    # If no trial or every trial succeeded, the bound is the share itself, and rounding must not exceed it.
    return min(share, max(0.0, (centre - spread) / scale)), max(share, min(1.0, (centre + spread) / scale))
