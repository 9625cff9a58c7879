"""From scores to probabilities: how likely a hit is right, and when to answer "no product".

Two parts are fitted on validation clips. Platt scaling of the best candidate's scores gives the probability that the
product is among the candidates. A softmax with a fitted temperature distributes it over them. Each clip is searched
twice, in its shop and in the same shop without its product. This mix does not show how often clips in use show
something else. The user states it as the prior probability that the product is in the shop, and the bias is corrected
by the difference of the log odds (prior correction of a logistic regression; G. King and L. Zeng, "Logistic Regression
in Rare Events Data", 2001).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

PRESENCE_PRIOR = 0.9
"""Default share of a shop's clips that show one of its products."""

EVEN_ODDS = 0.5
"""Confidence above which an answer is more likely right than wrong. This threshold is optimal if a right answer gains
as much as a wrong one costs, and "no product" does neither."""

FOLDS = 5
# Bounds of a stored temperature.
_COLDEST, _HOTTEST = 1e-6, 1e6
_ABOVE_ONE = math.nextafter(1, 2)
_FEWEST = 10
_PENALTY = 0.01


@dataclass
class ScoredClip:
    """Scores of one clip's candidates, all `(k,)`, with the score of the ranking last; `relevant` marks the right
    ones.

    `products` are the candidates' product ids. `group` names clips that belong together, such as those of one product,
    for cross-validation. `missed` means that the product is in the shop, but not among the candidates.
    """

    embedding: np.ndarray
    matching: np.ndarray | None
    ranked_by: np.ndarray
    relevant: np.ndarray
    products: Sequence[str]
    group: str = ""
    missed: bool = False

    @property
    def in_shop(self) -> bool:
        """Whether the searched shop has the clip's product."""
        return self.missed or bool(self.relevant.any())


@dataclass
class Calibration:
    """
    Result of `fit_calibration`.

    Attributes:
        temperature: Temperature of the softmax over the candidates' scores.
        bias, weights: Parameters of the logistic function over `presence_features`.
        threshold: Below this confidence of the best hit the answer is "no product".
        false_accept_rate: Requested maximum share of answered clips among those without their product, 0 to 1; `None`
            for the threshold at even odds.
        rerank: Number of scored candidates per clip; search with the same number.
        report: Figures of `fit_calibration` on clips that each fit had not seen.
        presence_prior: Assumed share of clips whose product is in the shop.
        said: Calibration for clips with speech, whose scores are higher; `None` if validation clips have no
            transcripts.
        ranking: Kind of score of the ranking, such as "fused"; `None` if not recorded.

    Raises:
        ValueError: a number is not finite or out of its range.
    """

    temperature: float
    bias: float
    weights: list[float]
    threshold: float = 0.0
    false_accept_rate: float | None = None
    rerank: int | None = None
    report: dict = field(default_factory=dict)
    presence_prior: float = PRESENCE_PRIOR
    said: "Calibration | None" = None
    ranking: str | None = None

    def __post_init__(self):
        check_decision(self.presence_prior, self.false_accept_rate)
        check_number("temperature", self.temperature, low=_COLDEST, high=_HOTTEST)
        check_number("bias", self.bias)
        if not isinstance(self.weights, (list, tuple)) or len(self.weights) not in (1, 2):
            raise ValueError(f"weights of a calibration must be one or two numbers, got {self.weights!r}.")
        for weight in self.weights:
            check_number("a weight", weight)
        # The lowest threshold for a rate may be the next number above 1.
        check_number("threshold", self.threshold, low=0, high=_ABOVE_ONE)
        check_depth("rerank", self.rerank)
        if self.ranking is not None and not isinstance(self.ranking, str):
            raise ValueError(f"ranking of a calibration must be the name of a score, got {self.ranking!r}.")

    @classmethod
    def from_dict(cls, values: dict) -> "Calibration":
        """
        Restores a calibration from `to_dict`.

        Raises:
            ValueError: a field is missing, unknown or invalid.
        """
        names = {one.name for one in fields(cls)}
        if isinstance(values, dict):
            # Calibrations of earlier versions lack these fields.
            values = {"said": None, "ranking": None, **values}
        if not isinstance(values, dict) or values.keys() != names or not isinstance(values["report"], dict):
            raise ValueError(f"a calibration must have the fields {', '.join(sorted(names))}, but this one has others")
        if values["said"] is not None:
            values["said"] = cls.from_dict(values["said"])
        return cls(**values)

    def of_clip(self, has_words: bool) -> "Calibration":
        """The calibration for a clip with or without speech."""
        return self.said if has_words and self.said is not None else self

    def check_ranking(self, kind: str) -> None:
        """Raises `ValueError` unless `kind` is the kind of score of the fit."""
        if self.ranking not in (None, kind):
            raise ValueError(
                f"the index was calibrated for clips ranked by {self.ranking} scores, but these are ranked "
                f"by {kind} scores; calibrate it again, or rank by {self.ranking} scores."
            )

    def presence(self, embedding: np.ndarray, matching: np.ndarray | None) -> float:
        """Probability that the clip's product is among the candidates, 0 to 1."""
        features = presence_features(embedding, matching)
        if len(features) != len(self.weights):
            raise ValueError("the index was calibrated with other scores (matching on or off); calibrate it again.")
        return _sigmoid(self.bias + float(np.dot(self.weights, features)))

    def confidences(
        self, embedding: np.ndarray, matching: np.ndarray | None, ranked_by: np.ndarray, products: Sequence[str]
    ) -> np.ndarray:
        """Probability of each candidate that its product is the clip's, `(k,)` in 0..1; one per product."""
        shares = product_shares(ranked_by, self.temperature, products)
        return self.presence(embedding, matching) * shares

    def to_dict(self) -> dict:
        """Plain values for JSON; `from_dict` restores them."""
        return asdict(self)


