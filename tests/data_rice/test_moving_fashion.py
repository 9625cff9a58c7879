"""MovingFashion's builder and the extraction of its frames, on small folders in the published layout."""

import json
import logging
import os
import re
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from data_rice import MovingFashion, gallery_scope, load_dataset_view
from data_rice.features import view_features
from data_rice.moving_fashion import layout
from data_rice.moving_fashion.moving_fashion import NO_BOXES
from data_rice.moving_fashion.prepare import (
    CUT_SHORT,
    UNDECODABLE,
    ExtractedFrames,
    FrameSettings,
    extract_frames,
    main,
)

KNOWN_VIDEO = min(layout.KNOWN_MISSING)


class Folder:
    """A MovingFashion folder: change ``train`` and ``test``, then `write`."""

    def __init__(self, root, write_video):
        self.root, self.write_video = root, write_video
        self.train = {
            "p0": {"video_paths": ["videos/a.mp4", "videos/b.mp4"], "img_path": "imgs/p0.jpg", "source": 1},
            "p1": {"video_paths": ["videos/c.mp4"], "img_path": "imgs/p1.jpg", "source": 0},
            "p2": {"video_paths": ["videos/c.mp4"], "img_path": "imgs/p2.jpg", "source": 0},
            "p3": {"video_paths": ["videos/d.mp4"], "img_path": "imgs/p0.jpg", "source": 1},
        }
        self.test = {
            "q0": {"video_paths": ["videos/e.mp4"], "img_path": "imgs/q0.jpg", "source": 1},
            "q1": {"video_paths": ["videos/f.mp4"], "img_path": "imgs/q1.jpg", "source": 0},
        }
        for name in "abcdef":
            write_video(root / f"videos/{name}.mp4")
        (root / "imgs").mkdir()
        for name in ("p0", "p1", "p2", "q0", "q1"):
            Image.new("RGB", (30, 40), (90, 10, 10)).save(root / f"imgs/{name}.jpg")

    def write(self):
        for name in ("train", "test"):
            (self.root / f"{name}.json").write_text(json.dumps(getattr(self, name)), encoding="utf-8")
        return self.root


@pytest.fixture
def folder(tmp_path, write_video):
    return Folder(tmp_path / "mf", write_video)


@pytest.fixture
def load(folder, tmp_path):
    def load(view: str, split: str = "train", **options):
        return load_dataset_view(folder.write(), view, split, cache_dir=tmp_path / "cache", **options)

    return load


@pytest.fixture
def problems(folder, tmp_path):
    """A function that builds a view and returns the listed problems of a split as (id, reason)."""

    def problems(view: str, split: str, **options) -> list[tuple[str, str]]:
        builder = MovingFashion(view, data_dir=folder.write(), cache_dir=tmp_path / "cache", **options)
        builder.download_and_prepare()
        log = builder.problems.get(split)
        if log is None:
            return []
        lines = [json.loads(line) for line in open(log.path, encoding="utf-8")]
        return [(line["id"], line["reason"]) for line in lines]

    return problems


def grey(picture) -> float:
    return float(np.asarray(picture, dtype=float).mean())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_lists_with_windows_paths_name_the_same_files(folder, tmp_path, encoding):
    """Backslashes, the other form of an accent, and tracklets that name their video so."""
    (folder.root / "videos/a.mp4").rename(folder.root / unicodedata.normalize("NFD", "videos/é.mp4"))
    box = [0.1, 0.1, 0.5, 0.5]
    folder.train["p0"] |= {
        "video_paths": ["videos\\é.mp4", "videos\\b.mp4"],
        "img_path": "imgs\\p0.jpg",
        "tracklets": {"videos\\b.mp4": {"1": box}, "videos/é.mp4": None},
    }
    path = folder.write() / "train.json"
    path.write_bytes(json.dumps(folder.train, ensure_ascii=False).encode(encoding))
    rows = load_dataset_view(folder.root, "pairs", "train", cache_dir=tmp_path / "cache")
    chosen = [row for row in rows if row["clip_id"] in ("p0#0", "p0#1")]
    assert [row["image_id"] for row in chosen] == ["imgs/p0.jpg"] * 2
    assert all(os.path.isfile(row["video"]) and os.path.isfile(row["image"]["path"]) for row in chosen)
    assert [row["box_frames"] for row in chosen] == [[], [1]]
    # p3 has the same picture, written with a slash: they are one product.
    assert {row["product_id"] for row in rows if row["image_id"] == "imgs/p0.jpg"} == {"p0"}


