from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import SizeDict

from evaluation_rice.report.heatmap import (
    PairMaps,
    draw_grid,
    has_maps,
    heat_pictures,
    overlay,
    pair_maps,
    patch_at,
    patch_corners,
    row_maps,
    seen_region,
)


class Reconstructing:
    """Reconstructs patch p of a 2 x 2 image from patch p of the clip's last frame, with weight p + 1."""

    reconstruction_head = object()

    def reconstruction_maps(self, pixel_values, pixel_values_videos):
        frames = pixel_values_videos.shape[1]
        weights = torch.zeros(1, 4, frames, 4)
        weights[0, range(4), -1, range(4)] = torch.arange(1.0, 5.0)
        return weights


def test_heat_of_one_patch_and_of_all():
    maps = pair_maps(
        Reconstructing(), {"pixel_values": torch.zeros(1, 3), "pixel_values_videos": torch.zeros(1, 3, 3)}
    )
    assert maps.grid == (2, 2)
    one = maps.heat((1, 0))
    assert one.shape == (3, 2, 2) and one[2].tolist() == [[0, 0], [1, 0]] and one[:2].max() == 0
    np.testing.assert_allclose(maps.heat()[2], [[0.25, 0.5], [0.75, 1.0]])


class Aligning:
    """A model that also reconstructs, of whose 2 x 2 image patches the last finds its like in two places."""

    reconstruction_head = alignment = object()

    def alignment_maps(self, pixel_values, pixel_values_videos):
        cosines = torch.full((1, 4, 2, 4), 0.2)
        cosines[0, 3, 1, 2], cosines[0, 3, 0, 1], cosines[0, :, 0, 0] = 1.0, 0.6, -1.0
        return cosines


def test_heat_of_an_alignment_is_that_of_the_best_match():
    maps = pair_maps(Aligning(), {"pixel_values": torch.zeros(1, 3), "pixel_values_videos": torch.zeros(1, 2, 3)})
    assert maps.is_alignment
    # From a masked patch, which no patch matches, to the best match.
    np.testing.assert_allclose(maps.heat(), [[[0, 0.6], [0.2, 0.2]], [[0.2, 0.2], [1, 0.2]]], rtol=1e-6)
    np.testing.assert_allclose(maps.heat((0, 0)), [[[0, 1], [1, 1]], [[1, 1], [1, 1]]])


def test_the_region_of_a_short_side_follows_the_shape_of_the_picture():
    crop = SimpleNamespace(
        do_center_crop=True, crop_size={"width": 224, "height": 224}, size=SizeDict(shortest_edge=224)
    )
    assert seen_region(crop, (400, 200)) == (0.25, 0.0, 0.75, 1.0)
    assert seen_region(crop, (200, 400)) == (0.0, 0.25, 1.0, 0.75)
    crop.size = SizeDict(shortest_edge=256)
    assert seen_region(crop, (300, 300)) == (0.0625, 0.0625, 0.9375, 0.9375)


def test_equal_weights_have_no_heat():
    assert PairMaps(np.full((1, 1, 2, 1, 1), 0.3)).heat().tolist() == [[[0.0]], [[0.0]]]


def test_models_without_maps_are_refused():
    without = SimpleNamespace(reconstruction_maps=None, reconstruction_head=None)
    assert not has_maps(without) and not has_maps(object()) and has_maps(Reconstructing())
    with pytest.raises(ValueError, match="no patch reconstruction"):
        pair_maps(without, {})


def test_patches_that_do_not_form_a_square_are_refused():
    odd = SimpleNamespace(reconstruction_maps=lambda: torch.zeros(1, 6, 2, 6))
    with pytest.raises(ValueError, match="6 patches are not a square grid"):
        pair_maps(odd, {})


def test_rows_become_pictures_under_heat(collator, shop):
    collator.processor = SimpleNamespace(video_processor=SimpleNamespace(num_frames=2, do_center_crop=False))
    collator.num_frames = None
    first, last = heat_pictures(Reconstructing(), collator, shop.queries[0], shop.gallery[0])
    frame = Image.open(shop.frame("a", 0)["path"])
    assert first.size == last.size == frame.size
    # The first frame has no heat and is dimmed; the last is brightest at its lower right.
    assert np.asarray(first).mean() < 0.5 * np.asarray(frame).mean()
    bright = np.asarray(last).sum(axis=2)
    assert bright[-1, -1] == bright.max() > bright[0, 0]


def test_frames_that_the_model_did_not_use_have_no_heat(shop):
    query = dict(shop.queries[0])
    frames = len(query["frames"])
    query["boxes"] = [None] * (frames - 1) + [[0.0, 0.0, 1.0, 1.0]]
    collator = SimpleNamespace(
        processor=SimpleNamespace(video_processor=SimpleNamespace(num_frames=frames, frames_without_box="drop")),
        use_boxes=True,
        num_frames=None,
        collate_queries=lambda rows: ({"pixel_values_videos": torch.zeros(1, 1, 3)}, [0], []),
        collate_gallery=lambda rows: ({"pixel_values": torch.zeros(1, 3)}, [0], []),
    )
    heat = row_maps(Reconstructing(), collator, query, shop.gallery[0]).heat()
    assert frames > 1 and heat.shape == (frames, 2, 2)
    assert heat[-1].max() == 1 and heat[:-1].max() == 0


def test_an_unreadable_row_is_named(collator, shop):
    (shop.folder / "x" / "x0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="x0.png"):
        row_maps(Reconstructing(), collator, shop.queries[0], shop.gallery[0])


def test_overlay_lies_on_the_part_that_the_encoder_sees():
    crop = SimpleNamespace(
        do_center_crop=True, crop_size={"width": 56, "height": 28}, size={"width": 64, "height": 56}
    )
    assert seen_region(crop) == (0.0625, 0.25, 0.9375, 0.75)
    picture = Image.new("RGB", (64, 64), (100, 100, 100))
    result = np.asarray(overlay(picture, np.ones((2, 2)), seen_region(crop))).astype(int)
    assert (result[:16] == 40).all() and (result[16:48, 4:60] != 40).any(axis=2).all()


def test_a_point_finds_the_patch_whose_corners_surround_it():
    size, grid, region = (90, 60), (3, 4), (0.1, 0.0, 0.9, 1.0)
    for patch in ((0, 0), (1, 2), (2, 3)):
        left, top, right, bottom = patch_corners(size, grid, patch, region)
        assert patch_at(size, grid, ((left + right) / 2, (top + bottom) / 2), region) == patch
    assert patch_at(size, grid, (2, 30), region) is None and patch_at(size, grid, (89, 30), region) is None


def test_the_chosen_patch_is_framed():
    plain = np.asarray(draw_grid(Image.new("RGB", (40, 40)), (2, 2))).astype(int)
    framed = np.asarray(draw_grid(Image.new("RGB", (40, 40)), (2, 2), (0, 1))).astype(int)
    rows, columns = np.nonzero((plain != framed).any(axis=2))
    assert rows.min() == 0 and rows.max() <= 20 and columns.min() == 20 and columns.max() == 39
