"""Rows to batches: shapes, unreadable files, and that no row is lost."""

import json
import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from data_rice.augmentation import ClipAugmentation
from data_rice.collator import RiceCollator, count_failures, product_id_hash, read_failure_log
from data_rice.decoding import normalize_pixels
from processing_rice import MediaError, build_processor, open_image, sample_frame_indices, train_tokenizer


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


def test_boxes_and_text_are_optional(processor, make_row):
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


def test_an_unreadable_frame_without_replacement_is_left_out(processor, make_row, broken, absent, tmp_path, caplog):
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
    assert [f["outcome"] for f in failures] == ["left out"] * 2
    assert "cannot be decoded" in failures[0]["reason"] and "no such file" in failures[1]["reason"]
    assert sum("clip-a" in record.getMessage() for record in caplog.records) == 2


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_an_unreadable_frame_is_replaced_by_another_of_its_clip(processor, make_row, broken, tmp_path, decode):
    """Of nine frames 0, 2, 4 and 6 are chosen at evaluation; the box is that of the frame that is taken instead."""
    boxes = [None] * 9
    boxes[3] = [0.75, 0.75, 1, 1]
    row = make_row("a", num_frames=9, boxes=boxes)
    row["frames"][4] = broken
    assert sample_frame_indices(9, 4, "eval") == [0, 2, 4, 6]
    collator = RiceCollator(processor, use_boxes=True, failure_log=tmp_path / "failures.jsonl", decode=decode)
    for inputs in (collator([row]), collator.collate_queries([row])[0]):
        assert grey_levels(inputs["pixel_values_videos"]) == [[10, 30, 40, 70]]
        assert inputs["frame_mask"].all()
        assert inputs["patch_mask"].all(dim=-1).tolist() == [[True, True, False, True]]
    (failure,) = collator.collate_queries([row])[2]
    assert failure["outcome"] == "replaced" and failure["file"] == broken["path"]
    assert read_failure_log(tmp_path / "failures.jsonl") == [failure]


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
    failures = read_failure_log(collator.failure_log)
    assert {(failure["id"], failure["outcome"]) for failure in failures} == {("clip-b", "skipped")}


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


def test_failures_are_counted_by_outcome():
    outcomes = [("a", "1", "replaced"), ("a", "2", "replaced"), ("b", "3", "left out"), ("c", "4", "skipped")]
    outcomes += [("c", "5", "skipped"), ("d", "4", "skipped"), ("e", "", "skipped"), ("a", "1", "left out")]
    failures = [{"id": row_id, "file": file, "reason": "r", "outcome": outcome} for row_id, file, outcome in outcomes]
    assert count_failures(failures) == {
        "unreadable_media": 6,
        "replaced_frames": 2,
        "left_out_frames": 2,
        "skipped_pairs": 3,
    }


def test_queries_for_evaluation(processor, make_row, broken):
    rows = [make_row("a", num_frames=2), make_row("b", frames=[]), make_row("c"), make_row("d")]
    rows[2]["frames"] = [broken] * 2
    rows[3]["frames"][0] = broken
    inputs, readable, failures = RiceCollator(processor).collate_queries(rows)
    assert readable == [0, 3]
    assert inputs["frame_mask"].tolist() == [[True, True], [True, True]]
    assert grey_levels(inputs["pixel_values_videos"]) == [[10, 20], [20, 30]]
    assert set(inputs) == {"pixel_values_videos", "frame_mask"}
    assert [(failure["id"], failure["outcome"]) for failure in failures] == [
        ("clip-b", "skipped"),
        ("clip-c", "skipped"),
        ("clip-c", "skipped"),
        ("clip-d", "left out"),
    ]
    assert all(set(failure) == {"id", "file", "reason", "outcome"} for failure in failures)


def test_a_clip_without_a_readable_frame_lists_its_chosen_frames(processor, make_row, tmp_path):
    absent = [{"path": str(tmp_path / f"absent-{i}.jpg"), "bytes": None} for i in range(9)]
    _, readable, failures = RiceCollator(processor).collate_queries([make_row("a", num_frames=9, frames=absent)])
    assert readable == []
    assert [failure["file"] for failure in failures] == [absent[i]["path"] for i in sample_frame_indices(9, 4)]
    assert {failure["outcome"] for failure in failures} == {"skipped"}


