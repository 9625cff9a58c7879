"""Boxes from a file in place of a data set's own."""

import json
import shutil

import pytest
from PIL import Image

from data_rice import load_dataset_view
from data_rice.box_files import FORMAT, BoxFile, box_line, clip_fingerprint, count_boxes

HEADER = json.dumps({**FORMAT, "detector": "somebody"}) + "\n"
BOX = [0.25, 0.25, 0.5, 1.0]


@pytest.fixture
def shop(tmp_path):
    """Clips a (two frames, one boxed) and b (one frame) to train on, and another clip a to test on."""
    folder = tmp_path / "shop"
    folder.mkdir()
    for name in ("1", "2", "3", "mug"):
        Image.new("RGB", (20, 10)).save(folder / f"{name}.jpg")
    (folder / "gallery.jsonl").write_text('{"gallery_id": "mug", "image": "mug.jpg"}\n')
    clips = [
        {"query_id": "a", "frames": ["1.jpg", "2.jpg"], "boxes": [[0, 0, 1, 1], None], "gt_gallery_ids": ["mug"]},
        {"query_id": "b", "frames": ["3.jpg"], "gt_gallery_ids": ["mug"]},
    ]
    (folder / "clips_train.jsonl").write_text("\n".join(map(json.dumps, clips)))
    (folder / "clips_test.jsonl").write_text(json.dumps(clips[1] | {"query_id": "a"}))
    return folder


@pytest.fixture
def load(shop, tmp_path):
    def load(lines, view="pairs", split="train", header=HEADER):
        path = tmp_path / "boxes.jsonl"
        path.write_text(header + "".join(lines))
        return load_dataset_view(shop, view, split, cache_dir=tmp_path / "cache", boxes_file=path)

    return load


GOOD = [
    box_line("train", "a", 2, [0, 1], [None, BOX], [None, 0.9]),
    box_line("train", "b", 1, [0], [[-0.04, 0, 0.5, 1.04]], [0.5]),
    box_line("test", "a", 1, [0], [[0, 0, 0.5, 0.5]], [0.5]),
]


def test_boxes_of_the_file_replace_those_of_the_rows(load, shop, tmp_path):
    rows = load(GOOD)
    plain = load_dataset_view(shop, "pairs", "train", cache_dir=tmp_path / "cache")
    assert rows["boxes"][:] == [[None, BOX], [[0, 0, 0.5, 1]]]
    assert rows.features == plain.features
    names = [name for name in plain.column_names if name != "boxes"]
    assert rows.select_columns(names).to_list() == plain.select_columns(names).to_list()
    assert count_boxes(rows) == {"boxes": 2, "frames": 3} and count_boxes(plain) == {"boxes": 1, "frames": 3}


def test_clips_with_equal_names_in_two_splits_keep_their_boxes(load):
    assert load(GOOD, "query", "test")["boxes"][:] == [[[0, 0, 0.5, 0.5]]]


def test_detection_rows_use_the_boxes_of_the_file(load):
    rows = load(GOOD, "detection")
    assert rows["frame_id"][:] == ["a-0001", "b-0000"] and rows["boxes"][0] == [BOX]


def test_gallery_rows_are_unchanged(load):
    assert load([], "gallery")["image_id"][:] == ["mug"]


def test_a_changed_file_is_read_again(load):
    assert load(GOOD)["boxes"][1] == [[0, 0, 0.5, 1]]
    changed = [*GOOD[:1], box_line("train", "b", 1, [0], [[0, 0, 0.125, 0.125]], [0.5])]
    assert load(changed)["boxes"][1] == [[0, 0, 0.125, 0.125]]


def test_missing_clips_are_listed(load):
    with pytest.raises(ValueError, match="has no boxes for 1 clips of the train split: b; run the detector on this"):
        load(GOOD[:1])


