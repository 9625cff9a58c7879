"""Words that a speech model is told to expect: those of the shop's titles that tell its products apart."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from .speech import UNSPACED

HINTS = ("titles", "none")
"""What a speech model can be told to expect."""
HINTS_HELP = "what --asr is told to expect: words of the shop's titles, or none (default: titles, if it can be told)"

# Languages that are written without spaces between words, by their codes in Whisper.
_UNSPACED_LANGUAGES = ("zh", "yue", "ja", "th", "lo", "my", "km")
# A letter first, then what may stand within a word or a number: t-shirt, kid's, 5g.
_WORD = re.compile(r"[^\W_](?:[\w'’.-]*[^\W_])?")


def hint_words(titles: Iterable[str], language: str) -> list[str]:
    """
    The words of titles, first those that tell most of which product is meant: what stands in half of the titles tells
    more than what stands in one, or in nearly all. Titles in a script without spaces, such as Chinese, have no words
    to choose.

    Args:
        titles: Of a shop's images. Equal titles count once.
        language: A code such as "en".

    Returns:
        Words in lower case, each once; none for a language that is written without spaces.
    """
    if language in _UNSPACED_LANGUAGES:
        return []
    worded = [words for title in dict.fromkeys(titles) if (words := dict.fromkeys(_words(title)))]
    counts = Counter(word for words in worded for word in words)
    # A word that is in every title tells nothing of which one; the order of the titles decides between equals.
    telling = [word for word in counts if counts[word] < len(worded) or len(worded) == 1]
    return sorted(telling, key=lambda word: abs(2 * counts[word] - len(worded)))


def _words(title: str) -> list[str]:
    found = (match.group().lower() for match in _WORD.finditer(title))
    return [word for word in found if not UNSPACED.search(word) and not word.isdigit()]


def within(words: Iterable[str], most: int, size: Callable[[str], int]) -> str:
    """The first of the words, with spaces between them, that have a size of `most` together."""
    chosen: list[str] = []
    for word in words:
        if size(" ".join([*chosen, word])) > most:
            break
        chosen.append(word)
    return " ".join(chosen)


def expect_titles(transcriber: Any, titles: Iterable[str], asked: str | None = None) -> tuple[Any, int]:
    """
    A speech model that expects the words of a shop's titles, where it can be told.

    Args:
        transcriber: See `load_transcriber`. One with `expecting` can be told.
        titles: Of the shop that is on show.
        asked: One of `HINTS`, or `None` for titles where they are of use.

    Returns:
        The speech model to hear with, and how many different words there are to expect.

    Raises:
        ValueError: titles were asked for and would change nothing.
    """
    takes_hints, titles = hasattr(transcriber, "expecting"), [] if asked == "none" else list(titles)
    if asked == "titles" and not takes_hints:
        raise ValueError("--asr_hints titles needs a faster-whisper model; leave it out with another one.")
    language = getattr(transcriber, "language", None) or ""
    words = hint_words(titles, language) if takes_hints else []
    if asked == "titles" and not words:
        spoken = f" to expect in the language {language}" if language else ""
        raise ValueError(f"--asr_hints titles: the shop's titles have no words{spoken}; leave it out.")
    return (transcriber.expecting(titles) if takes_hints else transcriber), len(words)
