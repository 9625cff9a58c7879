"""Recall at k of product retrieval from livestream clips, as a module of `evaluate`.

The folder stands alone: it imports nothing of the project, so that it can be copied to the Hub as it is. A test of the
project compares it with `evaluation_rice.recall.recall_at_k`.
"""

import datasets
import evaluate

_DESCRIPTION = """
Share of clips for which one of the first k retrieved shop images shows the right product.
Every clip counts: one with an empty ranking is a miss. Positions are counted as they stand.
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
    references: one list per clip with the image ids that count as right.
    ks: cut-offs, whole numbers of at least 1; 1, 3, 5 and 10 by default.
Returns:
    "R@k" for each k, a fraction between 0 and 1.
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
        )

    def _compute(self, predictions, references, ks=(1, 3, 5, 10)):
        ks = tuple(ks)
        if not ks:
            raise ValueError("ks is empty: name at least one k, such as (1, 5).")
        for k in ks:
            if isinstance(k, bool) or not isinstance(k, int) or k < 1:
                raise ValueError(f"ks holds {k!r}: every k must be a whole number of at least 1.")
        if not len(references):
            raise ValueError("references is empty: recall needs at least one clip.")
        hits = dict.fromkeys(ks, 0)
        for ranking, relevant in zip(predictions, references):
            for k in hits:
                hits[k] += any(image in relevant for image in ranking[:k])
        return {f"R@{k}": hits[k] / len(references) for k in hits}
