"""One draw per clip, boxes that follow the picture, and frames left out at random."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_rice.augmentation import ClipAugmentation, ClipChange

OFF = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "jitter": 0.0}


def picture_with_square(box=(0.25, 0.5, 0.5, 0.75), size=64):
    pixels = torch.full((3, size, size), 40, dtype=torch.uint8)
    left, top, right, bottom = (round(value * size) for value in box)
    pixels[:, top:bottom, left:right] = torch.tensor((250, 10, 10), dtype=torch.uint8)[:, None, None]
    return pixels, list(box)


def red_box(pixels):
    """Extent of the red square, in 0..1 of the picture."""
    pixels = pixels.int().numpy()
    rows, columns = np.nonzero((pixels[0] > 150) & (pixels[1] < 60))
    height, width = pixels.shape[1:]
    return [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]


def test_without_augmentation_nothing_changes():
    image, box = picture_with_square()
    frames, boxes = ClipAugmentation(**OFF).draw().apply([image], [box])
    assert torch.equal(frames[0], image)
    assert boxes == [box]


def test_a_crop_and_its_mirror_image_by_hand():
    image = torch.arange(8, dtype=torch.uint8).expand(3, 4, 8)
    change = ClipChange(crop=(0.25, 0.5, 0.75, 1.0))
    (frame,), (box,) = change.apply([image], [[0.25, 0.0, 0.5, 0.75]])
    assert frame.shape == (3, 2, 4) and frame[0, 0].tolist() == [2, 3, 4, 5]
    assert box == [0.0, 0.0, 0.5, 0.5]
    (frame,), (box,) = ClipChange(change.crop, mirrored=True).apply([image], [[0.25, 0.0, 0.5, 0.75]])
    assert frame[0, 0].tolist() == [5, 4, 3, 2]
    assert box == [0.5, 0.0, 1.0, 0.5]


def test_colours_by_hand():
    grey = torch.tensor([[[100, 200]]], dtype=torch.uint8).expand(3, 1, 2)
    brighter, _ = ClipChange(factors=(1.2, 1.0, 1.0)).apply([grey])
    assert brighter[0][0].tolist() == [[120, 240]]
    # Half of the way to the mean, which is 150.
    flatter, _ = ClipChange(factors=(1.0, 0.5, 1.0)).apply([grey])
    assert np.abs(flatter[0][0].int().numpy() - [[125, 175]]).max() <= 1
    # Without saturation a pixel is its luminance, 0.299 of red.
    red = torch.tensor([200, 0, 0], dtype=torch.uint8)[:, None, None]
    colourless, _ = ClipChange(factors=(1.0, 1.0, 0.0)).apply([red])
    assert np.abs(colourless[0].flatten().int().numpy() - 0.299 * 200).max() <= 1


@given(
    seed=st.integers(0, 2**31),
    box=st.tuples(*[st.integers(0, 56)] * 2, *[st.integers(8, 64)] * 2).filter(
        lambda b: b[2] - b[0] >= 8 and b[3] - b[1] >= 8
    ),
    scale=st.floats(0.1, 1.0),
)
@settings(max_examples=200, deadline=None)
def test_boxes_follow_crop_and_mirroring(seed, box, scale):
    """The box handed back is the product's in the new picture, to the pixel, or none where it is gone."""
    torch.manual_seed(seed)
    image, box = picture_with_square([value / 64 for value in box])
    change = ClipAugmentation(crop_scale=(scale, scale), flip=0.5, jitter=0.0).draw()
    (frame,), (moved,) = change.apply([image], [box])
    if moved is None:
        assert not (frame[0] > 150).any()
    else:
        assert moved == pytest.approx(red_box(frame), abs=1e-6)
        assert 0 <= moved[0] < moved[2] <= 1 and 0 <= moved[1] < moved[3] <= 1


