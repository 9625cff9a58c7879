"""Annotation files of every kind of damage: a right row or one sentence with file and line, and nothing else."""

import json
import math
import re
import tempfile
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from data_rice import parsing
from data_rice.lpr4m import layout
from data_rice.lpr4m.index import id_of_url
from processing_rice.media_rice import split_tar_member, tar_member_path

# Hypothesis keeps caches of its own even without a database.
set_hypothesis_home_dir(tempfile.mkdtemp(prefix="rice-hypothesis-"))

# Derandomised and without a database: the same examples every time, and no files in the tree.
FAST = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
THOROUGH = settings(FAST, max_examples=2000)


def fuzz(*strategies):
    """Make two tests of one: 200 examples by default, 2,000 among the slow ones."""

    def decorate(function):
        @pytest.mark.parametrize(
            "level", [pytest.param(FAST, id="200"), pytest.param(THOROUGH, id="2000", marks=pytest.mark.slow)]
        )
        def test(tmp_path, level):
            level(given(st.tuples(*strategies))(lambda values: function(tmp_path, *values)))()

        test.__doc__ = function.__doc__
        return test

    return decorate


# Ids, texts and boxes as real lists hold them.
uuids = st.uuids(version=4).map(str)
clip_ids = st.builds(
    lambda live, start, length: f"{live}-{start}-{start + length}", uuids, *[st.integers(0, 10**13)] * 2
)
cell_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r\0"), max_size=30)
coordinates = st.one_of(st.integers(-(10**6), 10**6), st.floats(-1e6, 1e6))
pixel_boxes = st.lists(coordinates, min_size=4, max_size=4)


@st.composite
def good_rows(draw):
    """Eleven columns, and what they say."""
    clip_id = draw(clip_ids)
    frame_ids = [f"{clip_id}-{index:04d}" for index in range(draw(st.integers(0, 4)))]
    boxes = draw(st.one_of(st.just([]), st.lists(pixel_boxes, min_size=len(frame_ids), max_size=len(frame_ids))))
    frames = draw(st.sampled_from([str(frame_ids), json.dumps(frame_ids)]))
    image_id = draw(uuids) + draw(st.sampled_from(["", "-0", "-3"]))
    rest = draw(st.lists(cell_text, min_size=7, max_size=7))
    return [clip_id, frames, str(boxes), image_id, *rest], (clip_id, frame_ids, boxes, image_id, rest)


