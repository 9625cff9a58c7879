"""Titles that a speech model is told to expect: those of the shop whose words tell its products apart."""

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from .speech import UNSPACED

# Languages that are written without spaces between words, by their codes in Whisper.
_UNSPACED_LANGUAGES = ("zh", "yue", "ja", "th", "lo", "my", "km")
# A letter or digit first, then what may stand within a word or a number: t-shirt, kid's, 5g.
_WORD = re.compile(r"[^\W_](?:[\w'’.-]*[^\W_])?")
# Of longer titles the beginning, which names the product.
_MOST_WORDS = 16


def hint_titles(titles: Iterable[str], language: str) -> list[str]:
    """
    The words of each title, first the titles that bring most of what tells products apart: a word that stands in half
    of the titles tells more than one that stands in a single one, or in nearly all, and no word counts twice. A model
    hears words better in the order in which they are said than by themselves.

    Args:
        titles: Of a shop's images.
        language: A code such as "en".

    Returns:
        Different titles in lower case, without words in a script that has no spaces, such as Chinese; none for a
        language that is written so.
    """
    return [] if language in _UNSPACED_LANGUAGES else list(_in_order(tuple(titles)))


# The shops of a demo are asked for again and again.
@lru_cache(maxsize=16)
def _in_order(titles: tuple[str, ...]) -> tuple[str, ...]:
    worded = list(dict.fromkeys(words for title in titles if (words := _words(title))))
    counts = Counter(word for words in worded for word in set(words))
    worth = {word: min(count, len(worded) - count) for word, count in counts.items()}
    known: set[str] = set()

    def cost(place: int) -> tuple[float, int]:
        words = worded[place]
        return -sum(worth[word] for word in set(words) - known) / len(words), place

    ordered: list[str] = []
    heap = sorted(map(cost, range(len(worded))))
    while heap:
        place = heapq.heappop(heap)[1]
        # What a title brings only falls, so that the best by what was known before may still be the best.
        if heap and cost(place) > heap[0]:
            heapq.heappush(heap, cost(place))
        else:
            ordered.append(" ".join(worded[place]))
            known.update(worded[place])
    return tuple(ordered)


def _words(title: str) -> tuple[str, ...]:
    found = (match.group().lower() for match in _WORD.finditer(title))
    return tuple(word for word in found if not UNSPACED.search(word) and not word.isdigit())[:_MOST_WORDS]


def within(titles: Iterable[str], most: int, size: Callable[[str], int]) -> str:
    """The first of the titles, with commas between them, that have a size of `most` together."""
    chosen: list[str] = []
    for title in titles:
        if size(", ".join([*chosen, title])) > most:
            break
        chosen.append(title)
    return ", ".join(chosen)


def expect_titles(transcriber: Any, titles: Iterable[str], asked: str | None = None) -> tuple[Any, int]:
    """
    A speech model that expects the words of a shop's titles, where it can be told.

    Args:
        transcriber: See `load_transcriber`. One with `expecting` can be told.
        titles: Of the shop that is on show.
        asked: "titles", "none", or `None` for titles where they are of use.

    Returns:
        The speech model to hear with, and how many different titles there are to choose from.

    Raises:
        ValueError: titles were asked for and would change nothing.
    """
    takes_hints, titles = hasattr(transcriber, "expecting"), [] if asked == "none" else list(titles)
    if asked == "titles" and not takes_hints:
        raise ValueError("--asr_hints titles needs a faster-whisper model; leave it out with another one.")
    language = getattr(transcriber, "language", None) or ""
    hints = hint_titles(titles, language) if takes_hints else []
    if asked == "titles" and not hints:
        spoken = f" to expect in the language {language}" if language else ""
        raise ValueError(f"--asr_hints titles: the shop's titles have no words{spoken}; leave it out.")
    return (transcriber.expecting(titles) if takes_hints else transcriber), len(hints)