def check_number(name: str, value, low: float = -math.inf, high: float = math.inf, above: float | None = None) -> None:
    """Raises `ValueError` unless a value is a finite number from `low` to `high`, and above `above`."""
    if (
        not _is_real(value)
        or not math.isfinite(value)
        or not low <= value <= high
        or (above is not None and value <= above)
    ):
        bounds = [f"above {above:g}"] if above is not None else []
        bounds += [f"from {low:g} to {high:g}"] if low > -math.inf else []
        raise ValueError(f"{name} must be a finite number{' '.join(['', *bounds])}, got {value!r}.")


def _is_real(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_depth(name: str, value, least: int = 0) -> None:
    """Raises `ValueError` unless a value is `None` or a whole number of at least `least`."""
    if value is None:
        return
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_decision(presence_prior: float | None = None, false_accept_rate: float | None = None) -> None:
    """Raises `ValueError` for a prior or a rate out of its range; `None` means not given."""
    if presence_prior is not None and not (_is_real(presence_prior) and 0 < presence_prior < 1):
        raise ValueError(
            f"presence_prior must be above 0 and below 1, got {presence_prior}; it is the share of clips that show a "
            f"product of the shop."
        )
    if false_accept_rate is not None and not (_is_real(false_accept_rate) and 0 <= false_accept_rate < 1):
        raise ValueError(f"false_accept_rate must be at least 0 and below 1, got {false_accept_rate}.")


def _log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def product_shares(scores: np.ndarray, temperature: float, products: Sequence[str]) -> np.ndarray:
    """Softmax of `scores / temperature`, summed over the images of each product; each gets the sum, `(k,)`."""
    weights = np.exp((scores - scores.max()) / temperature)
    totals: dict[str, float] = {}
    for product, weight in zip(products, weights):
        totals[product] = totals.get(product, 0.0) + float(weight)
    return np.array([totals[product] for product in products]) / weights.sum()


def presence_features(embedding: np.ndarray, matching: np.ndarray | None) -> np.ndarray:
    """The best score of each kind. Its lead over the other candidates did not help (docs/LOG.md)."""
    kinds = [embedding] if matching is None else [embedding, matching]
    return np.array([scores.max() for scores in kinds], dtype=np.float64)


def fit_calibration(
    clips: Sequence[ScoredClip],
    *,
    presence_prior: float = PRESENCE_PRIOR,
    false_accept_rate: float | None = None,
    rerank: int | None = None,
    ranking: str | None = None,
) -> Calibration:
    """
    Args:
        clips: Validation clips in shops with and without their product (`in_shop` False), in any mix.
        presence_prior: Share of clips in use whose product is in the shop, above 0 and below 1.
        false_accept_rate: Maximum share (0 to 1) of clips without their product that get an answer; `None`: answer if
            the answer is more likely right than wrong (`EVEN_ODDS`).
        rerank, ranking: Stored in the result.

    Returns:
        `Calibration`; its threshold and report come from cross-validation.

    Raises:
        ValueError: too few clips of either kind, scores that are not finite, a prior or rate out of its range, or a
            result that would answer none of the clips.
    """
    check_decision(presence_prior, false_accept_rate)
    clips = [clip for clip in clips if len(clip.embedding)]
    _check_finite(clips)
    in_shop = np.array([clip.in_shop for clip in clips], dtype=bool)
    num_found = sum(bool(clip.relevant.any()) for clip in clips)
    if num_found < _FEWEST or (~in_shop).sum() < _FEWEST:
        raise ValueError(
            f"calibration needs at least {_FEWEST} clips whose product is found and {_FEWEST} searches without it, "
            f"got {num_found} and {int((~in_shop).sum())}; use a larger validation split."
        )
    confidence = _unseen_confidences(clips, presence_prior)
    result = _fit(clips, presence_prior)
    result.presence_prior, result.false_accept_rate = presence_prior, false_accept_rate
    result.rerank, result.ranking = rerank, ranking
    if false_accept_rate is None:
        result.threshold = EVEN_ODDS
    else:
        result.threshold = threshold_at(confidence[~in_shop], false_accept_rate)
    result.report = _measure(clips, in_shop, confidence, result)
    if result.report["answered"] == 0:
        best = float(confidence[in_shop].max())
        raise ValueError(
            f"with this calibration none of the {int(in_shop.sum())} validation clips would be answered: the highest "
            f"confidence is {best:.2f} and the threshold {result.threshold:.2f}; use a model that distinguishes the "
            f"products better, a larger validation split, or another presence_prior or false_accept_rate."
        )
    return result


def fit_with_words(clips: Sequence[ScoredClip], said: Sequence[ScoredClip], **settings) -> Calibration:
    """
    As `fit_calibration` for clips without speech, with a second fit for clips with speech as `said`. If these are too
    few, both use the same calibration, and the report gives the reason.
    """
    result = fit_calibration(clips, **settings)
    if said:
        try:
            result.said = fit_calibration(said, **settings)
            result.report["said"] = result.said.report
        except ValueError as error:
            result.report["said"] = f"not calibrated separately: {error}"
    return result


def _check_finite(clips: Sequence[ScoredClip]) -> None:
    for clip in clips:
        kinds = [clip.embedding, clip.ranked_by] + ([] if clip.matching is None else [clip.matching])
        if not all(np.isfinite(scores).all() for scores in kinds):
            raise ValueError(f"a validation clip of {clip.group or 'no product'} has scores that are not finite.")


def _unseen_confidences(clips: Sequence[ScoredClip], presence_prior: float) -> np.ndarray:
    """Confidence of each clip's best candidate, from a fit on other products' clips, `(n,)`."""
    confidence = np.zeros(len(clips))
    # Groups in the order of their first clip, so that the folds are equal in every run.
    numbers = {group: i for i, group in enumerate(dict.fromkeys(clip.group for clip in clips))}
    folds = np.array([numbers[clip.group] % FOLDS for clip in clips])
    for fold in np.unique(folds):
        seen = [clip for clip, own in zip(clips, folds) if own != fold]
        fitted = _fit(seen if _is_mixed(seen) else clips, presence_prior)
        for i in np.flatnonzero(folds == fold):
            confidence[i] = _best_confidence(fitted, clips[i])
    return confidence


def _measure(clips: Sequence[ScoredClip], in_shop: np.ndarray, confidence: np.ndarray, result: Calibration) -> dict:
    correct = np.array([bool(clip.relevant[clip.ranked_by.argmax()]) for clip in clips])
    accepted = confidence >= result.threshold
    prior = result.presence_prior
    weights = np.where(in_shop, prior / in_shop.sum(), (1 - prior) / (~in_shop).sum())
    return {
        "num_present": int(in_shop.sum()),
        "num_absent": int((~in_shop).sum()),
        "presence_prior": prior,
        "threshold": result.threshold,
        "false_accepts": float(accepted[~in_shop].mean()),
        "answered": float(accepted[in_shop].mean()),
        "right_when_answered": float(correct[accepted & in_shop].mean()) if (accepted & in_shop).any() else None,
        "expected_calibration_error": calibration_error(confidence, correct, weights=weights),
    }


def _is_mixed(clips: Sequence[ScoredClip]) -> bool:
    return len({bool(clip.relevant.any()) for clip in clips}) == 2


def _best_confidence(calibration: Calibration, clip: ScoredClip) -> float:
    values = calibration.confidences(clip.embedding, clip.matching, clip.ranked_by, clip.products)
    return float(values[clip.ranked_by.argmax()])


def threshold_at(absent: np.ndarray, rate: float) -> float:
    """The lowest confidence that accepts at most the share `rate` of the `absent` clips."""
    falling = np.sort(absent)[::-1]
    allowed = int(math.floor(rate * len(falling)))
    return float(np.nextafter(falling[allowed], np.inf))


def calibration_error(
    confidence: np.ndarray, correct: np.ndarray, bins: int = 10, weights: np.ndarray | None = None
) -> float:
    """
    Expected calibration error: mean distance between confidence and accuracy over bins of equal weight, 0 to 1.

    Args:
        confidence, correct: `(n,)`.
        bins: Number of bins.
        weights: Weights of the clips, `(n,)`; by default equal.
    """
    order = np.argsort(confidence, kind="stable")
    shares = np.full(len(order), 1.0) if weights is None else weights[order]
    shares = shares / shares.sum()
    middles = np.cumsum(shares) - shares / 2
    gaps = shares * (confidence[order] - correct[order])
    return float(np.abs(np.bincount((middles * bins).astype(int), gaps)).sum())


def _fit(clips: Sequence[ScoredClip], presence_prior: float) -> Calibration:
    present = torch.tensor([float(clip.relevant.any()) for clip in clips], dtype=torch.float64)
    features = torch.from_numpy(np.stack([presence_features(clip.embedding, clip.matching) for clip in clips]))
    mean, scale = features.mean(dim=0), features.std(dim=0).clamp(min=1e-9)
    standard = (features - mean) / scale
    parameters = torch.zeros(features.shape[1] + 1, dtype=torch.float64, requires_grad=True)

    def presence_loss() -> torch.Tensor:
        logits = parameters[0] + standard @ parameters[1:]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, present)
        # Without this penalty the weights grow without limit if the classes are separable.
        return loss + _PENALTY * parameters[1:].square().sum()

    _minimise(presence_loss, parameters)
    weights = parameters.detach()[1:] / scale
    bias = parameters.detach()[0] - (weights * mean).sum()
    # A product that is in the shop may still not be among the candidates.
    found = presence_prior * float(present.sum()) / sum(clip.in_shop for clip in clips)
    bias += _log_odds(found) - _log_odds(float(present.mean()))
    temperature = _fit_temperature([clip for clip in clips if clip.relevant.any()])
    return Calibration(temperature, float(bias), weights.tolist())