def _write(tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def _one_sentence(error: ValueError, path: Path, line: int | None = None) -> None:
    """The message is one line of moderate length that names the file, and the line where it is known."""
    text = str(error)
    where = f"{re.escape(str(path))}, line {line}: " if line else f"{re.escape(str(path))}[,:]"
    assert re.match(where, text), text
    assert "\n" not in text.replace(str(path), "") or repr(text).count("\\n") == text.count("\n"), text


@fuzz(
    st.lists(good_rows(), max_size=4, unique_by=lambda row: row[0][0]), st.sampled_from(["\n", "\r\n"]), st.booleans()
)
def test_good_rows_come_back_as_written(tmp_path, rows, newline, byte_order_mark):
    """An independent reading of what was written, column by column."""
    text = "".join("\t".join(columns) + newline for columns, _ in rows)
    path = _write(tmp_path, "train.txt", (b"\xef\xbb\xbf" if byte_order_mark else b"") + text.encode())
    read = list(layout.read_training_rows([str(path)]))
    assert [line for _, line, _ in read] == list(range(1, len(rows) + 1))
    for (_, _, row), (_, (clip_id, frame_ids, boxes, image_id, rest)) in zip(read, rows, strict=True):
        assert (row.clip_id, row.frame_ids, row.image_id) == (clip_id, frame_ids, image_id)
        assert row.boxes == [[float(value) for value in box] for box in boxes]
        assert row.live_id == clip_id[:36] and str(uuid.UUID(row.live_id)) == row.live_id
        assert row.title == rest[0] and row.category == (rest[2] or rest[1])
        assert [row.asr, row.product_scale, row.visible_duration, row.product_number] == rest[3:]


damages = {
    "truncate": lambda line, at, junk: line[: at % max(1, len(line))],
    "insert": lambda line, at, junk: line[: at % (len(line) + 1)] + junk + line[at % (len(line) + 1) :],
    "replace": lambda line, at, junk: (
        line[: at % max(1, len(line))] + junk + line[at % max(1, len(line)) + len(junk) :]
    ),
    "commas": lambda line, at, junk: line.replace(b"\t", b","),
    "spaces": lambda line, at, junk: line.replace(b"\t", b"    "),
    "double tabs": lambda line, at, junk: line.replace(b"\t", b"\t\t", 1 + at % 3),
    "nested quotes": lambda line, at, junk: line.replace(b"'", b"'\"'", 1 + at % 4),
    "huge number": lambda line, at, junk: line.replace(b"[[", b"[[" + b"9" * (1 + at % 6000) + b", ", 1),
    "exponent": lambda line, at, junk: line.replace(b"]]", b", 1e999]]", 1),
    "brackets": lambda line, at, junk: line.replace(b"[[", b"[" * (2 + at % 3000), 1),
    "code": lambda line, at, junk: line.replace(b"['", b"[__import__('os').getcwd(), '", 1),
    "up": lambda line, at, junk: line.replace(b"['", b"['../../../etc/", 1),
}
junk = st.one_of(
    st.sampled_from(
        [b"\0", b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\t", b"\r", b"'", b'"', b"\\", b"[]", b"{}", b"NaN"]
    ),
    st.binary(min_size=1, max_size=8).filter(lambda data: b"\n" not in data),
)


@fuzz(good_rows(), good_rows(), st.sampled_from(sorted(damages)), st.integers(0, 10**6), junk)
def test_damaged_rows_are_refused_with_their_line_or_still_right(tmp_path, first, second, damage, at, junk):
    """Whatever one line becomes, the line before it is read, and a row that passes says what its line says."""
    before, after = ("\t".join(columns).encode() for columns, _ in (first, second))
    broken = damages[damage](after, at, junk)
    path = _write(tmp_path, "train.txt", before + b"\n" + broken + b"\n")
    rows = layout.read_training_rows([str(path)])
    assert next(rows)[2].clip_id == first[1][0]
    try:
        read = list(rows)
    except ValueError as error:
        _one_sentence(error, path, 2)
        return
    if not broken.strip(b" \r"):
        assert read == []
        return
    ((_, line, row),) = read
    columns = broken.rstrip(b"\r\n").decode().split("\t")
    assert line == 2 and len(columns) == 11
    assert [row.clip_id, row.image_id, row.title, row.asr] == [columns[0], columns[3], columns[4], columns[7]]
    assert re.fullmatch(r"[^-]+(-[^-]+){6}", row.clip_id)
    assert row.clip_id.startswith(row.live_id) and row.live_id.count("-") == 4
    # The list of frames, read in a way of its own: what stands between quotes.
    assert row.frame_ids == [a or b for a, b in re.findall(r"'([^']*)'|\"([^\"]*)\"", columns[1])]
    numbers = re.findall(r"[-+.\deE]+", columns[2])
    assert [value for box in row.boxes for value in box] == [float(number) for number in numbers]
    assert not row.boxes or len(row.boxes) == len(row.frame_ids)
    assert all(not set("/\\\0") & set(name) and name not in (".", "..") for name in [*row.frame_ids, row.image_id])


@fuzz(st.lists(good_rows(), min_size=2, max_size=4, unique_by=lambda row: row[0][0]), st.data())
def test_repeated_clips_are_refused(tmp_path, rows, data):
    again = data.draw(st.integers(0, len(rows) - 1))
    lines = ["\t".join(columns) for columns, _ in [*rows, rows[again]]]
    path = _write(tmp_path, "train.txt", "\n".join(lines).encode())
    with pytest.raises(ValueError, match="appears a second time") as error:
        list(layout.read_training_rows([str(path)]))
    _one_sentence(error.value, path, len(rows) + 1)


@fuzz(st.binary(max_size=300))
def test_any_bytes_as_tables(tmp_path, data):
    """Noise in place of a file: every reader yields or refuses, naming the file."""
    path = _write(tmp_path, "noise", data)
    for read in (
        lambda: list(layout.read_training_rows([str(path)])),
        lambda: layout.products_of_livestreams([str(path)]),
        lambda: layout.read_id_table(str(path), 2, "clip id"),
        lambda: layout.read_id_lists(str(path), "clip id"),
        lambda: layout.read_test_boxes(str(path)),
        lambda: layout.read_main_images(str(path)),
        lambda: list(parsing.read_json_lines(path)),
        lambda: parsing.read_json_object(path),
    ):
        try:
            read()
        except ValueError as error:
            _one_sentence(error, path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@fuzz(json_values, st.sampled_from(["ids", "boxes"]), names)
def test_any_json_as_test_files(tmp_path, value, kind, key):
    """Right JSON of the wrong shape; what passes is exactly what was written."""
    value = value if isinstance(value, dict) else {key: value}
    path = _write(tmp_path, "test.json", json.dumps(value).encode())
    try:
        if kind == "ids":
            table = layout.read_id_lists(str(path), "clip id")
            assert table == value
            ids = [*table, *(name for ids in table.values() for name in ids)]
            assert all(isinstance(name, str) and not set("/\\\0") & set(name) for name in ids)
        else:
            read = layout.read_test_boxes(str(path))
            assert {frame for frames in read.values() for frame in frames} == set(value)
    except ValueError as error:
        _one_sentence(error, path)


fractions = st.lists(st.floats(-2, 2), min_size=4, max_size=4)


@fuzz(
    st.dictionaries(
        st.builds(lambda clip, n: f"{clip}-{n}", clip_ids, st.integers(0, 9)), st.lists(fractions, max_size=3)
    )
)
def test_test_boxes_are_cut_at_the_frame(tmp_path, value):
    path = _write(tmp_path, "boxes.json", json.dumps(value).encode())
    read = layout.read_test_boxes(str(path))
    for frame_id, boxes in value.items():
        cut = [[min(max(number, 0.0), 1.0) for number in box] for box in boxes]
        expected = [box for box in cut if box[2] - box[0] >= 1e-6 and box[3] - box[1] >= 1e-6]
        assert read[frame_id.rpartition("-")[0]][frame_id] == expected


@fuzz(
    st.dictionaries(clip_ids, st.lists(uuids, max_size=3), min_size=1, max_size=3),
    st.sampled_from(["truncate", "insert", "replace"]),
    st.integers(0, 10**6),
    junk,
)
def test_damaged_json_names_the_file(tmp_path, value, damage, at, junk):
    path = _write(tmp_path, "test.json", damages[damage](json.dumps(value, indent=0).encode(), at, junk))
    try:
        assert layout.read_id_lists(str(path), "clip id") == json.loads(path.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        _one_sentence(error, path)


@fuzz(clip_ids, st.lists(uuids, max_size=2), st.lists(uuids, max_size=2))
def test_repeated_keys_are_refused(tmp_path, key, first, second):
    text = f'{{"{key}": {json.dumps(first)},\n"{key}": {json.dumps(second)}}}'
    path = _write(tmp_path, "test.json", text.encode())
    with pytest.raises(ValueError, match="appears twice") as error:
        layout.read_id_lists(str(path), "clip id")
    _one_sentence(error.value, path)


@fuzz(
    st.one_of(pixel_boxes, st.lists(st.floats(), min_size=4, max_size=4)), st.integers(1, 5000), st.integers(1, 5000)
)
def test_boxes_stay_inside_the_frame(tmp_path, box, width, height):
    try:
        checked = parsing.check_box(box)
    except ValueError:
        assert not all(math.isfinite(value) for value in box)
        return
    cut = parsing.clip_box(checked, width, height)
    left, top, right, bottom = checked
    if cut is None:
        # Sides under a millionth of the frame count as none, and vanish in single precision.
        wide, high = min(right, width) - max(left, 0), min(bottom, height) - max(top, 0)
        assert wide <= 1.001e-6 * width or high <= 1.001e-6 * height
        return
    assert 0 <= cut[0] < cut[2] <= 1 and 0 <= cut[1] < cut[3] <= 1
    assert cut[0] == pytest.approx(max(left, 0) / width) and cut[3] == pytest.approx(min(bottom, height) / height)


@fuzz(st.text(max_size=40))
def test_any_text_as_a_name_path_url_or_list(tmp_path, text):
    for parse in (
        lambda: parsing.check_name(text, "id"),
        lambda: id_of_url(f"https://cdn.example/{text}"),
        lambda: id_of_url(text),
    ):
        try:
            name = parse()
        except ValueError:
            continue
        assert (tmp_path / name).parent == tmp_path and name not in (".", "..")
    try:
        relative = parsing.check_relative_path(text, "path")
        assert (tmp_path / relative).resolve().is_relative_to(tmp_path.resolve())
    except ValueError:
        pass
    for parse in (parsing.parse_string_list, parsing.parse_box_list):
        try:
            assert isinstance(parse(text), list)
        except ValueError:
            pass


@fuzz(st.text(st.characters(exclude_characters="\0"), min_size=1), st.integers(0, 10**14), st.integers(0, 10**10))
def test_tar_member_paths_come_back(tmp_path, name, offset, size):
    assert split_tar_member(tar_member_path(f"{name}.tar", offset, size)) == (f"{name}.tar", offset, size)
    assert split_tar_member(f"{name}.jpg") is None
