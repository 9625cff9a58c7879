"""From a clip's candidates to its answer: scores, hits, confidence, and "no product"."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from modeling_rice.scoring_rice import best_first, ranked_scores

from .calibration import Calibration, product_shares
from .search import Candidates, Scope


class Scores(NamedTuple):
    """Scores of candidates, each `(k,)`: one per kind (`None` if not requested), and the scores of the ranking."""

    embedding: np.ndarray
    matching: np.ndarray | None
    alignment: np.ndarray | None
    ranked_by: np.ndarray

    @property
    def pairs(self) -> np.ndarray | None:
        """The pair scores for confidences, beside the embeddings: of the decoder, else of the alignment."""
        return self.alignment if self.matching is None else self.matching

    def take(self, order: Sequence[int]) -> "Scores":
        """The scores of some candidates."""
        return Scores(*(None if kind is None else kind[order] for kind in self))


@dataclass
class Hit:
    """
    A found image.

    Attributes:
        image_id, product_id, title: From the shop's rows; without a product id, `product_id` is the image id.
        live_id: The searched livestream, or the first that sells the image; "" without livestreams.
        image: Path of the picture as text of `data_rice.paths.path_to_text`, "" for a picture given as bytes.
        score: The score of the ranking, of the kind in the model's `config.ranking`.
        embedding_score: `model.similarity`, a cosine.
        matching_score, alignment_score: `model.match` and `model.align`, `None` if not computed.
        confidence: Probability that the hit's product is the clip's, 0 to 1; see `GalleryIndex.calibrate`.
    """

    image_id: str
    product_id: str
    live_id: str
    title: str
    image: str
    score: float
    embedding_score: float
    matching_score: float | None
    confidence: float
    alignment_score: float | None = None


@dataclass
class Answer:
    """
    The answer for one clip.

    Attributes:
        hits: Hits, best first; empty if the searched livestreams have no images.
        no_product: The clip shows none of the shop's products: the confidence is below the calibrated threshold.
        confidence: Confidence of the first hit, 0 to 1.
        timings: Milliseconds "search_ms" (embedding search) and "match_ms" (matching and alignment), as a clip's share
            of its batch.
    """

    hits: list[Hit]
    no_product: bool
    confidence: float
    timings: dict[str, float] = field(default_factory=dict)


def candidate_scores(model: Any, clip: Any, candidates: Candidates, match: bool) -> Scores:
    """`Scores` of the candidates of a clip, `RiceClips` of one row, by the model's ranking or its embeddings alone."""
    features = candidates.features.to(clip.embeds.device)
    ranked_by, known = ranked_scores(model, clip, features, None if match else "embedding")
    kinds = (known["embedding"], known.get("matching"), known.get("alignment"), ranked_by)
    return Scores(*(None if scores is None else scores[0].cpu().numpy() for scores in kinds))


def answer_of(
    candidates: Candidates,
    scores: Scores | None,
    scope: Scope,
    top_k: int,
    calibration: Calibration | None,
    timings: dict[str, float],
) -> Answer:
    """The answer from one clip's candidates and their scores; `scores` is `None` without candidates."""
    # As in evaluation, an image without a score cannot be found.
    order = [] if scores is None else best_first(torch.from_numpy(scores.ranked_by))
    if not order:
        return Answer([], True, 0.0, timings)
    scores = scores.take(order)
    records = [candidates.records[i] for i in order]
    products = [record["product_id"] for record in records]
    if calibration is None:
        confidence = product_shares(scores.ranked_by, 1.0, products)
    else:
        confidence = calibration.confidences(scores.embedding, scores.pairs, scores.ranked_by, products)
    hits = [
        Hit(
            **{name: records[i][name] for name in ("image_id", "product_id", "title", "image")},
            live_id=live_of(records[i], scope),
            score=float(scores.ranked_by[i]),
            embedding_score=float(scores.embedding[i]),
            **{
                f"{kind}_score": None if values is None else float(values[i])
                for kind, values in (("matching", scores.matching), ("alignment", scores.alignment))
            },
            confidence=float(confidence[i]),
        )
        for i in range(min(top_k, len(order)))
    ]
    no_product = calibration is not None and hits[0].confidence < calibration.threshold
    return Answer(hits, no_product, hits[0].confidence, timings)


def live_of(record: dict, scope: Scope) -> str:
    """The searched livestream, else the first that sells the image, else ""."""
    lives = record["live_ids"]
    return next((live for live in lives if scope is not None and live in scope), lives[0] if lives else "")


def relevance(candidates: Candidates, answers: Sequence[str], products: set[str]) -> np.ndarray:
    """Whether each candidate is a relevant image of the clip or shows the same product, `(k,)` bool."""
    return np.array(
        [record["image_id"] in answers or record["product_id"] in products for record in candidates.records]
    )
