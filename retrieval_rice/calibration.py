"""From scores to probabilities: how likely a hit is right, and when to answer "no product".

Two parts are fitted on validation clips. Platt scaling of what the best candidate looks like gives the probability
that the product is among the candidates at all; a softmax with a fitted temperature shares it out among them. Each
clip is searched twice, in its shop and in the same shop without its product, so that the probabilities hold for a mix
in which half of the clips show something else.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

FOLDS = 5
_FEWEST = 10
_PENALTY = 0.01


@dataclass
class ScoredClip:
    """Scores of one clip's candidates, all `(k,)`, the one it is ranked by last; `relevant` are the right ones.

    `products` are the candidates' product ids. `group` keeps clips together that are alike, such as those of one
    product, when the fit is checked on clips it has not seen.
    """

    embedding: np.ndarray
    matching: np.ndarray | None
    ranked_by: np.ndarray
    relevant: np.ndarray
    products: Sequence[str]
    group: str = ""


@dataclass
class Calibration:
    """
    Fitted by `fit_calibration`.

    Attributes:
        temperature: Of the softmax over the candidates' scores.
        bias, weights: Of the logistic function over `presence_features`.
        threshold: Below this confidence of the best hit the answer is "no product".
        false_accept_rate: Share of clips without their product that was to be answered at most, 0 to 1.
        rerank: Candidates per clip that were scored; search with the same number.
        report: What `fit_calibration` measured on clips that each fit had not seen.
    """

    temperature: float
    bias: float
    weights: list[float]
    threshold: float = 0.0
    false_accept_rate: float = 0.05
    rerank: int | None = None
    report: dict = field(default_factory=dict)

    def presence(self, embedding: np.ndarray, matching: np.ndarray | None) -> float:
        """Probability that the clip's product is among the candidates, 0 to 1."""
        features = presence_features(embedding, matching)
        if len(features) != len(self.weights):
            raise ValueError("the index was calibrated with other scores (matching on or off); calibrate it again.")
        return _sigmoid(self.bias + float(np.dot(self.weights, features)))

    def confidences(
        self, embedding: np.ndarray, matching: np.ndarray | None, ranked_by: np.ndarray, products: Sequence[str]
    ) -> np.ndarray:
        """Probability of each candidate that its product is the clip's, `(k,)` in 0..1; one product counts once."""
        shares = product_shares(ranked_by, self.temperature, products)
        return self.presence(embedding, matching) * shares

    def to_dict(self) -> dict:
        """As JSON; `Calibration(**values)` reads it back."""
        return asdict(self)


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def product_shares(scores: np.ndarray, temperature: float, products: Sequence[str]) -> np.ndarray:
    """Softmax of `scores / temperature`, summed over the images of each product and given to each of them, `(k,)`."""
    weights = np.exp((scores - scores.max()) / temperature)
    totals: dict[str, float] = {}
    for product, weight in zip(products, weights):
        totals[product] = totals.get(product, 0.0) + float(weight)
    return np.array([totals[product] for product in products]) / weights.sum()


def presence_features(embedding: np.ndarray, matching: np.ndarray | None) -> np.ndarray:
    """The best score of each kind. How far it stands out among the candidates' told nothing more (docs/LOG.md)."""
    kinds = [embedding] if matching is None else [embedding, matching]
    return np.array([scores.max() for scores in kinds], dtype=np.float64)


