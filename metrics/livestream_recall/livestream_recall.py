"""Recall at k of product retrieval from livestream clips, as a module of `evaluate`.

The module imports nothing of the project, so its folder can be copied to the Hub unchanged. The project computes every
recall with it, through `evaluation_rice.recall`.
"""

import datasets
import evaluate

_DESCRIPTION = """
Fraction of clips for which one of the first k retrieved shop images shows the right product (RICE, ICCV 2023).
Every clip counts; a clip with an empty ranking is a miss. Duplicate ids in a ranking keep their positions. A ranking
covers either the gallery of the clip's livestream or all images; `galleries` restricts the latter to the livestream.
"""

_CITATION = """
@inproceedings{yang2023rice,
  title={Cross-view Semantic Alignment for Livestreaming Product Recognition},
  author={Yang, Wenjie and Chen, Yiyi and Li, Yan and Cheng, Yanhua and Liu, Xudong and Chen, Quan and Li, Han},
  booktitle={ICCV},
  year={2023}
}
"""

_INPUTS = """
Args:
    predictions: one ranking per clip, a list of image ids, best first; may be empty.
    references: one list of relevant image ids per clip; with an empty list the clip is a miss.
    ks: cut-offs, integers of at least 1; 1, 3, 5 and 10 by default.
    live_ids: one livestream id per clip; the result then also has the recall of each livestream.
    galleries: livestream id -> its image ids. Rankings are restricted to the gallery of the clip's livestream and keep
        their order. Needs `live_ids`.
    An id is a string or an integer, and 7 is the same id as "7".
Returns:
    "R@k" for each k, a fraction between 0 and 1; with `live_ids` also "by_livestream", a dict from livestream id to
    "R@k" and "num_clips" of its clips.
Raises:
    ValueError: if there is no clip, a list is missing, an id is neither string nor integer, a k is no integer of at
        least 1, or livestreams do not match; the message names the entry.
Examples:
    >>> metric = evaluate.load("metrics/livestream_recall")
    >>> metric.compute(predictions=[["mug", "lamp"], ["lamp", "sock"]], references=[["mug"], ["sock"]], ks=(1, 3))
    {'R@1': 0.5, 'R@3': 1.0}
"""

_IDS = "a list of image ids"
_PER_CLIP = "a list with one list of ids per clip"


