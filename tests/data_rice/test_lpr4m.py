"""LPR4M builder on small trees written in the published layout."""

import json
import logging
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from PIL import Image

from data_rice import Lpr4m, gallery_scope, load_dataset_view

REPOSITORY = Path(__file__).parents[2]


def _uuid(number: int) -> str:
    return str(uuid.UUID(int=number + 1))


class Tree:
    """Writes an LPR750K tree: `train` and `test` collect annotation rows, `write` puts them on disk."""

    def __init__(self, root: Path):
        self.root = root
        self.train: list[list[str]] = []
        self.relevant: dict = {}
        self.gallery: dict = {}
        self.boxes: dict = {}
        self.asr: list[list[str]] = []
        self.titles: list[list[str]] = []

    def jpeg(self, *parts: str, size=(40, 20)) -> Path:
        path = self.root.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)
        return path

    def add_train(self, live: int, start: int, product: int, folder="training_video_00", frames=2, boxes=None):
        clip = f"{_uuid(live)}-{start}-{start + 5000}"
        frame_ids = [f"{clip}-{index:04d}" for index in range(frames)]
        image = f"{_uuid(1000 + product)}-0"
        if folder:
            for frame_id in frame_ids:
                self.jpeg(folder, clip, f"{frame_id}.jpg")
        self.jpeg("training_image", f"{image}.jpg")
        boxes = [[4, 2, 20, 10]] * frames if boxes is None else boxes
        text = ["3", "Skirt", "看这 a 'skirt'", "large", "long", "2"]
        self.train.append([clip, str(frame_ids), str(boxes), image, f"title {product}", *text])
        return clip

    def add_test(self, live: int, start: int, product: int, frames=3):
        live_id = _uuid(live)
        clip = f"{live_id}-{start}-{start + 5000}"
        for index in reversed(range(frames)):
            self.jpeg("query", clip, f"{clip}-{index:04d}.jpg")
        for shot in (1, 0):
            image = f"{_uuid(1000 + product)}-{shot}"
            self.gallery.setdefault(live_id, []).append(image)
            self.jpeg("gallery", live_id, f"{image}.jpg")
            self.titles.append([image, f"title {product}"])
        self.relevant[clip] = [f"{_uuid(1000 + product)}-0"]
        self.asr.append([clip, f"speech {product}"])
        self.boxes[f"{clip}-0001"] = [[0.1, 0.2, 0.3, 0.4], [0.25, 0.1, 0.5, 0.3]]
        return clip

    def write(self) -> Path:
        folder = self.root / "annotations"
        folder.mkdir(parents=True, exist_ok=True)
        if self.train:
            self.write_table("training_videoinfo_tiny.txt", self.train)
        if self.relevant:
            self.write_table("test_videoid_asr.txt", self.asr)
            self.write_table("test_image_title.txt", self.titles)
            self.write_json("test_videoid_to_gtimage.json", self.relevant)
            self.write_json("test_liveid_to_gallery.json", self.gallery)
            self.write_json("test_frameid2gtbox.json", self.boxes)
        return self.root

    def write_table(self, name: str, rows: list[list[str]]) -> Path:
        path = self.root / "annotations" / name
        path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def write_json(self, name: str, value: object) -> Path:
        path = self.root / "annotations" / name
        path.write_text(json.dumps(value), encoding="utf-8")
        return path


@pytest.fixture
def tree(tmp_path) -> Tree:
    return Tree(tmp_path / "lpr4m")


@pytest.fixture
def load(tree, tmp_path):
    def load(view: str, split: str, **options):
        return load_dataset_view("lpr4m", view, split, data_dir=tree.root, cache_dir=tmp_path / "cache", **options)

    return load


def _fill(tree: Tree) -> None:
    for live in range(4):
        tree.add_train(live, 0, 10 * live, folder=f"training_video_0{live % 2}")
        tree.add_train(live, 9000, 10 * live + 1, folder="training_video_03")
    tree.add_test(20, 0, 500)
    tree.add_test(20, 9000, 501)
    tree.add_test(21, 0, 502)
    tree.write()


