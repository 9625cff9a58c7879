"""Strict readers for annotation files: every value is checked, and every error names the file and the line.

Text is never evaluated as code. Lists in Python notation are translated to JSON if that is unambiguous, and refused
otherwise.
"""

import codecs
import hashlib
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from numbers import Integral
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm.auto import tqdm

# A smaller file is read within a few seconds and needs no progress bar.
_PROGRESS_BYTES = 64 * 1024 * 1024
# Rows store boxes in single precision, where two numbers near 1 that are closer than this may become equal.
_SMALLEST_SIDE = 1e-6

SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which neither UTF-8 nor Arrow can hold."""


def row_error(path: str | os.PathLike, line: int, message: str) -> ValueError:
    """Build the error for a bad row of an annotation file; ``line`` counts from 1."""
    return ValueError(f"{path}, line {line}: {message}")


def scan_lines(path: str | os.PathLike, by_offset: bool = False) -> Iterator[tuple[int, int, bytes]]:
    """Open a file of lines and return ``(line number, offset in bytes, line)`` of those that are not blank.

    Lines are UTF-8, without line end and byte order mark. A file in UTF-16 or UTF-32, or with carriage returns as line
    ends, is converted in memory. In other files only a line feed ends a line, because titles and speech may hold other
    Unicode separators.

    Args:
        path: the file.
        by_offset: the caller will read lines by their offsets in the file, so refuse files that need conversion.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged UTF-16 or UTF-32, or needs conversion despite ``by_offset``.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist; put the annotation file there.")
    file = open(path, "rb", buffering=1 << 20)
    try:
        encoding = _encoding_of(file.read(4))
        file.seek(0)
        turned = None
        if encoding != "utf-8":
            turned = decode_text(file.read(), path).encode("utf-8")
            file.close()
            file = io.BytesIO(turned)
        first = file.readline()
        if not first.endswith(b"\n") and b"\r" in first.rstrip(b"\r"):
            turned = first.replace(b"\r", b"\n")
            file.close()
            file = io.BytesIO(turned)
        if turned is not None and by_offset:
            raise row_error(path, 1, "a list for streaming must be UTF-8 with line feeds; save the file in that form.")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return _scan(file)


def _scan(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    offset = 0
    with file:
        for number, raw in enumerate(file, start=1):
            start = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
            line = raw[start:].rstrip(b"\r\n")
            # A line of tabs is a row of empty columns, not a blank line.
            if line.strip(b" "):
                yield number, offset + start, line
            offset += len(raw)


def read_lines(path: str | os.PathLike, description: str | None = None) -> Iterator[tuple[int, str]]:
    """Yield ``(line number, text)`` of a file's lines that are not blank, see `scan_lines`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is not UTF-8 or holds a NUL character.
    """
    lines = scan_lines(path)
    size = os.path.getsize(path)
    progress = tqdm(
        total=size,
        unit="B",
        unit_scale=True,
        desc=description or f"Reading {os.path.basename(path)}",
        disable=description is None or size < _PROGRESS_BYTES,
    )
    with progress:
        for number, offset, raw in lines:
            progress.update(offset - progress.n)
            yield number, decode_line(path, number, raw)


def _encoding_of(start: bytes) -> str:
    """Detect UTF-16 and UTF-32 by their byte order marks, or by the zero bytes of a first ASCII character."""
    return json.detect_encoding(start).replace("utf-8-sig", "utf-8")


def decode_text(data: bytes, path: str | os.PathLike) -> str:
    """Return the text of a UTF-8, UTF-16 or UTF-32 file without byte order mark; ``path`` is for the message.

    Raises:
        ValueError: it is none of these.
    """
    encoding = _encoding_of(data[:4])
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, errors="replace").count("\n") + 1
        name = encoding.upper().removesuffix("-LE").removesuffix("-BE")
        raise row_error(path, line, f"not {name} ({error.reason}); save the file as UTF-8.") from None