def test_gallery_for_evaluation(processor, make_row, broken, absent):
    rows = [make_row("a"), make_row("b", image=broken), make_row("c", level=60), make_row("d", image=absent)]
    inputs, readable, failures = RiceCollator(processor).collate_gallery(rows)
    assert readable == [0, 2] and grey_levels(inputs["pixel_values"]) == [200, 60]
    assert [failure["id"] for failure in failures] == ["image-b", "image-d"]
    assert [failure["file"] for failure in failures] == [broken["path"], absent["path"]]


def test_nothing_readable_gives_empty_inputs(processor, make_row, broken):
    collator = RiceCollator(processor)
    inputs, readable, failures = collator.collate_gallery([make_row("a", image=broken)])
    assert inputs == {} and readable == [] and len(failures) == 1
    inputs, readable, failures = collator.collate_queries([make_row("a", frames=[])])
    assert inputs == {} and readable == [] and failures[0]["reason"] == "the clip has no frames"


def test_rows_of_video_files(processor, make_row, tmp_path, write_video):
    path = tmp_path / "clip.mp4"
    write_video(path)
    rows = [
        make_row("a", frames=[], boxes=[], video=str(path), start=1.0, end=2.0),
        make_row("b", frames=[], boxes=[], video=str(path)),
        make_row("c"),
        make_row("d", frames=[], boxes=[], video=str(path), start=30.0, end=40.0),
        make_row("e", frames=[], boxes=[], video=str(tmp_path / "absent.mp4")),
    ]
    inputs, readable, failures = RiceCollator(processor, use_boxes=True).collate_queries(rows)
    assert readable == [0, 1, 2]
    levels = np.array(grey_levels(inputs["pixel_values_videos"]))
    np.testing.assert_allclose(levels[0], [70, 80, 90, 100], atol=4)
    np.testing.assert_allclose(levels[1], [20, 70, 120, 170], atol=4)
    assert inputs["frame_mask"].sum(dim=1).tolist() == [4, 4, 3] and inputs["patch_mask"].all()
    assert [(failure["id"], failure["file"]) for failure in failures] == [
        ("clip-d", str(path)),
        ("clip-e", str(tmp_path / "absent.mp4")),
    ]


@pytest.mark.parametrize("start", [-1.0, 1.0])
def test_boxes_of_video_files_belong_to_frames_by_number(processor, make_row, tmp_path, start, write_video):
    """Counted from the start of the clip's time range; four of twenty frames, or of the last fifteen, are taken."""
    write_video(tmp_path / "clip.mp4")
    total = 20 if start < 0 else 15
    chosen = sample_frame_indices(total, 4, "eval")
    row = make_row("a", frames=[], video=str(tmp_path / "clip.mp4"), start=start)
    row |= {"box_frames": [0, 1, chosen[2]], "boxes": [[0, 0, 0.25, 0.25], [0, 0, 1, 1], [0.75, 0.75, 1, 1]]}
    corners = RiceCollator(processor, use_boxes=True)([row])["patch_mask"][0].reshape(4, 4, 4)
    assert corners[0, 0, 0] and not corners[0, 3, 3]
    assert corners[2, 3, 3] and not corners[2, 0, 0]
    assert corners[1].all() and corners[3].all()
    visible = RiceCollator(processor, use_boxes=True, sampling="visible", num_frames=3)([row])
    assert visible["patch_mask"][0].flatten(1).all(dim=1).tolist() == [False, True, False]


def test_random_frames_follow_the_seed_and_keep_their_order(processor, make_row):
    collator, row = RiceCollator(processor, sampling="random"), make_row("a", num_frames=12)

    def draw(seed):
        torch.manual_seed(seed)
        return grey_levels(collator([row])["pixel_values_videos"][0])

    draws = [draw(seed) for seed in range(8)]
    assert draws == [draw(seed) for seed in range(8)]
    assert len({tuple(levels) for levels in draws}) > 4
    assert all(levels == sorted(set(levels)) and len(levels) == 4 for levels in draws)


def test_random_frames_of_video_files_follow_the_seed_too(processor, make_row, tmp_path, write_video):
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


