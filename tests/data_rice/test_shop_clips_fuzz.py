"""Damaged and hostile shop_clips folders: each gives whole rows, or one error that names the file and the line."""

import copy
import json
import os
import re

import pytest

from data_rice.features import view_features
from data_rice.shop_clips import shop_clips
from data_rice.shop_clips.check import check_folder

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

GALLERY = [
    {"gallery_id": "g0", "image": "gallery/g0.jpg", "title": "a 'red' \"cup\"", "category": "Cup"},
    {"gallery_id": "g1", "image": "gallery/g1.jpg", "name": "Pear"},
    {"gallery_id": 2, "image": "gallery/g2.jpg"},
]
CLIPS = [
    {"query_id": "c0", "frames": ["frames/a.jpg", "frames/b.jpg"], "gt_gallery_ids": ["g0", "g1"], "asr": "苹果"},
    {"query_id": "c1", "frames": ["frames/b.jpg"], "boxes": [[0.1, 0.2, 0.5, 1.02]], "gt_gallery_ids": [2]},
    {"query_id": "c2", "video": "videos/v.mp4", "start": 1, "end": 4.5, "gt_gallery_ids": ["g1"]},
]
PATHS = st.sampled_from(
    [
        "frames/a.jpg",
        "../secret",
        "frames/../../secret",
        "/etc/passwd",
        "link/secret",
        "frames/link.jpg",
        "..\\x",
        "C:\\x",
    ]
    + ["", " ", ".", "..", "a\0b", "frames/" + "x" * 5000, "frames/./a.jpg", "~/x", "frames/é\u2028.jpg", "\ud800"]
)
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([10**18, -(10**18), 10**399, 1e308, -1e308, 5e-324, 2**63, float("nan"), float("inf")]),
    st.floats(-2, 2),
)
BOXES = st.one_of(st.none(), st.lists(NUMBERS, min_size=3, max_size=5))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, PATHS, st.text(max_size=5), st.sampled_from(["g0", "c0", "2"]))
VALUES = st.one_of(
    SCALARS,
    BOXES,
    st.lists(SCALARS, max_size=3),
    st.lists(BOXES, max_size=3),
    st.dictionaries(st.text(max_size=3), SCALARS, max_size=2),
    st.just([[[[]]]]),
)
KEYS = st.sampled_from([*shop_clips.GALLERY_KEYS, *shop_clips.CLIP_KEYS, "unknown"])
CHANGES = st.lists(st.tuples(st.booleans(), st.integers(0, 2), KEYS, VALUES), max_size=2)
DAMAGES = st.lists(
    st.tuples(
        st.booleans(),
        st.sampled_from(["cut", "drop", "insert", "double", "empty"]),
        st.integers(0, 600),
        st.sampled_from(
            [b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b"\r", b'"', b"'", b"{", b"]", b"9" * 500, b"[" * 3000]
        ),
    ),
    max_size=2,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "shop"
    for name in ("frames", "gallery"):
        (folder / name).mkdir(parents=True)
    (folder.parent / "secret").write_text("secret")
    (folder / "link").symlink_to(folder.parent)
    (folder / "frames/link.jpg").symlink_to(folder.parent / "secret")
    return folder


def damage(data: bytes, kind: str, place: int, insert: bytes) -> bytes:
    place = min(place, len(data))
    lines = data.splitlines(keepends=True)
    if kind == "double" and lines:
        return data + lines[place % len(lines)]
    return {
        "cut": data[:place],
        "drop": data[:place] + data[place + 1 :],
        "insert": data[:place] + insert + data[place:],
        "empty": b"",
    }.get(kind, data)


def write(root, changes, damages) -> dict[str, bytes]:
    rows = {"gallery.jsonl": copy.deepcopy(GALLERY), "clips_train.jsonl": copy.deepcopy(CLIPS)}
    for in_clips, line, key, value in changes:
        rows["clips_train.jsonl" if in_clips else "gallery.jsonl"][line][key] = value
    files = {name: "".join(json.dumps(row) + "\n" for row in lines).encode() for name, lines in rows.items()}
    for in_clips, *how in damages:
        name = "clips_train.jsonl" if in_clips else "gallery.jsonl"
        files[name] = damage(files[name], *how)
    for name, data in files.items():
        (root / name).write_bytes(data)
    return files


def assert_whole(root, clip, relevant, gallery) -> None:
    inside = str(root) + os.sep
    for path in [*clip["frames"], *filter(None, [clip["video"]])]:
        assert path.startswith(inside) and os.path.realpath(path).startswith(inside) and "\0" not in path
    assert clip["clip_id"] and len(clip["boxes"]) == len(clip["frames"])
    for left, top, right, bottom in filter(None, clip["boxes"]):
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    assert (clip["start"], clip["end"]) == (-1, -1) or (clip["video"] and 0 <= clip["start"] < clip["end"] <= 1e6)
    assert set(relevant) <= gallery.keys() and clip["product_id"] == (relevant[0] if relevant else "")
    view_features("query").encode_example({**clip, "relevant": relevant})
    json.dumps(clip, ensure_ascii=False).encode()


def assert_named(error: ValueError, files: dict[str, bytes]) -> None:
    message = str(error)
    assert "\n" not in message.replace("\\n", "")
    place = re.search(r"/([a-z_]+\.jsonl)(?:, line (\d+): | holds no image)", message)
    assert place, message
    if place[2]:
        assert 1 <= int(place[2]) <= files[place[1]].count(b"\n") + 1


def run(root, max_examples: int) -> None:
    outcomes = set()

    @hypothesis.settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(CHANGES, DAMAGES)
    def check(changes, damages):
        files = write(root, changes, damages)
        try:
            gallery = shop_clips.read_gallery(str(root))
            rows = list(shop_clips._read_clips(str(root), str(root / "clips_train.jsonl"), gallery))
        except ValueError as error:
            assert_named(error, files)
            assert not check_folder(str(root), fast=True).ok
            outcomes.add("refused")
            return
        outcomes.add("rows" if rows else "none")
        lines = [line for line in files["clips_train.jsonl"].split(b"\n") if line.strip(b" \r")]
        assert len(rows) == len(lines) and len({clip["clip_id"] for _, clip, _ in rows}) == len(rows)
        for _, clip, relevant in rows:
            assert_whole(root, clip, relevant, gallery)
        check_folder(str(root), fast=True)

    check()
    assert {"refused", "rows"} <= outcomes


def test_fuzz(root):
    run(root, 200)


@pytest.mark.slow
def test_fuzz_long(root):
    run(root, 2000)


def test_the_undamaged_folder_is_read(root):
    write(root, [], [])
    gallery = shop_clips.read_gallery(str(root))
    assert len(list(shop_clips._read_clips(str(root), str(root / "clips_train.jsonl"), gallery))) == 3
