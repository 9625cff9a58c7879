"""The novel-product protocol: the products of each split, folders that load, and error messages."""

import errno
import json
import os
import random

import pytest
from PIL import Image

from data_rice import load_dataset_view
from data_rice.shop_clips.check import check_folder, main
from data_rice.shop_clips.novel import select_novel, write_novel_shop

NUM_PRODUCTS = 8
NOVEL = {"g1", "g5"}
SPLITS = {"train": "clips_train.jsonl", "validation": "clips_val.jsonl", "test": "clips_test.jsonl"}


class Shop:
    """Eight products with one clip each in validation and two in training and test; change it, then `write`."""

    def __init__(self, root):
        self.root = root
        self.gallery = [{"gallery_id": f"g{i}", "image": f"gallery/g{i}.png"} for i in range(NUM_PRODUCTS)]
        self.clips = {split: [] for split in SPLITS}
        for split, clips in self.clips.items():
            for i in range(NUM_PRODUCTS * (1 if split == "validation" else 2)):
                product = f"g{i % NUM_PRODUCTS}"
                clips.append(
                    {
                        "query_id": f"c{i}",
                        "frames": [f"frames/{split}/{i}-{j}.png" for j in range(2)],
                        "gt_gallery_ids": [product],
                        "product_fold": "novel" if product in NOVEL else "base",
                    }
                )

    def write(self):
        self.root.mkdir(exist_ok=True)
        rows = [*self.gallery, *(row for clips in self.clips.values() for row in clips)]
        pictures = sorted({path for row in rows for path in row.get("frames", [row.get("image", "")])} - {""})
        for i, name in enumerate(pictures):
            self.root.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (2 * i, 0, 0)).save(self.root / name)
        self.lines("gallery.jsonl", self.gallery)
        for split, clips in self.clips.items():
            self.lines(SPLITS[split], clips)
        return self.root

    def lines(self, name, rows):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.root.joinpath(name).write_text(text, encoding="utf-8")


@pytest.fixture
def shop(tmp_path):
    return Shop(tmp_path / "shop")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "written" / "novel"


def by_field(shop, output):
    return write_novel_shop(shop.write(), output, field="product_fold", value="novel")


def test_the_written_folder_loads_and_train_and_test_share_no_product(shop, output, tmp_path):
    for row in shop.clips["test"]:
        row["asr"] = "苹果"
    by_field(shop, output)

    def load(view, split):
        return load_dataset_view(str(output), view, split, cache_dir=tmp_path / "cache")

    products = {split: {row["product_id"] for row in load("query", split)} for split in SPLITS}
    assert products["test"] == NOVEL
    assert products["train"] == products["validation"] == {f"g{i}" for i in range(NUM_PRODUCTS)} - NOVEL
    assert {split: len(load("query", split)) for split in SPLITS} == {"train": 12, "validation": 6, "test": 4}
    assert load("gallery", "test")["image_id"][:] == [f"g{i}" for i in range(NUM_PRODUCTS)]
    for row in load("pairs", "test"):
        assert row["asr"] == "苹果" and len(row["frames"]) == 2
        for picture in (row["image"], *row["frames"]):
            assert picture["path"].startswith(str(output))
            with Image.open(picture["path"]) as opened:
                assert opened.size == (8, 8)
    kept = (output / "clips_train.jsonl").read_text(encoding="utf-8").splitlines()
    assert set(kept) < set((shop.root / "clips_train.jsonl").read_text(encoding="utf-8").splitlines())
    assert check_folder(str(output)).ok


def test_media_are_hard_links_to_the_named_files_of_the_shop(shop, output):
    selected = by_field(shop, output)
    written = {path.relative_to(output).as_posix() for path in output.rglob("*.png")}
    assert written == set(selected.media) and len(written) == NUM_PRODUCTS + 2 * (12 + 6 + 4)
    assert all(os.path.samefile(output / path, shop.root / path) for path in written)
    assert not os.path.samefile(output / "gallery.jsonl", shop.root / "gallery.jsonl")
    assert [path.name for path in output.parent.iterdir()] == ["novel"]


