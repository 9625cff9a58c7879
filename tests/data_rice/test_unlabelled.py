"""Pictures of shops and frames of clips without labels: what is read, left out and reported."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from data_rice.collator import RiceCollator
from data_rice.unlabelled import FRAMES_OF_VIDEO, clip_frames, shop_pictures, spread


@pytest.fixture
def save(tmp_path):
    """A function that saves small pictures under a folder and returns it."""

    def save(*names, folder="data"):
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 9), (len(name) * 20 % 255, 90, 30)).save(path)
        return tmp_path / folder

    return save


def write(folder, name, rows):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return folder


def paths(rows):
    return [os.path.basename(frame["path"]) for row in rows for frame in row["frames"]]


def test_only_the_gallery_of_a_shop_is_read(save):
    folder = save("g/a.jpg", "g/b.jpg", "frames/f.jpg")
    write(folder, "gallery.jsonl", [{"gallery_id": name, "image": f"g/{name}.jpg"} for name in "ab"])
    (folder / "clips_train.jsonl").write_text("not JSON\n")
    shop = shop_pictures(folder, 100)
    assert [row["image_id"] for row in shop.rows] == ["a", "b"] and shop.words == "2 pictures"


def test_a_folder_of_pictures_is_a_shop_with_its_subfolders(save):
    folder = save("a.jpg", "more/b.png")
    (folder / "notes.txt").write_text("x")
    shop = shop_pictures(folder, 100)
    assert [row["image_id"] for row in shop.rows] == ["a.jpg", "more/b.png"] and "notes.txt" in shop.note


def test_frames_of_clips_are_read_and_their_labels_are_not(save):
    folder = save(*(f"f/{i}.jpg" for i in range(4)))
    rows = [
        # Ids that are no list, missing, or of products that the shop does not have; boxes that are none.
        {"query_id": "a", "frames": ["f/0.jpg", "f/1.jpg"], "gt_gallery_ids": 7, "boxes": "none"},
        {"frames": ["f/1.jpg", "f/2.jpg"], "gt_gallery_ids": ["nowhere"], "live_id": [1]},
        {"query_id": "a", "video": "v.mp4", "start": 1, "end": 2.5},
    ]
    clips = clip_frames(write(folder, "clips_train.jsonl", rows), "train", 100)
    assert paths(clips.rows) == ["0.jpg", "1.jpg", "2.jpg"]
    assert [(os.path.basename(r["video"]), r["start"], r["end"]) for r in clips.rows[1:]] == [("v.mp4", 1, 2.5)]
    assert clips.words == "3 frames and at most 32 frames of each of 1 video"


def test_only_the_requested_split_must_exist(save):
    folder = write(save("0.jpg"), "clips_val.jsonl", [{"frames": ["0.jpg"]}])
    assert paths(clip_frames(folder, "validation", 9).rows) == ["0.jpg"]
    with pytest.raises(FileNotFoundError, match="no clips_train.jsonl; it has clips_val.jsonl, which --clips_split"):
        clip_frames(folder, "train", 9)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"frames": ["../secret.jpg"]}, "line 1: "),
        ({"frames": "0.jpg"}, "line 1: frames must be a list of paths; repair the row"),
        ({"query_id": "a"}, "line 1: the clip has neither frames nor a video"),
        ({"video": "v.mp4", "start": 3, "end": 1}, "line 1: start and end must be seconds"),
    ],
)
def test_malformed_rows_are_named(save, row, sentence):
    folder = write(save("0.jpg"), "clips_train.jsonl", [row])
    with pytest.raises(ValueError, match=sentence):
        clip_frames(folder, "train", 9)


def test_a_folder_of_pictures_and_videos(save, write_video, tmp_path):
    folder = save("2.jpg", "10.jpg", "below/3.jpg")
    write_video(folder / "show.mp4", num_frames=50)
    (folder / "notes.txt").write_text("x")
    clips = clip_frames(folder, "train", 1000)
    assert paths(clips.rows) == ["2.jpg", "10.jpg", "3.jpg"]
    assert [os.path.basename(row["video"]) for row in clips.rows[1:]] == ["show.mp4"]
    assert "notes.txt" in clips.note and "show.mp4" not in clips.note
    outside = write_video(tmp_path / "outside.mp4")
    (folder / "link.mp4").symlink_to(outside)
    with pytest.raises(ValueError, match="link.mp4 is a link that leads out"):
        clip_frames(folder, "train", 1000)


def test_frames_are_read_as_the_collator_takes_them(save, write_video):
    from processing_rice import build_processor, train_tokenizer

    folder = save(*(f"{i}.jpg" for i in range(20)))
    (folder / "7.jpg").write_bytes(b"no picture")
    write_video(folder / "show.mp4", num_frames=50)
    collator = RiceCollator(build_processor(train_tokenizer(["a"] * 9), 32, 8), num_frames=FRAMES_OF_VIDEO)
    counts, failures = [], []
    for row in clip_frames(folder, "train", 1000).rows:
        inputs, _, failed = collator.collate_queries([row])
        counts.append(int(inputs["frame_mask"].sum()))
        failures += failed
    # 16 pictures of which one is unreadable, the other four, and the video.
    assert counts == [15, 4, 32]
    assert [os.path.basename(failure["file"]) for failure in failures] == ["7.jpg"]


def test_many_pictures_are_sampled_evenly(save):
    folder = save(*(f"{i:02}.jpg" for i in range(40)))
    clips = clip_frames(folder, "train", 10)
    assert paths(clips.rows) == [f"{i:02}.jpg" for i in range(0, 40, 4)]
    assert clips.words == "10 of 40 frames (evenly spread)"
    assert shop_pictures(folder, 1).words == "1 of 40 pictures (evenly spread)"
    for total, limit in ((7, 3), (100, 99), (5, 5), (2, 9)):
        kept = np.array(spread(total, limit))
        assert len(kept) == min(total, limit) and (np.diff(kept) > 0).all() and kept.max() < total


def test_missing_folders_are_refused(tmp_path, save):
    folder = save("0.jpg")
    for read, name in ((lambda path: shop_pictures(path, 9), "shop"), (lambda p: clip_frames(p, "train", 9), "clips")):
        with pytest.raises(FileNotFoundError, match=f"--{name} .*nowhere does not exist; name a folder"):
            read(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="0.jpg is a file; name a folder"):
            read(folder / "0.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="neither pictures nor the files of a data set"):
        shop_pictures(tmp_path / "empty", 9)
    with pytest.raises(FileNotFoundError, match="holds no frame of a clip"):
        clip_frames(tmp_path / "empty", "train", 9)
    write(tmp_path / "blank", "clips_train.jsonl", [])
    with pytest.raises(FileNotFoundError, match="holds no frame of a clip"):
        clip_frames(tmp_path / "blank", "train", 9)