def test_sampling_modes_reach_sample_frame_indices(processor, make_row):
    """Official training loses the end of a clip at random."""
    row, seen = make_row("a", num_frames=9), set()
    for seed in range(12):
        torch.manual_seed(seed)
        expected = sample_frame_indices(9, 4, "train_random_drop")
        torch.manual_seed(seed)
        batch = RiceCollator(processor, sampling="train_random_drop")([row])
        kept = int(batch["frame_mask"].sum())
        assert grey_levels(batch["pixel_values_videos"][0, :kept]) == [10 * (i + 1) for i in expected]
        seen.add(kept)
    assert len(seen) > 1


def test_frames_that_are_not_chosen_are_not_opened(processor, make_row, absent):
    row = make_row("a", num_frames=9)
    chosen = sample_frame_indices(9, 4, "eval")
    row["frames"] = [frame if i in chosen else absent for i, frame in enumerate(row["frames"])]
    _, readable, failures = RiceCollator(processor).collate_queries([row])
    assert readable == [0] and failures == []


def test_images_may_be_bytes(processor, make_row, tmp_path):
    row = make_row("a", level=130)
    with open(row["image"]["path"], "rb") as file:
        row["image"] = {"path": None, "bytes": file.read()}
    assert grey_levels(RiceCollator(processor)([row])["pixel_values"]) == [130]
    with pytest.raises(MediaError, match="<bytes> cannot be decoded"):
        open_image({"path": None, "bytes": b"torn"})


def test_a_collator_can_be_pickled_for_workers(processor, make_row):
    collator = pickle.loads(pickle.dumps(RiceCollator(processor, use_boxes=True)))
    assert collator([make_row("a")])["pixel_values"].shape == (1, 3, 32, 32)


class TestDecodeModes:
    """`decode` and `pixels`: the same frames, near or equal pixels."""

    @pytest.fixture
    def photo_row(self, make_row, tmp_path):
        """A row of JPEGs of 90 x 160 pixels, and one frame of another size."""
        rng = np.random.default_rng(0)

        def write(name: str, size: tuple[int, int]) -> dict:
            noise = rng.normal(size=(size[1], size[0], 3))
            levels = 128 + 90 * np.sign(gaussian_filter(noise, (6, 6, 0))) + 4 * noise
            Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(tmp_path / name, quality=90)
            return {"path": str(tmp_path / name), "bytes": None}

        frames = [write(f"{i}.jpg", (90, 160)) for i in range(3)] + [write("3.jpg", (50, 40))]
        return make_row("photo", num_frames=4, frames=frames, image=write("shop.jpg", (120, 120)))

    @pytest.mark.parametrize("backend", ["torchvision", "pillow"])
    def test_exact_is_the_processor(self, processor, photo_row, backend):
        processor = build_processor(processor.tokenizer, 32, 8, 4, resize_backend=backend)
        batch = RiceCollator(processor)([photo_row])
        frames = [Image.open(frame["path"]) for frame in photo_row["frames"]]
        expected = processor(videos=[frames], images=[Image.open(photo_row["image"]["path"])])
        for name in ("pixel_values", "pixel_values_videos"):
            assert torch.equal(batch[name], expected[name])

    @pytest.mark.parametrize("decode", ["exact", "fast"])
    @pytest.mark.parametrize("backend", ["torchvision", "pillow"])
    def test_bytes_become_the_same_floats_on_the_device(self, processor, photo_row, make_row, decode, backend):
        processor = build_processor(processor.tokenizer, 32, 8, 4, resize_backend=backend)
        rows = [photo_row, make_row("b", num_frames=2)]
        floats = RiceCollator(processor, decode=decode)(rows)
        batch = RiceCollator(processor, decode=decode, pixels="uint8")(rows)
        assert batch["pixel_values"].dtype == batch["pixel_values_videos"].dtype == torch.uint8
        batch = normalize_pixels(batch, processor)
        assert batch.keys() == floats.keys()
        for name, expected in floats.items():
            # The smallest standard deviation is 0.26, so one grey level of 255 would be 0.015.
            torch.testing.assert_close(batch[name], expected, rtol=0, atol=1e-5)
        assert not batch["pixel_values_videos"][1, 2:].any()

    @pytest.mark.parametrize("keeps_shape", [False, True])
    def test_fast_is_close_to_exact(self, processor, photo_row, keeps_shape):
        processor = build_processor(processor.tokenizer, 32, 8, 4)
        if keeps_shape:
            for part in (processor.image_processor, processor.video_processor):
                part.size, part.do_center_crop = {"shortest_edge": 32}, True
                part.crop_size = {"height": 32, "width": 32}
        exact, fast = (RiceCollator(processor, decode=decode)([photo_row]) for decode in ("exact", "fast"))
        for name in ("pixel_values", "pixel_values_videos"):
            # In grey levels, by the standard deviation of the normalisation.
            difference = (exact[name] - fast[name]).abs().mean() * 0.27 * 255
            assert exact[name].shape == fast[name].shape and 0 < difference < 4, name
        assert torch.equal(exact["frame_mask"], fast["frame_mask"])

    def test_fast_frames_of_video_files(self, processor, make_row, tmp_path, write_video):
        write_video(tmp_path / "clip.mp4")
        row = make_row("a", frames=[], boxes=[], video=str(tmp_path / "clip.mp4"))
        exact, fast = (RiceCollator(processor, decode=decode)([row]) for decode in ("exact", "fast"))
        torch.testing.assert_close(fast["pixel_values_videos"], exact["pixel_values_videos"], rtol=0, atol=0.02)

    @pytest.mark.parametrize("option", ["decode", "pixels"])
    def test_unknown_ways_are_refused(self, processor, option):
        with pytest.raises(ValueError, match=f'`{option}` must be ".*" or ".*", got \'quick\''):
            RiceCollator(processor, **{option: "quick"})


