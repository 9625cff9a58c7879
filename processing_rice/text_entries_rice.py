"""One rule for titles, ASR and ids from tables: what is a text, what counts as missing, and what is refused."""

import sys
from collections.abc import Mapping
from decimal import Decimal

import numpy as np


def is_missing(value) -> bool:
    """Whether a value stands for a missing entry of a table: `None`, NaN, `pandas.NA`, NaT, a masked entry."""
    if value is None or value is np.ma.masked:
        return True
    pandas = sys.modules.get("pandas")
    if pandas is not None and (value is pandas.NA or value is pandas.NaT):
        return True
    return isinstance(value, (float, Decimal, np.generic)) and not isinstance(value, (str, bytes)) and value != value


def read_text(value) -> str:
    """
    A text of a table, "" if it is missing. Halves of surrogate pairs are joined, or replaced by U+FFFD.

    Raises:
        ValueError: if it is not text. The message starts with "is"; the caller puts the name of the entry before it.
    """
    if is_missing(value):
        return ""
    if not isinstance(value, str):
        shown = repr(value)
        shown = shown if len(shown) <= 40 else shown[:37] + "..."
        raise ValueError(f"is a {type(value).__name__} ({shown}); give text, or None if there is none")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return str(value)


def read_texts(values, name: str) -> list[str]:
    """
    Texts in any accepted form as a list of `str`.

    Args:
        values: One text, or several in a list, a tuple, an array or a column of a table.
        name: Name of the argument, for the error message.

    Raises:
        ValueError: if an entry is not text, or if `values` is bytes, a mapping, a set, or has several columns.
    """
    if isinstance(values, str) or is_missing(values):
        values = [values]
    if hasattr(values, "to_pylist"):
        # Iterating an Arrow column gives Arrow scalars, not texts.
        values = values.to_pylist()
    is_flat = getattr(values, "ndim", 1) == 1 and not isinstance(values, (bytes, bytearray, Mapping, set, frozenset))
    if not is_flat or not hasattr(values, "__iter__"):
        raise ValueError(f"`{name}` is a {type(values).__name__}; give a text, or a list of texts in order.")
    texts = []
    for number, value in enumerate(values):
        try:
            texts.append(read_text(value))
        except ValueError as error:
            raise ValueError(f"Entry {number} of `{name}` {error}.") from None
    return texts


__all__ = ["is_missing", "read_text", "read_texts"]
