"""Which frames are used: as published, and dropped at random as published."""

import json

import pytest
import torch

from processing_rice.sampling_rice import draw_frame_drop, drop_last_frames, sample_frame_indices


@pytest.mark.parametrize(
    "num_frames, max_frames, mode, expected",
    [
        (3, 10, "train", [0, 1, 2]),
        (4, 4, "eval", [0, 1, 2, 3]),
        (10, 4, "eval", [0, 2, 5, 7]),
        (10, 4, "train", [0, 3, 6, 9]),
        (7, 1, "eval", [0]),
        (7, 1, "train", [0]),
    ],
)
def test_frames_are_sampled_as_published(num_frames, max_frames, mode, expected):
    assert sample_frame_indices(num_frames, max_frames, mode) == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 4), "`num_frames` must be at least 1, got 0"),
        ((4, 0), "`max_frames` must be at least 1, got 0"),
        ((4, 4, "random"), "`mode` must be"),
        ((9, 4.0), "`max_frames` must be an integer, got 4.0"),
    ],
)
def test_sampling_refuses_invalid_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_frame_indices(*arguments)


@pytest.mark.parametrize(
    "num_frames, fraction, kept", [(10, 0.3, 7), (10, 0.0, 10), (3, 0.9, 1), (1, 0.9, 1), (7, 0.5, 4)]
)
def test_the_end_of_a_clip_is_dropped(num_frames, fraction, kept):
    assert drop_last_frames(range(num_frames), fraction) == list(range(kept))


def test_recorded_frame_drop(reference_dir):
    """The older code first spreads ten frames over the clip, then drops from their end."""
    recorded = json.loads((reference_dir / "golden_functions.json").read_text())["train_random_drop"]
    assert len(recorded) > 200
    for case in recorded:
        fraction = case["drop_fraction"] if case["gate"] >= 0.5 else 0.0
        kept = drop_last_frames(sample_frame_indices(case["num_frames"], 10, "train"), fraction)
        assert kept == case["kept"], case


def test_frame_drops_are_drawn_as_published():
    """Half of the time nothing, else 0, 0.1, ..., 0.9 with equal probability: 55 % and 5 % each of nine."""
    torch.manual_seed(0)
    draws = torch.tensor([draw_frame_drop() for _ in range(4000)])
    shares = [(draws - 0.1 * step).abs().lt(1e-6).double().mean().item() for step in range(10)]
    assert sum(shares) == pytest.approx(1)
    assert shares[0] == pytest.approx(0.55, abs=0.03) and shares[1:] == pytest.approx([0.05] * 9, abs=0.012)


@pytest.mark.parametrize(
    "mode, num_frames, longest",
    [
        ("train_random_drop", 25, sample_frame_indices(25, 10, "train")),
        ("train_random_drop", 6, list(range(6))),
        ("train_random_drop_full", 25, sample_frame_indices(25, 10, "train")),
        ("eval_random_drop_full", 25, sample_frame_indices(25, 10, "eval")),
        ("eval_random_drop_full", 10, list(range(10))),
    ],
)
def test_random_drops_keep_the_beginning(mode, num_frames, longest):
    drawn = [sample_frame_indices(num_frames, 10, mode) for _ in range(200)]
    assert all(indices == longest[: len(indices)] for indices in drawn)
    lengths = {len(indices) for indices in drawn}
    assert max(lengths) == len(longest) and len(lengths) > 3


def test_the_newer_codes_drop_leaves_short_clips_alone():
    for mode in ("train_random_drop_full", "eval_random_drop_full"):
        assert all(sample_frame_indices(9, 10, mode) == list(range(9)) for _ in range(50))