class TestAugmentation:
    def test_frames_and_boxes_move_together(self, processor, make_row, tmp_path):
        """Each frame is black with a white square, which must be in the kept patches wherever it goes."""
        canvas = Image.new("RGB", (128, 128))
        canvas.paste("white", (32, 64, 64, 96))
        canvas.save(tmp_path / "square.png")
        frame = {"path": str(tmp_path / "square.png"), "bytes": None}
        row = make_row("a", frames=[frame] * 3, boxes=[[0.25, 0.5, 0.5, 0.75]] * 3)
        augmentation = ClipAugmentation(crop_scale=(0.5, 0.9), flip=0.5, jitter=0.2, frame_drop=0.3)
        places = set()
        for seed in range(10):
            torch.manual_seed(seed)
            batch = RiceCollator(processor, use_boxes=True, augmentation=augmentation)([row])
            frames, kept = batch["pixel_values_videos"][0], batch["frame_mask"][0]
            assert all(torch.equal(each, frames[0]) for each in frames[kept])
            bright = frames[0].mean(dim=0).unfold(0, 8, 8).unfold(1, 8, 8).amax(dim=(2, 3)).flatten() > 0.5
            assert (batch["patch_mask"][0, 0] | ~bright).all()
            places.add((tuple(bright.tolist()), int(kept.sum())))
        assert len(places) > 5

    @pytest.mark.parametrize("decode", ["exact", "fast"])
    def test_the_draws_of_a_pair_do_not_depend_on_other_pairs(self, processor, make_row, broken, decode):
        augmentation = ClipAugmentation(frame_drop=0.3)
        collator = RiceCollator(processor, sampling="random", augmentation=augmentation, decode=decode)
        good, other = make_row("a", num_frames=9), make_row("b", num_frames=9, level=120)
        damaged = {**other, "frames": [broken] * 5 + other["frames"][5:], "image": broken}
        batches = []
        for first in (other, damaged):
            torch.manual_seed(1)
            batches.append(collator([first, good]))
        for name in ("pixel_values", "pixel_values_videos", "frame_mask"):
            assert torch.equal(batches[0][name][1], batches[1][name][1])

    def test_queries_are_not_augmented(self, processor, make_row):
        collator = RiceCollator(processor, augmentation=ClipAugmentation(background=1.0, frame_drop=1.0))
        inputs, _, _ = collator.collate_queries([make_row("a")])
        assert grey_levels(inputs["pixel_values_videos"]) == [[10, 20, 30]]

    def test_a_crop_is_not_enlarged_from_a_reduced_picture(self, processor, make_row, tmp_path, monkeypatch):
        """32 of 160 pixels are a fifth; the picture is decoded at a quarter of its size, a crop of a third is not."""
        Image.new("RGB", (160, 160)).save(tmp_path / "large.jpg")
        large = {"path": str(tmp_path / "large.jpg"), "bytes": None}
        seen = []
        monkeypatch.setattr(
            "data_rice.collator.open_image", lambda *args, **kw: seen.append(open_image(*args, **kw)) or seen[-1]
        )
        row = make_row("a", frames=[large], boxes=[None], image=large)
        RiceCollator(processor, decode="fast")([row])
        third = ClipAugmentation(crop_scale=(1 / 9, 1 / 9), crop_ratio=(1.0, 1.0))
        RiceCollator(processor, decode="fast", augmentation=third)([row])
        assert [picture.width for picture in seen] == [40, 40, 160, 160]


