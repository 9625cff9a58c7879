"""The check of a shop_clips folder: what it finds, where it says it is, and that whole folders pass."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from functools import partial

import pytest
from PIL import Image

from data_rice import load_dataset_view
from data_rice.collator import RiceCollator
from data_rice.shop_clips.check import check_folder, main
from processing_rice import build_processor, train_tokenizer

NUM_PRODUCTS = 10
nfc, nfd = partial(unicodedata.normalize, "NFC"), partial(unicodedata.normalize, "NFD")


class Shop:
    """A whole shop of ten products with clips of frames and of one video; change it, then `write`."""

    def __init__(self, root):
        self.root = root
        self.gallery = [{"gallery_id": f"g{i}", "image": f"gallery/g{i}.png", "title": "x"} for i in range(10)]
        self.clips = {split: [] for split in ("train", "val", "test")}
        for split, clips in self.clips.items():
            for i in range(NUM_PRODUCTS):
                frames = [f"frames/{split}-{i}-{j}.png" for j in range(2)]
                clips.append({"query_id": f"c{i}", "frames": frames, "gt_gallery_ids": [f"g{i}"]})
        video = {"video": "v.mp4", "gt_gallery_ids": ["g0"]}
        self.clips["train"].append({"query_id": "v0", "start": 0, "end": 2, **video})
        self.clips["test"].append({"query_id": "v1", "start": 2, "end": 4, **video})

    def write_media(self, write_video):
        for folder in ("gallery", "frames"):
            (self.root / folder).mkdir(parents=True)
        pictures = [row["image"] for row in self.gallery]
        pictures += [frame for clips in self.clips.values() for row in clips for frame in row.get("frames", [])]
        for i, name in enumerate(pictures):
            Image.new("RGB", (8, 8), (3 * i, 0, 0)).save(self.root / name)
        write_video(self.root / "v.mp4", num_frames=20, fps=5)

    def write(self):
        self.lines("gallery.jsonl", self.gallery)
        for split, clips in self.clips.items():
            self.lines(f"clips_{split}.jsonl", clips)
        return str(self.root)

    def lines(self, name, rows):
        rows = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (self.root / name).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def media(tmp_path_factory, write_video):
    folder = tmp_path_factory.mktemp("media") / "shop"
    Shop(folder).write_media(write_video)
    return folder


@pytest.fixture
def shop(media, tmp_path):
    return Shop(shutil.copytree(media, tmp_path / "shop"))


@pytest.fixture
def found(shop):
    """A function that checks the shop and returns the problems as they are printed."""

    def found(**options) -> list[str]:
        return [str(problem) for problem in check_folder(shop.write(), **options).problems]

    return found


def test_a_whole_folder_passes(shop, found, capsys):
    assert found() == [] and found(fast=True) == []
    assert main(["check", str(shop.root)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed] == [
        ["file", "rows", "products", "pictures", "videos", "seconds", "of", "video"],
        ["gallery.jsonl", "10", "10", "10", "0", "0.0"],
        ["clips_train.jsonl", "11", "10", "20", "1", "2.0"],
        ["clips_val.jsonl", "10", "10", "20", "0", "0.0"],
        ["clips_test.jsonl", "11", "10", "20", "1", "2.0"],
        ["0", "errors,", "0", "warnings"],
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"frames": ["../a.png"]}, "the frame path '../a.png' leads out of the data folder"),
        ({"frames": "frames/a.png"}, "frames must be a list of paths"),
        ({"frames": None}, "the clip has neither frames nor a video"),
        ({"frames": []}, "the clip has no frames"),
        ({"gt_gallery_ids": ["g99"]}, "the relevant image 'g99' is not in gallery.jsonl"),
        ({"gt_gallery_ids": []}, "gt_gallery_ids is empty"),
        ({"gt_gallery_ids": None}, "gt_gallery_ids must be a list"),
        ({"query_id": None}, "query_id is missing or empty"),
        ({"query_id": "c0"}, "the query_id 'c0' appears a second time, first in line 1"),
        ({"asr": [1]}, "asr must be text, found a list"),
        ({"boxes": [None]}, "boxes must be a list with one entry per frame (2)"),
        ({"boxes": [None, [0, 0, 1.3, 1]]}, "is not in fractions of the frame"),
        ({"boxes": [None, [0.5, 0, 0.5, 1]]}, "has no area"),
        ({"video": "v.mp4"}, "the clip has both frames and a video"),
        ({"frames": ["frames/none.png"]}, "frames/none.png does not exist"),
        ({"frames": ["frames"]}, "frames is not a file"),
    ],
)
@pytest.mark.parametrize("fast", [False, True])
def test_problems_of_one_clip(shop, found, change, message, fast):
    shop.clips["val"][2] |= change
    (problem,) = found(fast=fast)
    assert problem.startswith("clips_val.jsonl:3: ") and message in problem


@pytest.mark.parametrize(
    "change, message",
    [
        ({"start": 4.5, "end": 6}, "the clip starts at 4.5 s, after the 4 s of v.mp4"),
        ({"start": 2, "end": 6}, "the clip ends at 6 s, after the 4 s of v.mp4"),
        ({"start": 3, "end": 3}, "0 <= start < end"),
        ({"start": 3}, "0 <= start < end"),
        ({"start": -1, "end": 3}, "0 <= start < end"),
        ({"video": "w.mp4"}, "w.mp4: the video does not exist"),
        ({"boxes": [[0, 0, 1, 1]], "start": 2, "end": 3}, "boxes belong to frames, but the clip is a video"),
    ],
)
@pytest.mark.parametrize("fast", [False, True])
def test_problems_of_one_video(shop, found, change, message, fast):
    shop.clips["test"][-1] = {"query_id": "v1", "video": "v.mp4", "gt_gallery_ids": ["g1"], **change}
    (problem,) = found(fast=fast)
    assert problem.startswith("clips_test.jsonl:11: ") and message in problem


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gallery_id": "g0"}, "the gallery_id 'g0' appears a second time, first in line 1"),
        ({"image": 3}, "the image path must be a non-empty path"),
        ({"image": "gallery/none.png"}, "gallery/none.png does not exist"),
        ({"title": {}}, "title must be text, found a dict"),
        ({"live_id": "l0"}, "some gallery rows have a live_id and some have none"),
    ],
)
def test_problems_of_one_gallery_row(shop, found, change, message):
    shop.gallery[9] |= change
    for split in shop.clips:
        shop.clips[split] = [row for row in shop.clips[split] if row["gt_gallery_ids"] != ["g9"]]
    lines = [line for line in found() if line.startswith("gallery.jsonl")]
    assert len(lines) == 1 and lines[0].startswith("gallery.jsonl:10: ") and message in lines[0]


def test_all_problems_of_one_row_are_reported(shop, found):
    shop.clips["train"][0] |= {"gt_gallery_ids": 3, "boxes": 4, "asr": [], "query_id": None}
    assert len(found()) == 4 and all(line.startswith("clips_train.jsonl:1: ") for line in found())


def test_every_damaged_line_is_reported(shop, found):
    shop.write()
    shop.clips["val"][1:4] = ['{"query_id": "x', "[1, 2]", '{"query_id": "a", "query_id": "b"}']
    shop.clips["val"][5] = '{"query_id": NaN}'
    lines = found()
    assert [line.split(": ")[0] for line in lines] == [f"clips_val.jsonl:{i}" for i in (2, 3, 4, 6)]
    for line, message in zip(lines, ("not valid JSON", "found a list", "appears twice", "NaN is not a number")):
        assert message in line
    path = shop.root / "clips_val.jsonl"
    path.write_bytes(path.read_bytes().replace(b"[1, 2]", b"\xff\xfe").replace(b"NaN", b"\0"))
    lines = [str(problem) for problem in check_folder(str(shop.root)).problems]
    assert [line.split(": ")[0] for line in lines] == [f"clips_val.jsonl:{i}" for i in (2, 3, 4, 6)]
    assert "not UTF-8" in lines[1]


def test_two_files_joined_are_refused_by_check_and_builder_alike(shop, found, tmp_path):
    shop.write()
    path = shop.root / "clips_val.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([b"\xef\xbb\xbf", *lines[:4], b"\xef\xbb\xbf", *lines[4:]]))
    problems = [str(problem) for problem in check_folder(str(shop.root)).problems]
    assert len(problems) == 1 and problems[0].startswith("clips_val.jsonl:5: not valid JSON")
    with pytest.raises(ValueError, match="clips_val.jsonl, line 5: not valid JSON"):
        load_dataset_view(shop.root, "query", "validation", cache_dir=tmp_path / "cache")


def respelt(rows, change):
    """The rows with every path changed."""
    keys = {"image": change, "video": change, "frames": lambda paths: [change(path) for path in paths]}
    return [{key: keys.get(key, lambda value: value)(value) for key, value in row.items()} for row in rows]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be", "utf-8-sig"])
@pytest.mark.parametrize("written", [lambda path: path.replace("/", "\\"), nfc, lambda path: "./" + nfd(path)])
def test_lists_of_other_systems(shop, tmp_path, encoding, written):
    """Backslashes, the other form of accents, another encoding: check and builder find the same files."""
    (shop.root / "gallery").rename(shop.root / nfd("vitrine-é"))
    (shop.root / "v.mp4").rename(shop.root / nfd("ガラス.mp4"))
    elsewhere = {"gallery": nfd("vitrine-é"), "v.mp4": nfd("ガラス.mp4")}

    def moved(path):
        first, slash, rest = path.partition("/")
        return written(elsewhere.get(first, first) + slash + rest)

    shop.gallery = respelt(shop.gallery, moved)
    shop.clips = {split: respelt(rows, moved) for split, rows in shop.clips.items()}
    shop.write()
    for path in shop.root.glob("*.jsonl"):
        path.write_bytes(path.read_text(encoding="utf-8").replace("\n", "\r\n").encode(encoding))
    assert check_folder(str(shop.root)).problems == []
    pairs = load_dataset_view(shop.root, "pairs", "train", cache_dir=tmp_path / "cache")
    for row in pairs:
        assert all(Image.open(entry["path"]) for entry in [row["image"], *row["frames"]])
        assert row["frames"] or open(row["video"], "rb").close() is None
    assert main(["novel", str(shop.root), str(tmp_path / "novel")]) == 0
    problems = check_folder(str(tmp_path / "novel")).problems
    assert [problem for problem in problems if problem.level == "error"] == []


def test_a_name_in_other_capitals_is_reported(shop, found):
    shop.gallery[2]["image"] = "Gallery\\G2.png"
    shop.gallery[3]["image"] = "gallery/h3.png"
    assert found() == [
        "gallery.jsonl:3: Gallery/G2.png does not exist, but gallery/g2.png does",
        "gallery.jsonl:4: gallery/h3.png does not exist",
    ]


def test_a_list_in_a_local_encoding_is_reported_with_its_lines(shop, found):
    shop.write()
    path = shop.root / "clips_val.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b'"c3"', '"杯"'.encode("gbk"))
    path.write_bytes(b"".join(lines))
    (problem,) = check_folder(str(shop.root)).problems
    assert str(problem).startswith("clips_val.jsonl:4: the line is not UTF-8") and "save the file as" in str(problem)


def test_damaged_utf_16_is_reported(shop):
    shop.write()
    (shop.root / "clips_val.jsonl").write_bytes(b"\xff\xfe{\0\x00\xd8{\0")
    problems = [str(problem) for problem in check_folder(str(shop.root)).problems]
    assert len(problems) == 2 and "it holds no clip" in problems[0]
    assert problems[1].startswith("clips_val.jsonl:1: not UTF-16 ") and "save the file as UTF-8" in problems[1]


def test_whole_numbers_are_ids_with_and_without_a_decimal_point(shop, found, tmp_path):
    """As tables write them whose columns have gaps."""
    for i, row in enumerate(shop.gallery):
        row["gallery_id"], row["live_id"] = i, 7
    for clips in shop.clips.values():
        for row in clips:
            row["gt_gallery_ids"], row["live_id"] = [float(row["gt_gallery_ids"][0][1:])], 7.0
    assert found() == []
    row = load_dataset_view(shop.root, "query", "test", cache_dir=tmp_path / "cache")[3]
    assert row["relevant"] == ["3"] and row["live_id"] == "7"
    shop.clips["val"][0]["query_id"] = 1.5
    (problem,) = found()
    assert problem.startswith("clips_val.jsonl:1: query_id is 1.5, neither text nor a whole number")


def test_a_folder_whose_name_is_not_utf8_is_refused_by_name(shop, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xc8\xcb")
    shutil.move(shop.write(), folder)
    with pytest.raises(ValueError, match=r"data_dir .*/\\xc8\\xcb: the name is not UTF-8, .*; rename the folder"):
        load_dataset_view(folder, "gallery", "test", cache_dir=tmp_path / "cache")


def test_unknown_keys_give_a_warning_with_the_nearest_name(shop, found):
    for row in shop.clips["val"]:
        row["gt_galery_ids"] = row["gt_gallery_ids"]
        row["department"] = "x"
    del shop.clips["val"][0]["gt_gallery_ids"]
    assert found() == [
        "clips_val.jsonl:1: gt_gallery_ids must be a list of gallery ids",
        "clips_val.jsonl:1: warning: the key 'gt_galery_ids' is not known and ignored (and in 9 more lines); did you "
        "mean 'gt_gallery_ids'?",
        "clips_val.jsonl:1: warning: the key 'department' is not known and ignored (and in 9 more lines)",
    ]


def test_damaged_media_are_reported_once_at_their_first_mention(shop, found):
    whole = (shop.root / "frames/val-3-0.png").read_bytes()
    (shop.root / "frames/val-3-0.png").write_bytes(whole[:40])
    (shop.root / "gallery/g2.png").write_bytes(b"")
    shop.clips["val"][4]["frames"] = ["frames/val-3-0.png"]
    lines = found()
    assert [line.split(": ")[0] for line in lines] == ["gallery.jsonl:3", "clips_val.jsonl:4"]
    assert "gallery/g2.png is empty (0 bytes)" in lines[0] and "frames/val-3-0.png cannot be decoded" in lines[1]
    assert found(fast=True) == ["gallery.jsonl:3: gallery/g2.png is empty (0 bytes)"]


def test_damaged_videos(shop, found):
    whole = (shop.root / "v.mp4").read_bytes()
    (shop.root / "v.mp4").write_bytes(b"no video")
    (line,) = found()
    assert line.startswith("clips_train.jsonl:11: v.mp4: cannot be decoded")
    data = whole.index(b"mdat") + 4
    (shop.root / "v.mp4").write_bytes(
        whole[:data] + bytes(len(whole[data:]) // 4) + whole[data + len(whole[data:]) // 4 :]
    )
    assert found() != [] and found(fast=True) is not None


def test_the_same_clip_in_two_splits(shop, found):
    shop.clips["val"][3]["frames"][1] = "frames/train-3-1.png"
    message = "one of its frames is also in clips_train.jsonl:4 (c3); a clip belongs in one split"
    assert found() == [f"clips_val.jsonl:4: {message}"] == found(fast=True)
    shop.clips["val"][3]["frames"][1] = "frames/copy.png"
    (shop.root / "frames/copy.png").write_bytes((shop.root / "frames/train-3-1.png").read_bytes())
    assert found() == [f"clips_val.jsonl:4: {message}"]
    assert found(fast=True) == []


def test_overlapping_ranges_of_one_video_in_two_splits(shop, found):
    shop.clips["test"][-1]["start"] = 1.9
    assert found() == [
        "clips_test.jsonl:11: part of its video is also in clips_train.jsonl:11 (v0); a clip belongs in one split"
    ]
    shop.clips["train"][-1] |= {"start": None, "end": None}
    assert len(found()) == 1


def test_livestreams(shop, found):
    for i, row in enumerate(shop.gallery):
        row["live_id"] = f"l{i % 2}"
    for clips in shop.clips.values():
        for row in clips:
            row["live_id"] = f"l{int(row['gt_gallery_ids'][0][1:]) % 2}"
    assert found() == []
    shop.clips["val"][0]["live_id"] = "l1"
    shop.clips["val"][1]["live_id"] = "l7"
    del shop.clips["val"][2]["live_id"]
    first, second, third = found()
    assert first.startswith("clips_val.jsonl:1: the relevant image 'g0' is not in the gallery of the livestream 'l1'")
    assert second == "clips_val.jsonl:2: the livestream 'l7' has an empty gallery"
    assert third.startswith("clips_val.jsonl:3: live_id is missing")


def test_missing_files_and_few_products(shop, found):
    shop.write()
    for name in ("clips_val.jsonl", "clips_test.jsonl"):
        (shop.root / name).unlink()
    shop.lines("clips_train.jsonl", shop.clips["train"][:3])
    lines = [str(problem) for problem in check_folder(str(shop.root)).problems]
    assert (
        lines[0] == "clips_train.jsonl: warning: its clips show 3 products; contrastive training needs more products"
    )
    assert lines[1].startswith("clips_val.jsonl: warning: the file does not exist: train with --eval_strategy no")
    assert lines[2].startswith("clips_test.jsonl: warning: the file does not exist")
    shop.lines("clips_train.jsonl", shop.clips["train"][:1])
    assert "clips_train.jsonl: its clips show 1 products" in str(check_folder(str(shop.root)).problems[0])
    (shop.root / "gallery.jsonl").unlink()
    (shop.root / "clips_train.jsonl").unlink()
    lines = [str(problem) for problem in check_folder(str(shop.root)).problems]
    assert len(lines) == 2 and "the file does not exist; write one JSON object" in lines[0]
    assert "none of clips_train.jsonl" in lines[1]


def test_command(shop, capsys):
    shop.clips["val"][0]["asr"] = 3 * [1]
    folder = shop.write()
    assert main(["check", folder, "--json"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["ok"] is False and captured.err == ""
    message = "asr must be text, found a list"
    assert report["problems"] == [{"file": "clips_val.jsonl", "line": 1, "message": message, "level": "error"}]
    assert report["files"]["clips_test.jsonl"]["seconds"] == 2.0
    assert main(["check", folder]) == 1
    assert capsys.readouterr().out.startswith(f"clips_val.jsonl:1: {message}\n")
    assert main(["check", folder + "/nothing"]) == 2
    assert "is not a folder; pass the folder that holds gallery.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["check"])
    assert end.value.code == 2


def test_it_runs_as_a_module_without_a_warning(shop):
    command = [sys.executable, "-m", "data_rice.shop_clips", "check", shop.write(), "--json", "--fast"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "" and json.loads(done.stdout)["ok"]


def test_any_problem_can_be_printed_on_an_ascii_terminal(shop):
    shop.gallery[0]["图"] = 1
    command = [sys.executable, "-m", "data_rice.shop_clips", "check", shop.write(), "--json", "--fast"]
    done = subprocess.run(command, capture_output=True, check=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert "图" in json.loads(done.stdout.decode("ascii"))["problems"][0]["message"]


def test_a_folder_that_passes_can_be_loaded_and_one_that_fails_for_its_rows_cannot(shop, tmp_path):
    folder = shop.write()
    for view, split in (("pairs", "train"), ("query", "validation"), ("query", "test"), ("gallery", "test")):
        assert len(load_dataset_view(folder, view, split, cache_dir=tmp_path / "cache")) >= NUM_PRODUCTS


def test_the_real_photographs_pass(groceries_dir):
    report = check_folder(str(groceries_dir), workers=2)
    assert report.ok and report.files["clips_train.jsonl"]["frames"] == 2640
    assert all(problem.level == "warning" and "is not known" in problem.message for problem in report.problems)


def test_check_and_loader_agree(shop, found, tmp_path, write_video, cut_after):
    """On a picture of a kind that is not read, on recordings that were joined, and on one that is cut short."""
    Image.new("RGB", (16, 16)).save(shop.root / "frames/named.png", format="JPEG2000")
    part = write_video(shop.root / "part.mpg", num_frames=25, fps=25)
    (shop.root / "joined.mpg").write_bytes(2 * part.read_bytes())
    cut_after(write_video(shop.root / "cut.mp4", movflags="faststart"), 10)
    clips = shop.clips["val"]
    clips[0]["frames"] = ["frames/named.png"]
    for i, where in enumerate(
        (
            {"video": "joined.mpg", "start": 1.5, "end": 1.9},
            {"video": "cut.mp4"},
            {"video": "cut.mp4", "start": 3, "end": 4},
        )
    ):
        clips[i + 1] = {"query_id": f"v{i}", "gt_gallery_ids": [f"g{i}"], **where}
    lines = found()
    assert [line.split(": ")[0] for line in lines] == [f"clips_val.jsonl:{line}" for line in (1, 3, 4)]
    assert "warning: 10 frames at the end are missing" in lines[1] and "after the 2 s of cut.mp4" in lines[2]
    assert not any("joined" in line for line in found(fast=True))

    rows = load_dataset_view(shop.root, "query", "validation", cache_dir=tmp_path / "cache").select(range(4))
    processor = build_processor(train_tokenizer(["a red cup"] * 9, vocab_size=400), image_size=16, patch_size=8)
    _, readable, failures = RiceCollator(processor).collate_queries(list(rows))
    assert readable == [1, 2]
    assert failures[0]["reason"] in lines[0] and "its video ends at 2 s" in failures[1]["reason"]
