"""The renderer of the mini LPR4M: same seed same bytes, LPR4M's raw layout, and truthful annotations."""

import ast
import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from PIL import Image

from data_rice.mini_lpr4m import render_mini_lpr4m
from data_rice.mini_lpr4m.products import EMBLEMS, MAX_PRODUCTS, PATTERNS, draw_product, draw_room
from data_rice.mini_lpr4m.scenes import Clip
from data_rice.mini_lpr4m.silhouettes import SILHOUETTES
from data_rice.mini_lpr4m.text import COLORS_ZH, EMBLEMS_ZH, PATTERNS_ZH
from data_rice.mini_lpr4m.writer import product_number, product_scale, visible_duration

SIZES = {
    "num_train_lives": 2,
    "num_test_lives": 2,
    "products_per_live": 6,
    "clips_per_product": 2,
    "num_frames": 4,
    "image_size": 64,
    "num_workers": 1,
    "progress": False,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return render_mini_lpr4m(tmp_path_factory.mktemp("data") / "mini", seed=7, **SIZES)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _table(root: Path, name: str) -> list[list[str]]:
    lines = (root / "annotations" / f"{name}.txt").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return [line.split("\t") for line in lines]


def _json(root: Path, name: str) -> dict:
    return json.loads((root / "annotations" / f"{name}.json").read_text(encoding="utf-8"))


def _live_of(clip_id: str) -> str:
    return "-".join(clip_id.split("-")[:5])


def _is_uuid(text: str) -> bool:
    return str(uuid.UUID(text)) == text


def test_same_seed_same_bytes_for_any_number_of_workers(root, tmp_path):
    again = render_mini_lpr4m(tmp_path / "again", seed=7, **{**SIZES, "num_workers": 2})
    assert _contents(again) == _contents(root)


def test_another_seed_gives_other_products(root, tmp_path):
    other = render_mini_lpr4m(tmp_path / "other", seed=8, **SIZES)
    assert not {row[3] for row in _table(root, "training_videoinfo")} & {
        row[3] for row in _table(other, "training_videoinfo")
    }


def test_training_rows(root):
    rows = _table(root, "training_videoinfo")
    assert len(rows) == 2 * 6 * 2
    assert {len(row) for row in rows} == {11}
    assert len({row[0] for row in rows}) == len(rows)
    for clip_id, frame_list, box_list, image_id, title, category_id, category, _, scale, duration, number in rows:
        live, start, end = _live_of(clip_id), *clip_id.split("-")[5:]
        assert _is_uuid(live) and int(start) < int(end)
        product_id, shot = image_id.rsplit("-", 1)
        assert _is_uuid(product_id) and shot == "0"
        frames, boxes = ast.literal_eval(frame_list), ast.literal_eval(box_list)
        assert frames == [f"{clip_id}-{index:04d}" for index in range(4)]
        assert len(boxes) == 4 and any(boxes[index] != [0, 0, 0, 0] for index in range(4))
        for left, top, right, bottom in boxes:
            assert (left, top, right, bottom) == (0, 0, 0, 0) or (0 <= left < right <= 64 and 0 <= top < bottom <= 64)
        assert title and SILHOUETTES[int(category_id)].name == category
        assert scale in ("small", "medium", "large")
        assert duration in ("short", "medium", "long")
        assert number in ("few", "many")
        shown = sum(box != [0, 0, 0, 0] for box in boxes) / 4
        assert duration == ("short" if shown <= 0.4 else "long" if shown > 0.7 else "medium")


def test_every_training_file_exists_once_and_opens(root):
    rows = _table(root, "training_videoinfo")
    for row in rows:
        folders = list(root.glob(f"training_video_0[0-7]/{row[0]}"))
        assert len(folders) == 1
        names = sorted(path.name for path in folders[0].iterdir())
        assert names == [f"{frame_id}.jpg" for frame_id in ast.literal_eval(row[1])]
        with Image.open(folders[0] / names[0]) as image:
            assert image.size == (64, 64) and image.format == "JPEG"
    shop = {path.stem for path in (root / "training_image").iterdir()}
    assert shop == {row[3] for row in rows}
    assert sum(len(list(folder.iterdir())) for folder in root.glob("training_video_0*")) == len(rows)


def test_queries_galleries_and_relevants(root):
    relevant, galleries = _json(root, "test_videoid_to_gtimage"), _json(root, "test_liveid_to_gallery")
    assert len(relevant) == 2 * 6 and len(galleries) == 2
    assert {row[0] for row in _table(root, "test_videoid_asr")} == set(relevant)
    attributes = _table(root, "test_videoid_attributes")
    assert [row[0] for row in attributes] == list(relevant) and {len(row) for row in attributes} == {5}
    titles = dict(_table(root, "test_image_title"))
    for live, images in galleries.items():
        assert _is_uuid(live)
        assert {path.stem for path in (root / "gallery" / live).iterdir()} == set(images)
        assert len({image for image in images if image.endswith("-0")}) == 6
        assert all(titles[image] for image in images)
    for clip_id, images in relevant.items():
        assert images[0].endswith("-0") and set(images) <= set(galleries[_live_of(clip_id)])
        names = sorted(path.name for path in (root / "query" / clip_id).iterdir())
        assert names == [f"{clip_id}-{index:04d}.jpg" for index in range(4)]


def test_gallery_order_says_nothing_about_the_queries(root):
    relevant, galleries = _json(root, "test_videoid_to_gtimage"), _json(root, "test_liveid_to_gallery")
    for live, images in galleries.items():
        presented = [found[0] for clip_id, found in relevant.items() if _live_of(clip_id) == live]
        assert presented != [image for image in images if image.endswith("-0")]


def test_test_boxes_are_normalised_and_inside_the_frame(root):
    boxes, relevant = _json(root, "test_frameid2gtbox"), _json(root, "test_videoid_to_gtimage")
    for frame_id, found in boxes.items():
        assert frame_id.rsplit("-", 1)[0] in relevant
        ((left, top, right, bottom),) = found
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    assert {frame_id.rsplit("-", 1)[0] for frame_id in boxes} == set(relevant)


def test_training_and_test_share_no_livestream_and_no_product(root):
    rows = _table(root, "training_videoinfo")
    galleries = _json(root, "test_liveid_to_gallery")
    assert not {_live_of(row[0]) for row in rows} & set(galleries)
    assert not {row[3] for row in rows} & {image for images in galleries.values() for image in images}


def test_finished_folder_is_reused_and_another_is_refused(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert render_mini_lpr4m(root, seed=7, **SIZES) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    with pytest.raises(ValueError, match="seed 7 instead of 9"):
        render_mini_lpr4m(root, seed=9, **SIZES)


def test_foreign_or_broken_folders_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and is not a rendered mini LPR4M"):
        render_mini_lpr4m(tmp_path, **SIZES)
    with pytest.raises(ValueError, match="is a file"):
        render_mini_lpr4m(tmp_path / "notes.txt", **SIZES)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "mini_lpr4m.json").write_text("{")
    with pytest.raises(ValueError, match="is not a manifest"):
        render_mini_lpr4m(broken, **SIZES)


def test_an_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("data_rice.mini_lpr4m.writer._write_annotations", fail)
    with pytest.raises(OSError, match="disk full"):
        render_mini_lpr4m(tmp_path / "mini", **{**SIZES, "num_train_lives": 0, "num_test_lives": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("products_per_live", 0, "at least 1"),
        ("products_per_live", MAX_PRODUCTS + 1, f"at most {MAX_PRODUCTS}"),
        ("num_frames", 0, "at least 1"),
        ("image_size", 8, "at least 32"),
        ("seed", -1, "at least 0"),
        ("clips_per_product", 1.5, "whole number"),
    ],
)
def test_sizes_out_of_range_are_refused(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=message):
        render_mini_lpr4m(tmp_path / "mini", **{**SIZES, name: value})


def test_nothing_to_render_is_refused(tmp_path):
    with pytest.raises(ValueError, match="are both 0"):
        render_mini_lpr4m(tmp_path / "mini", **{**SIZES, "num_train_lives": 0, "num_test_lives": 0})


def test_products_of_a_shop_differ_by_more_than_colour():
    for index in range(3):
        products = draw_room(0, "test", index, 50).products
        assert len({product.product_id for product in products}) == 50
        for number, product in enumerate(products):
            assert all(product.differences(other) >= 2 for other in products[:number])
        assert len({color for product in products for color in (product.body, product.second, product.part)}) <= 5
    assert len(draw_room(0, "test", 0, MAX_PRODUCTS).products) == MAX_PRODUCTS


def test_a_shop_may_have_a_single_product(tmp_path):
    sizes = {**SIZES, "products_per_live": 1, "num_frames": 1, "num_train_lives": 0, "num_test_lives": 1}
    assert len(_json(render_mini_lpr4m(tmp_path / "mini", **sizes), "test_videoid_to_gtimage")) == 1


def test_every_category_pattern_and_emblem_is_drawn_and_named():
    assert (
        len(SILHOUETTES)
        == len({item.name for item in SILHOUETTES})
        == len({item.name_zh for item in SILHOUETTES})
        == 34
    )
    assert set(PATTERNS_ZH) == set(PATTERNS) and set(EMBLEMS_ZH) == set(EMBLEMS)
    products = draw_room(0, "test", 0, 50).products
    arts = {draw_product(product).tobytes() for product in products}
    assert len(arts) == 50
    assert {product.body for product in products} <= set(COLORS_ZH)


def test_attributes_follow_the_boxes():
    frame = Image.new("RGB", (10, 10))
    clip = Clip([frame] * 5, [[0, 0, 10, 10], [0, 0, 5, 2], None, None, None], [3, 1, 0, 0, 0])
    assert product_scale(clip) == "large" and visible_duration(clip) == "short" and product_number(clip) == "few"
    clip = Clip([frame] * 5, [[0, 0, 5, 2]] * 4 + [None], [4, 1, 0, 0, 0])
    assert product_scale(clip) == "small" and visible_duration(clip) == "long" and product_number(clip) == "many"
    clip = Clip([frame] * 5, [[0, 0, 5, 8]] * 3 + [None] * 2, [0] * 5)
    assert product_scale(clip) == "medium" and visible_duration(clip) == "medium"


def test_command_line_renders_and_refuses(tmp_path):
    command = [
        sys.executable,
        "-m",
        "data_rice.mini_lpr4m",
        "--output_dir",
        str(tmp_path / "mini"),
        "--num_workers",
        "1",
    ]
    sizes = ["--num_train_lives", "0", "--num_test_lives", "1", "--products_per_live", "2"]
    repository = Path(__file__).parents[2]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, cwd=repository)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "mini")
    refused = subprocess.run([*command, *sizes, "--seed", "3"], capture_output=True, text=True, cwd=repository)
    assert refused.returncode == 2
    assert "seed 0 instead of 3" in refused.stderr and "Traceback" not in refused.stderr
