"""Joins answers, one per window of a stream, to segments: the products on screen with their times.

A switch needs several windows in a row in which another product leads by a margin, or the confidence crosses one of
two thresholds. Then it is reported, and dated back to the point where the unsmoothed confidences cross.
"""

import json
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

from .speech import Word, join_words, phrases

_UNDECIDED = object()
# For a product with few appearances, only its name is kept.
_FORGET_BELOW = 1e-3
_MOST_ALTERNATIVES = 32


@dataclass(frozen=True)
class Hysteresis:
    """
    Rules for a change of the product on screen.

    Attributes:
        enter: Smoothed confidence, 0..1, at which a product is on screen.
        leave: Smoothed confidence below which it is no longer on screen; at most `enter`.
        margin: Lead that another product needs over the product on screen.
        patience: Number of windows in a row with that lead, at least 1.
        smoothing: Weight of the newest window in the exponential mean, above 0 and at most 1 (no smoothing).
    """

    enter: float = 0.5
    leave: float = 0.35
    margin: float = 0.1
    patience: int = 2
    smoothing: float = 0.5

    def __post_init__(self):
        if not 0 <= self.leave <= self.enter <= 1:
            raise ValueError(
                f"`leave` and `enter` must be 0 <= leave <= enter <= 1, got {self.leave} and {self.enter}."
            )
        if not 0 <= self.margin <= 1:
            raise ValueError(f"`margin` must be in 0..1, got {self.margin}.")
        if self.patience < 1:
            raise ValueError(f"`patience` must be at least 1, got {self.patience}.")
        if not 0 < self.smoothing <= 1:
            raise ValueError(f"`smoothing` must be above 0 and at most 1, got {self.smoothing}.")

    @classmethod
    def for_index(cls, index) -> "Hysteresis":
        """
        Default rules for an index: around its threshold if it is calibrated. Without calibration, confidences can only
        be compared, so the most likely product is always taken.
        """
        calibration = getattr(index, "calibration", None)
        if calibration is None:
            return cls(enter=0.0, leave=0.0, margin=0.0, patience=3)
        # With and without words; the higher threshold keeps the rate of false accepts in both cases.
        said = getattr(calibration, "said", None)
        threshold = calibration.threshold if said is None else max(calibration.threshold, said.threshold)
        enter = min(max(float(threshold), 0.0), 1.0)
        return cls(enter=enter, leave=0.7 * enter)


@dataclass(frozen=True)
class Segment:
    """
    A part of a stream with one product, or none.

    Attributes:
        start_s, end_s: Seconds from the start of the stream.
        hit: The product's image with the highest confidence, from the index; `None` for no product.
        confidence: Mean confidence over the segment's windows, 0..1; without a product, the confidence of "no
            product".
        alternatives: Other products, most likely first, each a hit with its mean confidence over the segment.
        said: Speech during the segment, the last 10,000 words; `None` without a source of speech.
    """

    start_s: float
    end_s: float
    hit: Any | None
    confidence: float
    alternatives: list = field(default_factory=list)
    said: list[Word] | None = None


@dataclass
class _Window:
    time_s: float
    scores: dict[Hashable, float]
    hits: dict[Hashable, Any]


def product_key(hit) -> Hashable:
    """The key of a hit: its product, or its image if the product is unknown."""
    return hit.product_id or hit.image_id


def _read(time_s: float, answer) -> _Window:
    """The best image of every product; the key `None` is "no product", with 1 minus the best confidence."""
    scores: dict[Hashable, float] = {}
    hits: dict[Hashable, Any] = {}
    for hit in answer.hits:
        key = product_key(hit)
        if hit.confidence > scores.get(key, -1.0):
            scores[key], hits[key] = float(hit.confidence), hit
    scores[None] = 1 - max(scores.values(), default=0.0)
    return _Window(time_s, scores, hits)