def _fit_temperature(clips: Sequence[ScoredClip]) -> float:
    rows = [
        (torch.as_tensor(clip.ranked_by, dtype=torch.float64), torch.as_tensor(clip.relevant, dtype=torch.bool))
        for clip in clips
    ]
    # Finite values for missing candidates, because minus infinity over a temperature has no gradient.
    scores = pad_sequence([scores for scores, _ in rows], batch_first=True)
    relevant = pad_sequence([relevant for _, relevant in rows], batch_first=True)
    there = pad_sequence([torch.ones_like(relevant) for _, relevant in rows], batch_first=True)
    log_temperature = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    unit = _typical_lead(scores.masked_fill(~there, -torch.inf))

    def loss() -> torch.Tensor:
        cooled = scores / (unit * _temperature(log_temperature))
        right = cooled.masked_fill(~relevant, -torch.inf).logsumexp(dim=1)
        everything = cooled.masked_fill(~there, -torch.inf).logsumexp(dim=1)
        return (everything - right).mean() + _PENALTY * log_temperature.square().sum()

    _minimise(loss, log_temperature)
    return float((unit * _temperature(log_temperature.detach())).clamp(_COLDEST, _HOTTEST))


def _typical_lead(scores: torch.Tensor) -> torch.Tensor:
    """
    Mean lead of the best score `(n, k)` over the next, as the unit of temperatures: cosines differ by hundredths, the
    scores of a decoder by whole numbers.
    """
    best = scores.topk(min(2, scores.shape[1]), dim=1).values
    leads = (best[:, 0] - best[:, -1])[best[:, -1] > -torch.inf]
    lead = leads.mean() if len(leads) else scores.new_zeros(())
    return torch.where(lead > 0, lead, 1.0)


def _temperature(log_temperature: torch.Tensor) -> torch.Tensor:
    # Bounded, because it would go to zero if all clips are ranked correctly. At these bounds, the best candidate's
    # share hardly changes any more.
    return log_temperature.clamp(-4, 6).exp()


def _minimise(loss, parameters: torch.Tensor) -> None:
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    # The fit needs gradients, even if the caller has turned them off.
    with torch.enable_grad():
        optimizer.step(closure)
    if not parameters.isfinite().all():
        raise ValueError("the fit of the confidences did not end at finite numbers; use a larger validation split.")
