"""Frames of a clip that can be read, and resizing in 8 bits: how far the fast way is from the exact one."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from transformers import CLIPImageProcessor

from data_rice.decoding import normalize_pixels, read_frames, resize_pixels, target_size, to_pixels
from processing_rice import MediaError, build_processor, open_image, train_tokenizer


def textured(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with edges and fine grain."""
    rng = np.random.default_rng(seed)
    field = gaussian_filter(rng.normal(size=(height, width, 3)), (12, 12, 0))
    levels = 128 + 60 * np.sign(field) + 400 * field + rng.normal(size=field.shape) * 4
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def mean_difference(a, b) -> float:
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


class TestReducedScale:
    @pytest.mark.parametrize(("size", "subsampling"), [((540, 960), 2), ((720, 1280), 0), ((1080, 1920), 2)])
    def test_close_to_bicubic_of_the_whole_picture(self, size, subsampling):
        buffer = io.BytesIO()
        textured(*size).save(buffer, "JPEG", quality=85, subsampling=subsampling)
        data = buffer.getvalue()
        exact = open_image(data).resize((224, 224), Image.Resampling.BICUBIC)
        fast = resize_pixels(to_pixels(open_image(data, (224, 224))), (224, 224)).movedim(0, -1)
        assert mean_difference(fast, exact) < 2
        nearest = open_image(data).resize((224, 224), Image.Resampling.NEAREST)
        assert mean_difference(nearest, exact) > 3, "the picture is too smooth to tell"


class TestResizing:
    @pytest.mark.parametrize(("filter_name", "size"), [("BICUBIC", (32, 32)), ("BILINEAR", (20, 50))])
    def test_within_one_level_of_pil(self, filter_name, size):
        picture, resample = textured(70, 90), Image.Resampling[filter_name]
        expected = np.asarray(picture.resize((size[1], size[0]), resample)).astype(int)
        resized = resize_pixels(to_pixels(picture), size, resample)
        assert resized.dtype == torch.uint8 and resized.shape == (3, *size)
        assert np.abs(resized.movedim(0, -1).numpy() - expected).max() <= 1

    def test_targets_of_processors(self):
        assert target_size(CLIPImageProcessor(size={"height": 20, "width": 30}), (90, 80)) == (20, 30)
        assert target_size(CLIPImageProcessor(size={"height": 20, "width": 30}, do_resize=False), (9, 8)) is None
        short = CLIPImageProcessor(size={"shortest_edge": 20})
        for height, width in ((41, 67), (67, 41), (30, 30), (20, 33)):
            picture = torch.zeros(3, height, width, dtype=torch.uint8)
            resized = short(picture, do_center_crop=False, return_tensors="pt")["pixel_values"]
            assert target_size(short, (height, width)) == tuple(resized.shape[-2:])
        both = SimpleNamespace(do_resize=True, size={"shortest_edge": 20, "longest_edge": 30})
        assert target_size(both, (41, 67)) is None


class TestNormalisation:
    @pytest.fixture
    def processor(self):
        return build_processor(train_tokenizer(["a red cup"] * 9, vocab_size=400), image_size=16, patch_size=8)

    def test_by_hand(self, processor):
        processor.video_processor.image_mean, processor.video_processor.image_std = (0.5, 0.4, 0.2), (0.5, 0.3, 0.2)
        pixels = torch.tensor([0, 255, 102], dtype=torch.uint8)[:, None, None].expand(3, 2, 2).repeat(1, 2, 1, 1, 1)
        mask = torch.tensor([[True, False]])
        product_ids = torch.tensor([7])
        inputs = {"pixel_values_videos": pixels, "frame_mask": mask, "product_ids": product_ids}
        result = normalize_pixels(inputs, processor)
        assert result["pixel_values_videos"][0, 0, :, 0, 0].tolist() == pytest.approx([-1, 2, 1], abs=1e-6)
        assert not result["pixel_values_videos"][0, 1].any(), "padded frames stay zero"
        assert result["product_ids"] is product_ids and inputs["pixel_values_videos"].dtype == torch.uint8

    def test_floats_pass_unchanged(self, processor):
        inputs = {"pixel_values": torch.rand(2, 3, 16, 16)}
        assert normalize_pixels(inputs, processor)["pixel_values"] is inputs["pixel_values"]

    def test_a_processor_that_does_not_normalise(self, processor):
        processor.image_processor.do_normalize, processor.image_processor.do_rescale = False, False
        pixels = torch.randint(256, (1, 3, 4, 4), dtype=torch.uint8)
        assert torch.equal(normalize_pixels({"pixel_values": pixels}, processor)["pixel_values"], pixels.float())


class TestReplacement:
    """Frames are numbers here, and unreadable ones raise."""

    @staticmethod
    def read(total, chosen, unreadable):
        opened = []

        def decode(number):
            opened.append(number)
            if number in unreadable:
                raise MediaError(f"frame {number}")
            return number

        frames, failures = read_frames(list(range(total)), chosen, decode)
        assert list(frames) == list(frames.values())
        return list(frames), [(number, outcome) for number, _, outcome in failures], opened

    def test_only_the_chosen_frames_are_opened_if_readable(self):
        assert self.read(9, [0, 4, 8], {1, 2}) == ([0, 4, 8], [], [0, 4, 8])

    def test_an_unreadable_frame_is_replaced_by_the_nearest(self):
        assert self.read(9, [0, 4, 8], {4})[:2] == ([0, 3, 8], [(4, "replaced")])
        assert self.read(9, [0, 4, 8], {3, 4})[:2] == ([0, 5, 8], [(4, "replaced"), (3, "replaced")])
        assert self.read(9, [0, 4, 8], {8})[:2] == ([0, 4, 7], [(8, "replaced")])

    def test_no_frame_is_used_twice_and_their_order_is_kept(self):
        assert self.read(6, [1, 2, 3], {2, 3})[:2] == ([0, 1, 4], [(2, "replaced"), (3, "replaced")])
        assert self.read(5, [0, 1, 2], {0, 1, 2})[:2] == ([3, 4], [(0, "replaced"), (1, "replaced"), (2, "left out")])

    def test_without_another_frame_it_is_left_out(self):
        assert self.read(3, [0, 1, 2], {1})[:2] == ([0, 2], [(1, "left out")])

    def test_nothing_can_be_read(self):
        frames, failures, opened = self.read(5, [0, 2], set(range(5)))
        assert frames == [] and sorted(opened) == list(range(5))
        assert sorted(number for number, _ in failures) == list(range(5))