class Timeline:
    """
    Takes answers in order of time and returns segments when they are closed. Memory does not grow with time.

    Args:
        hysteresis: [`Hysteresis`].
        num_alternatives: Maximum number of entries in a segment's `alternatives`.
    """

    def __init__(self, hysteresis: Hysteresis | None = None, num_alternatives: int = 3):
        self.rules = hysteresis or Hysteresis()
        self.num_alternatives = num_alternatives
        self.start(0.0)

    def start(self, time_s: float) -> None:
        """Starts anew: nothing is known, and the next segment starts at `time_s` seconds."""
        self._start_s = time_s
        self._key: Hashable = _UNDECIDED
        self._pending: tuple[Hashable, int] = (_UNDECIDED, 0)
        self._smoothed: dict[Hashable, float] = {}
        # Windows to which a switch may be dated back; older windows are in the sums.
        self._recent: deque[_Window] = deque()
        self._clear_sums()

    def _clear_sums(self) -> None:
        self._count = 0
        self._sums: dict[Hashable, float] = {}
        self._best: dict[Hashable, Any] = {}

    @property
    def is_decided(self) -> bool:
        """Whether there were enough windows to decide what is on screen."""
        return self._key is not _UNDECIDED

    @property
    def current(self):
        """The hit on screen, `None` for no product or if not decided yet."""
        return self._hit(self._key) if self.is_decided and self._key is not None else None

    @property
    def since_s(self) -> float:
        """Start of the open segment in seconds."""
        return self._start_s

    def add(self, time_s: float, answer) -> list[Segment]:
        """
        Args:
            time_s: Middle of the window in seconds, later than the previous one.
            answer: The index's answer, of which `hits` are used (`product_id`, `image_id`, `confidence`). "No product"
                is decided here, over several windows.

        Returns:
            The closed segments, none or one.
        """
        window = _read(time_s, answer)
        self._recent.append(window)
        self._smooth(window.scores)
        wanted = self._wanted()
        if wanted == self._key:
            self._pending = (wanted, 0)
        else:
            self._pending = (wanted, self._pending[1] + 1 if wanted == self._pending[0] else 1)
        closed = self._switch(wanted) if self._pending[1] >= self.rules.patience else []
        while len(self._recent) > max(16, 4 * self.rules.patience):
            self._settle(self._recent.popleft())
        return closed

    def finish(self, end_s: float) -> list[Segment]:
        """
        Closes the open segment at `end_s` seconds and returns one or two segments: a recent switch counts if enough
        windows support it. With too few windows for a decision, the most likely product is taken.
        """
        if not self._recent and not self._count:
            return []
        wanted, count = self._pending
        closed = []
        if not self.is_decided:
            self._key = wanted
        elif count and len(self._recent) - self._change_point(wanted)[0] >= self.rules.patience:
            closed = self._switch(wanted)
        segment = self._close(end_s, len(self._recent))
        self.start(end_s)
        return closed + [segment] * (segment.end_s > segment.start_s)

    def _smooth(self, scores: dict[Hashable, float]) -> None:
        new, old = self.rules.smoothing, self._smoothed
        if not old:
            self._smoothed = dict(scores)
            return
        mixed = {key: (1 - new) * old.get(key, 0.0) + new * scores.get(key, 0.0) for key in old.keys() | scores.keys()}
        self._smoothed = {key: score for key, score in mixed.items() if key is None or score >= _FORGET_BELOW}

    def _wanted(self) -> Hashable:
        """The product that the smoothed confidences select, `None` for no product."""
        rules, scores = self.rules, self._smoothed
        # Ties are broken by name, so that the order of a set does not decide.
        leader = max((key for key in scores if key is not None), key=lambda key: (scores[key], str(key)), default=None)
        leading = scores.get(leader, 0.0) if leader is not None else 0.0
        if self._key is _UNDECIDED or self._key is None:
            return leader if leading >= rules.enter else None
        own = scores.get(self._key, 0.0)
        if leading > own and leading >= max(rules.enter, own + rules.margin):
            return leader
        return self._key if own >= rules.leave else None

    def _switch(self, wanted: Hashable) -> list[Segment]:
        closed = []
        if self.is_decided:
            position, time_s = self._change_point(wanted)
            segment = self._close(time_s, position)
            if segment.end_s > segment.start_s:
                closed.append(segment)
            self._start_s = time_s
        self._key = wanted
        self._pending = (wanted, 0)
        return closed

    def _change_point(self, wanted: Hashable) -> tuple[int, float]:
        """The best split of the recent windows into the old product before and the new one after it."""
        leads = [self._strength(window, wanted) - self._strength(window, self._key) for window in self._recent]
        # At least one window on each side, because both products were decided.
        position = max(range(1, len(leads)), key=lambda i: sum(leads[i:]) - sum(leads[:i]))
        before, after = self._recent[position - 1], self._recent[position]
        low, high = leads[position - 1], leads[position]
        # The point where the line between the two windows crosses zero.
        share = -low / (high - low) if low <= 0 <= high and high > low else 0.5
        return position, max(self._start_s, before.time_s + share * (after.time_s - before.time_s))

    def _strength(self, window: _Window, key: Hashable) -> float:
        """The support of a window for a product; for "no product", the threshold that a product must exceed."""
        return (self.rules.enter + self.rules.leave) / 2 if key is None else window.scores.get(key, 0.0)

    def _settle(self, window: _Window) -> None:
        self._count += 1
        for key, score in window.scores.items():
            self._sums[key] = self._sums.get(key, 0.0) + score
            hit = window.hits.get(key)
            if hit is not None and (key not in self._best or hit.confidence > self._best[key].confidence):
                self._best[key] = hit
        if len(self._sums) > 2 * _MOST_ALTERNATIVES:
            kept = sorted(self._sums, key=self._sums.__getitem__, reverse=True)[:_MOST_ALTERNATIVES]
            kept += [key for key in (None, self._key) if key in self._sums and key not in kept]
            self._sums = {key: self._sums[key] for key in kept}
            self._best = {key: self._best[key] for key in kept if key in self._best}

    def _hit(self, key: Hashable):
        seen = [self._best.get(key), *(window.hits.get(key) for window in self._recent)]
        return max((hit for hit in seen if hit is not None), key=lambda hit: hit.confidence, default=None)

    def _close(self, end_s: float, count: int) -> Segment:
        """Closes the open segment with the first `count` recent windows, which are removed."""
        for _ in range(count):
            self._settle(self._recent.popleft())
        means = {key: total / self._count for key, total in self._sums.items()} if self._count else {}
        others = sorted((key for key in means if key not in (None, self._key)), key=means.__getitem__, reverse=True)
        segment = Segment(
            start_s=self._start_s,
            end_s=end_s,
            hit=self._best.get(self._key) if self._key is not None else None,
            confidence=means.get(self._key, 0.0),
            alternatives=[replace(self._best[key], confidence=means[key]) for key in others[: self.num_alternatives]],
        )
        self._clear_sums()
        return segment