def decode_line(path: str | os.PathLike, number: int, raw: bytes) -> str:
    """Return the text of a line without its end; ``path`` and ``number`` are for the messages.

    Raises:
        ValueError: the line is not UTF-8 or holds a NUL character.
    """
    if b"\0" in raw:
        raise row_error(path, number, "the line holds a NUL character; the file is damaged, restore it.")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise row_error(path, number, f"the line is not UTF-8 ({error.reason}); save the file as UTF-8.") from None


def read_table(
    path: str | os.PathLike, num_columns: int, description: str | None = None
) -> Iterator[tuple[int, list[str]]]:
    """Yield ``(line number, columns)`` of a tab-separated file without a header.

    Raises:
        ValueError: a row does not have ``num_columns`` columns.
    """
    for number, text in read_lines(path, description):
        yield number, check_columns(path, number, text.split("\t"), num_columns)


def check_columns(path: str | os.PathLike, number: int, columns: list, num_columns: int) -> list:
    """Return the columns of a row; ``path`` and ``number`` are for the message.

    Raises:
        ValueError: there are not ``num_columns`` of them.
    """
    if len(columns) != num_columns:
        raise row_error(
            path,
            number,
            f"expected {num_columns} tab-separated columns, found {len(columns)}; repair or remove the row.",
        )
    return columns


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {duplicate!r} appears twice; keep one of the entries")
    return result


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number; write null or remove the entry")


def _parse_int(text: str) -> int:
    if len(text) > 400:
        raise ValueError(f"a number has {len(text)} digits; repair it")
    return int(text)


def _loads(text: str) -> object:
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_int=_parse_int)
    except RecursionError:
        raise ValueError("the value is nested too deeply") from None
    if "\\ud" in text.lower():
        # JSON allows an escaped half of a surrogate pair.
        if SURROGATE.search(json.dumps(value, ensure_ascii=False)):
            raise ValueError("a text holds half of a surrogate pair; write the whole character")
    return value


