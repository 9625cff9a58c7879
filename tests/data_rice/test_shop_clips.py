"""shop_clips builder on small folders written by a fixture, and on the real photographs if available."""

import copy
import json
import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from data_rice import ShopClips, gallery_scope, load_dataset_view

GALLERY = [
    {"gallery_id": "g0", "image": "gallery/g0.jpg", "title": "Red apple", "category": "Apple", "price": 3},
    {"gallery_id": "g1", "image": "gallery/g1.jpg", "name": "Pear"},
    {"gallery_id": 2, "image": "gallery/g2.jpg"},
]
CLIPS = [
    {"query_id": "c0", "frames": ["frames/a.jpg", "frames/b.jpg"], "gt_gallery_ids": ["g0", "g1"], "asr": "苹果"},
    {
        "query_id": "c1",
        "frames": ["frames/b.jpg", "frames/a.jpg"],
        "boxes": [[0.1, 0.2, 0.5, 1.02], None],
        "gt_gallery_ids": [2],
        "category": "Fruit",
        "unknown": [1],
    },
    {"query_id": "c2", "video": "videos/v.mp4", "start": 1, "end": 4.5, "gt_gallery_ids": ["g1"]},
]


class Shop:
    """A shop_clips folder: change ``gallery`` and ``clips``, then `write`."""

    def __init__(self, root: Path):
        self.root = root
        self.gallery = copy.deepcopy(GALLERY)
        self.clips = {"train": copy.deepcopy(CLIPS), "test": copy.deepcopy(CLIPS)}

    def write(self) -> Path:
        self.root.mkdir(exist_ok=True)
        self.lines("gallery.jsonl", self.gallery)
        for split, clips in self.clips.items():
            self.lines(f"clips_{split}.jsonl", clips)
        return self.root

    def lines(self, name: str, rows: list) -> None:
        self.root.joinpath(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def shop(tmp_path) -> Shop:
    return Shop(tmp_path / "shop")


@pytest.fixture
def load(shop, tmp_path):
    def load(view: str, split: str = "train"):
        shop.write()
        return load_dataset_view("shop_clips", view, split, data_dir=shop.root, cache_dir=tmp_path / "cache")

    return load


def test_pairs(shop, load):
    rows = load("pairs")
    first, second, third = rows
    assert (first["clip_id"], first["live_id"], first["product_id"], first["image_id"]) == ("c0", "", "g0", "g0")
    assert (first["title"], first["asr"], first["category"]) == ("Red apple", "苹果", "Apple")
    assert [frame["path"] for frame in first["frames"]] == [str(shop.root / f"frames/{name}.jpg") for name in "ab"]
    assert first["image"] == {"bytes": None, "path": str(shop.root / "gallery/g0.jpg")}
    assert first["boxes"] == [None, None]
    assert second["boxes"] == [pytest.approx([0.1, 0.2, 0.5, 1.0]), None]
    assert (second["product_id"], second["category"], second["title"]) == ("2", "Fruit", "")
    assert third["frames"] == [] and third["video"] == str(shop.root / "videos/v.mp4")
    assert (third["start"], third["end"], third["title"]) == (1.0, 4.5, "Pear")
    assert (first["video"], first["start"], first["end"]) == ("", -1.0, -1.0)


def test_queries_and_gallery(shop, load):
    rows = load("query", "test")
    assert rows["relevant"][:] == [["g0", "g1"], ["2"], ["g1"]]
    for split in ("train", "validation", "test"):
        gallery = load("gallery", split)
        assert gallery["image_id"][:] == ["g0", "g1", "2"] and gallery["live_id"][:] == [""] * 3
    assert gallery_scope(shop.root) == gallery_scope("shop_clips") == "all"


def test_both_builders_share_the_columns(shop, load):
    from data_rice import Lpr4m
    from data_rice.features import view_features

    for view in ("pairs", "query", "gallery"):
        assert load(view).features == view_features(view)
    assert Lpr4m.BUILDER_CONFIG_CLASS is not ShopClips.BUILDER_CONFIG_CLASS


def test_rows_with_livestreams(shop, load):
    del shop.clips["test"]
    for row, live in zip(shop.gallery, ("l0", "l1", "l1")):
        row["live_id"] = live
    for row, live in zip(shop.clips["train"], ("l0", "l1", "l1")):
        row["live_id"] = live
    shop.clips["train"][0]["gt_gallery_ids"] = ["g0"]
    assert load("query")["live_id"][:] == ["l0", "l1", "l1"]
    assert gallery_scope(shop.root) == gallery_scope("shop_clips", shop.root) == "live"
    shop.clips["train"][0]["live_id"] = "l9"
    with pytest.raises(ValueError, match="clips_train.jsonl, line 1: the livestream 'l9' has an empty gallery"):
        load("query")
    shop.clips["train"][0]["live_id"] = "l1"
    with pytest.raises(ValueError, match="line 1: the relevant image 'g0' is not in the gallery of the livestream"):
        load("query")
    del shop.gallery[1]["live_id"]
    with pytest.raises(ValueError, match="gallery.jsonl, line 2: some gallery rows have a live_id and some have none"):
        load("gallery")


def test_unusable_clips_are_left_out_of_training_and_kept_as_queries(shop, load, tmp_path, caplog):
    shop.clips["train"][0]["frames"] = []
    shop.clips["train"][1]["gt_gallery_ids"] = []
    with caplog.at_level(logging.WARNING):
        assert load("pairs")["clip_id"][:] == ["c2"]
        assert "left out because they have no frames (c0)" in caplog.text
        assert "left out because gt_gallery_ids is empty (c1)" in caplog.text
        queries = load("query")
    assert queries["clip_id"][:] == ["c0", "c1", "c2"]
    assert queries["frames"][0] == [] and queries["relevant"][1] == []
    assert "kept without frames" in caplog.text
    builder = ShopClips("pairs", data_dir=shop.root, cache_dir=tmp_path / "cache")
    builder.download_and_prepare()
    assert sum(builder.problems["train"].counts.values()) == 2
    assert Path(builder.problems["train"].path).read_text().count("\n") == 2


def test_split_without_a_usable_row(shop, load):
    shop.clips["train"] = [shop.clips["train"][0] | {"frames": []}]
    with pytest.raises(ValueError, match="no usable row in the train split of pairs .*1 rows left out because"):
        load("pairs")
    assert len(load("pairs", "test")) == 3
    shop.clips["train"] = []
    with pytest.raises(ValueError, match="no usable row in the train split of query .no row"):
        load("query")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"frames": ["../secret.jpg"]}, "leads out of the data folder"),
        ({"frames": ["frames/../../secret.jpg"]}, "leads out of the data folder"),
        ({"frames": ["/etc/passwd"]}, "leads out of the data folder"),
        ({"frames": ["..\\secret.jpg"]}, "leads out of the data folder"),
        ({"frames": ["C:\\secret.jpg"]}, "leads out of the data folder"),
        ({"frames": ["a\0.jpg"]}, "must be a non-empty path"),
        ({"frames": [3]}, "must be a non-empty path"),
        ({"frames": "frames/a.jpg"}, "frames must be a list"),
        ({"frames": None}, "neither frames nor a video"),
        ({"video": "v.mp4"}, "both frames and a video"),
        ({"frames": None, "video": "/v.mp4"}, "leads out of the data folder"),
        ({"frames": None, "video": "v.mp4", "start": 3, "end": 2}, "0 <= start < end"),
        ({"frames": None, "video": "v.mp4", "start": 3}, "0 <= start < end"),
        ({"frames": None, "video": "v.mp4", "start": 900, "end": 900.00001}, "0 <= start < end"),
        ({"gt_gallery_ids": ["g7"]}, "the relevant image 'g7' is not in gallery.jsonl"),
        ({"gt_gallery_ids": "g0"}, "must be a list"),
        ({"gt_gallery_ids": [["g0"]]}, "is not in gallery.jsonl"),
        ({"query_id": "c0"}, "appears a second time"),
        ({"query_id": ""}, "query_id is missing"),
        ({"query_id": None}, "query_id is missing"),
        ({"query_id": "\ud800"}, "half of a surrogate pair"),
        ({"asr": ["a"]}, "asr must be text"),
        ({"boxes": [[0, 0, 1, 1]]}, "one entry per frame"),
        ({"boxes": [[0, 0, 1, 1], [0, 0, 200, 100]]}, "not in fractions"),
        ({"boxes": [[0.5, 0, 0.5, 1], None]}, "has no area"),
        ({"boxes": [[0, 0, True, 1], None]}, "four finite numbers"),
        ({"boxes": [[0, 0, 10**399, 1], None]}, "four finite numbers"),
    ],
)
def test_malformed_clips_name_file_and_line(shop, load, change, message):
    shop.clips["train"][1] |= {"boxes": None} | change
    with pytest.raises(ValueError, match=f"clips_train.jsonl, line 2: .*{message}"):
        load("pairs")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gallery_id": "g0"}, "appears a second time"),
        ({"gallery_id": None}, "gallery_id is missing"),
        ({"image": None}, "must be a non-empty path"),
        ({"image": "../g.jpg"}, "leads out of the data folder"),
    ],
)
def test_malformed_gallery_names_file_and_line(shop, load, change, message):
    shop.gallery[1] |= change
    with pytest.raises(ValueError, match=f"gallery.jsonl, line 2: .*{message}"):
        load("gallery")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "line 1: not valid JSON"),
        ("[1]", "line 1: expected a JSON object, found a list"),
        ('{"gallery_id": "a", "gallery_id": "b"}', "line 1: the key 'gallery_id' appears twice"),
        ('{"gallery_id": NaN}', "line 1: NaN is not a number"),
        ("[" * 100000, "line 1: "),
        ("", "holds no image"),
    ],
)
def test_damaged_gallery_file(shop, tmp_path, text, message):
    shop.write()
    (shop.root / "gallery.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_dataset_view(shop.root, "gallery", "test", cache_dir=tmp_path / "cache")


def test_missing_files(shop, load, tmp_path):
    with pytest.raises(ValueError, match="clips_val.jsonl does not exist, so there is no validation split"):
        load("pairs", "validation")
    for name in ("clips_train.jsonl", "clips_test.jsonl"):
        (shop.root / name).unlink()
    with pytest.raises(FileNotFoundError, match="has none of clips_train.jsonl"):
        load_dataset_view(shop.root, "query", "test", cache_dir=tmp_path / "cache")
    (shop.root / "gallery.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="gallery.jsonl does not exist"):
        load_dataset_view("shop_clips", "gallery", "test", data_dir=shop.root, cache_dir=tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        ShopClips("pairs", data_dir=shop.root / "nothing")
    with pytest.raises(ValueError, match="data_dir is missing"):
        ShopClips("pairs")


def test_cache_follows_the_files(shop, load):
    assert len(load("pairs")) == 3
    shop.clips["train"].pop()
    assert len(load("pairs")) == 2
    file = shop.root / "clips_train.jsonl"
    shop.write()
    before = load_dataset_view(shop.root, "pairs", "train", cache_dir=shop.root / "cache").cache_files
    os.utime(file, ns=(1, 1))
    assert load_dataset_view(shop.root, "pairs", "train", cache_dir=shop.root / "cache").cache_files != before


def test_rows_can_be_streamed(shop):
    rows = list(ShopClips("pairs", data_dir=shop.write()).as_streaming_dataset(split="train"))
    assert [row["clip_id"] for row in rows] == ["c0", "c1", "c2"]


def test_real_photographs(tmp_path, groceries_dir):
    pairs = load_dataset_view(groceries_dir, "pairs", "train", cache_dir=tmp_path)
    assert (len(pairs), len(set(pairs["product_id"]))) == (465, 81)
    queries = load_dataset_view(groceries_dir, "query", "test", cache_dir=tmp_path)
    gallery = load_dataset_view(groceries_dir, "gallery", "test", cache_dir=tmp_path)
    assert (len(queries), len(gallery)) == (289, 81)
    with Image.open(queries[0]["frames"][0]["path"]) as frame:
        assert min(frame.size) <= 160


def test_a_cache_that_is_a_file_is_named(shop, tmp_path):
    (tmp_path / "cache").write_text("x")
    with pytest.raises(ValueError, match=r"cache_dir .*cache is a file; name a folder\."):
        load_dataset_view(shop.root, "gallery", "test", cache_dir=tmp_path / "cache")
