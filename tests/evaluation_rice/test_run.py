import json

from data_rice.box_files import FORMAT, box_line
from evaluation_rice.run import describe_boxes


def test_the_origin_of_boxes_names_the_detected_classes(shop, tmp_path):
    origin = {"detector": "red", "detector_sha256": "abc", "threshold": 0.3, "labels": ["mug"], "frames_per_clip": 2}
    path = tmp_path / "boxes.jsonl"
    lines = [json.dumps({**FORMAT, "dataset": "shop", **origin}) + "\n"]
    lines += [box_line("test", clip, 2, [0, 1], [[0, 0, 1, 1], None], [0.9, None]) for clip in "abcde"]
    path.write_text("".join(lines))
    # The rows have one box of two frames each.
    assert describe_boxes(str(path), shop.queries) == {"file": str(path), **origin, "boxes": 5, "frames": 10}
