import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluation_rice.study import attention
from evaluation_rice.study.attention import box_cover, box_shares, clip_shares, measure, summarise


class Looking:
    """
    Has 2 x 2 patches. The class token of the right image, known by its colour, looks at the upper left of the first
    frame, its patches at the lower left of the last; a wrong image looks everywhere alike. A tenth goes elsewhere.
    """

    config = SimpleNamespace(use_decoder=True)
    reconstruction_head = None

    def match(self, clips, gallery):
        raise AssertionError("nothing is scored here")

    def attention_maps(self, pixel_values, pixel_values_videos):
        maps = torch.full((len(pixel_values), 5, pixel_values_videos.shape[1], 4), 0.9 / 8)
        for i, (image, clip) in enumerate(zip(pixel_values, pixel_values_videos, strict=True)):
            if (0.8 * image - clip[0]).abs().max() < 0.02:
                maps[i] = 0
                maps[i, 0, 0, 0] = maps[i, 1:, -1, 2] = 0.9
        return maps


class Reconstructing(Looking):
    reconstruction_head = object()

    def reconstruction_maps(self, pixel_values, pixel_values_videos):
        maps = torch.zeros(len(pixel_values), 4, pixel_values_videos.shape[1], 4)
        maps[:, 0, 0, 1], maps[:, 1, 0, 2] = 7.0, 0.1
        return maps


@pytest.fixture
def collator(collator):
    collator.processor = SimpleNamespace(video_processor=SimpleNamespace(num_frames=2, do_center_crop=False))
    collator.num_frames = None
    return collator


def test_cover_of_a_patch_is_the_part_of_it_that_lies_in_the_box():
    assert box_cover((0.25, 0.0, 0.75, 0.5), 2).tolist() == [0.5, 0.5, 0, 0]
    assert box_cover((0.0, 0.75, 1.0, 1.0), 2).tolist() == [0, 0, 0.5, 0.5]
    assert box_cover(None, 2).tolist() == box_cover([], 2).tolist() == [0, 0, 0, 0]
    # A crop sees the middle of the frame only, which the box fills.
    assert box_cover((0.25, 0.0, 0.75, 1.0), 2, (0.25, 0.25, 0.75, 0.75)).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("side", [1, 3, 7])
def test_uniform_attention_inside_a_box_equals_its_area(side):
    box = (0.13, 0.2, 0.57, 0.95)
    cover = np.stack([box_cover(box, side), box_cover(None, side)])
    shares = box_shares(np.ones((1, 2, side**2)), cover)
    assert shares["in_boxes"] == pytest.approx(0.44 * 0.75 / 2)
    assert shares["on_frames"] == pytest.approx(0.5) and shares["in_boxes_of_frames"] == pytest.approx(0.33)


def test_shares_are_the_mean_over_normalised_rows():
    cover = np.zeros((2, 4))
    cover[0, 0] = 0.5
    weights = np.zeros((3, 2, 4))
    weights[0, 0, 0] = 0.2
    weights[1, 0, 0] = weights[1, 1, 3] = 5.0
    shares = box_shares(weights, cover)
    assert shares == {"in_boxes": 0.375, "on_frames": 0.75, "in_boxes_of_frames": 0.5}
    assert all(map(math.isnan, box_shares(np.zeros((3, 2, 4)), cover).values()))
    nowhere = box_shares(weights[1:2, 1:], np.zeros((1, 4)))
    assert nowhere["in_boxes"] == nowhere["on_frames"] == 0 and math.isnan(nowhere["in_boxes_of_frames"])


def test_attention_in_a_known_place_has_the_known_share(collator, shop):
    """The box is the left half of the first of two frames."""
    result = measure(Reconstructing(), collator, shop.queries, shop.gallery, quiet=True)
    summary = result["summary"]
    assert summary["num_clips"] == 5 and result["failures"] == []
    means = {
        (name, share): [round(summary[name][share][side]["mean"], 6) for side in ("uniform", "right", "wrong")]
        for name in attention.MAPS
        for share in ("in_boxes", "on_frames")
    }
    assert means == {
        ("score", "in_boxes"): [0.25, 1.0, 0.25],
        ("score", "on_frames"): [0.5, 1.0, 0.5],
        ("patches", "in_boxes"): [0.25, 0.0, 0.25],
        ("patches", "on_frames"): [0.5, 0.0, 0.5],
        ("reconstruction", "in_boxes"): [0.25, 0.5, 0.5],
        ("reconstruction", "on_frames"): [0.5, 1.0, 1.0],
    }
    assert summary["score"]["in_boxes"]["right_minus_uniform"]["mean"] == pytest.approx(0.75)
    assert summary["patches"]["in_boxes"]["right_minus_wrong"]["mean"] == pytest.approx(-0.25)
    assert summary["patches"]["in_boxes_of_frames"]["right"]["mean"] is None
    assert summary["not_on_patches"]["mean"] == pytest.approx(0.1)


def test_wrong_images_are_of_the_clips_own_shop(collator, shop):
    result = measure(Looking(), collator, shop.queries, shop.gallery, quiet=True)
    lives = {"x": {"x0", "x1", "x2", "shared"}, "y": {"y0", "y1", "shared"}}
    for entry, (clip, live, relevant) in zip(result["clips"], shop.clips, strict=True):
        right, wrong = entry["images"]
        assert entry["clip_id"] == clip and right == relevant[0] and wrong in lives[live] - {right}
        assert "reconstruction" not in entry
    assert "reconstruction" not in result["summary"]


