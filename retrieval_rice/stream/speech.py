"""Speech of a stream: words come from any source during the stream, and each window gets the words around it.

A source of words is any iterable of [`Word`]s, or of `(start_s, end_s, text)`, on the clock of the stream's frames. It
is read in its own thread. Two optional members are used: `heard_s`, the time in seconds before which no more words
will come, and `stop()`.
"""

import heapq
import logging
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from data_rice.parsing import SURROGATE

logger = logging.getLogger(__name__)

ASR_BEFORE_S = 6.0
ASR_AFTER_S = 2.0
"""A window gets the words from this many seconds before it to this many seconds after it."""

# Words that are already known, such as subtitles, should be available for the first window.
_FIRST_WORDS_S = 0.25
# A source without progress for this long counts as stopped.
_LONGEST_WAIT_S = 120.0
# Words later than this are unrelated to the current picture.
_LATEST_S = 30.0
_SECONDS_BETWEEN_NOTICES = 10.0
_MOST_WORDS_OF_A_SEGMENT = 10_000
_LONGEST_WORD_S, _LONGEST_TEXT = 60.0, 2000
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]")
"""Letters of scripts that have no spaces between words: Chinese, Japanese, Thai, Lao, Burmese and Khmer."""

_PHRASE_LETTERS, _PHRASE_S, _PHRASE_PAUSE_S = 42, 6.0, 1.0


@dataclass(frozen=True)
class Word:
    """
    A word, or a phrase with a common time.

    Attributes:
        start_s, end_s: Seconds from the start of the stream, on the clock of its frames.
        text: Text without line breaks.
    """

    start_s: float
    end_s: float
    text: str


@dataclass
class WordCounts:
    """
    Counts of a stream's words so far.

    Attributes:
        words: Number of received words.
        late: Words that came too late for their windows, and were used for the next window.
        lost: Unused words: even later ones, or invalid ones (times that are not numbers, or no text).
        delay_s, longest_delay_s: Delay from the end of a word of a live source to its arrival, mean and maximum.
    """

    words: int = 0
    late: int = 0
    lost: int = 0
    delay_s: float = 0.0
    longest_delay_s: float = 0.0


def word_of(value: Any) -> Word | None:
    """
    Converts a source's value to a word, `None` if it is not a word. A word that ends before it starts gets length 0. A
    word without end, such as the last cue of some subtitle files, lasts at most a minute.
    """
    if not isinstance(value, Word):
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) != 3:
            return None
        value = Word(*value)
    try:
        start_s, end_s = float(value.start_s), float(value.end_s)
    except (TypeError, ValueError, OverflowError):
        return None
    # Half of a surrogate pair cannot be written to a file.
    text = " ".join(SURROGATE.sub("\ufffd", value.text).split()) if isinstance(value.text, str) else ""
    if not math.isfinite(start_s) or not math.isfinite(end_s) or not text:
        return None
    return Word(start_s, min(max(start_s, end_s), start_s + _LONGEST_WORD_S), text[:_LONGEST_TEXT])


def join_words(words: Iterable[Word]) -> str:
    """The texts in order, joined with spaces except in scripts without spaces."""
    joined = ""
    for word in words:
        text = word.text.strip()
        together = joined and UNSPACED.match(joined[-1]) and UNSPACED.match(text)
        joined += text if together or not joined else f" {text}"
    return joined


