"""The queries, their galleries and the scoring of rankings: one protocol for the model and all baselines.

A query searches its livestream's shop or the whole gallery. It is a hit if any relevant image is among the first k.
Ties keep the gallery order and are counted. Every query stays in the denominator. See docs/protocol.md.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .recall import DEFAULT_KS, check_ks, compute_recall, expected_hit, first_rank, hit_interval, read_ids

SCOPES = ("live", "all")
BREAKDOWN_COLUMNS = ("category", "product_scale", "visible_duration", "product_number", "source")
MAX_GROUPS = 12
"""A numeric attribute with more distinct values than this is grouped by its quartiles."""


@dataclass(frozen=True)
class RetrievalTask:
    """Queries, the unique images they search, and the scope of each query; built by `from_datasets`.

    Attributes:
        query_ids: clip ids in file order.
        relevant: query id -> image ids that count as a hit.
        query_scopes: per query, the name of its gallery (its livestream, or "" for the whole gallery).
        image_ids: unique image ids in file order.
        image_rows: per unique image, the gallery rows that hold it, in file order.
        scopes: gallery name -> positions in `image_ids`, in gallery order (which breaks ties).
        shops: per query, its livestream's id or "", independent of its gallery; intervals resample these shops.
        num_duplicate_rows: number of gallery rows that repeat an image within one gallery; duplicates are ignored.
    """

    query_ids: list[str]
    relevant: dict[str, list[str]]
    query_scopes: list[str]
    image_ids: list[str]
    image_rows: list[list[int]]
    scopes: dict[str, list[int]]
    shops: list[str]
    num_duplicate_rows: int = 0

    @classmethod
    def from_datasets(cls, queries, gallery, scope: str) -> "RetrievalTask":
        """Reads the id columns of a query view and a gallery view, without opening images.

        Args:
            queries: dataset with `clip_id`, `live_id` and `relevant`.
            gallery: dataset with `image_id` and `live_id`.
            scope: "live" (a query searches its livestream's images) or "all" (it searches every image).

        Raises:
            ValueError: there are no queries, a gallery is empty, a clip id occurs twice, or the scope is unknown.
        """
        if scope not in SCOPES:
            raise ValueError(f"scope is {scope!r}: choose one of {', '.join(SCOPES)}.")
        if len(queries) == 0:
            raise ValueError("the query view has no rows: evaluation needs at least one query.")
        if len(gallery) == 0:
            raise ValueError("the gallery is empty: it needs at least one image to retrieve.")
        query_ids, by_live = read_ids("clip_id", queries["clip_id"]), scope == "live"
        relevant = {
            query: read_ids(f"relevant of {query!r}", ids) for query, ids in zip(query_ids, queries["relevant"])
        }
        if len(relevant) != len(query_ids):
            twice = next(query for query, count in Counter(query_ids).items() if count > 1)
            raise ValueError(f"clip id {twice!r} occurs twice in the query view: clip ids must be unique.")
        shops = _live_ids(queries) if by_live or "live_id" in queries.column_names else [""] * len(query_ids)
        query_scopes = shops if by_live else [""] * len(query_ids)
        rows_of: dict[str, list[int]] = {}
        members: dict[str, dict[str, None]] = {}
        image_ids = read_ids("image_id", gallery["image_id"])
        for row, (image_id, live_id) in enumerate(zip(image_ids, _live_ids(gallery))):
            rows_of.setdefault(image_id, []).append(row)
            members.setdefault(live_id if by_live else "", {})[image_id] = None
        positions = {image_id: position for position, image_id in enumerate(rows_of)}
        scopes = {name: [positions[image] for image in images] for name, images in members.items()}
        if not any(name in scopes for name in query_scopes):
            raise ValueError(
                f"the gallery is empty for every query: no gallery image has the live_id of a query, such as "
                f"{query_scopes[0]!r}."
            )
        num_duplicate_rows = len(gallery) - sum(map(len, scopes.values()))
        images = list(rows_of), list(rows_of.values())
        return cls(query_ids, relevant, query_scopes, *images, scopes, shops, num_duplicate_rows)

    @cached_property
    def _places(self) -> dict[str, dict[str, int]]:
        return {name: {self.image_ids[i]: place for place, i in enumerate(m)} for name, m in self.scopes.items()}

    def gallery_of(self, query: int) -> list[int]:
        """Positions in `image_ids` of the gallery of query number `query`; empty if it has no gallery."""
        return self.scopes.get(self.query_scopes[query], [])

    def relevant_positions(self, query: int) -> list[int]:
        """Positions of the query's relevant images within its gallery."""
        places = self._places.get(self.query_scopes[query], {})
        return sorted({places[image] for image in self.relevant[self.query_ids[query]] if image in places})

    def gallery_size(self) -> dict[str, float]:
        """Minimum, median and maximum size of the galleries that at least one query searches."""
        sizes = [len(self.scopes.get(name, [])) for name in dict.fromkeys(self.query_scopes)]
        return {"min": int(min(sizes)), "median": float(np.median(sizes)), "max": int(max(sizes))}

    def num_unreachable(self) -> int:
        """Number of queries without a relevant image in their gallery; they are misses for any method."""
        return sum(not self.relevant_positions(i) for i in range(len(self.query_ids)))

    def fingerprint(self) -> str:
        """SHA-256 of queries and galleries; equal for results over the same queries in the same galleries."""
        galleries = {name: [self.image_ids[i] for i in self.scopes.get(name, [])] for name in set(self.query_scopes)}
        rows = sorted(zip(self.query_ids, self.query_scopes, map(sorted, self.relevant.values())))
        return hashlib.sha256(json.dumps([rows, galleries], sort_keys=True).encode()).hexdigest()

    def without_gallery(self) -> list[dict[str, str]]:
        """Failure entries of the queries whose livestream has no gallery image."""
        return [
            {"kind": "query", "id": query, "file": "", "reason": f"no gallery image has its live_id {name!r}"}
            for query, name in zip(self.query_ids, self.query_scopes)
            if name not in self.scopes
        ]


def _live_ids(rows) -> list[str]:
    return read_ids("live_id", ["" if name is None else name for name in rows["live_id"]])


@dataclass
class Rankings:
    """The rankings of one kind of score, filled query by query; scores are dropped after ranking.

    Args:
        task: the queries and their galleries.
        ks: cut-offs of the recall.
        depth: entries kept per ranking; raised to the largest k.
    """

    task: RetrievalTask
    ks: tuple[int, ...] = DEFAULT_KS
    depth: int = 100
    rankings: dict[str, list[str]] = field(default_factory=dict)
    top_scores: dict[str, list[float]] = field(default_factory=dict)
    tied: set[str] = field(default_factory=set)
    tie_hits: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        self.ks = check_ks(self.ks)
        self.depth = max(self.depth, *self.ks)

    def add(self, query: int, scores: np.ndarray) -> None:
        """Ranks the gallery of query number `query`.

        Args:
            query: position of the query in the task.
            scores: float array `(gallery size,)`, higher is better. An image whose score is not finite is left out of
                the ranking. It cannot be a hit, and it takes no rank from other images.
        """
        gallery, query_id = self.task.gallery_of(query), self.task.query_ids[query]
        scores = np.asarray(scores)
        if scores.shape != (len(gallery),):
            raise ValueError(f"query {query_id!r} searches {len(gallery)} images but has scores {scores.shape}.")
        order = np.argsort(-np.where(np.isfinite(scores), scores, -np.inf), kind="stable")
        order = order[np.isfinite(scores[order])]
        kept = order[: self.depth]
        self.rankings[query_id] = [self.task.image_ids[gallery[i]] for i in kept]
        self.top_scores[query_id] = [float(scores[i]) for i in kept[:5]]
        self._count_ties(query, query_id, scores)

    def _count_ties(self, query: int, query_id: str, scores: np.ndarray) -> None:
        relevant = [i for i in self.task.relevant_positions(query) if np.isfinite(scores[i])]
        if not relevant:
            return
        best = scores[relevant].max()
        equal = int((scores == best).sum())
        if equal > 1:
            self.tied.add(query_id)
        above = int((scores[np.isfinite(scores)] > best).sum())
        self.tie_hits[query_id] = expected_hit(equal, int((scores[relevant] == best).sum()), 1 - above)

    def complete(self) -> "Rankings":
        """Gives every missing query an empty ranking, and puts all queries in file order."""
        self.rankings = {query: self.rankings.get(query, []) for query in self.task.query_ids}
        return self

    def hits_at_1(self) -> np.ndarray:
        """1.0 for each query whose first image is relevant and 0.0 for the others, in file order."""
        tops = ((self.rankings.get(query, [])[:1], self.task.relevant[query]) for query in self.task.query_ids)
        return np.array([float(first_rank(top, wanted) == 1) for top, wanted in tops])

    def first_relevant_ranks(self) -> dict[str, int | None]:
        """Query id -> rank (from 1) of its first relevant image, `None` if the kept part of the ranking has none."""
        relevant = self.task.relevant
        return {query: first_rank(self.rankings.get(query, []), relevant[query]) for query in self.task.query_ids}

    def recall(self) -> dict[str, float]:
        """R@k over all queries."""
        return self._recall()

    def summary(self) -> dict[str, float | list[float]]:
        """R@k over all queries, and `R@1_ci95`, the interval of R@1 by `evaluation_rice.recall.hit_interval`."""
        return {**self.recall(), "R@1_ci95": hit_interval(self.hits_at_1(), self.task.shops)}

    def summary_by(self, groups: Sequence[str]) -> dict[str, dict[str, float | list[float]]]:
        """`summary` of the queries of each group, by name.

        Args:
            groups: per query the name of its group, in file order.
        """
        hits, names, shops = self.hits_at_1(), np.array(groups), np.array(self.task.shops)
        result = {}
        for group, figures in sorted(self._recall(groups)["by_livestream"].items()):
            figures.pop("num_clips")
            result[group] = {**figures, "R@1_ci95": hit_interval(hits[names == group], shops[names == group])}
        return result

    def _recall(self, groups: Sequence[str] | None = None) -> dict:
        rankings = [self.rankings.get(query, []) for query in self.task.query_ids]
        return compute_recall(rankings, [self.task.relevant[query] for query in self.task.query_ids], self.ks, groups)

    def tie_summary(self) -> dict[str, float]:
        """Share of tied queries, and the expected R@1 if ties were broken at random instead of by gallery order.

        A query is tied if its best relevant image has the same score as another image.
        """
        total = len(self.task.query_ids)
        return {"share": len(self.tied) / total, "R@1_ties_at_random": sum(self.tie_hits.values()) / total}


def chance_recall(task: RetrievalTask, ks: Iterable[int] = DEFAULT_KS) -> dict[str, float]:
    """Expected R@k of a random order of each query's own gallery, exact (hypergeometric)."""
    ks = check_ks(ks)
    shapes = [(len(task.gallery_of(i)), len(task.relevant_positions(i))) for i in range(len(task.query_ids))]
    return {f"R@{k}": float(np.mean([expected_hit(size, wanted, k) for size, wanted in shapes])) for k in ks}


def group_values(values: Sequence[str]) -> list[str]:
    """Group name of each row: its value, "unknown" if empty, or a quartile if the column has many numbers."""
    known = [value for value in values if value not in (None, "")]
    if len(set(known)) > MAX_GROUPS:
        try:
            numbers = np.array([float(value) for value in known])
        except ValueError:
            numbers = np.array([np.nan])
        if np.isfinite(numbers).all():
            edges = np.unique(np.quantile(numbers, [0, 0.25, 0.5, 0.75, 1]))
            names = [f"{low:g} to {high:g}" for low, high in zip(edges, edges[1:])]
            return [
                "unknown" if value in (None, "") else names[np.searchsorted(edges[1:-1], float(value), side="left")]
                for value in values
            ]
    return ["unknown" if value in (None, "") else str(value) for value in values]


HEAD_TAIL_RULE = (
    "head: the most frequent categories of the training rows that together hold at least half of them; "
    "tail: the other categories; not in training: categories without a training row"
)


def head_categories(train_rows: Mapping[str, int]) -> set[str]:
    """The smallest set of most frequent categories that together hold at least half of the training rows.

    Args:
        train_rows: category -> number of its training rows; equally frequent categories are ordered by name.
    """
    head, held = set(), 0
    for category, count in sorted(train_rows.items(), key=lambda item: (-item[1], item[0])):
        if 2 * held >= sum(train_rows.values()):
            break
        head.add(category)
        held += count
    return head


def _head_or_tail(values: Sequence[str], train_rows: Mapping[str, int]) -> list[str]:
    head = head_categories(train_rows)

    def group(value: str) -> str:
        if not value:
            return "unknown"
        return "head" if value in head else "tail" if train_rows.get(value) else "not in training"

    return [group(value) for value in values]


def query_groups(queries, train_rows: Mapping[str, int] | None = None) -> dict[str, list[str]]:
    """Column -> the group of each query, in the order of the rows; arguments and columns as `breakdown`."""
    groups_of = {}
    for column in BREAKDOWN_COLUMNS:
        values = list(queries[column]) if column in queries.column_names else []
        if not any(values):
            continue
        groups_of[column] = [value or "unknown" for value in values] if column == "category" else group_values(values)
        if column == "category" and train_rows:
            groups_of["head_tail"] = _head_or_tail(values, train_rows)
    return groups_of


def breakdown(
    queries, rankings: dict[str, Rankings], train_rows: Mapping[str, int] | None = None
) -> dict[str, dict[str, dict]]:
    """Recall by category, product scale, visible duration, product number and source, if the rows have them.

    Args:
        queries: the query view.
        rankings: score name -> its rankings.
        train_rows: category -> number of its training rows, for the column `head_tail` by `HEAD_TAIL_RULE`.

    Returns:
        `{column: {group: {"num_queries": n, score name: {"R@1": ..., "R@1_ci95": [low, high]}}}}`; a column without
        any value is left out.
    """
    result = {}
    for column, groups in query_groups(queries, train_rows).items():
        counts = Counter(groups)
        summaries = {kind: ranked.summary_by(groups) for kind, ranked in rankings.items()}
        result[column] = {
            group: {"num_queries": counts[group], **{kind: summary[group] for kind, summary in summaries.items()}}
            for group in sorted(counts)
        }
    return result