class LivestreamRecall(evaluate.Metric):
    """Recall at k as a metric of `evaluate`; see the README of this folder."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("string")),
                    "references": datasets.List(datasets.Value("string")),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2308.04912"],
        )

    def compute(self, *, predictions=None, references=None, ks=(1, 3, 5, 10), live_ids=None, galleries=None):
        """Recall over the given clips, or over clips added before; `inputs_description` has the arguments."""
        # Everything is checked before the clips are stored, because `evaluate` keeps them even if the call fails.
        lives, names = (None, None) if live_ids is None else _read_names("live_ids", live_ids)
        if galleries is not None:
            if lives is None:
                raise ValueError("galleries needs live_ids, the livestream of each clip: give both.")
            galleries = _read_galleries(galleries)
            missing = next((live for live in lives if live not in galleries), None)
            if missing is not None:
                raise ValueError(f"galleries lacks the livestream {missing!r} of live_ids: add it.")
        if predictions is not None:
            predictions = _entries("predictions", predictions, _PER_CLIP)
        count = len(self) + len(predictions or ())
        if not count:
            raise ValueError("predictions is empty: give at least one clip.")
        if lives is not None and len(lives) != count:
            raise ValueError(f"live_ids has {len(lives)} entries for {count} clips: give one per clip.")
        options = {"ks": check_ks(ks), "lives": lives, "names": names, "galleries": galleries}
        return super().compute(predictions=predictions, references=references, **options)

    def add_batch(self, *, predictions=None, references=None):
        """Adds clips: a list of rankings, and a list of relevant image ids for each."""
        rankings = _id_lists("predictions", predictions, ordered=True)
        relevant = _id_lists("references", references)
        if len(rankings) != len(relevant):
            raise ValueError(
                f"predictions has {len(rankings)} clips and references {len(relevant)}: give one entry per clip each."
            )
        if rankings:
            super().add_batch(predictions=rankings, references=relevant)

    def add(self, *, prediction=None, reference=None):
        """Adds one clip: its ranking and its relevant image ids."""
        self.add_batch(predictions=[prediction], references=[reference])

    def _compute(self, predictions, references, ks, lives, names, galleries):
        if galleries is not None:
            cut = ((ranking, galleries[live]) for ranking, live in zip(predictions, lives))
            predictions = [[image for image in ranking if image in own] for ranking, own in cut]
        ranks = [first_rank(ranking, relevant) for ranking, relevant in zip(predictions, references)]
        result = _recall(ranks, ks)
        if lives is not None:
            groups = {}
            for live, rank in zip(lives, ranks):
                groups.setdefault(live, []).append(rank)
            result["by_livestream"] = {
                names[live]: {"num_clips": len(own), **_recall(own, ks)} for live, own in groups.items()
            }
        return result


def check_ks(ks):
    """`ks` as a tuple of integers. Raises `ValueError` unless all are integers of at least 1."""
    if isinstance(ks, (str, bytes)) or not hasattr(ks, "__iter__"):
        raise ValueError(f"ks must be a sequence of integers such as (1, 3, 5, 10), not {ks!r}.")
    ks = tuple(ks)
    if not ks:
        raise ValueError("ks is empty: name at least one k, such as (1, 5).")
    numbers = [_whole_number(k) for k in ks]
    for k, number in zip(ks, numbers):
        if number is None or number < 1:
            raise ValueError(f"ks holds {k!r}: every k must be an integer of at least 1.")
    return tuple(numbers)


def read_ids(where, value, ordered=False):
    """The ids of a list as strings. Raises `ValueError`, naming `where`, unless all are strings or integers.

    A set has no order; it is accepted for relevant images (`ordered` False), but not for a ranking.
    """
    return [entry if type(entry) is str else _read_id(where, entry) for entry in _entries(where, value, _IDS, ordered)]


def first_rank(ranking, relevant):
    """Rank (from 1) of the first id of `ranking` that is in `relevant`; `None` if there is none."""
    relevant = set(relevant)
    return next((rank for rank, image in enumerate(ranking, 1) if image in relevant), None)


def _entries(where, value, what, ordered=True):
    # A string would be read letter by letter and give a plausible but wrong figure.
    wrong = (str, bytes, dict, set, frozenset) if ordered else (str, bytes, dict)
    try:
        return list(None if isinstance(value, wrong) else value)
    except TypeError:
        raise ValueError(f"{where} must be {what}, not {_short(value)}.") from None


def _id_lists(name, lists, ordered=False):
    return [read_ids(f"{name}[{i}]", ids, ordered) for i, ids in enumerate(_entries(name, lists, _PER_CLIP))]


def _read_id(where, entry):
    if isinstance(entry, str):
        return str(entry)
    if isinstance(entry, (list, tuple, dict, set)) or getattr(entry, "ndim", 0):
        raise ValueError(f"{where} holds {_short(entry)}: give image ids alone, without scores.")
    number = _whole_number(entry)
    if number is None:
        raise ValueError(f"{where} holds {_short(entry)}: an id is a string or an integer.")
    return str(number)


def _whole_number(value):
    """The value as an integer, also one of an array; `None` for anything else."""
    # Booleans have `__index__` too, also those of arrays.
    if "bool" in str(getattr(value, "dtype", type(value))):
        return None
    try:
        return value.__index__()
    except (AttributeError, TypeError):
        return None


def _read_names(where, value):
    """The ids as strings, and for each its key in the result: an integer if it was given as one."""
    given = _entries(where, value, "a list with one livestream id per clip")
    ids = [_read_id(where, entry) for entry in given]
    names = {}
    for live, entry in zip(ids, given):
        names.setdefault(live, live if isinstance(entry, str) else int(live))
    return ids, names


def _read_galleries(galleries):
    if not hasattr(galleries, "items"):
        raise ValueError(f"galleries must map a livestream id to its image ids, not be {_short(galleries)}.")
    own = {}
    for given, images in galleries.items():
        live = _read_id("galleries", given)
        if live in own:
            raise ValueError(f"galleries has livestream {live!r} twice, as string and as integer: give it once.")
        own[live] = set(read_ids(f"galleries[{given!r}]", images))
    return own


def _recall(ranks, ks):
    return {f"R@{k}": sum(rank is not None and rank <= k for rank in ranks) / len(ranks) for k in ks}


def _short(value):
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