def test_pairs_rows(tree, load):
    _fill(tree)
    rows = load("pairs", "train")
    assert len(rows) == 8
    row = rows[1]
    clip = f"{_uuid(0)}-9000-14000"
    assert (row["clip_id"], row["live_id"]) == (clip, _uuid(0))
    assert (row["image_id"], row["product_id"]) == (f"{_uuid(1001)}-0", _uuid(1001))
    assert row["title"] == "title 1" and row["asr"] == "看这 a 'skirt'" and row["category"] == "Skirt"
    assert (row["product_scale"], row["visible_duration"], row["product_number"]) == ("large", "long", "2")
    folder = tree.root / "training_video_03" / clip
    assert [frame["path"] for frame in row["frames"]] == [str(folder / f"{clip}-000{i}.jpg") for i in range(2)]
    assert all(frame["bytes"] is None and os.path.isfile(frame["path"]) for frame in row["frames"])
    assert row["image"] == {"bytes": None, "path": str(tree.root / "training_image" / f"{_uuid(1001)}-0.jpg")}
    assert row["boxes"] == [pytest.approx([0.1, 0.1, 0.5, 0.5])] * 2
    assert (row["video"], row["start"], row["end"]) == ("", -1.0, -1.0)


def test_boxes_are_cut_at_the_frame_and_zero_means_none(tree, load):
    tree.add_train(0, 0, 1, frames=3, boxes=[[0, 0, 0, 0], [-8, 5, 80, 10.0], [50, 5, 60, 10]])
    tree.add_train(0, 9000, 2, boxes=[])
    tree.write()
    rows = load("pairs", "train")
    assert rows[0]["boxes"] == [None, pytest.approx([0.0, 0.25, 1.0, 0.5]), None]
    assert rows[1]["boxes"] == [None, None]


def test_query_rows(tree, load):
    _fill(tree)
    rows = load("query", "test")
    assert [row["relevant"] for row in rows] == [[f"{_uuid(1500 + i)}-0"] for i in range(3)]
    row = rows[0]
    clip = row["clip_id"]
    assert row["live_id"] == _uuid(20) and row["asr"] == "speech 500" and row["product_id"] == _uuid(1500)
    assert [Path(frame["path"]).name for frame in row["frames"]] == [f"{clip}-000{i}.jpg" for i in range(3)]
    assert row["boxes"] == [None, pytest.approx([0.1, 0.1, 0.5, 0.4]), None]
    assert row["category"] == ""


def test_query_attributes_come_from_the_optional_file(tree, load):
    clip = tree.add_test(20, 0, 500)
    tree.write()
    tree.write_table("test_videoid_attributes.txt", [[clip, "Skirt", "small", "short", "3"]])
    row = load("query", "test")[0]
    attributes = [row[name] for name in ("category", "product_scale", "visible_duration", "product_number")]
    assert attributes == ["Skirt", "small", "short", "3"]


def test_gallery_holds_main_images_in_the_published_order(tree, load):
    _fill(tree)
    rows = load("gallery", "test")
    assert rows["image_id"][:] == [f"{_uuid(1500 + i)}-0" for i in range(3)]
    assert rows["live_id"][:] == [_uuid(20), _uuid(20), _uuid(21)]
    assert rows[0]["title"] == "title 500" and os.path.isfile(rows[0]["image"]["path"])
    every = load("gallery", "test", gallery_images="all")
    assert every["image_id"][:2] == [f"{_uuid(1500)}-1", f"{_uuid(1500)}-0"]
    assert load("query", "test", gallery_images="all")[0]["relevant"] == [f"{_uuid(1500)}-1", f"{_uuid(1500)}-0"]


def test_gallery_main_file_overrides_the_names(tree, load):
    _fill(tree)
    listed = tree.root / "annotations" / "gallery_main.txt"
    listed.write_text(f"{_uuid(20)}/{_uuid(1500)}-1.jpg\n{_uuid(1501)}-0\n{_uuid(1502)}-0\n")
    assert load("gallery", "test")["image_id"][:] == [f"{_uuid(1500)}-1", f"{_uuid(1501)}-0", f"{_uuid(1502)}-0"]
    assert load("query", "test")[0]["relevant"] == [f"{_uuid(1500)}-1"]


