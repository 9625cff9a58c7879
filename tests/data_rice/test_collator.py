"""Rows to batches: shapes, what is done about unreadable files, and that nothing is lost on the way."""

import json
import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from data_rice.collator import MediaError, RiceCollator, decode_image, product_id_hash, read_failure_log
from processing_rice import build_processor, sample_frame_indices, train_tokenizer


@pytest.fixture(scope="module")
def processor():
    tokenizer = train_tokenizer(["a red cup", "buy this blue cup", "a green dress"], vocab_size=400)
    return build_processor(tokenizer, image_size=32, patch_size=8, num_frames=4)


@pytest.fixture
def write_image(tmp_path):
    """A function that writes a flat picture of one grey level and returns its image entry."""

    def write(level: int, name: str | None = None) -> dict:
        path = tmp_path / (name or f"{level}.png")
        Image.new("RGB", (40, 30), (level,) * 3).save(path)
        return {"path": str(path), "bytes": None}

    return write


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 torn")
    return {"path": str(path), "bytes": None}


@pytest.fixture
def absent(tmp_path):
    return {"path": str(tmp_path / "absent.jpg"), "bytes": None}


@pytest.fixture
def make_row(write_image):
    """A function that makes a pair row; its frames have the grey levels 10, 20, ... and its image `level`."""

    def make(name: str, num_frames: int = 3, level: int = 200, **columns) -> dict:
        row = {
            "clip_id": f"clip-{name}",
            "live_id": "live",
            "product_id": f"product-{name}",
            "frames": [write_image(10 * (i + 1)) for i in range(num_frames)],
            "boxes": [None] * num_frames,
            "video": "",
            "start": -1.0,
            "end": -1.0,
            "image_id": f"image-{name}",
            "image": write_image(level),
            "title": "a red cup",
            "asr": "buy this blue cup",
        }
        return row | columns

    return make


def grey_levels(pixels: torch.Tensor) -> list[int]:
    """Mean grey level of each picture of a (..., 3, H, W) tensor."""
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]
    return ((pixels * std + mean) * 255).mean(dim=(-1, -2, -3)).round().int().tolist()


def test_a_training_batch(processor, make_row):
    rows = [make_row("a"), make_row("b", num_frames=1, level=100), make_row("c", num_frames=9)]
    batch = RiceCollator(processor)(rows)
    assert set(batch) == {"pixel_values", "pixel_values_videos", "frame_mask", "product_ids"}
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert batch["pixel_values_videos"].shape == (3, 4, 3, 32, 32)
    assert batch["frame_mask"].sum(dim=1).tolist() == [3, 1, 4]
    assert grey_levels(batch["pixel_values"]) == [200, 100, 200]
    assert grey_levels(batch["pixel_values_videos"][2]) == [10 * (i + 1) for i in sample_frame_indices(9, 4, "eval")]
    assert batch["product_ids"].dtype == torch.int64 and len(set(batch["product_ids"].tolist())) == 3


def test_boxes_and_text_come_on_request(processor, make_row):
    row = make_row("a", num_frames=3, boxes=[[0.0, 0.0, 0.25, 0.25], None, [0.5, 0.5, 1.0, 1.0]])
    batch = RiceCollator(processor, use_boxes=True, use_text=True)([row, make_row("b")])
    mask = batch["patch_mask"]
    assert mask.shape == (2, 4, 16) and mask[0, 1].all() and mask[1].all()
    assert 0 < mask[0, 0].sum() < 16 and not mask[0, 0].equal(mask[0, 2])
    for name in ("title_input_ids", "title_attention_mask", "asr_input_ids", "asr_attention_mask"):
        assert len(batch[name]) == 2


def test_product_ids_are_the_same_everywhere_and_fit_int64():
    assert product_id_hash("product-a") == 2450605500809489865
    assert product_id_hash("红色连衣裙") == 7891698720266792387
    assert all(0 <= product_id_hash(str(i)) < 2**63 for i in range(1000))