def test_pairs(folder, load):
    rows = load("pairs")
    assert rows.features == view_features("pairs")
    assert rows["clip_id"][:] == ["p0#0", "p0#1", "p1#0", "p2#0", "p3#0"]
    assert rows["image_id"][:] == ["imgs/p0.jpg"] * 2 + ["imgs/p1.jpg", "imgs/p2.jpg", "imgs/p0.jpg"]
    assert rows["source"][:] == ["regular", "regular", "hard", "hard", "regular"]
    first = rows[0]
    assert first["video"] == str(folder.root / "videos/a.mp4") and first["frames"] == [] and first["live_id"] == ""
    assert (first["start"], first["end"]) == (-1.0, -1.0)
    assert first["image"] == {"bytes": None, "path": str(folder.root / "imgs/p0.jpg")}
    assert first["boxes"] == [] and first["box_frames"] == []


def test_products_with_one_picture_are_one_product(load):
    assert load("pairs")["product_id"][:] == ["p0", "p0", "p1", "p2", "p0"]


def test_queries_and_gallery(folder, load):
    rows = load("query", "test")
    assert rows.features == view_features("query")
    assert rows["clip_id"][:] == ["q0#0", "q1#0"] and rows["relevant"][:] == [["imgs/q0.jpg"], ["imgs/q1.jpg"]]
    assert load("gallery", "test")["image_id"][:] == ["imgs/q0.jpg", "imgs/q1.jpg"]
    assert load("gallery", "train")["image_id"][:] == ["imgs/p0.jpg", "imgs/p1.jpg", "imgs/p2.jpg"]
    assert gallery_scope(folder.root) == gallery_scope("moving_fashion") == "all"
    by_name = load_dataset_view("moving_fashion", "query", "test", data_dir=folder.root, cache_dir=folder.root / "c")
    assert by_name["clip_id"][:] == rows["clip_id"][:]


def test_validation_holds_out_products_with_all_their_videos(folder, load, problems):
    ids = {"p0", "p1", "p2"}
    for fraction in (0.1, 0.4):
        train, queries = (
            load("pairs", validation_fraction=fraction),
            load("query", "validation", validation_fraction=fraction),
        )
        held = set(queries["product_id"])
        assert 0 < len(held) == max(1, round(fraction * 3)) and held | set(train["product_id"]) <= ids
        assert not set(train["video"]) & set(queries["video"]) and not held & set(train["product_id"])
        gallery = load("gallery", "validation", validation_fraction=fraction)
        assert set(gallery["image_id"]) == {image for images in queries["relevant"] for image in images}
        left_out = problems("pairs", "train", validation_fraction=fraction)
        assert len(train) + len(left_out) + len(queries) == 5
        assert all("also shows a held-out product" in reason for _, reason in left_out)
    with pytest.raises(ValueError, match="holds out all 3 products"):
        load("pairs", validation_fraction=0.9)
    with pytest.raises(ValueError, match="validation_fraction must be at least 0 and below 1, not 1.5"):
        load("pairs", validation_fraction=1.5)
    with pytest.raises(ValueError, match="MovingFashion publishes none; pass validation_fraction"):
        load("query", "validation")


def test_videos_of_held_out_products_are_not_in_training(folder, load, problems):
    held = next(iter(layout.choose_products(["p0", "p1", "p2"], 1)))
    other = next(name for name in ("p1", "p2") if name != held)
    folder.train[other]["video_paths"] = [folder.train[held]["video_paths"][0]]
    assert (f"{other}#0", "left out because the video also shows a held-out product") in problems(
        "pairs", "train", validation_fraction=0.1
    )
    assert f"{other}#0" not in load("pairs", validation_fraction=0.1)["clip_id"][:]


