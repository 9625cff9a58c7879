"""Lists as editors and shells of all systems save them, and ids of any table."""

import codecs
import json
from decimal import Decimal

import numpy as np
import pytest

from data_rice import parsing
from data_rice.collator import read_failure_log
from data_rice.line_index import build_line_index

ROWS = [{"id": "p0", "title": "蓝色杯子 é"}, {"id": "p1", "title": "a\u2028b\x85c"}]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
NO_MARK = "utf-16-le utf-16-be utf-32-le utf-32-be".split()
ENCODINGS = {
    "utf-8": TEXT.encode(),
    "utf-8 with a mark": TEXT.encode("utf-8-sig"),
    **{f"{name} without a mark": TEXT.encode(name) for name in NO_MARK},
    "utf-16-le": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "utf-16-be": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "utf-32-le": codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
    "utf-32-be": codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
    "windows": TEXT.replace("\n", "\r\n").encode(),
    "powershell": codecs.BOM_UTF16_LE + TEXT.replace("\n", "\r\n").encode("utf-16-le"),
    "old mac": TEXT.replace("\n", "\r").encode(),
    "old mac in utf-16": codecs.BOM_UTF16_BE + TEXT.replace("\n", "\r").encode("utf-16-be"),
    "no last line end": TEXT.rstrip("\n").encode(),
    "blank lines": b"\n" + TEXT.encode() + b"\n  \r\n",
}


@pytest.mark.parametrize("saved", ENCODINGS)
def test_a_list_is_read_in_any_encoding(tmp_path, saved):
    path = tmp_path / "gallery.jsonl"
    path.write_bytes(ENCODINGS[saved])
    rows = list(parsing.read_json_lines(path))
    assert [row for _, row in rows] == ROWS
    assert [line for line, _ in rows] == ([2, 3] if saved == "blank lines" else [1, 2])


@pytest.mark.parametrize("saved", ["utf-8-sig", "utf-16", "utf-32", *NO_MARK])
def test_a_json_file_is_read_in_any_encoding(tmp_path, saved):
    path = tmp_path / "train.json"
    path.write_bytes(json.dumps({"é": ["人"]}, ensure_ascii=False, indent=1).encode(saved))
    assert parsing.read_json_object(path) == {"é": ["人"]}


@pytest.mark.parametrize(
    "data, message",
    [
        ("{}\n杯子\n".encode("gbk"), r"line 2: the line is not UTF-8 \(.*\); save the file as UTF-8"),
        ('{}\n{}\n"é"\n'.encode("latin-1"), r"line 3: the line is not UTF-8"),
        (b"{}\n{}\n\0", "line 3: the line holds a NUL character; the file is damaged"),
        (codecs.BOM_UTF16_LE + "{}\n{}\n".encode("utf-16-le") + b"\x00\xd8{\x00", "line 3: not UTF-16 .*; save"),
        (codecs.BOM_UTF16_LE + "{}\n".encode("utf-16-le")[:-1], "line 1: not UTF-16 .*; save the file as UTF-8"),
    ],
)
def test_unreadable_text_is_named_with_its_line(tmp_path, data, message):
    path = tmp_path / "gallery.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"gallery.jsonl, {message}"):
        list(parsing.read_json_lines(path))


def test_an_empty_file_has_no_lines(tmp_path):
    for data in (b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, b"\r\n", b"\r"):
        (tmp_path / "empty").write_bytes(data)
        assert list(parsing.read_lines(tmp_path / "empty")) == []


@pytest.mark.parametrize("saved", ENCODINGS)
def test_lines_by_offset_are_right_or_refused(tmp_path, saved):
    """What would have to be turned in memory has no offsets: it must not give other rows."""
    path = tmp_path / "list.txt"
    path.write_bytes(ENCODINGS[saved])
    if "utf-16" in saved or "utf-32" in saved or saved in ("powershell", "old mac"):
        with pytest.raises(ValueError, match="list.txt, line 1: .* must be UTF-8 with line feeds"):
            build_line_index([str(path)], lambda: _select, tmp_path / "cache")
        return
    index = build_line_index([str(path)], lambda: _select, tmp_path / "cache")
    assert [json.loads(index.read(row)[2]) for row in range(len(index))] == ROWS


def _select(file, line, raw, problems):
    return raw, ()


def test_the_log_of_unreadable_media_is_read_by_lines(tmp_path):
    failure = {"id": "a\u2028b", "file": "x\x85.jpg", "reason": "r", "outcome": "skipped"}
    (tmp_path / "log").write_text((json.dumps(failure, ensure_ascii=False) + "\n") * 2, encoding="utf-8")
    assert read_failure_log(tmp_path / "log") == [failure]


@pytest.mark.parametrize(
    "value, text",
    [
        ("a", "a"),
        ("017", "017"),
        (17, "17"),
        (17.0, "17"),
        (-0.0, "0"),
        (np.int64(2**60 + 1), str(2**60 + 1)),
        (np.uint8(3), "3"),
        (np.float32(17), "17"),
        (10**30, str(10**30)),
        (np.str_("a"), "a"),
    ],
)
def test_ids_are_text_or_whole_numbers(value, text):
    assert parsing.id_text(value) == text and type(parsing.id_text(value)) is str


@pytest.mark.parametrize(
    "value, words",
    [
        *((value, "neither text nor a whole number") for value in (True, np.True_, 1.5, float("nan"), float("inf"))),
        *((value, "neither text nor a whole number") for value in (None, "", b"a", ["a"], Decimal(3))),
        (2.0**53, "too large .* to be exact"),
        (np.float32(2**24), "too large .* to be exact"),
        ("a\ud83d", "half of a surrogate pair"),
    ],
)
def test_invalid_ids_are_refused(value, words):
    with pytest.raises(ValueError, match=words):
        parsing.id_text(value)