def test_another_number_of_frames_is_refused(load):
    with pytest.raises(ValueError, match="boxes for 3 frames of the clip 'b', but the data set has 1 frames; write"):
        load([GOOD[0], box_line("train", "b", 3, [0], [None], [None])])
    with pytest.raises(ValueError, match="boxes for a video of the clip 'b', but the data set has 1 frames"):
        load([GOOD[0], box_line("train", "b", None, [0], [None], [None])])


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"clip_id": 3}, "'clip_id' is missing or is not text"),
        ({"split": None}, "'split' is missing or is not text"),
        ({"num_frames": "2"}, "'num_frames' is neither a whole number nor null"),
        ({"boxes": [None]}, "are not three lists of equal length"),
        ({"frames": [0, 2]}, "2 in 'frames' is not the number of a frame of the clip"),
        ({"frames": [0, True]}, "True in 'frames' is not the number"),
        ({"scores": [None, "high"]}, "the score 'high' is not a number"),
        ({"boxes": [None, [0, 0, 1]]}, "expected a box as four finite numbers"),
        ({"boxes": [None, [0.5, 0, 0.5, 1]]}, "the box of frame 1 has no area in the frame"),
        ({"boxes": [None, [0, 0, 9, 9]]}, "the box [0, 0, 9, 9] of frame 1 reaches out of the frame; write fractions"),
        ({"boxes": [None, [-0.06, 0, 1, 1]]}, "of frame 1 reaches out of the frame"),
        ({"fingerprint": 7}, "'fingerprint' is neither text nor null"),
    ],
)
def test_bad_lines_are_named(tmp_path, change, reason):
    path = tmp_path / "boxes.jsonl"
    path.write_text(HEADER + json.dumps(json.loads(GOOD[0]) | change) + "\n")
    with pytest.raises(ValueError, match="boxes.jsonl, line 2: .*") as error:
        BoxFile(path)
    assert reason in str(error.value)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "boxes.jsonl"
    with pytest.raises(FileNotFoundError, match="boxes.jsonl does not exist; write it with python -m"):
        BoxFile(path)
    for content in ("", GOOD[0]):
        path.write_text(content)
        with pytest.raises(ValueError, match="does not begin like a box file"):
            BoxFile(path)
    path.write_text(HEADER + GOOD[0] + GOOD[0])
    with pytest.raises(ValueError, match="line 3: the clip 'a' of train appears twice"):
        BoxFile(path)


@pytest.mark.parametrize(
    "field, value, kind",
    [
        ("detector", 7, "text"),
        ("threshold", "0.5", "a number"),
        ("labels", ["mug", 3], "a list of texts"),
        ("frames_per_clip", 0, 'a whole number above 0 or "all"'),
        ("frames_per_clip", "some", 'a whole number above 0 or "all"'),
    ],
)
def test_a_first_line_that_results_could_not_repeat_is_refused(tmp_path, field, value, kind):
    path = tmp_path / "boxes.jsonl"
    path.write_text(json.dumps({**FORMAT, field: value}) + "\n")
    with pytest.raises(ValueError, match=f"boxes.jsonl, line 1: '{field}' is not {kind}; correct it, or leave it out"):
        BoxFile(path)
    for fine in ({field: None}, {"frames_per_clip": "all"}, {"frames_per_clip": 3}):
        path.write_text(json.dumps({**FORMAT, **fine}) + "\n")
        assert BoxFile(path).header[next(iter(fine))] == next(iter(fine.values()))


def test_frames_with_boxes_of_a_video_are_numbered(tmp_path):
    path = tmp_path / "boxes.jsonl"
    path.write_text(HEADER + box_line("test", "v", None, [8, 3, 5], [BOX, [0, 0, 1, 1], None], [0.5, 0.5, None]))
    assert BoxFile(path).columns("test", "v", None) == ([[0, 0, 1, 1], BOX], [3, 8])


def make_shop(folder, colour, count=3):
    """Clips c0, c1, ... to test on, of two frames each, which are alike in all shops but for their colour."""
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "mug.png")
    (folder / "gallery.jsonl").write_text('{"gallery_id": "mug", "image": "mug.png"}\n')
    clips = []
    for clip in range(count):
        frames = [f"c{clip}-{i}.png" for i in range(2)]
        for i, frame in enumerate(frames):
            Image.new("RGB", (8, 8), (colour, clip, i)).save(folder / frame)
        clips.append({"query_id": f"c{clip}", "frames": frames, "gt_gallery_ids": ["mug"]})
    (folder / "clips_test.jsonl").write_text("\n".join(map(json.dumps, clips)))
    return folder