def test_missing_media_are_left_out_of_training_and_are_misses_in_evaluation(folder, load, problems, caplog):
    folder.train["p1"]["video_paths"] = [KNOWN_VIDEO]
    (folder.root / "videos/b.mp4").unlink()
    (folder.root / "videos/f.mp4").unlink()
    (folder.root / "imgs/p2.jpg").unlink()
    folder.train["p4"] = {"video_paths": [], "img_path": "imgs/p1.jpg", "source": 1}
    with caplog.at_level(logging.WARNING):
        assert load("pairs")["clip_id"][:] == ["p0#0", "p3#0"]
    assert "1 rows left out: the video is missing (p0#1)" in caplog.text
    assert problems("pairs", "train") == [
        ("p0#1", "left out: the video is missing"),
        ("p1#0", "left out: the video is missing, as it is from the published archive"),
        ("p2#0", "left out: the shop's picture is missing"),
        ("p4", "left out because video_paths is empty"),
    ]
    queries = load("query", "test")
    assert queries["clip_id"][:] == ["q0#0", "q1#0"] and queries[1]["relevant"] == ["imgs/q1.jpg"]
    assert problems("query", "test") == [("q1#0", "kept as misses: the video is missing")]


def test_the_published_archive_lacks_23_videos():
    assert len(layout.KNOWN_MISSING) == 23


def test_cache_follows_the_media(folder, load):
    (folder.root / "videos/b.mp4").rename(folder.root / "b.mp4")
    assert len(load("pairs")) == 4
    (folder.root / "b.mp4").rename(folder.root / "videos/b.mp4")
    assert len(load("pairs")) == 5


def test_missing_files(folder, load, tmp_path):
    folder.write()
    (folder.root / "test.json").unlink()
    with pytest.raises(ValueError, match="neither gallery.jsonl .* nor train.json, test.json and imgs/"):
        load_dataset_view(folder.root, "pairs", "train", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="test.json does not exist, so there is no test split"):
        load_dataset_view("moving_fashion", "gallery", "test", data_dir=folder.root, cache_dir=tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="test.json does not exist; put the annotation file there"):
        load_dataset_view("moving_fashion", "query", "test", data_dir=folder.root, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="needs data_dir"):
        load_dataset_view("moving_fashion", "query", "test")
    with pytest.raises(ValueError, match="MovingFashion has no test pairs"):
        load("pairs", "test")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"video_paths": None}, "video_paths must be a list"),
        ({"video_paths": "videos/a.mp4"}, "video_paths must be a list"),
        ({"video_paths": ["../a.mp4"]}, "leads out of the data folder"),
        ({"video_paths": ["/a.mp4"]}, "leads out of the data folder"),
        ({"video_paths": ["videos/a.mp4", "videos//a.mp4"]}, "names a video twice"),
        ({"video_paths": [3]}, "must be a non-empty path"),
        ({"img_path": None}, "must be a non-empty path"),
        ({"img_path": "imgs/../../a.jpg"}, "leads out of the data folder"),
        ({"img_path": "."}, "names the data folder itself"),
        ({"source": 3}, "source must be 1 .regular., or 0 or 2 .hard., not 3"),
        ({"source": True}, "source must be 1 .regular., or 0 or 2 .hard., not True"),
        ({"source": None}, "not None"),
    ],
)
def test_malformed_entries_name_file_and_product(folder, load, change, message):
    folder.train["p0"] |= change
    with pytest.raises(ValueError, match=f"train.json, product 'p0': .*{message}.*; repair the entry"):
        load("pairs")


def test_both_numbers_of_hard_clips_are_known(folder, load):
    folder.train["p1"]["source"] = 2
    assert load("pairs")["source"][:] == ["regular", "regular", "hard", "hard", "regular"]


