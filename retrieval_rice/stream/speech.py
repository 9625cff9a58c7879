"""What is said in a stream, and when: words come from any source while the stream goes on, and windows are given those
around them.

A source of words is any iterable of [`Word`]s, or of `(start_s, end_s, text)`, on the clock of the stream's frames. It
is read in a thread of its own. Two things are used where it has them: `heard_s`, the second before which nothing more
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
"""A window is given the words from so many seconds before it to so many after it."""

# What is known by now, such as subtitles that were read, is to be there for the first window.
_FIRST_WORDS_S = 0.25
# A source that gives nothing for so long has stopped, whatever it says.
_LONGEST_WAIT_S = 120.0
# Later than this, words say nothing of what is on screen.
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
    A word, or a phrase of which no more is known.

    Attributes:
        start_s, end_s: Seconds from the start of the stream, as the time of its frames.
        text: Without a line break.
    """

    start_s: float
    end_s: float
    text: str


@dataclass
class WordCounts:
    """
    What became of a stream's words so far.

    Attributes:
        words: That came.
        late: Too late for the windows around them, and scored with the next one.
        lost: Later than that, or no words at all: times that are no numbers, or no text. They are not used.
        delay_s, longest_delay_s: From the end of a word of a live source to when it came, on average and at most.
    """

    words: int = 0
    late: int = 0
    lost: int = 0
    delay_s: float = 0.0
    longest_delay_s: float = 0.0


def word_of(value: Any) -> Word | None:
    """
    A word from what a source gives, `None` where that is none. One that ends before it starts has no length, and one
    that never ends, such as the last cue of some subtitle files, is said for a minute at most.
    """
    if not isinstance(value, Word):
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) != 3:
            return None
        value = Word(*value)
    try:
        start_s, end_s = float(value.start_s), float(value.end_s)
    except (TypeError, ValueError, OverflowError):
        return None
    # Half of a surrogate pair can be written to no file.
    text = " ".join(SURROGATE.sub("\ufffd", value.text).split()) if isinstance(value.text, str) else ""
    if not math.isfinite(start_s) or not math.isfinite(end_s) or not text:
        return None
    return Word(start_s, min(max(start_s, end_s), start_s + _LONGEST_WORD_S), text[:_LONGEST_TEXT])


def join_words(words: Iterable[Word]) -> str:
    """Their texts in order, with spaces but between scripts that have none."""
    joined = ""
    for word in words:
        text = word.text.strip()
        together = joined and UNSPACED.match(joined[-1]) and UNSPACED.match(text)
        joined += text if together or not joined else f" {text}"
    return joined


def phrases(words: Iterable[Word]) -> list[Word]:
    """Words joined to what fits into a subtitle; a pause or the end of a sentence ends one."""
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
    The words of a stream for its windows, which come in the order of time.

    A live stream's windows take what is there by then. Where nothing is lost by waiting, a window waits for a source
    that tells how far it is (`heard_s`). A source that fails ends: it is told, and the rest goes without words.

    Args:
        speech: A source of words.
        waits: Whether windows wait; not for live streams.
        notify: Is told in one sentence what happens.

    Raises:
        ValueError: for what is no iterable of words.
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
        # Those that no window was given, the earliest first: (start_s, number, word).
        self._new: list[tuple[float, int, Word]] = []
        self._said: deque[Word] = deque(maxlen=_MOST_WORDS_OF_A_SEGMENT)
        self._ended = False
        self._stopping = False
        self._now_s: float | None = None
        self._told_s = -math.inf
        self._delays = 0

    def start(self) -> None:
        """Begins to read the source."""
        thread = threading.Thread(target=self._read, name="words of the stream", daemon=True)
        thread.start()
        thread.join(_FIRST_WORDS_S)

    def stop(self) -> None:
        """Ends the reading; may be called from any thread."""
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
            # Whatever a recogniser raises, the picture goes on.
            self.notify(f"what is said is not known from here on: {_reason(error)}")
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
        What is said from `start_s` to `end_s` seconds, "" for nothing, with what came too late for its own window.

        Args:
            start_s, end_s: Of the words, which go at least as far as in the call before.
            first_s: What was said before it belongs to no window: the picture had paused.
            now_s: How far the picture is, from which delays are counted.
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
        """The words that start within a segment, in order; to be asked for segment by segment."""
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
                    f"speech recognition has got no further for {_LONGEST_WAIT_S:g} s; recognition goes on without it"
                )
                return

    def _heard_s(self) -> float | None:
        try:
            heard_s = getattr(self.speech, "heard_s", None)
            return None if heard_s is None else float(heard_s)
        except Exception as error:
            self.waits = False
            self.notify(f"how far the words are known cannot be told, and nothing waits for them: {_reason(error)}")
            return None

    def _tell_late(self) -> None:
        if self.counts.late and time.monotonic() - self._told_s >= _SECONDS_BETWEEN_NOTICES:
            self._told_s = time.monotonic()
            self.notify(
                f"words come {self.counts.longest_delay_s:.1f} s late, and {self.counts.late} so far too late for "
                f"what they were said of; they are scored with the next window"
            )