def test_media_that_are_links_inside_the_shop(shop, output, tmp_path):
    root = shop.write()
    (root / "frames").rename(root / "pictures")
    (root / "frames").symlink_to("pictures", target_is_directory=True)
    (root / "gallery" / "g0.png").rename(root / "g0.png")
    (root / "gallery" / "g0.png").symlink_to("../g0.png")
    write_novel_shop(root, output, field="product_fold", value="novel")
    assert not any(path.is_symlink() for path in output.rglob("*"))
    assert check_folder(str(output)).ok


def test_videos_are_linked(shop, output):
    for row in (shop.clips["train"][0], shop.clips["test"][1]):
        row.update(video="videos/a.mp4", start=0, end=1)
        del row["frames"]
    shop.write()
    (shop.root / "videos").mkdir()
    (shop.root / "videos" / "a.mp4").write_bytes(b"x")
    write_novel_shop(shop.root, output, field="product_fold", value="novel")
    assert (output / "videos" / "a.mp4").read_bytes() == b"x"


def test_a_draw_is_a_function_of_seed_fraction_and_ids(shop, tmp_path):
    root = shop.write()
    selected = select_novel(root, fraction=0.4, seed=3)
    assert selected.novel == set(random.Random(3).sample([f"g{i}" for i in range(NUM_PRODUCTS)], 3))
    assert len({frozenset(select_novel(root, seed=seed).novel) for seed in range(8)}) > 1
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        write_novel_shop(root, folder, fraction=0.4, seed=3)
    names = {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    assert names == {path.relative_to(second) for path in second.rglob("*") if path.is_file()}
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    for clips in shop.clips.values():
        clips.reverse()
    assert select_novel(shop.write(), fraction=0.4, seed=3).novel == selected.novel


def test_a_small_fraction_still_draws_one_product(shop):
    assert len(select_novel(shop.write(), fraction=0.01).novel) == 1


@pytest.mark.parametrize("seed", range(6))
def test_images_named_together_are_one_product(shop, seed):
    # g0-g1-g2 through two clips of different splits, neither of which names all three.
    shop.clips["train"][0]["gt_gallery_ids"] = ["g1", "g0"]
    shop.clips["test"][2]["gt_gallery_ids"] = ["g2", "g1"]
    selected = select_novel(shop.write(), fraction=0.5, seed=seed)
    assert selected.products == ["g0", "g3", "g4", "g5", "g6", "g7"] and len(selected.novel) == 3
    ids = {
        split: {image_id for line in lines for image_id in json.loads(line)["gt_gallery_ids"]}
        for split, lines in selected.kept.items()
    }
    assert not ids["train"] & ids["test"] and not ids["validation"] & ids["test"]
    assert {"g0", "g1", "g2"} <= ids["train"] | ids["test"]
    assert ({"g0", "g1", "g2"} <= ids["test"]) == ("g0" in selected.novel)


def test_clips_without_product_and_media_that_are_missing_are_counted(shop, output, capsys):
    shop.clips["test"][3]["gt_gallery_ids"] = []
    root = shop.write()
    (root / "frames" / "train" / "0-1.png").unlink()
    (root / "frames" / "test" / "0-1.png").unlink()
    assert main(["novel", str(root), str(output), "--field", "product_fold", "--value", "novel"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "products: 8, 2 of them novel",
        "clips_train.jsonl: 12 clips kept, 4 left out",
        "clips_val.jsonl: 6 clips kept, 2 left out",
        "clips_test.jsonl: 4 clips kept, 12 left out (1 of them name no product)",
        "media: 51 linked, 1 missing",
        "missing: frames/train/0-1.png",
    ]


def test_a_shop_without_validation_clips(shop, output):
    root = shop.write()
    (root / "clips_val.jsonl").unlink()
    assert list(write_novel_shop(root, output).kept) == ["train", "test"]
    assert not (output / "clips_val.jsonl").exists()


FIELD = ["--field", "product_fold", "--value"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*FIELD, "new"], "no clip of {shop} has product_fold 'new'; its values are 'base', 'novel'."),
        (["--field", "fold", "--value", "novel"], "clips_train.jsonl, line 1: the field 'fold' is absent; write it"),
        (["--fraction", "0"], "fraction must lie between 0 and 1, both excluded, not 0;"),
        (["--fraction", "1"], "fraction must lie between 0 and 1, both excluded, not 1;"),
        (["--fraction", "nan"], "fraction must lie between 0 and 1, both excluded, not nan;"),
        (["--fraction", "0.99"], "clips_train.jsonl has no clip of a base product, with 8 of 8 products novel;"),
        (["--field", "product_fold"], "--field and --value belong together;"),
        ([*FIELD, "novel", "--seed", "1"], "--fraction and --seed draw products, but --field selects them;"),
    ],
)
def test_bad_options(shop, output, capsys, options, message):
    root = shop.write()
    assert main(["novel", str(root), str(output), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message.format(shop=root) in error
    assert not output.parent.exists()


def test_an_existing_output_is_left_unchanged(shop, output):
    output.mkdir(parents=True)
    with pytest.raises(FileExistsError, match="novel already exists; remove it or choose another folder"):
        by_field(shop, output)
    assert list(output.iterdir()) == []


def test_a_split_that_would_be_empty(shop, output):
    shop.clips["test"] = [row for row in shop.clips["test"] if row["product_fold"] == "base"]
    with pytest.raises(
        ValueError, match="clips_test.jsonl has no clip of a novel product, with 2 of 8 products novel"
    ):
        by_field(shop, output)
    shop.clips["validation"] = [row for row in shop.clips["validation"] if row["product_fold"] == "novel"]
    with pytest.raises(ValueError, match="clips_val.jsonl has no clip of a base product"):
        by_field(shop, output)


def test_clips_of_one_product_with_different_values(shop, output):
    shop.clips["test"][1]["product_fold"] = "base"
    message = (
        "clips_test.jsonl, line 2: product_fold 'base' contradicts clips_train.jsonl, line 2, .* product \\(g1\\)"
    )
    with pytest.raises(ValueError, match=message):
        by_field(shop, output)
    shop.clips["test"][1].update(product_fold="novel", gt_gallery_ids=["g1", "g2"])
    with pytest.raises(ValueError, match="clips_train.jsonl, line 3: product_fold 'base' contradicts"):
        by_field(shop, output)


def test_a_filesystem_without_links_leaves_no_files(shop, output, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(
        OSError, match="frames/test/1-0.png cannot be hard-linked .*; write to the filesystem of .*, or copy"
    ):
        by_field(shop, output)
    assert list(output.parent.iterdir()) == []


def test_a_media_file_named_like_a_list_does_not_change_the_shop(shop, output):
    root = shop.write()
    shop.clips["train"][0]["frames"] = ["clips_test.jsonl"]
    shop.lines("clips_train.jsonl", shop.clips["train"])
    before = (root / "clips_test.jsonl").read_bytes()
    with pytest.raises(OSError, match="clips_test.jsonl cannot be hard-linked"):
        write_novel_shop(root, output, field="product_fold", value="novel")
    assert (root / "clips_test.jsonl").read_bytes() == before


def test_the_real_photographs(groceries_dir):
    root = groceries_dir
    selected = select_novel(root, field="product_fold", value="novel")
    assert (len(selected.products), len(selected.novel)) == (81, 20)
    assert [len(selected.kept[split]) for split in SPLITS] == [341, 45, 74]
    assert [selected.left_out[split] for split in SPLITS] == [124, 15, 215]
    assert selected.missing == []
