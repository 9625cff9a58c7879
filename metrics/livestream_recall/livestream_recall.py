"""Recall at k of product retrieval from livestream clips, as a module of `evaluate`.

The folder stands alone: it imports nothing of the project, so that it can be copied to the Hub as it is. A test of the
project compares it with `evaluation_rice.recall.recall_at_k`.
"""

import datasets
import evaluate

_DESCRIPTION = """
Share of clips for which one of the first k retrieved shop images shows the right product (RICE, ICCV 2023).
Every clip counts: one with an empty ranking is a miss. Positions are counted as they stand. A ranking may be over the
clip's own livestream already, or over all images; `galleries` then cuts it to the livestream's own.
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
    references: one list per clip with the image ids that count as right; an empty one makes the clip a miss.
    ks: cut-offs, whole numbers of at least 1; 1, 3, 5 and 10 by default.
    live_ids: one livestream id per clip; the result then holds each livestream's own recall too.
    galleries: livestream id -> its image ids; rankings are cut to the gallery of the livestream, in their order.
        Needs `live_ids`.
Returns:
    "R@k" for each k, a fraction between 0 and 1; with `live_ids` also "by_livestream", a dict of livestream id -> the
    same of its clips, with "num_clips".
Examples:
    >>> metric = evaluate.load("metrics/livestream_recall")
    >>> metric.compute(predictions=[["mug", "lamp"], ["lamp", "sock"]], references=[["mug"], ["sock"]], ks=(1, 3))
    {'R@1': 0.5, 'R@3': 1.0}
"""


class LivestreamRecall(evaluate.Metric):
    """Recall at k; see the folder's README."""

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

    def _compute(self, predictions, references, ks=(1, 3, 5, 10), live_ids=None, galleries=None):
        ks = _check_ks(ks)
        if not len(references):
            raise ValueError("references is empty: recall needs at least one clip.")
        if live_ids is not None and len(live_ids) != len(references):
            raise ValueError(f"live_ids has {len(live_ids)} entries for {len(references)} clips: give one per clip.")
        if galleries is not None:
            predictions = _cut(predictions, live_ids, galleries)
        hits = [_hits(ranking, relevant, ks) for ranking, relevant in zip(predictions, references)]
        result = _mean(hits, ks)
        if live_ids is not None:
            groups = {}
            for live_id, clip in zip(live_ids, hits):
                groups.setdefault(live_id, []).append(clip)
            result["by_livestream"] = {
                live_id: {"num_clips": len(clips), **_mean(clips, ks)} for live_id, clips in groups.items()
            }
        return result


def _check_ks(ks):
    ks = tuple(ks)
    if not ks:
        raise ValueError("ks is empty: name at least one k, such as (1, 5).")
    for k in ks:
        if isinstance(k, bool) or not hasattr(k, "__index__") or k < 1:
            raise ValueError(f"ks holds {k!r}: every k must be a whole number of at least 1.")
    return tuple(int(k) for k in ks)


def _cut(predictions, live_ids, galleries):
    if live_ids is None:
        raise ValueError("galleries needs live_ids, which say whose gallery a clip is searched in.")
    own = {live_id: set(images) for live_id, images in galleries.items()}
    for live_id in live_ids:
        if live_id not in own:
            raise ValueError(f"galleries has no livestream {live_id!r}, which live_ids names.")
    return [[image for image in ranking if image in own[live]] for ranking, live in zip(predictions, live_ids)]


def _hits(ranking, relevant, ks):
    relevant = set(relevant)
    first = next((i for i, image in enumerate(ranking, 1) if image in relevant), None)
    return [first is not None and first <= k for k in ks]


def _mean(hits, ks):
    return {f"R@{k}": sum(clip[i] for clip in hits) / len(hits) for i, k in enumerate(ks)}