class TestFingerprint:
    @pytest.fixture
    def rows(self, tmp_path):
        def rows(folder, **options):
            return load_dataset_view(folder, "query", "test", cache_dir=tmp_path / "cache", **options)

        return rows

    @pytest.fixture
    def file(self, rows, tmp_path):
        """The box file of shop "a"."""
        path = tmp_path / "boxes.jsonl"
        lines = [
            box_line("test", row["clip_id"], 2, [0], [BOX], [0.5], clip_fingerprint(row, [0]))
            for row in rows(make_shop(tmp_path / "a", 10))
        ]
        path.write_text(HEADER + "".join(lines))
        return path

    def test_other_pictures_under_the_same_names_are_refused(self, file, rows, tmp_path):
        assert rows(tmp_path / "a", boxes_file=file)["boxes"][0] == [BOX, None]
        words = "boxes.jsonl has boxes of other pictures than those of the clip 'c0' of the test split; "
        with pytest.raises(ValueError, match=words + "name another box file, or remove this one and write it"):
            rows(make_shop(tmp_path / "b", 20), boxes_file=file)

    def test_one_clip_among_few_is_enough(self, file, rows, tmp_path):
        Image.new("RGB", (8, 8), "white").save(tmp_path / "a" / "c2-0.png")
        with pytest.raises(ValueError, match="other pictures than those of the clip 'c2'"):
            rows(tmp_path / "a", boxes_file=file)

    def test_frames_that_detection_did_not_read_are_not_compared(self, file, rows, tmp_path):
        Image.new("RGB", (8, 8), "white").save(tmp_path / "a" / "c2-1.png")
        assert len(rows(tmp_path / "a", boxes_file=file)) == 3

    def test_copies_moved_folders_and_renamed_files_are_the_same_data(self, file, rows, tmp_path):
        copy = tmp_path / "elsewhere" / "copy"
        shutil.copytree(tmp_path / "a", copy)
        moved = (tmp_path / "a").rename(tmp_path / "moved")
        for folder in (copy, moved):
            assert rows(folder, boxes_file=file)["boxes"][2] == [BOX, None]
        text = (copy / "clips_test.jsonl").read_text().replace("c0-0.png", "renamed.png")
        (copy / "clips_test.jsonl").write_text(text)
        (copy / "c0-0.png").rename(copy / "renamed.png")
        assert rows(copy, boxes_file=file)["boxes"][0] == [BOX, None]

    def test_pictures_in_rows_equal_those_in_files(self, rows, tmp_path):
        row = rows(make_shop(tmp_path / "a", 10))[0]
        held = row | {"frames": [{"path": None, "bytes": open(entry["path"], "rb").read()} for entry in row["frames"]]}
        assert clip_fingerprint(row, [0, 1]) == clip_fingerprint(held, [0, 1]) != clip_fingerprint(held, [0])
        assert clip_fingerprint(held, [1, 0]) != clip_fingerprint(held, [0, 1])

    def test_unreadable_files_are_not_compared(self, file, rows, tmp_path):
        (tmp_path / "a" / "c1-0.png").unlink()
        assert len(rows(tmp_path / "a", boxes_file=file)) == 3
        row = rows(tmp_path / "a")[1]
        assert clip_fingerprint(row, [0]) is None and clip_fingerprint(row, []) is None

    def test_videos_are_compared_by_their_ends_and_time_range(self, tmp_path):
        path = tmp_path / "v.mp4"
        path.write_bytes(bytes(200_000))
        row = {"video": str(path), "frames": [], "start": 0.5, "end": 2.0}
        first = clip_fingerprint(row, [])
        assert clip_fingerprint(row, [1, 2]) == first != clip_fingerprint(row | {"end": 3.0}, [])
        for other in (b"1" + bytes(199_999), bytes(199_999) + b"1", bytes(200_001)):
            path.write_bytes(other)
            assert clip_fingerprint(row, []) != first

    def test_only_some_of_many_clips_are_compared(self, rows, tmp_path, monkeypatch):
        from data_rice import box_files

        table = rows(make_shop(tmp_path / "many", 10, count=130))
        path = tmp_path / "boxes.jsonl"
        lines = [box_line("test", row["clip_id"], 2, [0], [BOX], [0.5], clip_fingerprint(row, [0])) for row in table]
        path.write_text(HEADER + "".join(lines))
        read = []
        monkeypatch.setattr(box_files, "read_media", lambda entry: read.append(entry["path"]) or b"other")
        with pytest.raises(ValueError, match="other pictures than those of the clip 'c0'"):
            BoxFile(path).check_pictures(table, "test")
        read.clear()
        plain = tmp_path / "plain.jsonl"
        plain.write_text(HEADER + "".join(line.replace('"fingerprint"', '"note"') for line in lines))
        BoxFile(plain).check_pictures(table, "test")
        assert read == []
        monkeypatch.undo()
        count = []
        monkeypatch.setattr(box_files, "clip_fingerprint", lambda *row: count.append(row[0]["clip_id"]))
        BoxFile(path).check_pictures(table, "test")
        assert len(count) == len(set(count)) == 100 and count[0] == "c0" and int(count[-1][1:]) > 125
