"""Single frames with their boxes, out of the pairs of any data set."""

import json

import pytest
from PIL import Image

from data_rice import load_dataset_view


@pytest.fixture
def shop(tmp_path):
    folder = tmp_path / "shop"
    (folder / "frames").mkdir(parents=True)
    for name in ("a", "b", "c", "mug"):
        Image.new("RGB", (20, 10)).save(folder / "frames" / f"{name}.jpg")
    (folder / "gallery.jsonl").write_text('{"gallery_id": "mug", "image": "frames/mug.jpg"}\n')
    clips = [
        {"query_id": "c1", "frames": ["frames/a.jpg", "frames/b.jpg"], "boxes": [None, [0.1, 0.2, 0.5, 1]]},
        {"query_id": "c2", "frames": ["frames/c.jpg"]},
        {"query_id": "c3", "frames": ["frames/c.jpg"], "boxes": [[0, 0, 1, 1]], "category": "Mug"},
    ]
    rows = [json.dumps({**clip, "gt_gallery_ids": ["mug"]}) for clip in clips]
    (folder / "clips_train.jsonl").write_text("\n".join(rows))
    (folder / "clips_test.jsonl").write_text(rows[1])
    return folder


def test_every_frame_with_a_box_is_a_row(shop, tmp_path):
    rows = load_dataset_view(shop, "detection", "train", cache_dir=tmp_path / "cache")
    assert rows["frame_id"][:] == ["c1-0001", "c3-0000"] and rows["clip_id"][:] == ["c1", "c3"]
    assert rows["boxes"][:] == [[pytest.approx([0.1, 0.2, 0.5, 1])], [[0, 0, 1, 1]]]
    assert rows[0]["image"]["path"].endswith("frames/b.jpg") and rows[1]["category"] == "Mug"
    assert set(rows["split"]) == {"train"}


def test_missing_boxes_are_reported(shop, tmp_path):
    with pytest.raises(ValueError, match="has no frame with a box in the test split of pairs; add boxes"):
        load_dataset_view(shop, "detection", "test", cache_dir=tmp_path / "cache")