def test_validation_holds_out_whole_livestreams_and_their_products(tree, load, caplog):
    _fill(tree)
    held = load("pairs", "validation", validation_fraction=0.25)
    (live,) = set(held["live_id"])
    assert load("query", "validation", validation_lives=1)["live_id"][:] == [live, live]
    shared = int(uuid.UUID(held[0]["product_id"])) - 1 - 1000
    kept = next(number for number in range(4) if _uuid(number) != live)
    leaked = tree.add_train(kept, 20000, shared)
    tree.write()
    with caplog.at_level(logging.WARNING):
        train = load("pairs", "train", validation_lives=[live])
    assert live not in train["live_id"] and leaked not in train["clip_id"]
    assert len(train) == 6
    assert "1 rows left out of training" in caplog.text and leaked in caplog.text
    assert set(train["product_id"]).isdisjoint(held["product_id"])

    queries = load("query", "validation", validation_lives=[live])
    gallery = load("gallery", "validation", validation_lives=[live])
    assert set(gallery["live_id"]) == {live}
    assert all(set(row["relevant"]) <= set(gallery["image_id"]) and row["relevant"] for row in queries)


def test_problem_list_is_a_file_and_an_attribute(tree, tmp_path):
    good = tree.add_train(0, 0, 1)
    bad = tree.add_train(0, 9000, 2, frames=0)
    tree.write()
    for _ in range(2):  # built, then reused from the cache
        builder = Lpr4m("pairs", data_dir=tree.root, cache_dir=tmp_path / "cache")
        builder.download_and_prepare()
        assert builder.as_dataset(split="train")["clip_id"][:] == [good]
        log = builder.problems["train"]
        assert dict(log.counts) == {"left out because they have no frames": 1}
        entry = json.loads(Path(log.path).read_text())
        assert entry["id"] == bad and entry["line"] == 2 and entry["file"].endswith("training_videoinfo_tiny.txt")


def test_missing_media_keep_their_rows(tree, load, caplog):
    clip = tree.add_train(0, 0, 1, folder=None)
    test = tree.add_test(20, 0, 500)
    for frame in (tree.root / "query" / test).iterdir():
        frame.unlink()
    tree.write()
    with caplog.at_level(logging.WARNING):
        row = load("pairs", "train")[0]
        query = load("query", "test")[0]
    assert [Path(frame["path"]).parts[-3:-1] for frame in row["frames"]] == [("training_video_00", clip)] * 2
    assert row["boxes"] == [None, None] and "no folder or shard holds their frames" in caplog.text
    assert [Path(frame["path"]).name for frame in query["frames"]] == [f"{test}-0001.jpg"]
    assert query["relevant"] and "count as misses" in caplog.text


def test_unanswerable_query_is_kept(tree, load, caplog):
    _fill(tree)
    clip = next(iter(tree.relevant))
    tree.relevant[clip] = ["nowhere-0"]
    tree.write()
    with caplog.at_level(logging.WARNING):
        rows = load("query", "test")
    assert len(rows) == 3 and rows[0]["relevant"] == ["nowhere-0"] and clip in caplog.text


def _corrupt(column: int, value: str):
    def corrupt(tree: Tree) -> None:
        tree.train[1][column] = value

    return corrupt


@pytest.mark.parametrize(
    "corrupt, message",
    [
        (lambda tree: tree.train[1].pop(), "expected 11 tab-separated columns, found 10"),
        (lambda tree: tree.train[1].append("x"), "expected 11 tab-separated columns, found 12"),
        (_corrupt(0, "clip"), "not of the form <live uuid>"),
        (_corrupt(0, "../x-b-c-d-e-0-1"), "would lead out of the data folder"),
        (_corrupt(1, "__import__('os').getcwd()"), "list of quoted strings|list of plain quoted strings"),
        (_corrupt(1, "['a', 'b'"), "list of quoted strings"),
        (_corrupt(1, "['../../a', 'b']"), "would lead out"),
        (_corrupt(2, "[[1, 2, 3]]"), "four finite numbers"),
        (_corrupt(2, "[[1, 2, 3, 1e999], [0, 0, 0, 0]]"), "four finite numbers"),
        (_corrupt(2, "[[1, 2, 3, NaN], [0, 0, 0, 0]]"), "list of boxes"),
        (_corrupt(2, "[" * 100000), "list of boxes"),
        (_corrupt(2, "[[1, 2, 3, 4]]"), "2 frames but 1 boxes"),
        (_corrupt(3, ""), "image id is empty"),
        (_corrupt(3, "/etc/passwd"), "would lead out"),
        (_corrupt(7, "a\0b"), "NUL character"),
    ],
)
def test_malformed_rows_name_file_and_line(tree, load, corrupt, message):
    tree.add_train(0, 0, 1)
    tree.add_train(0, 9000, 2)
    corrupt(tree)
    tree.write()
    with pytest.raises(ValueError, match=rf"training_videoinfo_tiny.txt, line 2: .*({message})"):
        load("pairs", "train")