def phrases(words: Iterable[Word]) -> list[Word]:
    """Joins words to phrases of subtitle length; a pause or the end of a sentence ends a phrase."""
    groups: list[list[Word]] = []
    for word in words:
        group = groups[-1] if groups else []
        fits = (
            group
            and sum(len(other.text) + 1 for other in group) + len(word.text) <= _PHRASE_LETTERS
            and word.end_s - group[0].start_s <= _PHRASE_S
            and word.start_s - group[-1].end_s <= _PHRASE_PAUSE_S
            and not group[-1].text.endswith((".", "!", "?", "。", "！", "？"))
        )
        if fits:
            group.append(word)
        else:
            groups.append([word])
    return [Word(group[0].start_s, max(word.end_s for word in group), join_words(group)) for group in groups]


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Hearing:
    """
    The words of a stream for its windows, in order of time.

    Windows of a live stream use the words that have arrived. Windows of other streams wait for a source with
    `heard_s`. If a source fails, this is reported and the rest of the stream has no words.

    Args:
        speech: A source of words.
        waits: Whether windows wait; not for live streams.
        notify: Called with one sentence per event.

    Raises:
        ValueError: `speech` is not an iterable of words.
    """

    def __init__(self, speech: Any, waits: bool = False, notify: Callable[[str], None] = logger.warning):
        if isinstance(speech, (str, bytes)) or not hasattr(speech, "__iter__"):
            raise ValueError(
                f"`speech` must be an iterable of words, (start_s, end_s, text) each, got a {type(speech).__name__}."
            )
        self.speech, self.waits, self.notify = speech, waits, notify
        self.counts = WordCounts()
        self._changed = threading.Condition()
        self._words: list[Word] = []
        # Words that no window has used, the earliest first: (start_s, number, word).
        self._new: list[tuple[float, int, Word]] = []
        self._said: deque[Word] = deque(maxlen=_MOST_WORDS_OF_A_SEGMENT)
        self._ended = False
        self._stopping = False
        self._now_s: float | None = None
        self._told_s = -math.inf
        self._delays = 0

    def start(self) -> None:
        """Starts reading the source."""
        thread = threading.Thread(target=self._read, name="words of the stream", daemon=True)
        thread.start()
        thread.join(_FIRST_WORDS_S)

    def stop(self) -> None:
        """Stops reading; may be called from any thread."""
        self._stopping = True
        try:
            getattr(self.speech, "stop", lambda: None)()
        except Exception as error:
            self.notify(f"the source of words could not be stopped: {_reason(error)}")

    def _read(self) -> None:
        try:
            for value in self.speech:
                if self._stopping:
                    return
                self._add(word_of(value))
        except (Exception, SystemExit) as error:
            # Any error of speech recognition must not stop the pictures.
            self.notify(f"speech is not available from here on: {_reason(error)}")
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _add(self, word: Word | None) -> None:
        with self._changed:
            if word is None:
                self.counts.lost += 1
                return
            self.counts.words += 1
            heapq.heappush(self._new, (word.start_s, self.counts.words, word))
            if not self.waits and self._now_s is not None and word.end_s < self._now_s:
                self._delays += 1
                delay_s = self._now_s - word.end_s
                self.counts.longest_delay_s = max(self.counts.longest_delay_s, delay_s)
                self.counts.delay_s += (delay_s - self.counts.delay_s) / self._delays
            self._changed.notify_all()

    def text(self, start_s: float, end_s: float, first_s: float = -math.inf, now_s: float | None = None) -> str:
        """
        Text of the words from `start_s` to `end_s` seconds, "" for none, including words too late for their window.

        Args:
            start_s, end_s: Times of the words; `end_s` must not decrease from call to call.
            first_s: Earlier words belong to no window, because the pictures had paused.
            now_s: Time of the pictures, for measuring delays.
        """
        if self.waits:
            self._wait_for(end_s)
        with self._changed:
            self._now_s = end_s if now_s is None else now_s
            self._words = [word for word in self._words if word.end_s >= start_s]
            late = []
            while self._new and self._new[0][0] < end_s:
                word = heapq.heappop(self._new)[-1]
                if word.end_s >= start_s:
                    self._words.append(word)
                elif word.end_s >= first_s and word.end_s >= self._now_s - _LATEST_S:
                    late.append(word)
                    self.counts.late += 1
                else:
                    self.counts.lost += word.end_s >= first_s
                    continue
                self._said.append(word)
            self._words.sort(key=lambda word: word.start_s)
            chosen = sorted(late, key=lambda word: word.start_s) + self._words
        self._tell_late()
        return join_words(chosen)

    def said(self, start_s: float, end_s: float) -> list[Word]:
        """The words that start within a segment, in order; call it segment by segment."""
        with self._changed:
            known = sorted(self._said, key=lambda word: word.start_s)
            self._said = deque((word for word in known if word.start_s >= end_s), maxlen=self._said.maxlen)
        return [word for word in known if start_s <= word.start_s < end_s]

    def _wait_for(self, time_s: float) -> None:
        heard_s, since = self._heard_s(), time.monotonic()
        while heard_s is not None and heard_s < time_s and not self._ended and not self._stopping:
            with self._changed:
                self._changed.wait(0.05)
            now_s = self._heard_s()
            if now_s != heard_s:
                heard_s, since = now_s, time.monotonic()
            elif time.monotonic() - since > _LONGEST_WAIT_S:
                self.waits = False
                self.notify(
                    f"speech recognition made no progress for {_LONGEST_WAIT_S:g} s; recognition continues without it"
                )
                return

    def _heard_s(self) -> float | None:
        try:
            heard_s = getattr(self.speech, "heard_s", None)
            return None if heard_s is None else float(heard_s)
        except Exception as error:
            self.waits = False
            self.notify(f"the progress of the words is unknown, so windows do not wait for them: {_reason(error)}")
            return None

    def _tell_late(self) -> None:
        if self.counts.late and time.monotonic() - self._told_s >= _SECONDS_BETWEEN_NOTICES:
            self._told_s = time.monotonic()
            self.notify(
                f"words come {self.counts.longest_delay_s:.1f} s late, and {self.counts.late} so far too late for "
                f"their window; they are used for the next window"
            )