@pytest.mark.parametrize(
    "tracklets, message",
    [
        (5, "must hold one tracklet per video"),
        ([None, None, None], "must hold one tracklet per video .2."),
        ([{"x": [0, 0, 1, 1]}, None], "keys must be frame numbers, not 'x'"),
        ([{"1": [0, 0, 1]}, None], "four finite numbers"),
        ([{"1": [0, 0, 0, 1]}, None], "has no area"),
        ([{"1": [0, 0, 1, 1], "01": None}, None], "names frame 1 twice"),
        ({"videos/z.mp4": []}, "'videos/z.mp4', which is not in video_paths"),
    ],
)
def test_unknown_tracklets_lose_their_boxes_but_do_not_stop_the_build(
    folder, load, problems, capsys, tracklets, message
):
    folder.train["p0"]["tracklets"] = tracklets
    folder.train["p1"]["tracklets"] = {"3": [0, 0, 0.5, 0.5]}
    rows = load("pairs")
    assert rows["box_frames"][:] == [[], [], [3], [], []] and rows[0]["boxes"] == []
    assert problems("pairs", "train") == [("p0#0", NO_BOXES), ("p0#1", NO_BOXES)]
    assert main(["prepare", str(folder.root)]) == 2
    error = capsys.readouterr().err
    assert re.search(f"train.json, product 'p0': .*{message}.*; repair the entry", error)


@pytest.mark.parametrize("boxes", [[[0, 0, 65, 60]], [[0, 0, 1, 1], [0, 0, 60, 40]]])
def test_tracklets_that_do_not_fit_the_video_lose_their_boxes(folder, load, problems, boxes):
    folder.train["p0"]["tracklets"] = [boxes, [[0, 0, 60, 40]]]
    rows = load("pairs")
    assert rows["box_frames"][:2] == [[], [0]] and len(rows) == 5
    assert problems("pairs", "train") == [("p0#0", NO_BOXES)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "train.json, line 1: not valid JSON"),
        ("[]", "expected a JSON object, found a list"),
        ("{}", "holds no product"),
        ('{"a": 1}', "product 'a': expected an object, found a int"),
        ('{"a": {}, "a": {}}', "the key 'a' appears twice"),
        ('{"": {}}', "the product id is empty"),
    ],
)
def test_damaged_annotations(folder, tmp_path, text, message):
    folder.write()
    (folder.root / "train.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_dataset_view(folder.root, "pairs", "train", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    "tracklets",
    [
        [{"1": [0.25, 0.5, 0.75, 1.05], "5": None, "6": [0, 0, 1, 1]}, None],
        {"videos/a.mp4": [None, [0.25, 0.5, 0.75, 1.05], None, None, None, None, [0, 0, 1, 1]]},
        [[None, [16, 24, 48, 50], None, None, None, None, [0, 0, 64, 48]], {}],
        {"videos/a.mp4": {"6": [0, 0, 64, 48], "1": [16, 24, 48, 50]}, "videos/b.mp4": None},
    ],
)
def test_notations_of_tracklets(folder, load, tracklets):
    folder.train["p0"]["tracklets"] = tracklets
    first, second = load("pairs").select([0, 1])
    assert first["box_frames"] == [1, 6]
    assert first["boxes"] == [pytest.approx([0.25, 0.5, 0.75, 1.0]), [0, 0, 1, 1]]
    assert second["boxes"] == [] and second["box_frames"] == []


def test_a_single_tracklet_needs_no_list_around_it(folder, load):
    folder.train["p1"]["tracklets"] = {"3": [0, 0, 0.5, 0.5]}
    folder.train["p2"]["tracklets"] = [None, None, [0, 0, 0.5, 0.5]]
    rows = load("pairs").select([2, 3])
    assert rows["box_frames"][:] == [[3], [2]] and rows["boxes"][:] == [[[0, 0, 0.5, 0.5]]] * 2


def test_a_broken_video_with_boxes_in_pixels_is_counted_and_not_fatal(folder, load, problems):
    folder.train["p1"]["tracklets"] = [[0, 0, 32, 24]]
    (folder.root / "videos/c.mp4").write_bytes(b"torn")
    assert "p1#0" not in load("pairs")["clip_id"][:]
    assert problems("pairs", "train") == [("p1#0", "left out: the video cannot be decoded")]