def test_duplicated_clips_and_bad_bytes(tree, load):
    tree.add_train(0, 0, 1)
    tree.add_train(0, 0, 2)
    tree.write()
    with pytest.raises(ValueError, match=r"line 2: the clip id .* appears a second time"):
        load("pairs", "train")
    tree.train.pop()
    tree.write()
    with open(tree.root / "annotations" / "training_videoinfo_tiny.txt", "ab") as file:
        file.write(b"\xff\n")
    with pytest.raises(ValueError, match="line 2: the line is not UTF-8"):
        load("pairs", "train")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("test_liveid_to_gallery.json", {}, "has an empty gallery"),
        ("test_liveid_to_gallery.json", [], "expected a JSON object"),
        ("test_frameid2gtbox.json", {"a-0": [[0, 0, 50, 50]]}, "frame 'a-0': the boxes are not fractions"),
        ("test_frameid2gtbox.json", {"a-0": [[0, 0, 1]]}, "frame 'a-0': expected a box"),
        ("test_videoid_to_gtimage.json", {"a/b": []}, "would lead out"),
        ("test_videoid_to_gtimage.json", {"a": "b"}, "expected a list of image ids"),
    ],
)
def test_malformed_test_files(tree, load, name, value, message):
    _fill(tree)
    tree.write_json(name, value)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        load("query", "test")


def test_damaged_json_names_the_line_and_duplicates(tree, load):
    _fill(tree)
    path = tree.root / "annotations" / "test_videoid_to_gtimage.json"
    path.write_text('{"a": [],\n"b": [}')
    with pytest.raises(ValueError, match=r"gtimage.json, line 2: not valid JSON"):
        load("query", "test")
    path.write_text('{"a": [], "a": []}')
    with pytest.raises(ValueError, match=r"gtimage.json: the key 'a' appears twice"):
        load("query", "test")


@pytest.mark.parametrize(
    "name", ["test_liveid_to_gallery.json", "test_frameid2gtbox.json", "test_videoid_asr.txt", "test_image_title.txt"]
)
def test_missing_annotation_file(tree, load, name):
    _fill(tree)
    (tree.root / "annotations" / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.split(".")[0]):
        load("query", "test")


def test_missing_splits_and_arguments(tree, load, tmp_path):
    _fill(tree)
    with pytest.raises(ValueError, match="validation_fraction"):
        load("query", "validation")
    with pytest.raises(ValueError, match="LPR4M has no test pairs"):
        load("pairs", "test")
    with pytest.raises(ValueError, match="no view 'clips'"):
        load("clips", "test")
    with pytest.raises(ValueError, match="no option 'validation'"):
        load("pairs", "train", validation=3)
    with pytest.raises(ValueError, match="hold out fewer"):
        load("pairs", "train", validation_lives=4)
    with pytest.raises(ValueError, match="validation_fraction must be"):
        load("pairs", "train", validation_fraction=1.5)
    with pytest.raises(FileNotFoundError, match="python -m data_rice.mini_lpr4m"):
        load_dataset_view("mini_lpr4m", "pairs", "train", data_dir=tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="neither a data set"):
        load_dataset_view("lpr5m", "pairs", "train")
    with pytest.raises(ValueError, match="needs data_dir"):
        load_dataset_view("lpr4m", "pairs", "train")
    with pytest.raises(ValueError, match="holds neither gallery.jsonl"):
        load_dataset_view(tmp_path, "pairs", "train")


def test_folder_is_recognised(tree, tmp_path):
    _fill(tree)
    rows = load_dataset_view(tree.root, "pairs", "train", cache_dir=tmp_path / "cache")
    assert len(rows) == 8
    assert gallery_scope(tree.root) == gallery_scope("lpr4m") == gallery_scope("mini_lpr4m") == "live"


