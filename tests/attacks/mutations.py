"""Files that were damaged or written by an attacker: each is refused in one sentence, or read with its content."""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VALUES = (
    None,
    True,
    "text",
    "",
    "32",
    0,
    -1,
    1,
    3,
    2.5,
    10**4,
    10**12,
    -(10**12),
    1e300,
    [],
    [1],
    ["a"],
    {},
    {"a": 1},
)
# What Python's json writes and reads, and what it reads as infinite.
RAW = ("NaN", "Infinity", "1e999", "[" * 5000 + "]" * 5000, '"\\ud800"', "9" * 500)
_JUNK = (b"\0", b"\xff\xfe", b"\n", b"9" * 400, b"[" * 3000, b"\x7f" * 8, b"\xed\xa0\x80")


def places(value, path=()) -> list[tuple]:
    """Where the values of a JSON file stand, containers included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in items for place in places(item, (*path, key))]


def mutate_json(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A damaged JSON file, and what was done to it."""
    text = data.decode()
    if draw.random() < 0.05:
        end = draw.randrange(len(text))
        return text[:end].encode(), f"cut at {end}"
    content = copy.deepcopy(json.loads(text))
    # The first so many, since a vocabulary would take all the turns.
    place = draw.choice(places(content)[:300])
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    if draw.random() < 0.1:
        del parent[place[-1]]
        return json.dumps(content).encode(), f"{place} removed"
    if draw.random() < 0.1:
        raw = draw.choice(RAW)
        parent[place[-1]] = "RAW"
        return json.dumps(content).replace('"RAW"', raw, 1).encode(), f"{place} = {raw[:20]}"
    parent[place[-1]] = draw.choice(VALUES)
    return json.dumps(content).encode(), f"{place} = {parent[place[-1]]!r}"


def mutate_bytes(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A file with flipped bits, a part of it lost, doubled, zeroed or overwritten."""
    place, length = draw.randrange(len(data)), draw.choice((1, 4, 100))
    how = draw.choice(("flip", "flip", "cut", "drop", "double", "zero", "junk"))
    part = data[place : place + length]
    changed = {
        "flip": bytes([part[0] ^ 1 << draw.randrange(8)]) + part[1:],
        "cut": b"",
        "drop": b"",
        "double": part * 2,
        "zero": bytes(len(part)),
        "junk": draw.choice(_JUNK),
    }[how]
    rest = b"" if how == "cut" else data[place + length :]
    return data[:place] + changed + rest, f"{how} {length} at {place}"


def mutate_header(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A safetensors file with another header, whose length is given rightly unless it is changed itself."""
    length = int.from_bytes(data[:8], "little")
    if draw.random() < 0.1:
        return draw.randbytes(8) + data[8:], "length of the header"
    header, what = mutate_json(data[8 : 8 + length], draw)
    return len(header).to_bytes(8, "little") + header + data[8 + length :], what


def mutate_lines(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """One line of a file of JSON lines damaged; now and then a line is lost or comes twice."""
    lines = data.splitlines(keepends=True)
    number = draw.randrange(len(lines))
    if draw.random() < 0.1:
        times = draw.choice((0, 2))
        return b"".join([*lines[:number], *[lines[number]] * times, *lines[number + 1 :]]), f"line {number} x {times}"
    mutate = draw.choice((mutate_json, mutate_json, mutate_bytes))
    changed, what = mutate(lines[number].rstrip(b"\n"), draw)
    return b"".join([*lines[:number], changed + b"\n", *lines[number + 1 :]]), f"line {number}: {what}"


def mutate_rows(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """One row of a table of tab-separated columns damaged."""
    lines = data.splitlines(keepends=True)
    number = draw.randrange(len(lines))
    changed, what = mutate_bytes(lines[number].rstrip(b"\n"), draw)
    return b"".join([*lines[:number], changed + b"\n", *lines[number + 1 :]]), f"row {number}: {what}"


@dataclass
class Reader:
    """
    A door of the project through which files come in.

    Attributes:
        folder: Where the whole files lie.
        names: Of those that are damaged, one at a time.
        read: What the door gives for the folder.
        mutate: How a file is damaged.
        wrong: Says what is wrong with what was read from damaged files, "" if it may be so; given what is read from
            the whole ones, what was read, and the damaged file's name and content.
        near: What a sentence may name in the place of the file or its folder.
    """

    folder: Path
    names: list[str]
    read: Callable[[Path], Any]
    mutate: Callable[[bytes, random.Random], tuple[bytes, str]]
    wrong: Callable[[Any, Any, str, bytes], str] = lambda whole, read, name, data: ""
    near: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What became of damaged files: how many were tried and refused, and what should not have happened."""

    tried: int = 0
    refused: int = 0
    tracebacks: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)

    def faults(self) -> str:
        """All that went wrong, a line each."""
        return "\n".join(self.tracebacks + self.sentences + self.silent)


def attack(reader: Reader, count: int, seed: int = 0) -> Outcome:
    """Reads a folder with one file after the other damaged, `count` times."""
    draw, outcome = random.Random(seed), Outcome()
    content = {name: (reader.folder / name).read_bytes() for name in reader.names}
    whole = reader.read(reader.folder)
    while outcome.tried < count:
        name = draw.choice(reader.names)
        data, what = reader.mutate(content[name], draw)
        if data == content[name]:
            continue
        outcome.tried += 1
        _write_anew(reader.folder / name, data)
        try:
            said = reader.wrong(whole, reader.read(reader.folder), name, data)
            if said:
                outcome.silent.append(f"{name}: {what}: {said}")
        except (ValueError, OSError) as error:
            outcome.refused += 1
            sentence = str(error)
            named = (name, str(reader.folder), *reader.near)
            if "\n" in sentence or len(sentence) > 1000 or not any(one in sentence for one in named):
                outcome.sentences.append(f"{name}: {what}: {type(error).__name__}: {sentence}")
        # What a command would end with as a traceback, such as a panic of the tokenizers' library.
        except BaseException as error:
            outcome.tracebacks.append(f"{name}: {what}: {type(error).__name__}: {error}")
        _write_anew(reader.folder / name, content[name])
    return outcome


def _write_anew(path: Path, data: bytes) -> None:
    # What was read before may be a view of the file that is there.
    path.unlink()
    path.write_bytes(data)