class TestExtraction:
    SETTINGS = FrameSettings(fps=1, short_side=24)

    def extract(self, folder, settings=SETTINGS, **options):
        root = folder.write()
        return extract_frames(str(root), str(root / "frames"), settings, progress=False, **options)

    @staticmethod
    def tree(root):
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def test_one_frame_per_second_is_extracted(self, folder):
        extracted = self.extract(folder)
        clip = extracted.clips["videos/a.mp4"]
        assert clip.frames == (0, 5, 10, 15) and (clip.fps, clip.width, clip.height) == (5, 64, 48)
        pictures = [Image.open(path) for path in extracted.paths("videos/a.mp4")]
        assert [picture.size for picture in pictures] == [(32, 24)] * 4
        np.testing.assert_allclose([grey(p) for p in pictures], [20, 70, 120, 170], atol=4)

    @pytest.mark.parametrize(
        "settings, num_frames, fps, expected",
        [
            (FrameSettings(fps=1), 1, 25, [0]),
            (FrameSettings(fps=1), 26, 25, [0, 25]),
            (FrameSettings(fps=2), 60, 29.97002997, [0, 14, 29, 44, 59]),
            (FrameSettings(fps=30), 4, 5, [0, 1, 2, 3]),
        ],
    )
    def test_choice_of_frames(self, settings, num_frames, fps, expected):
        times = [3 + i / fps for i in range(num_frames)]
        assert settings.choose(times, 3 + num_frames / fps) == expected

    def test_choice_by_time_where_the_rate_changes(self):
        """Three frames in the first three seconds, then ten in one second."""
        times = [0.0, 1.0, 2.0, *(3 + i / 10 for i in range(10))]
        assert FrameSettings(fps=2).choose(times, 4.0) == [0, 1, 2, 3, 8]

    def test_the_builder_uses_extracted_frames_and_their_boxes(self, folder, load):
        folder.train["p1"]["tracklets"] = {"5": [16, 0, 48, 24], "6": [0, 0, 64, 48], "15": [0, 0, 32, 48]}
        self.extract(folder)
        row = load("pairs")[2]
        frames = [str(folder.root / f"frames/videos/c.mp4/{n:06d}.jpg") for n in (0, 5, 10, 15)]
        assert row["video"] == "" and [frame["path"] for frame in row["frames"]] == frames
        assert row["boxes"] == [None, [0.25, 0, 0.75, 0.5], None, [0, 0, 0.5, 1]] and row["box_frames"] == []

    def test_another_folder_can_be_named(self, folder, load, tmp_path):
        root = folder.write()
        extract_frames(str(root), str(tmp_path / "elsewhere"), self.SETTINGS, progress=False)
        assert load("query", "test")[0]["frames"] == []
        row = load("query", "test", frames_dir=str(tmp_path / "elsewhere"))[0]
        assert row["frames"][0]["path"].startswith(str(tmp_path / "elsewhere")) and len(row["frames"]) == 4
        with pytest.raises(FileNotFoundError, match="frames_dir .*nowhere does not exist; extract the frames with"):
            load("query", "test", frames_dir=str(tmp_path / "nowhere"))

    def test_bad_videos_are_listed_and_do_not_stop_it(self, folder, load, problems, tmp_path):
        (folder.root / "videos/b.mp4").write_bytes(b"torn")
        (folder.root / "videos/d.mp4").unlink()
        (folder.root / "videos/f.mp4").write_bytes(b"")
        extracted = self.extract(folder)
        assert extracted.problems == {
            "videos/b.mp4": UNDECODABLE,
            "videos/d.mp4": "the video is missing",
            "videos/f.mp4": UNDECODABLE,
        }
        listed = [json.loads(line) for line in open(folder.root / "frames/problems.jsonl", encoding="utf-8")]
        assert [line["file"] for line in listed] == ["videos/b.mp4", "videos/d.mp4", "videos/f.mp4"]
        assert "b.mp4" in listed[0]["detail"]
        assert problems("pairs", "train") == [
            ("p0#1", "left out: the video cannot be decoded"),
            ("p3#0", "left out: the video is missing"),
        ]
        assert problems("query", "test") == [("q1#0", "kept as misses: the video cannot be decoded")]
        assert load("query", "test")[1]["frames"] == []

    def test_a_truncated_video_keeps_its_first_frames(self, folder, problems, cut_after):
        cut_after(folder.write_video(folder.root / "videos/a.mp4", movflags="faststart"), 10)
        extracted = self.extract(folder)
        assert extracted.problems == {"videos/a.mp4": CUT_SHORT} and extracted.clips["videos/a.mp4"].frames == (0, 5)
        assert problems("pairs", "train") == [("p0#0", "kept: the video is cut short")]
        before = self.tree(folder.root / "frames")
        self.extract(folder)
        assert self.tree(folder.root / "frames") == before

    @pytest.mark.parametrize("stop_at", [1, 3, 5])
    def test_an_interrupted_extraction_ends_with_the_same_files(self, folder, monkeypatch, stop_at):
        from data_rice.moving_fashion import prepare

        (folder.root / "videos/b.mp4").write_bytes(b"torn")
        self.extract(folder)
        expected = self.tree(folder.root / "frames")
        shutil.rmtree(folder.root / "frames")
        save, calls = prepare._save_frame, []

        def save_and_stop(*arguments):
            calls.append(None)
            if len(calls) == stop_at * 3:
                raise KeyboardInterrupt
            save(*arguments)

        monkeypatch.setattr(prepare, "_save_frame", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            self.extract(folder)
        with pytest.raises(ValueError, match="no manifest.json, so they are not complete; finish with"):
            ExtractedFrames.read(str(folder.root / "frames"))
        monkeypatch.setattr(prepare, "_save_frame", save)
        self.extract(folder, workers=3)
        assert self.tree(folder.root / "frames") == expected

    def test_nothing_is_decoded_twice_unless_the_settings_change(self, folder, monkeypatch):
        from data_rice.moving_fashion import prepare

        self.extract(folder)
        decoded, read = [], prepare.VideoReader
        monkeypatch.setattr(prepare, "VideoReader", lambda path: decoded.append(path) or read(path))
        self.extract(folder)
        assert decoded == []
        self.extract(folder, FrameSettings(fps=5, short_side=24))
        assert len(decoded) == 6
        folder.write_video(folder.root / "videos/a.mp4", num_frames=9)
        extracted = self.extract(folder, FrameSettings(fps=5, short_side=24))
        assert len(decoded) == 7 and extracted.clips["videos/a.mp4"].frames == tuple(range(9))

    def test_stale_frames_are_refused(self, folder, load):
        self.extract(folder)
        whole = (folder.root / "videos/a.mp4").read_bytes()
        (folder.root / "videos/a.mp4").write_bytes(whole + b"0")
        with pytest.raises(
            ValueError, match="are outdated: videos/a.mp4 has .* bytes and had .* at the time of extraction; run py"
        ):
            load("pairs")
        (folder.root / "videos/a.mp4").write_bytes(whole)
        (folder.root / "frames/videos/d.mp4/000005.jpg").unlink()
        with pytest.raises(ValueError, match="are outdated: videos/d.mp4 lacks frames"):
            load("pairs")
        assert len(load("query", "test")) == 2
        folder.test["q2"] = {"video_paths": ["videos/g.mp4"], "img_path": "imgs/q0.jpg", "source": 1}
        with pytest.raises(ValueError, match="are outdated: videos/g.mp4 did not exist at the time of extraction"):
            load("query", "test")

    def test_the_videos_can_be_deleted_after_extraction(self, folder, load):
        extracted = self.extract(folder)
        shutil.rmtree(folder.root / "videos")
        assert [len(row["frames"]) for row in load("pairs")] == [4] * 5
        assert self.extract(folder).clips == extracted.clips

    def test_a_video_that_was_added_later_is_extracted(self, folder, load):
        (folder.root / "videos/a.mp4").rename(folder.root / "a.mp4")
        self.extract(folder)
        (folder.root / "a.mp4").rename(folder.root / "videos/a.mp4")
        with pytest.raises(ValueError, match="videos/a.mp4 was missing at the time of extraction and exists now"):
            load("pairs")

    def test_command(self, folder, capsys):
        root = folder.write()
        words = ["prepare", str(root), "--short_side", "24", "--workers", "2"]
        assert main(words) == 0
        assert f"{root}/frames: 6 videos, 24 frames" in capsys.readouterr().out
        folder.train["p1"]["video_paths"] = [KNOWN_VIDEO]
        folder.write()
        assert main(words) == 0
        assert "1 videos: the video is missing, as it is from the published archive" in capsys.readouterr().out
        (root / "videos/a.mp4").write_bytes(b"torn")
        assert main(words) == 1
        assert "1 videos: the video cannot be decoded" in capsys.readouterr().out
        assert main([*words, "--fps", "0"]) == 2
        assert "fps must be a number above 0" in capsys.readouterr().err
        assert main(["prepare", str(root / "imgs")]) == 2
        assert "has none of train.json, test.json" in capsys.readouterr().err


def test_breakdown_by_source(load):
    from evaluation_rice.protocol import Rankings, RetrievalTask, breakdown

    queries, gallery = load("query", "test"), load("gallery", "test")
    ranked = Rankings(RetrievalTask.from_datasets(queries, gallery, "all"))
    ranked.add(0, np.array([1.0, 0.0]))
    ranked.add(1, np.array([1.0, 0.0]))
    groups = breakdown(queries, {"embedding": ranked})["source"]
    assert groups["regular"]["embedding"]["R@1"] == 1.0 and groups["hard"]["embedding"]["R@1"] == 0.0


def test_links_that_leave_the_folder_are_refused(folder, load, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/s.mp4").write_bytes((folder.root / "videos/a.mp4").read_bytes())
    (folder.root / "videos/link.mp4").symlink_to(tmp_path / "secret/s.mp4")
    (folder.root / "linked").symlink_to(tmp_path / "secret")
    (folder.root / "videos/inside.mp4").symlink_to(folder.root / "videos/a.mp4")
    for path in ("videos/link.mp4", "linked/s.mp4"):
        folder.train["p0"]["video_paths"] = [path]
        with pytest.raises(ValueError, match=f"product 'p0': the video path '{path}' leads out .* through a link"):
            load("pairs")
    folder.train["p0"]["video_paths"] = ["videos/inside.mp4"]
    assert len(load("pairs")) == 4


@pytest.mark.parametrize("extracted", [False, True])
def test_boxes_of_the_sampled_frames_reach_the_model(folder, load, extracted):
    from data_rice.collator import RiceCollator
    from processing_rice import build_processor, train_tokenizer

    corner, rest = [0, 0, 0.25, 0.25], [0.5, 0.5, 1, 1]
    folder.train["p1"]["tracklets"] = {str(i): corner if i == 5 else rest for i in range(20) if i != 10}
    if extracted:
        extract_frames(str(folder.write()), str(folder.root / "frames"), FrameSettings(fps=1), progress=False)
    row = load("pairs")[2]
    assert bool(row["frames"]) == extracted
    tokenizer = train_tokenizer(["a red cup", "buy this blue cup", "a green dress"], vocab_size=400)
    processor = build_processor(tokenizer, image_size=32, patch_size=8, num_frames=4)
    # Of 20 frames the evaluation takes 0, 5, 10 and 15, which are also those of one frame per second.
    mask = RiceCollator(processor, use_boxes=True)([row])["patch_mask"][0].reshape(4, 4, 4)
    assert mask[1, 0, 0] and not mask[1, 2:, 2:].any()
    assert mask[2].all()
    for frame in (0, 3):
        assert mask[frame, 2:, 2:].all() and not mask[frame, 0, 0]