class TestNoisyAsr:
    @pytest.fixture
    def rows(self, make_row):
        """Three rows of two products."""
        return [
            make_row("a", asr="a red cup", product_id="cup"),
            make_row("b", asr="a blue cup", product_id="cup"),
            make_row("c", asr="a green dress"),
        ]

    @staticmethod
    def read(processor, batch) -> list[str]:
        return processor.tokenizer.batch_decode(batch["asr_input_ids"], skip_special_tokens=True)

    def test_noisy_asr_is_empty_or_of_another_product(self, processor, rows):
        collator = RiceCollator(processor, use_text=True, asr_noise=1.0)
        others = [{"a green dress"}, {"a green dress"}, {"a red cup", "a blue cup"}]
        seen = [set(), set(), set()]
        for seed in range(30):
            torch.manual_seed(seed)
            batch = collator(rows)
            for i, text in enumerate(self.read(processor, batch)):
                seen[i].add(text)
                assert batch["asr_is_noise"][i] == (text != "") == batch["asr_attention_mask"][i].any()
        assert seen == [texts | {""} for texts in others]
        assert rows[0]["asr"] == "a red cup"

    def test_noise_has_the_requested_rate_and_is_reproducible(self, processor, rows):
        collator, own = RiceCollator(processor, use_text=True, asr_noise=0.3), [row["asr"] for row in rows]
        read, flags = [], 0
        for _ in range(2):
            torch.manual_seed(0)
            batches = [collator(rows) for _ in range(100)]
            read.append([self.read(processor, batch) for batch in batches])
            flags = sum(int(batch["asr_is_noise"].sum()) for batch in batches)
        changed = [text for texts in read[0] for text, before in zip(texts, own, strict=True) if text != before]
        assert read[0] == read[1] and 60 < len(changed) < 120
        assert flags == sum(text != "" for text in changed) and 0.35 < flags / len(changed) < 0.65

    def test_a_single_product_has_no_wrong_asr(self, processor, rows):
        collator = RiceCollator(processor, use_text=True, asr_noise=1.0)
        for _ in range(5):
            batch = collator(rows[:2])
            assert not batch["asr_is_noise"].any() and self.read(processor, batch) == ["", ""]

    @pytest.mark.parametrize("settings", [{}, {"use_text": True}, {"asr_noise": 1.0}])
    def test_without_noise_or_text_nothing_is_drawn(self, processor, rows, settings):
        state = torch.get_rng_state()
        batch = RiceCollator(processor, **settings)(rows)
        assert "asr_is_noise" not in batch and torch.equal(torch.get_rng_state(), state)

    def test_asr_noise_does_not_change_pictures(self, processor, rows):
        augmentation = ClipAugmentation(crop_scale=(0.5, 0.9), flip=0.5, jitter=0.2)
        settings = {"augmentation": augmentation, "sampling": "random", "use_text": True}
        batches = []
        for noise in (0.0, 1.0):
            torch.manual_seed(3)
            batches.append(RiceCollator(processor, asr_noise=noise, **settings)(rows))
        for name in ("pixel_values", "pixel_values_videos", "title_input_ids"):
            assert torch.equal(batches[0][name], batches[1][name])

    def test_queries_keep_their_asr(self, processor, rows):
        inputs, _, _ = RiceCollator(processor, use_text=True, asr_noise=1.0).collate_queries(rows)
        assert self.read(processor, inputs) == [row["asr"] for row in rows]

    @pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
    def test_an_invalid_rate_is_refused(self, processor, rate):
        with pytest.raises(ValueError, match="`asr_noise` must lie in 0..1, got"):
            RiceCollator(processor, asr_noise=rate)