def test_an_unreadable_frame_is_left_out_and_logged(processor, make_row, broken, absent, tmp_path, caplog):
    row = make_row("a", num_frames=4, boxes=[[0, 0, 0.25, 0.25], None, None, [0.75, 0.75, 1, 1]])
    row["frames"][1], row["frames"][2] = broken, absent
    collator = RiceCollator(processor, use_boxes=True, failure_log=tmp_path / "failures.jsonl")
    with caplog.at_level(logging.WARNING):
        batch = collator([row, make_row("b")])
    assert batch["frame_mask"].sum(dim=1).tolist() == [2, 3]
    assert grey_levels(batch["pixel_values_videos"][0, :2]) == [10, 40]
    corners = batch["patch_mask"][0, :2].reshape(2, 4, 4)
    assert corners[0, 0, 0] and not corners[0, 3, 3] and corners[1, 3, 3] and not corners[1, 0, 0]
    failures = read_failure_log(tmp_path / "failures.jsonl")
    assert [(f["id"], f["file"]) for f in failures] == [("clip-a", broken["path"]), ("clip-a", absent["path"])]
    assert "cannot be decoded" in failures[0]["reason"] and "no such file" in failures[1]["reason"]
    assert sum("clip-a" in record.getMessage() for record in caplog.records) == 2


@pytest.mark.parametrize("part", ["image", "all frames", "no frames"])
def test_an_unreadable_pair_is_replaced_by_a_repeat(processor, make_row, broken, tmp_path, part):
    rows = [make_row("a"), make_row("b", num_frames=2, level=50), make_row("c", level=90)]
    if part == "image":
        rows[1]["image"] = broken
    else:
        rows[1]["frames"] = [broken, broken] if part == "all frames" else []
    collator = RiceCollator(processor, failure_log=tmp_path / "failures.jsonl")
    batch = collator(rows)
    assert len(batch["pixel_values"]) == 3
    others = {product_id_hash("product-a"), product_id_hash("product-c")}
    product = batch["product_ids"][1].item()
    assert product in others
    source = batch["product_ids"].tolist().index(product) if product == batch["product_ids"][0] else 2
    for name in ("pixel_values", "pixel_values_videos", "frame_mask", "product_ids"):
        assert torch.equal(batch[name][1], batch[name][source])
    assert {failure["id"] for failure in read_failure_log(collator.failure_log)} == {"clip-b"}


def test_a_batch_without_a_readable_pair_is_an_error(processor, make_row, broken, tmp_path):
    log = tmp_path / "failures.jsonl"
    with pytest.raises(MediaError, match=r"None of the 2 pairs .*clip-a.*failures\.jsonl"):
        RiceCollator(processor, failure_log=log)([make_row("a", image=broken), make_row("b", frames=[])])
    assert {failure["id"] for failure in read_failure_log(log)} == {"clip-a", "clip-b"}


def test_the_failure_log_lists_each_failure_once(processor, make_row, broken, tmp_path):
    log = tmp_path / "failures.jsonl"
    assert read_failure_log(log) == []
    collator = RiceCollator(processor, failure_log=log)
    for _ in range(3):
        collator([make_row("a"), make_row("b", image=broken)])
    assert len(log.read_text().splitlines()) == 3
    assert [json.loads(line) for line in log.read_text().splitlines()[:1]] == read_failure_log(log)


def test_queries_for_evaluation(processor, make_row, broken):
    rows = [make_row("a", num_frames=2), make_row("b", frames=[]), make_row("c"), make_row("d")]
    rows[2]["frames"] = [broken] * 2
    rows[3]["frames"][0] = broken
    inputs, readable, failures = RiceCollator(processor).encode_queries(rows)
    assert readable == [0, 3]
    assert inputs["frame_mask"].tolist() == [[True, True], [True, True]]
    assert grey_levels(inputs["pixel_values_videos"]) == [[10, 20], [20, 30]]
    assert set(inputs) == {"pixel_values_videos", "frame_mask"}
    assert [failure["id"] for failure in failures] == ["clip-b", "clip-c", "clip-c", "clip-d"]
    assert all(set(failure) == {"id", "file", "reason"} for failure in failures)


def test_gallery_for_evaluation(processor, make_row, broken, absent):
    rows = [make_row("a"), make_row("b", image=broken), make_row("c", level=60), make_row("d", image=absent)]
    inputs, readable, failures = RiceCollator(processor).encode_gallery(rows)
    assert readable == [0, 2] and grey_levels(inputs["pixel_values"]) == [200, 60]
    assert [failure["id"] for failure in failures] == ["image-b", "image-d"]
    assert [failure["file"] for failure in failures] == [broken["path"], absent["path"]]


def test_nothing_readable_gives_empty_inputs(processor, make_row, broken):
    collator = RiceCollator(processor)
    inputs, readable, failures = collator.encode_gallery([make_row("a", image=broken)])
    assert inputs == {} and readable == [] and len(failures) == 1
    inputs, readable, failures = collator.encode_queries([make_row("a", frames=[])])
    assert inputs == {} and readable == [] and failures[0]["reason"] == "the clip has no frames"