def read_json_object(path: str | os.PathLike) -> dict:
    """Read a JSON file that holds one object; a key that appears twice is an error.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not UTF-8 JSON, or not an object.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist; put the annotation file there.")
    return parse_json_object(Path(path).read_bytes(), path)


def parse_json_object(data: bytes, path: str | os.PathLike) -> dict:
    """Parse the contents of a JSON file that holds one object; ``path`` is for the messages.

    Raises:
        ValueError: as `read_json_object`.
    """
    text = decode_text(data, path)
    try:
        value = _loads(text)
    except json.JSONDecodeError as error:
        raise row_error(path, error.lineno, f"not valid JSON ({error.msg}); restore the file.") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(value).__name__}; restore the file.")
    return value


def read_json_lines(path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
    """Yield ``(line number, object)`` of a file with one JSON object per line.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is not a JSON object.
    """
    for number, text in read_lines(path):
        yield number, parse_json_line(path, number, text)


def parse_json_line(path: str | os.PathLike, number: int, text: str) -> dict:
    """Return the object of one line; ``path`` and ``number`` are for the messages.

    Raises:
        ValueError: the line is not a JSON object.
    """
    try:
        value = _loads(text)
    except json.JSONDecodeError as error:
        raise row_error(path, number, f"not valid JSON ({error.msg}, column {error.colno}).") from None
    except ValueError as error:
        raise row_error(path, number, f"{error}.") from None
    if not isinstance(value, dict):
        raise row_error(path, number, f"expected a JSON object, found a {type(value).__name__}.")
    return value


def parse_string_list(text: str) -> list[str]:
    """Parse ``['a', 'b']`` or ``["a", "b"]``; strings hold neither quotes nor backslashes.

    Raises:
        ValueError: the text is anything else (without file and line, which the caller adds).
    """
    if "\\" in text or ("'" in text and '"' in text):
        raise ValueError("expected a list of plain quoted strings such as ['a', 'b']")
    try:
        value = _loads(text.replace("'", '"'))
    except ValueError:
        value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("expected a list of quoted strings such as ['a', 'b']")
    return value


def is_number(value: object) -> bool:
    """Return whether ``value`` is a finite int or float; a bool does not count as a number."""
    # JSON integers have any length; those beyond a float's range count as not finite.
    if type(value) is int:
        return abs(value) <= sys.float_info.max
    return type(value) is float and math.isfinite(value)


def id_text(value: object) -> str:
    """Return an id as text. Whole numbers are written without a decimal point: 17 and 17.0 are "17".

    Raises:
        ValueError: it is empty, or neither text nor a whole number (without file and line, which the caller adds).
    """
    if isinstance(value, str) and value:
        if SURROGATE.search(value):
            raise ValueError(f"is {value!r}, which holds half of a surrogate pair; write the whole character")
        return str(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        if abs(value) < 2 ** (np.finfo(type(value)).nmant + 1):
            return str(int(value))
        raise ValueError(f"is {value}, too large for a number with a decimal point to be exact; write it as text")
    raise ValueError(f"is {value!r}, neither text nor a whole number; write it as text")


def check_box(value: object) -> list[float]:
    """Return ``value`` as ``[left, top, right, bottom]`` floats.

    Raises:
        ValueError: it is not a list of four finite numbers (without file and line, which the caller adds).
    """
    if not isinstance(value, list) or len(value) != 4 or not all(is_number(item) for item in value):
        raise ValueError("expected a box as four finite numbers [left, top, right, bottom]")
    return [float(item) for item in value]


def parse_box_list(text: str) -> list[list[float]]:
    """Parse ``[[l, t, r, b], ...]`` as floats, in the unit of the text.

    Raises:
        ValueError: the text is anything else (without file and line, which the caller adds).
    """
    try:
        value = _loads(text)
    except ValueError:
        raise ValueError("expected a list of boxes such as [[0, 0, 10, 20]]") from None
    if not isinstance(value, list):
        raise ValueError("expected a list of boxes such as [[0, 0, 10, 20]]")
    return [check_box(item) for item in value]


def clip_box(box: list[float], width: float = 1.0, height: float = 1.0) -> list[float] | None:
    """Scale a box by the frame size and cut it at the frame's border.

    Returns:
        ``[left, top, right, bottom]`` in 0 to 1, or None ("no box") if no area is left.
    """
    left, top, right, bottom = (
        min(max(value / size, 0.0), 1.0) for value, size in zip(box, (width, height, width, height))
    )
    return [left, top, right, bottom] if min(right - left, bottom - top) >= _SMALLEST_SIDE else None


def enclosing_box(boxes: list[list[float]]) -> list[float] | None:
    """Return the smallest box around all ``boxes`` that have an area, or None when there is none."""
    real = [box for box in boxes if box is not None]
    if not real:
        return None
    lefts, tops, rights, bottoms = zip(*real)
    return [min(lefts), min(tops), max(rights), max(bottoms)]


def check_name(value: object, what: str) -> str:
    """Return ``value`` if it can be the name of one file or folder.

    Raises:
        ValueError: it is empty, not a string, or would lead elsewhere (without file and line, which the caller adds).
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the {what} is empty")
    if value in (".", "..") or any(character in value for character in "/\\\0"):
        raise ValueError(f"the {what} {value!r} is not a plain name and would lead out of the data folder")
    return value


def check_relative_path(value: object, what: str) -> str:
    """Return ``value`` if it is a path that stays below the folder it is relative to.

    Raises:
        ValueError: it is empty, absolute or climbs up (without file and line, which the caller adds).
    """
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError(f"the {what} must be a non-empty path relative to the data folder")
    parts = value.replace("\\", "/").split("/")
    if os.path.isabs(value) or parts[0] == "" or parts[0].endswith(":") or ".." in parts:
        raise ValueError(f"the {what} {value!r} leads out of the data folder; write it relative to that folder")
    return value


def fingerprint(paths: Iterable[str | os.PathLike]) -> str:
    """Hash the real names, sizes and modification times of files and folders; missing ones are allowed."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(path)
            state = f"{status.st_size}:{status.st_mtime_ns}"
        except OSError:
            state = "missing"
        digest.update(f"{os.path.realpath(path)}\0{state}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def file_sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
