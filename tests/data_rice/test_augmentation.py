"""One draw per clip, and boxes that follow the picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from data_rice.augmentation import ClipAugmentation

OFF = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "jitter": 0.0}


def picture_with_square(box=(0.25, 0.5, 0.5, 0.75), size=64):
    pixels = np.full((size, size, 3), 40, dtype=np.uint8)
    left, top, right, bottom = (round(value * size) for value in box)
    pixels[top:bottom, left:right] = (250, 10, 10)
    return Image.fromarray(pixels), list(box)


def red_box(image):
    """Extent of the red square, in 0..1 of the picture."""
    pixels = np.asarray(image).astype(int)
    rows, columns = np.nonzero((pixels[..., 0] > 150) & (pixels[..., 1] < 60))
    height, width = pixels.shape[:2]
    return [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]


def test_switched_off_it_changes_nothing():
    image, box = picture_with_square()
    frames, boxes = ClipAugmentation(**OFF)([image], [box])
    assert np.array_equal(np.asarray(frames[0]), np.asarray(image))
    assert boxes == [box]


@pytest.mark.parametrize("seed", range(8))
def test_boxes_follow_crop_and_mirroring(seed):
    torch.manual_seed(seed)
    image, box = picture_with_square((0.4, 0.45, 0.6, 0.65))
    augmentation = ClipAugmentation(crop_scale=(0.6, 0.9), flip=0.5, jitter=0.0)
    frames, boxes = augmentation([image], [box])
    assert boxes[0] == pytest.approx(red_box(frames[0]), abs=2.5 / 64)


def test_every_frame_of_a_clip_gets_the_same_change():
    image, box = picture_with_square()
    frames, boxes = ClipAugmentation(crop_scale=(0.4, 0.8), jitter=0.5)([image] * 4, [box, None, box, None])
    assert all(np.array_equal(np.asarray(frame), np.asarray(frames[0])) for frame in frames)
    assert boxes[0] == boxes[2] and boxes[1] is boxes[3] is None


def test_a_box_that_is_cropped_away_becomes_none():
    image, _ = picture_with_square()
    augmentation = ClipAugmentation(crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0), flip=0.0)
    outcomes = {augmentation([image], [[0.0, 0.0, 0.05, 0.05]])[1][0] is None for _ in range(30)}
    assert outcomes == {True, False} or outcomes == {True}


def test_background_becomes_one_colour_outside_the_box_only():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    box = [0.25, 0.25, 0.75, 0.5]
    frames, boxes = ClipAugmentation(**OFF, background=1.0)([noise, noise], [box, None])
    kept, original = np.asarray(frames[0]), np.asarray(noise)
    assert np.array_equal(kept[16:32, 16:48], original[16:32, 16:48])
    outside = np.ones((64, 64), dtype=bool)
    outside[16:32, 16:48] = False
    assert len(np.unique(kept[outside], axis=0)) == 1
    assert np.array_equal(np.asarray(frames[1]), original), "a frame without a box has no background to remove"
    assert boxes == [box, None]


def test_the_same_seed_draws_the_same_change():
    image, box = picture_with_square()
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        frames, boxes = ClipAugmentation(background=0.5)([image], [box])
        results.append((np.asarray(frames[0]).tolist(), boxes))
    assert results[0] == results[1]