def write_video(path, num_frames=20, fps=5):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(num_frames):
            picture = np.full((48, 64, 3), 20 + 10 * i, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def test_rows_of_video_files(processor, make_row, tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path)
    rows = [
        make_row("a", frames=[], boxes=[], video=str(path), start=1.0, end=2.0),
        make_row("b", frames=[], boxes=[], video=str(path)),
        make_row("c"),
        make_row("d", frames=[], boxes=[], video=str(path), start=30.0, end=40.0),
        make_row("e", frames=[], boxes=[], video=str(tmp_path / "absent.mp4")),
    ]
    inputs, readable, failures = RiceCollator(processor, use_boxes=True).encode_queries(rows)
    assert readable == [0, 1, 2]
    levels = np.array(grey_levels(inputs["pixel_values_videos"]))
    np.testing.assert_allclose(levels[0], [70, 80, 90, 100], atol=4)
    np.testing.assert_allclose(levels[1], [20, 70, 120, 170], atol=4)
    assert inputs["frame_mask"].sum(dim=1).tolist() == [4, 4, 3] and inputs["patch_mask"].all()
    assert [(failure["id"], failure["file"]) for failure in failures] == [
        ("clip-d", str(path)),
        ("clip-e", str(tmp_path / "absent.mp4")),
    ]


def test_random_frames_follow_the_seed_and_keep_their_order(processor, make_row):
    collator, row = RiceCollator(processor, sampling="random"), make_row("a", num_frames=12)

    def draw(seed):
        torch.manual_seed(seed)
        return grey_levels(collator([row])["pixel_values_videos"][0])

    draws = [draw(seed) for seed in range(8)]
    assert draws == [draw(seed) for seed in range(8)]
    assert len({tuple(levels) for levels in draws}) > 4
    assert all(levels == sorted(set(levels)) and len(levels) == 4 for levels in draws)


def test_random_frames_of_video_files_follow_the_seed_too(processor, make_row, tmp_path):
    write_video(tmp_path / "clip.mp4")
    row = make_row("a", frames=[], boxes=[], video=str(tmp_path / "clip.mp4"))
    collator = RiceCollator(processor, sampling="random")

    def draw(seed):
        torch.manual_seed(seed)
        return tuple(grey_levels(collator([row])["pixel_values_videos"][0]))

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(6)}) > 2


def test_visible_frames_come_first_and_others_fill_up(processor, make_row):
    collator = RiceCollator(processor, sampling="visible")
    few, many = ([[0, 0, 1, 1] if i in shown else None for i in range(8)] for shown in ({1, 6}, {0, 2, 3, 5, 6, 7}))
    for seed in range(5):
        torch.manual_seed(seed)
        levels = grey_levels(collator([make_row("a", num_frames=8, boxes=few)])["pixel_values_videos"][0])
        assert {20, 70} < set(levels) and levels == sorted(levels)
        levels = grey_levels(collator([make_row("b", num_frames=8, boxes=many)])["pixel_values_videos"][0])
        assert set(levels) < {10, 30, 40, 60, 70, 80} and len(levels) == 4


def test_sampling_and_number_of_frames_can_be_set(processor, make_row):
    row = make_row("a", num_frames=9)
    train = RiceCollator(processor, sampling="train", num_frames=3)([row])
    assert grey_levels(train["pixel_values_videos"][0]) == [10, 50, 90]
    longer = RiceCollator(processor, num_frames=20)([row])
    assert longer["frame_mask"].shape == (1, 20) and longer["frame_mask"].sum() == 9


def test_frames_that_are_not_chosen_are_not_opened(processor, make_row, absent):
    row = make_row("a", num_frames=9)
    chosen = sample_frame_indices(9, 4, "eval")
    row["frames"] = [frame if i in chosen else absent for i, frame in enumerate(row["frames"])]
    _, readable, failures = RiceCollator(processor).encode_queries([row])
    assert readable == [0] and failures == []


def test_images_may_be_bytes(processor, make_row, tmp_path):
    row = make_row("a", level=130)
    with open(row["image"]["path"], "rb") as file:
        row["image"] = {"path": None, "bytes": file.read()}
    assert grey_levels(RiceCollator(processor)([row])["pixel_values"]) == [130]
    with pytest.raises(MediaError, match="<bytes>: cannot be decoded"):
        decode_image({"path": None, "bytes": b"torn"})


def test_workers_can_be_sent_a_collator(processor, make_row):
    collator = pickle.loads(pickle.dumps(RiceCollator(processor, use_boxes=True)))
    assert collator([make_row("a")])["pixel_values"].shape == (1, 3, 32, 32)