def test_clips_are_evenly_spaced_among_those_with_boxes(collator, shop):
    queries = shop.queries.map(lambda row: {"boxes": row["boxes"] if row["clip_id"] != "a" else [None, None]})
    chosen = measure(Looking(), collator, queries, shop.gallery, num_clips=2, quiet=True)["clips"]
    assert [clip["clip_id"] for clip in chosen] == ["c", "e"]


def test_clips_that_cannot_be_measured_are_listed(collator, shop):
    (shop.folder / "y" / "y1.png").write_bytes(b"no image")
    result = measure(Looking(), collator, shop.queries, shop.gallery, quiet=True)
    assert result["failures"][0]["id"] == "b" and "y1.png" in result["failures"][0]["reason"]
    assert len(result["clips"]) + len(result["failures"]) == 5
    assert {clip["clip_id"]: clip["live_id"] for clip in result["clips"]}["a"] == "x"


def test_refusals(collator, shop):
    blind = SimpleNamespace(config=SimpleNamespace(use_decoder=False), match=None, attention_maps=None)
    for model in (blind, SimpleNamespace(match=None)):
        with pytest.raises(ValueError, match="no matching decoder"):
            measure(model, collator, shop.queries, shop.gallery)
    bare = shop.queries.map(lambda row: {"boxes": [None, None]})
    with pytest.raises(ValueError, match="no clip of this split has a true box"):
        measure(Looking(), collator, bare, shop.gallery)
    odd = SimpleNamespace(attention_maps=lambda **_: torch.ones(1, 4, 2, 3))
    with pytest.raises(ValueError, match="3 patches are not a square grid"):
        clip_shares(odd, collator, shop.queries[0], [shop.gallery[0]])


def test_intervals_are_over_several_shops():
    shares = dict.fromkeys(attention.SHARES, 0.5)
    clips = [
        {"live_id": live, "uniform": shares, "score": [dict.fromkeys(attention.SHARES, value), shares]}
        | {"not_on_patches": [0.0]}
        for live, value in (("x", 0.2), ("x", 0.2), ("y", 0.8), ("y", 0.8))
    ]
    summary = summarise(clips)
    assert summary["score"]["in_boxes"]["right"]["ci95"] == pytest.approx([0.2, 0.8])
    assert summary["interval"].startswith("percentile bootstrap over 2 shops")


def test_intervals_are_over_clips_and_differences_paired():
    shares = dict.fromkeys(attention.SHARES, 0.0)
    clips = [
        {
            "uniform": {**shares, "in_boxes": value},
            "score": [{**shares, "in_boxes": value + 0.2}, {**shares, "in_boxes": 0.5}],
            "not_on_patches": [0.0, 0.0],
        }
        for value in (0.1, 0.3, 0.5)
    ]
    entry = summarise(clips)["score"]["in_boxes"]
    assert entry["right"]["mean"] == pytest.approx(0.5) and entry["right"]["ci95"][0] == pytest.approx(0.3)
    # Each clip differs by the same amount, so the difference has no spread, although both sides have.
    assert entry["right_minus_uniform"]["ci95"] == pytest.approx([0.2, 0.2])
    assert entry["right_minus_wrong"]["mean"] == pytest.approx(0.0)


@pytest.fixture
def command(collator, shop, tmp_path, monkeypatch):
    def call(model, *arguments):
        monkeypatch.setattr("hub_rice.loading.load_model", lambda path, device: (model, None))
        monkeypatch.setattr("data_rice.collator.RiceCollator", lambda processor, use_text: collator)
        monkeypatch.setattr("data_rice.load_dataset_view", view_of)
        monkeypatch.setattr("data_rice.gallery_scope", lambda *_: "live")
        output = tmp_path / "attention.json"
        attention.main(["--model", "m", "--dataset", "d", "--output", str(output), *arguments])
        return json.loads(output.read_text())

    def view_of(name, view, split="train", data_dir=None, cache_dir=None):
        call.caches.append(cache_dir)
        return shop.queries if view == "query" else getattr(shop, view)

    call.caches = []
    return call


def test_the_cache_folder_can_be_chosen(command):
    command(Looking(), "--cache_dir", "elsewhere")
    assert command.caches == ["elsewhere", "elsewhere"]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(command, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        command(None, "--output", str(tmp_path))
    assert end.value.code == 2 and f"--output {tmp_path} is a folder" in capsys.readouterr().err


def test_the_command_prints_a_table_and_writes_json(command, capsys):
    result = command(Looking())
    assert result["summary"]["num_clips"] == 5 and result["split"] == "test"
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("| attention of the class token, inside"))
    assert row.split(" | ")[1:] == [
        "25.0",
        "100.0 (100.0 to 100.0)",
        "25.0 (25.0 to 25.0)",
        "+75.0 (+75.0 to +75.0)",
        "+75.0 (+75.0 to +75.0) |",
    ]
    assert "not counted: 10.0 % of the attention" in text and "percentile bootstrap over 2 shops" in text


def test_the_command_refuses_a_model_without_decoder_in_one_sentence(command, capsys):
    with pytest.raises(SystemExit) as end:
        command(SimpleNamespace(config=SimpleNamespace(use_decoder=False), match=None))
    assert end.value.code == 2
    assert capsys.readouterr().err.strip().endswith("no attention to clips: name a model trained with one.")
