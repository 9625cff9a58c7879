"""Recall at k over rankings, the exact expectation of a random order, and a bootstrap interval over queries."""

from collections.abc import Iterable, Mapping, Sequence
from math import comb, sqrt

import numpy as np

DEFAULT_KS = (1, 3, 5, 10)
Z_95 = 1.959963984540054
_NESTED = (list, tuple, dict, set)


def check_ks(ks: Iterable[int]) -> tuple[int, ...]:
    """`ks` as a tuple; raises `ValueError` when it is empty or holds anything but whole numbers of at least 1."""
    if isinstance(ks, (str, bytes)) or not isinstance(ks, Iterable):
        raise ValueError(f"ks must be a sequence of whole numbers such as (1, 3, 5, 10), not {ks!r}.")
    ks = tuple(ks)
    if not ks:
        raise ValueError("ks is empty: name at least one k, such as (1, 5).")
    for k in ks:
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"ks holds {k!r}: every k must be a whole number of at least 1.")
    return tuple(int(k) for k in ks)


def _check_lists(name: str, lists: Mapping[str, Sequence[str]]) -> None:
    if not isinstance(lists, Mapping):
        raise ValueError(f"{name} must map a query id to a list of image ids, not be a {type(lists).__name__}.")
    for query_id, ids in lists.items():
        # A string would be searched by substring or walked letter by letter, and give a plausible wrong figure.
        if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Iterable):
            raise ValueError(f"{name}[{query_id!r}] must be a list of image ids, not {ids!r}.")
        # A pair of id and score, say, would match no image.
        listed = ids if isinstance(ids, Sequence) else ()
        nested = next((entry for entry in listed if isinstance(entry, _NESTED)), None)
        if nested is not None:
            raise ValueError(f"{name}[{query_id!r}] holds {nested!r}: give image ids alone, without scores.")


def recall_at_k(
    rankings: Mapping[str, Sequence[str]],
    relevant: Mapping[str, Sequence[str]],
    ks: Iterable[int] = DEFAULT_KS,
) -> dict[str, float]:
    """Share of queries with a relevant image among the first k of their ranking (RICE, ICCV 2023, section 4).

    Args:
        rankings: query id -> image ids, best first. A ranking may be empty or shorter than k; positions are counted
            as they stand, so an id that occurs twice takes two places.
        relevant: query id -> the images that count as a hit. These are the queries of the denominator: one without a
            ranking is a miss, and so is one with an empty list.
        ks: the cut-offs.

    Returns:
        `{"R@1": ..., "R@3": ...}`, fractions in [0, 1].

    Raises:
        ValueError: `relevant` is empty, a value is a string in place of a list or holds lists, a ranking belongs to no
            query of `relevant`, or a k is not a whole number of at least 1.
    """
    ks = check_ks(ks)
    _check_lists("rankings", rankings)
    _check_lists("relevant", relevant)
    if not relevant:
        raise ValueError("relevant is empty: recall needs at least one query.")
    stray = next((query_id for query_id in rankings if query_id not in relevant), None)
    if stray is not None:
        raise ValueError(f"rankings holds query {stray!r}, which relevant does not: give its relevant images.")
    hits = dict.fromkeys(ks, 0)
    for query_id, wanted in relevant.items():
        wanted = set(wanted)
        first_hit = next((i for i, image in enumerate(rankings.get(query_id, ()), 1) if image in wanted), None)
        for k in hits:
            hits[k] += first_hit is not None and first_hit <= k
    return {f"R@{k}": hits[k] / len(relevant) for k in ks}


def expected_hit(num_images: int, num_relevant: int, k: int) -> float:
    """Probability that the first `k` of `num_images` in random order hold one of `num_relevant` (hypergeometric)."""
    if num_relevant <= 0 or k <= 0:
        return 0.0
    k = min(k, num_images)
    return 1.0 - comb(num_images - num_relevant, k) / comb(num_images, k)


def bootstrap_interval(
    values: Sequence[float], num_resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> list[float]:
    """Percentile bootstrap interval of the mean over queries, `[low, high]`.

    Resampling n queries with replacement draws a multinomial count for each distinct value, so the counts are drawn
    directly; for hits and misses that is one binomial per resample. The values may also be paired differences.

    Args:
        values: one number per query, such as 1.0 for a hit and 0.0 for a miss.
        num_resamples: resamples drawn.
        seed: seed of the generator; the same values and seed give the same interval.
        confidence: mass inside the interval, in (0, 1).

    Raises:
        ValueError: there are no values, or `confidence` is not in (0, 1).
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("values is empty: an interval needs at least one query.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}: it must lie between 0 and 1.")
    levels, counts = np.unique(values, return_counts=True)
    rng = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // levels.size)  # bounds the table of counts to 32 MB
    means = [
        rng.multinomial(values.size, counts / values.size, size=min(chunk, num_resamples - start)) @ levels
        for start in range(0, num_resamples, chunk)
    ]
    tail = (1 - confidence) / 2
    return np.quantile(np.concatenate(means) / values.size, [tail, 1 - tail]).tolist()


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` independent trials (Wilson score), for groups too small to resample."""
    centre = share + Z_95**2 / (2 * count)
    spread = Z_95 * sqrt(share * (1 - share) / count + (Z_95 / (2 * count)) ** 2)
    scale = 1 + Z_95**2 / count
    # Where no trial or every one succeeded, the bound is the share itself, and rounding must not pass it.
    return min(share, max(0.0, (centre - spread) / scale)), max(share, min(1.0, (centre + spread) / scale))