def clock(seconds: float, digits: int = 3) -> str:
    """Seconds as `HH:MM:SS.mmm`, with `digits` digits after the point."""
    unit = 10**digits
    whole, part = divmod(round(max(seconds, 0.0) * unit), unit)
    text = f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{text}.{part:0{digits}d}" if digits else text


def one_line(text: str) -> str:
    """Text of a shop without line breaks and control characters, which could control a terminal or end a cue."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def name_of(hit) -> str:
    """Title of a hit, or its id."""
    return one_line(hit.title or str(product_key(hit)))


TABLE_HEADER = f"{'start':>10}  {'end':>10}  {'sure':>5}  {'product':<16}  title"


def table_row(segment: Segment) -> str:
    """A segment as a line of the table below `TABLE_HEADER`."""
    times = f"{clock(segment.start_s, 1):>10}  {clock(segment.end_s, 1):>10}  {segment.confidence:>5.0%}"
    if segment.hit is None:
        return f"{times}  {'-':<16}  (no product)"
    product = one_line(str(product_key(segment.hit)))
    return f"{times}  {product:<16}  {one_line(segment.hit.title or '')}".rstrip()


def json_line(segment: Segment) -> str:
    """A segment as one line of JSON; without a product its ids are null."""

    def describe(hit) -> dict:
        return {name: getattr(hit, name, None) for name in ("product_id", "image_id", "live_id", "title")}

    product = dict.fromkeys(("product_id", "image_id", "live_id", "title"))
    entry = {
        "start_s": round(segment.start_s, 3),
        "end_s": round(segment.end_s, 3),
        **(product if segment.hit is None else describe(segment.hit)),
        "confidence": round(segment.confidence, 4),
        "alternatives": [{**describe(hit), "confidence": round(hit.confidence, 4)} for hit in segment.alternatives],
    }
    if segment.said is not None:
        entry["asr"] = join_words(segment.said)
    return json.dumps(entry, ensure_ascii=False, allow_nan=False)


VTT_HEADER = "WEBVTT\n\n"


def vtt_cue(segment: Segment) -> str:
    """
    A segment as WebVTT cues, each followed by a blank line: the product, if there is one, and then the speech during
    the segment, in parentheses.
    """
    cues = []
    if segment.hit is not None:
        cues.append((segment.start_s, segment.end_s, f"{name_of(segment.hit)} ({segment.confidence:.0%})"))
    for part in phrases(segment.said or ()):
        # A cue needs a duration, but the words may have only a start.
        cues.append((part.start_s, max(part.end_s, part.start_s + 0.5), f"({one_line(part.text)})"))
    return "".join(f"{clock(start)} --> {clock(end)}\n{_escaped(text)}\n\n" for start, end, text in cues)


def _escaped(text: str) -> str:
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(sign, entity)
    return text
