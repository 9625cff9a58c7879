"""Damaged and hostile MovingFashion folders: every one gives whole rows, or one error that names the file."""

import copy
import json
import os
import re

import pytest

from data_rice import MovingFashion
from data_rice.builder import ProblemLog
from data_rice.features import view_features
from data_rice.moving_fashion.prepare import ExtractedFrames

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

TRAIN = {
    "p0": {"video_paths": ["videos/a.mp4", "videos/b.mp4"], "img_path": "imgs/0.jpg", "source": 1},
    "p1": {"video_paths": ["videos/c.mp4"], "img_path": "imgs/1.jpg", "source": 0, "tracklets": {"1": [0, 0, 0.5, 1]}},
    "p2": {"video_paths": ["videos/a.mp4"], "img_path": "imgs/0.jpg", "source": 0, "tracklets": [[0, 0, 9, 9], None]},
}
MANIFEST = {
    "settings": {"fps": 1, "short_side": 256, "quality": 90},
    "clips": {"videos/a.mp4": {"frames": [0, 25], "fps": 25.0, "width": 64, "height": 48, "size": 4}},
    "problems": {"videos/b.mp4": "the video cannot be decoded"},
}
PATHS = st.sampled_from(
    ["videos/a.mp4", "../secret", "videos/../../secret", "/etc/passwd", "link/secret", "videos/link.mp4", "..\\x"]
    + ["", " ", ".", "./", "a\0b", "videos/" + "x" * 5000, "videos/./a.mp4", "videos//a.mp4", "é\u2028", "\ud800"]
)
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([10**18, -(10**18), 10**399, 1e308, 5e-324, 2**63, float("nan"), float("inf")]),
    st.floats(-2, 100),
)
BOXES = st.one_of(
    st.none(), st.lists(NUMBERS, min_size=3, max_size=5), st.lists(st.floats(0, 1), min_size=4, max_size=4)
)
FRAMES = st.sampled_from(["0", "1", "01", "-1", "1.5", "x", "٣", "9" * 9, "9" * 20, ""])
TRACKLETS = st.one_of(
    st.dictionaries(FRAMES, BOXES, max_size=3),
    st.lists(BOXES, max_size=3),
    st.lists(st.dictionaries(FRAMES, BOXES, max_size=2), max_size=3),
    st.dictionaries(PATHS, st.lists(BOXES, max_size=2), max_size=2),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, PATHS, st.text(max_size=5))