def test_a_box_that_is_cropped_away_becomes_none():
    image, _ = picture_with_square()
    change = ClipChange(crop=(0.5, 0.5, 1.0, 1.0))
    _, boxes = change.apply([image] * 3, [[0.0, 0.0, 0.5, 1.0], [0.0, 0.0, 0.625, 1.0], None])
    assert boxes == [None, [0.0, 0.0, 0.25, 1.0], None]


def test_boxes_and_pictures_move_by_whole_pixels():
    frames = [torch.zeros(3, 10, 10, dtype=torch.uint8), torch.zeros(3, 100, 100, dtype=torch.uint8)]
    cropped, boxes = ClipChange(crop=(0.33, 0.0, 1.0, 1.0)).apply(frames, [[0.5, 0.0, 1.0, 1.0]] * 2)
    assert [frame.shape[2] for frame in cropped] == [7, 67]
    assert boxes[0][0] == pytest.approx((5 - 3) / 7) and boxes[1][0] == pytest.approx((50 - 33) / 67)


def test_every_frame_of_a_clip_is_changed_equally():
    image, box = picture_with_square()
    change = ClipAugmentation(crop_scale=(0.4, 0.8), jitter=0.5).draw()
    frames, boxes = change.apply([image] * 4, [box, None, box, None])
    assert all(torch.equal(frame, frames[0]) for frame in frames)
    assert boxes[0] == boxes[2] and boxes[1] is boxes[3] is None


def test_a_tiny_picture_keeps_a_pixel():
    frames, _ = ClipChange(crop=(0.9, 0.9, 1.0, 1.0)).apply([torch.zeros(3, 1, 2, dtype=torch.uint8)])
    assert frames[0].shape == (3, 1, 1)


def test_resizing_comes_after_cropping_and_before_colours():
    image = torch.arange(8, dtype=torch.uint8).expand(3, 4, 8)
    change = ClipChange(crop=(0.5, 0.0, 1.0, 1.0), factors=(10.0, 1.0, 1.0))
    frames, _ = change.apply([image], resize=lambda frame: frame[:, ::2, ::2])
    assert frames[0][0].tolist() == [[40, 60], [40, 60]]


def test_background_becomes_one_colour_outside_the_box_only():
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 64, 64), dtype=np.uint8))
    box = [0.25, 0.25, 0.75, 0.5]
    change = ClipAugmentation(**OFF, background=1.0).draw()
    frames, boxes = change.apply([noise, noise], [box, None])
    kept = frames[0]
    assert torch.equal(kept[:, 16:32, 16:48], noise[:, 16:32, 16:48])
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[16:32, 16:48] = False
    assert len(kept[:, outside].unique(dim=1).T) == 1
    assert torch.equal(frames[1], noise), "a frame without a box has no background to remove"
    assert boxes == [box, None]


class TestFrameDrop:
    def test_frames_drop_with_the_given_probability_and_one_is_kept(self):
        augmentation, frames = ClipAugmentation(frame_drop=0.3), list(range(10, 20))
        draws = [augmentation.drop_frames(frames) for _ in range(2000)]
        assert all(draw == sorted(set(draw)) and set(draw) <= set(frames) for draw in draws)
        # Ten frames in 2,000 draws: a standard error of 0.01 for each.
        shares = [np.mean([frame in draw for draw in draws]) for frame in frames]
        assert np.abs(np.array(shares) - 0.7).max() < 0.05

    def test_if_all_frames_would_drop_a_random_one_stays(self):
        draws = [ClipAugmentation(frame_drop=1.0).drop_frames([3, 5, 8]) for _ in range(300)]
        assert all(len(draw) == 1 for draw in draws)
        assert all(0.2 < np.mean([draw == [frame] for draw in draws]) < 0.5 for frame in (3, 5, 8))

    def test_off_by_default(self):
        assert ClipAugmentation().drop_frames([2, 4]) == [2, 4]


def test_the_same_seed_draws_the_same_change():
    augmentation = ClipAugmentation(background=0.5)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append((augmentation.draw(), torch.rand(()).item()))
    assert draws[0] == draws[1] != draws[2]