def test_cache_follows_the_annotation_files_and_the_media(tree, load, tmp_path):
    clip = tree.add_train(0, 0, 1, folder=None)
    tree.write()
    first = load("pairs", "train")
    assert first.cache_files == load("pairs", "train").cache_files
    tree.add_train(0, 9000, 2)
    tree.write()
    assert len(load("pairs", "train")) == 2
    for index in range(2):
        tree.jpeg("training_video_05", clip, f"{clip}-{index:04d}.jpg")
    assert "training_video_05" in load("pairs", "train")[0]["frames"][0]["path"]

    other = Tree(tmp_path / "other")
    other.add_train(7, 0, 1)
    rows = load_dataset_view("lpr4m", "pairs", "train", data_dir=other.write(), cache_dir=tmp_path / "cache")
    assert rows["live_id"][:] == [_uuid(7)]


def test_query_cache_follows_the_frames(tree, load):
    _fill(tree)
    clip = load("query", "test")[0]["clip_id"]
    tree.jpeg("query", clip, f"{clip}-0003.jpg")
    assert len(load("query", "test")[0]["frames"]) == 4


def test_several_processes_build_at_the_same_time(tree, tmp_path):
    _fill(tree)
    code = (
        "import sys; from data_rice import load_dataset_view\n"
        "print(len(load_dataset_view('lpr4m', 'pairs', 'train', data_dir=sys.argv[1], cache_dir=sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(tree.root), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    for process in started:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert output.strip() == "8"


def test_training_lists_alone_have_no_validation_queries(tree, load):
    tree.add_train(0, 0, 1)
    tree.write()
    with pytest.raises(FileNotFoundError, match="no validation split; put the test files there, or set validation_fr"):
        load("query", "validation")


def test_test_boxes_without_an_area_are_counted(tree, tmp_path):
    clip = tree.add_test(0, 0, 1)
    tree.boxes[f"{clip}-0000"] = [[0.5, 0.5, 0.5, 0.9], [0, 0, 0, 0]]
    tree.boxes[f"{clip}-0002"] = [[1.5, 0, 1.9, 1]]
    untouched = tree.add_test(0, 9000, 2)
    tree.boxes[f"{untouched}-0000"] = [[0, 0, 0, 0]]
    tree.write()
    for view in ("query", "detection"):
        builder = Lpr4m(view, data_dir=tree.root, cache_dir=tmp_path / "cache")
        builder.download_and_prepare()
        log = builder.problems["test"]
        assert dict(log.counts) == {"kept without those boxes that have no area inside the frame": 1}
        assert log.examples == {"kept without those boxes that have no area inside the frame": [clip]}


def test_boxes_that_single_precision_cannot_hold_are_none(tree, load):
    clip = tree.add_test(0, 0, 1)
    tree.boxes = {f"{clip}-0000": [[0.99999999, 0, 1, 1]], f"{clip}-0001": [[0, 0, 0.001, 1]]}
    tree.write()
    boxes = load("query", "test")[0]["boxes"]
    assert boxes == [None, pytest.approx([0, 0, 0.001, 1]), None]


@pytest.mark.parametrize(
    "view, split, place",
    [
        ("pairs", "train", "training_video_00/{clip}/{clip}-0000.jpg"),
        ("pairs", "train", "training_image/{image}.jpg"),
        ("gallery", "test", "gallery/{live}/{image}.jpg"),
    ],
)
def test_linked_pictures_of_other_places_are_refused(tree, load, tmp_path, view, split, place):
    clip = tree.add_train(0, 0, 1)
    tree.add_test(0, 9000, 1)
    tree.write()
    path = tree.root / place.format(clip=clip, live=_uuid(0), image=f"{_uuid(1001)}-0")
    path.rename(tmp_path / "elsewhere.jpg")
    path.symlink_to(tmp_path / "elsewhere.jpg")
    with pytest.raises(ValueError, match=f"{path.name} is a link that leads out of"):
        load(view, split)
    inside = tree.root / "pictures.jpg"
    (tmp_path / "elsewhere.jpg").rename(inside)
    path.unlink()
    path.symlink_to(inside)
    assert len(load(view, split)) == 1