VALUES = st.one_of(SCALARS, TRACKLETS, st.lists(PATHS, max_size=3), st.lists(SCALARS, max_size=2), st.just([[[[]]]]))
KEYS = st.sampled_from(["video_paths", "img_path", "source", "tracklets", "unknown"])
CHANGES = st.lists(st.tuples(st.sampled_from(["p0", "p1", "p2"]), KEYS, VALUES), max_size=2)
NAMES = st.sampled_from([None, None, None, "", " ", "p0", "a\0", "\ud800", "é#1"])
DAMAGES = st.lists(
    st.tuples(
        st.sampled_from(["cut", "drop", "insert", "empty"]),
        st.integers(0, 500),
        st.sampled_from([b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b'"', b"'", b"{", b"]", b"9" * 500, b"[" * 3000]),
    ),
    max_size=2,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "mf"
    for name in ("videos", "imgs"):
        (folder / name).mkdir(parents=True)
    (folder.parent / "secret").write_text("secret")
    (folder / "link").symlink_to(folder.parent)
    (folder / "videos/link.mp4").symlink_to(folder.parent / "secret")
    for name in ("videos/a.mp4", "videos/b.mp4", "videos/c.mp4", "imgs/0.jpg", "imgs/1.jpg"):
        (folder / name).write_bytes(b"torn")
    return folder


def damage(data: bytes, kind: str, place: int, insert: bytes) -> bytes:
    place = min(place, len(data))
    if kind == "insert":
        return data[:place] + insert + data[place:]
    return {"cut": data[:place], "drop": data[:place] + data[place + 1 :], "empty": b""}[kind]


def fuzz(max_examples: int, *strategies):
    def decorate(check):
        settings = hypothesis.settings(
            max_examples=max_examples,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        settings(hypothesis.given(*strategies)(check))()

    return decorate


def assert_whole(root, row) -> None:
    inside = str(root) + os.sep
    for path in (row["video"], row["image"]):
        assert path.startswith(inside) and os.path.realpath(path).startswith(inside)
    assert row["source"] in ("regular", "hard") and row["product_id"]
    assert len(row["boxes"]) == len(row["box_frames"]) == len(set(row["box_frames"]))
    for left, top, right, bottom in row["boxes"]:
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    view_features("pairs").encode_example(row)
    json.dumps(row, ensure_ascii=False).encode()


def run_annotations(root, max_examples: int) -> None:
    (root / "train.json").write_text("{}")
    builder = MovingFashion("pairs", data_dir=root, cache_dir=root.parent / "cache")
    outcomes = set()

    @fuzz(max_examples, CHANGES, NAMES, DAMAGES)
    def check(changes, name, damages):
        products = copy.deepcopy(TRAIN)
        for product, key, value in changes:
            products[product][key] = value
        if name is not None:
            products[name] = products.pop("p1")
        data = json.dumps(products).encode()
        for how in damages:
            data = damage(data, *how)
        (root / "train.json").write_bytes(data)
        problems = ProblemLog(None)
        try:
            rows = list(builder.generate_rows("train", problems))
        except ValueError as error:
            assert re.search(r"/train\.json(, line \d+|, product '|: | holds no product)", str(error)), error
            outcomes.add("refused")
            return
        outcomes.add("rows" if rows else "none")
        read = json.loads(data)
        listed = sum(len(entry["video_paths"]) or 1 for entry in read.values())
        left_out = sum(count for reason, count in problems.counts.items() if reason.startswith("left out"))
        assert len(rows) + left_out == listed and len({row["clip_id"] for row in rows}) == len(rows)
        for row in rows:
            assert_whole(root, row)

    assert {"refused", "rows"} <= outcomes


def run_manifest(root, max_examples: int) -> None:
    folder = root.parent / "frames"
    folder.mkdir(exist_ok=True)

    fields = st.sampled_from(["frames", "fps", "width", "height", "size"])
    changes = st.one_of(
        st.tuples(st.just("clip"), fields, VALUES), st.tuples(st.sampled_from(["clips", "problems"]), PATHS, VALUES)
    )
    outcomes = set()

    @fuzz(max_examples, st.lists(changes, max_size=2), DAMAGES)
    def check(changes, damages):
        manifest = copy.deepcopy(MANIFEST)
        for where, key, value in sorted(changes, key=lambda change: change[0] != "clip"):
            (manifest["clips"]["videos/a.mp4"] if where == "clip" else manifest[where])[key] = value
        data = json.dumps(manifest).encode()
        for how in damages:
            data = damage(data, *how)
        (folder / "manifest.json").write_bytes(data)
        try:
            frames = ExtractedFrames.read(str(folder))
        except ValueError as error:
            assert f"{folder}/manifest.json" in str(error)
            outcomes.add("refused")
            return
        outcomes.add("read")
        for video in frames.clips:
            for path in frames.paths(video):
                assert os.path.normpath(path).startswith(str(folder) + os.sep)
        with pytest.raises(ValueError, match="are outdated: "):
            frames.check(str(root), ["videos/a.mp4", "videos/b.mp4", "videos/c.mp4"])

    assert outcomes == {"refused", "read"}


@pytest.mark.parametrize("run", [run_annotations, run_manifest])
def test_fuzz(root, run):
    run(root, 200)


@pytest.mark.slow
@pytest.mark.parametrize("run", [run_annotations, run_manifest])
def test_fuzz_long(root, run):
    run(root, 2000)
