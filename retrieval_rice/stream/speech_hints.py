"""Hints for a speech model: titles of the shop whose words distinguish its products."""

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from .speech import UNSPACED

# Languages without spaces between words, by their codes in Whisper.
_UNSPACED_LANGUAGES = ("zh", "yue", "ja", "th", "lo", "my", "km")
# A letter or digit, then characters that may occur inside a word or number: t-shirt, kid's, 5g.
_WORD = re.compile(r"[^\W_](?:[\w'’.-]*[^\W_])?")
# Only the beginning of longer titles, which names the product.
_MOST_WORDS = 16


def hint_titles(titles: Iterable[str], language: str) -> list[str]:
    """
    The words of each title, ordered by how well they distinguish products. A word in half of the titles distinguishes
    more than a word in a single title or in nearly all of them, and no word counts twice. Whole titles are used,
    because a model recognises words better in their spoken order than as single words.

    Args:
        titles: Titles of a shop's images.
        language: A code such as "en".

    Returns:
        Distinct titles in lower case, without words in scripts without spaces, such as Chinese; empty for a language
        with such a script.
    """
    return [] if language in _UNSPACED_LANGUAGES else list(_in_order(tuple(titles)))


# A demo uses the same shops again and again.
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
        # The gain of a title can only decrease, so the previous best title may still be the best.
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
    """The first titles, joined with commas, up to a total size of `most`."""
    chosen: list[str] = []
    for title in titles:
        if size(", ".join([*chosen, title])) > most:
            break
        chosen.append(title)
    return ", ".join(chosen)


def expect_titles(transcriber: Any, titles: Iterable[str], asked: str | None = None) -> tuple[Any, int]:
    """
    A speech model with the words of a shop's titles as hints, if it supports hints.

    Args:
        transcriber: See `load_transcriber`. A transcriber with `expecting` supports hints.
        titles: Titles of the shop.
        asked: "titles", "none", or `None` for titles if they are useful.

    Returns:
        The speech model to use, and the number of distinct titles.

    Raises:
        ValueError: titles are requested, but would have no effect.
    """
    takes_hints, titles = hasattr(transcriber, "expecting"), [] if asked == "none" else list(titles)
    if asked == "titles" and not takes_hints:
        raise ValueError(
            "--asr_hints titles works with faster-whisper models only; leave it out, or name such a model with --asr."
        )
    language = getattr(transcriber, "language", None) or ""
    hints = hint_titles(titles, language) if takes_hints else []
    if asked == "titles" and not hints:
        spoken = f" to expect in the language {language}" if language else ""
        raise ValueError(f"--asr_hints titles: the shop's titles have no words{spoken}; leave it out.")
    return (transcriber.expecting(titles) if takes_hints else transcriber), len(hints)
