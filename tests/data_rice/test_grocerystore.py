"""Building a shop_clips folder from a clone of GroceryStoreDataset, on a small clone that a fixture writes."""

import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image

from data_rice import load_dataset_view
from data_rice.grocerystore import build_grocerystore, cut_into_clips, main

HEADER = "Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int),Image Path (str),Text (str)"
CLASSES = [("Royal-Gala", "Apple", "Fruit/Apple/Royal-Gala"), ("Leek", "Leek", "Vegetables/Leek")]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def clone(tmp_path) -> Path:
    root = tmp_path / "clone"
    dataset = root / "dataset"
    rows = [HEADER]
    for class_id, (name, coarse, folder) in enumerate(CLASSES):
        stem = f"iconic-images-and-descriptions/{folder}/{name}"
        picture = dataset / f"{stem}_Iconic.jpg"
        picture.parent.mkdir(parents=True)
        Image.new("RGB", (300, 200), (class_id * 90, 40, 40)).save(picture)
        _write(dataset / f"{stem}_Description.txt", f"About {name}.\n")
        rows.append(f"{name},{class_id},{coarse},{class_id},/{stem}_Iconic.jpg,/{stem}_Descriptions.txt")
    information = dataset / "iconic-images-and-descriptions/Fruit/Apple/Royal-Gala/Royal-Gala_Information.txt"
    _write(information, "Title: Äpple Royal Gala \nURL: none\n")
    _write(dataset / "classes.csv", "\n".join(rows))
    for split, counts in {"train": (17, 12), "val": (4, 2), "test": (9, 11)}.items():
        lines = []
        for class_id, count in enumerate(counts):
            name, _, folder = CLASSES[class_id]
            for number in reversed(range(1, count + 1)):
                path = f"{split}/{folder}/{name}_{number:03d}.jpg"
                picture = dataset / path
                picture.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (30, 40 + number), (number, class_id * 99, 9)).save(picture)
                lines.append(f"{path}, {class_id}, {class_id}")
        _write(dataset / f"{split}.txt", "\n".join(lines) + "\n")
    return root


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_built_folder_is_read_by_the_builder(clone, tmp_path):
    output = tmp_path / "shop"
    counts = build_grocerystore(clone, output)
    gallery = load_dataset_view(output, "gallery", "test", cache_dir=tmp_path / "cache")
    assert gallery["title"][:] == ["Äpple Royal Gala", "Leek"] and gallery["image_id"][:] == ["g000", "g001"]
    for split, photographs in {"train": 29, "validation": 4, "test": 20}.items():
        rows = load_dataset_view(output, "pairs", split, cache_dir=tmp_path / "cache")
        assert len(rows) == counts[split]
        assert all(3 <= len(frames) <= 10 for frames in rows["frames"])
        paths = [frame["path"] for frames in rows["frames"] for frame in frames]
        assert len(set(paths)) == len(paths) == photographs
        assert all(Path(path).is_file() for path in paths)
    row = json.loads((output / "gallery.jsonl").read_text().splitlines()[0])
    assert (row["description"], row["category"], row["department"]) == ("About Royal-Gala.", "Apple", "Fruit")
    assert (row["width"], row["height"]) == (240, 160)
    assert "fewer than 3 in that list: 2." in (output / "SOURCE.md").read_text()


def test_frames_are_neighbours_in_order_and_never_enlarged(clone, tmp_path):
    build_grocerystore(clone, tmp_path / "shop")
    for line in (tmp_path / "shop" / "clips_train.jsonl").read_text().splitlines():
        heights = []
        for name in json.loads(line)["frames"]:
            assert "Gala" not in name and "Leek" not in name
            with Image.open(tmp_path / "shop" / name) as frame:
                assert frame.width == 30
                heights.append(frame.height)
        assert heights == list(range(heights[0], heights[0] + len(heights)))


def test_deterministic(clone, tmp_path):
    build_grocerystore(clone, tmp_path / "a", short_side=20)
    build_grocerystore(clone, tmp_path / "b", short_side=20)
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")
    with Image.open(tmp_path / "a" / "gallery" / "g000.jpg") as image:
        assert image.size == (30, 20)


def test_lists_without_labels_give_the_same_clips(clone, tmp_path):
    build_grocerystore(clone, tmp_path / "a")
    for name in ("train.txt", "val.txt", "test.txt"):
        file = clone / "dataset" / name
        file.write_text("".join(line.split(",")[0] + "\n" for line in file.read_text().splitlines()))
    build_grocerystore(clone, tmp_path / "b")
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")


@pytest.mark.parametrize("count", range(60))
def test_cut_uses_every_photograph(count):
    paths = [str(number) for number in range(count)]
    clips = cut_into_clips(paths, "key")
    assert [path for clip in clips for path in clip] == (paths if count >= 3 else [])
    assert all(3 <= len(clip) <= 10 for clip in clips)


@pytest.mark.parametrize(
    "file, line, message",
    [
        ("train.txt", "../x/y/z.jpg, 0, 0", "leads out of the data folder"),
        ("train.txt", "train/Fruit/Leek/x.jpg, 7, 0", "not in classes.csv"),
        ("train.txt", "train/Fruit/Kiwi/x.jpg", "not in classes.csv"),
        ("train.txt", "train/Fruit/Leek/x.jpg, a, 0", "not a whole number"),
        ("train.txt", "train/Fruit/Leek/x.jpg, 1", "expected: <list>"),
        ("classes.csv", "Kiwi,3", "expected 6 comma-separated columns, found 2"),
        ("classes.csv", "Leek,3,Leek,1,/a/b.jpg,/a/b.txt", "appears a second time"),
    ],
)
def test_damaged_lists_name_file_and_line(clone, tmp_path, file, line, message):
    path = clone / "dataset" / file
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, line]))
    with pytest.raises(ValueError, match=f"{file}, line {len(lines) + 1}: .*{message}"):
        build_grocerystore(clone, tmp_path / "shop")
    assert not (tmp_path / "shop").exists()


def test_command_line_reports_in_one_sentence(clone, tmp_path, capsys):
    output = str(tmp_path / "shop")
    assert main([str(clone), output, "--short_side", "16"]) == 0
    assert "train clips" in capsys.readouterr().out
    assert main([str(clone), output]) == 1
    assert "already exists" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "other")]) == 1
    assert "pass the folder of a GroceryStoreDataset clone" in capsys.readouterr().err
    (clone / "dataset" / "test" / "Fruit" / "Apple" / "Royal-Gala" / "Royal-Gala_003.jpg").write_bytes(b"no image")
    assert main([str(clone), str(tmp_path / "other")]) == 1
    assert "Royal-Gala_003.jpg cannot be decoded" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