def fit_calibration(clips: Sequence[ScoredClip], false_accept_rate: float = 0.05, rerank: int | None = None):
    """
    Args:
        clips: Validation clips in shops with and without their product (`relevant` all False).
        false_accept_rate: Share of the latter, 0 to 1, that may be answered with a product.
        rerank: Noted in the result.

    Returns:
        `Calibration`, whose threshold and report come from fits that had not seen the clips in question.

    Raises:
        ValueError: too few clips of either kind, or a rate outside 0..1.
    """
    if not 0 <= false_accept_rate < 1:
        raise ValueError(f"false_accept_rate must be at least 0 and below 1, got {false_accept_rate}.")
    clips = [clip for clip in clips if len(clip.embedding)]
    present = np.array([bool(clip.relevant.any()) for clip in clips])
    if present.sum() < _FEWEST or (~present).sum() < _FEWEST:
        raise ValueError(
            f"calibration needs at least {_FEWEST} clips whose product is found and {_FEWEST} searches without it, "
            f"got {int(present.sum())} and {int((~present).sum())}; use a larger validation split."
        )
    confidence = np.zeros(len(clips))
    # Groups in the order of their first clip, so that the folds are the same in every run.
    numbers = {group: i for i, group in enumerate(dict.fromkeys(clip.group for clip in clips))}
    folds = np.array([numbers[clip.group] % FOLDS for clip in clips])
    for fold in np.unique(folds):
        seen = [clip for clip, own in zip(clips, folds) if own != fold]
        fitted = _fit(seen) if _is_mixed(seen) else _fit(clips)
        for i in np.flatnonzero(folds == fold):
            confidence[i] = _best_confidence(fitted, clips[i])
    correct = np.array([bool(clip.relevant[clip.ranked_by.argmax()]) for clip in clips])
    result = _fit(clips)
    result.false_accept_rate, result.rerank = false_accept_rate, rerank
    result.threshold = threshold_at(confidence[~present], false_accept_rate)
    accepted = confidence >= result.threshold
    result.report = {
        "num_present": int(present.sum()),
        "num_absent": int((~present).sum()),
        "false_accepts": float(accepted[~present].mean()),
        "answered": float(accepted[present].mean()),
        "right_when_answered": float(correct[accepted & present].mean()) if (accepted & present).any() else None,
        "expected_calibration_error": calibration_error(confidence, correct),
    }
    return result


def _is_mixed(clips: Sequence[ScoredClip]) -> bool:
    return len({bool(clip.relevant.any()) for clip in clips}) == 2


def _best_confidence(calibration: Calibration, clip: ScoredClip) -> float:
    values = calibration.confidences(clip.embedding, clip.matching, clip.ranked_by, clip.products)
    return float(values[clip.ranked_by.argmax()])


def threshold_at(absent: np.ndarray, rate: float) -> float:
    """The lowest confidence to accept, so that at most a share `rate` of the `absent` clips' are accepted."""
    falling = np.sort(absent)[::-1]
    allowed = int(math.floor(rate * len(falling)))
    return float(np.nextafter(falling[allowed], np.inf))


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over equally full bins, 0 to 1."""
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return float(sum(len(p) * abs(confidence[p].mean() - correct[p].mean()) for p in parts) / len(order))


def _fit(clips: Sequence[ScoredClip]) -> Calibration:
    present = torch.tensor([float(clip.relevant.any()) for clip in clips], dtype=torch.float64)
    features = torch.from_numpy(np.stack([presence_features(clip.embedding, clip.matching) for clip in clips]))
    mean, scale = features.mean(dim=0), features.std(dim=0).clamp(min=1e-9)
    standard = (features - mean) / scale
    parameters = torch.zeros(features.shape[1] + 1, dtype=torch.float64, requires_grad=True)

    def presence_loss() -> torch.Tensor:
        logits = parameters[0] + standard @ parameters[1:]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, present)
        # The classes may be separable, and the weights would grow for ever.
        return loss + _PENALTY * parameters[1:].square().sum()

    _minimise(presence_loss, parameters)
    weights = parameters.detach()[1:] / scale
    bias = parameters.detach()[0] - (weights * mean).sum()
    temperature = _fit_temperature([clip for clip in clips if clip.relevant.any()])
    return Calibration(temperature, float(bias), weights.tolist())


def _fit_temperature(clips: Sequence[ScoredClip]) -> float:
    width = max(len(clip.ranked_by) for clip in clips)
    scores = torch.full((len(clips), width), -torch.inf, dtype=torch.float64)
    relevant = torch.zeros(len(clips), width, dtype=torch.bool)
    for row, clip in enumerate(clips):
        scores[row, : len(clip.ranked_by)] = torch.as_tensor(clip.ranked_by)
        relevant[row, : len(clip.relevant)] = torch.as_tensor(clip.relevant)
    log_temperature = torch.zeros(1, dtype=torch.float64, requires_grad=True)

    def loss() -> torch.Tensor:
        cooled = scores / _temperature(log_temperature)
        right = cooled.masked_fill(~relevant, -torch.inf).logsumexp(dim=1)
        return (cooled.logsumexp(dim=1) - right).mean() + _PENALTY * log_temperature.square().sum()

    _minimise(loss, log_temperature)
    return float(_temperature(log_temperature.detach()))


def _temperature(log_temperature: torch.Tensor) -> torch.Tensor:
    # Bounded, since clips that are all ranked right would drive it to zero.
    return log_temperature.clamp(-4, 6).exp()


def _minimise(loss, parameters: torch.Tensor) -> None:
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    # Losses are wanted with gradients even where the model is used without.
    with torch.enable_grad():
        optimizer.step(closure)
