"""Bytes to pixels: what is read, what is refused with which sentence, how far the fast way is from the exact one."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from transformers import CLIPImageProcessor

from data_rice import decoding
from data_rice.decoding import (
    MediaError,
    decode_image,
    normalize_pixels,
    read_frames,
    resize_pixels,
    target_size,
    to_pixels,
)
from data_rice.media import tar_member_path
from processing_rice import build_processor, train_tokenizer


def encode(picture: Image.Image, file_format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def entry(data: bytes) -> dict:
    return {"path": None, "bytes": data}


def textured(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with edges and fine grain."""
    rng = np.random.default_rng(seed)
    field = gaussian_filter(rng.normal(size=(height, width, 3)), (12, 12, 0))
    levels = 128 + 60 * np.sign(field) + 400 * field + rng.normal(size=field.shape) * 4
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def mean_difference(a, b) -> float:
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


class TestExact:
    def test_bytes_files_and_members_of_tars(self, tmp_path):
        picture = textured(30, 20)
        data = encode(picture, "PNG")
        (tmp_path / "a.png").write_bytes(data)
        (tmp_path / "shard.tar").write_bytes(b"x" * 7 + data)
        entries = (
            entry(data),
            {"path": str(tmp_path / "a.png"), "bytes": None},
            {"path": tar_member_path(str(tmp_path / "shard.tar"), 7, len(data)), "bytes": None},
        )
        for each in entries:
            assert np.array_equal(decode_image(each), picture)

    def test_the_content_tells_the_format(self, tmp_path):
        picture = textured(30, 20)
        path = tmp_path / "really_a_png.jpg"
        path.write_bytes(encode(picture, "PNG"))
        assert np.array_equal(decode_image({"path": str(path), "bytes": None}), picture)

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
    def test_every_mode_becomes_rgb(self, mode):
        picture = Image.new("I;16", (9, 5)) if mode == "I;16" else Image.new("RGB", (9, 5), "white").convert(mode)
        image = decode_image(entry(encode(picture, "TIFF" if mode == "CMYK" else "PNG")))
        assert image.mode == "RGB" and image.size == (9, 5)

    @pytest.mark.parametrize("target", [None, (10, 20)])
    def test_pictures_come_upright(self, target):
        stored = Image.new("RGB", (100, 60), "blue")
        stored.paste("red", (0, 0, 100, 30))
        exif = Image.Exif()
        exif[0x0112] = 6
        image = decode_image(entry(encode(stored, exif=exif)), target)
        width, height = image.size
        assert width < height
        # Turned a quarter clockwise, its upper half is on the right.
        assert image.getpixel((width - 3, height // 2))[0] > 200 and image.getpixel((2, height // 2))[2] > 200

    def test_the_picture_outlives_its_bytes(self):
        image = decode_image(entry(encode(textured(64, 48))))
        assert image.copy().resize((8, 8)).size == (8, 8)


class TestReducedScale:
    @pytest.mark.parametrize(
        ("size", "target", "expected"),
        [
            ((540, 960), (224, 224), (270, 480)),
            # 448 / 2 is 224, which is not 1.2 times the target.
            ((448, 448), (224, 224), (448, 448)),
            ((1080, 1920), (224, 224), (270, 480)),
            ((2200, 2300), (224, 224), (275, 288)),
            ((540, 960), (448, 448), (540, 960)),
            # Half of a picture's height is cropped away.
            ((540, 960), (448, 224), (540, 960)),
            ((960, 540), (224, 448), (960, 540)),
            ((1200, 540), (224, 448), (600, 270)),
            ((200, 200), (224, 224), (200, 200)),
        ],
    )
    def test_scale(self, size, target, expected):
        assert decode_image(entry(encode(Image.new("RGB", size))), target).size == expected

    def test_other_formats_are_decoded_whole(self):
        assert decode_image(entry(encode(Image.new("RGB", (540, 960)), "PNG")), (64, 64)).size == (540, 960)

    def test_a_picture_on_its_side(self):
        exif = Image.Exif()
        exif[0x0112] = 8
        data = encode(Image.new("RGB", (1200, 540)), exif=exif)
        assert decode_image(entry(data), (448, 224)).size == (270, 600)
        assert decode_image(entry(data), (224, 448)).size == (540, 1200)

    @pytest.mark.parametrize(("size", "subsampling"), [((540, 960), 2), ((720, 1280), 0), ((1080, 1920), 2)])
    def test_close_to_bicubic_of_the_whole_picture(self, size, subsampling):
        data = entry(encode(textured(*size), quality=85, subsampling=subsampling))
        exact = decode_image(data).resize((224, 224), Image.Resampling.BICUBIC)
        fast = resize_pixels(to_pixels(decode_image(data, (224, 224))), (224, 224)).movedim(0, -1)
        assert mean_difference(fast, exact) < 2
        nearest = decode_image(data).resize((224, 224), Image.Resampling.NEAREST)
        assert mean_difference(nearest, exact) > 3, "the picture is too smooth to tell"

    def test_grey_and_cmyk_are_reduced_too(self):
        for mode in ("L", "CMYK"):
            image = decode_image(entry(encode(Image.new(mode, (640, 640), 0))), (64, 64))
            assert image.size == (80, 80) and image.mode == "RGB"


class TestResizing:
    @pytest.mark.parametrize(("filter_name", "size"), [("BICUBIC", (32, 32)), ("BILINEAR", (20, 50))])
    def test_within_one_level_of_pil(self, filter_name, size):
        picture, resample = textured(70, 90), Image.Resampling[filter_name]
        expected = np.asarray(picture.resize((size[1], size[0]), resample)).astype(int)
        resized = resize_pixels(to_pixels(picture), size, resample)
        assert resized.dtype == torch.uint8 and resized.shape == (3, *size)
        assert np.abs(resized.movedim(0, -1).numpy() - expected).max() <= 1

    def test_targets_of_processors(self):
        assert target_size(CLIPImageProcessor(size={"height": 20, "width": 30})) == (20, 30)
        assert target_size(CLIPImageProcessor(size={"shortest_edge": 20})) is None
        assert target_size(CLIPImageProcessor(size={"height": 20, "width": 30}, do_resize=False)) is None


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

    def test_floats_are_handed_through(self, processor):
        inputs = {"pixel_values": torch.rand(2, 3, 16, 16)}
        assert normalize_pixels(inputs, processor)["pixel_values"] is inputs["pixel_values"]

    def test_a_processor_that_does_not_normalise(self, processor):
        processor.image_processor.do_normalize, processor.image_processor.do_rescale = False, False
        pixels = torch.randint(256, (1, 3, 4, 4), dtype=torch.uint8)
        assert torch.equal(normalize_pixels({"pixel_values": pixels}, processor)["pixel_values"], pixels.float())


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that declares a size and has next to no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


class TestDamaged:
    @pytest.mark.parametrize("target", [None, (64, 64)])
    def test_a_cut_off_jpeg(self, target):
        data = encode(textured(540, 960))
        with pytest.raises(MediaError, match="<bytes>: cannot be decoded .*truncated"):
            decode_image(entry(data[: len(data) // 2]), target)

    @pytest.mark.parametrize("data", [b"", b"torn", b"\xff\xd8\xff\xe0 torn", b"<svg></svg>", b"%!PS-Adobe EPSF\n"])
    def test_what_is_no_picture(self, data):
        with pytest.raises(MediaError, match="cannot be decoded"):
            decode_image(entry(data))

    def test_missing_files_folders_and_entries(self, tmp_path):
        with pytest.raises(MediaError, match=r"absent\.jpg: there is no such file"):
            decode_image({"path": str(tmp_path / "absent.jpg"), "bytes": None})
        with pytest.raises(MediaError, match="cannot be read"):
            decode_image({"path": str(tmp_path), "bytes": None})
        with pytest.raises(MediaError, match="cannot be read"):
            decode_image({"path": None, "bytes": None})

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(("width", "height"), [(12_000, 12_000), (60_000, 60_000), (2**31 - 1, 2)])
    def test_bombs_are_refused_before_they_are_decoded(self, width, height):
        with pytest.raises(MediaError, match="cannot be decoded .*(pixels|bomb)"):
            decode_image(entry(png_of_size(width, height)))

    def test_the_limit_counts_pixels_after_reduction(self, monkeypatch):
        monkeypatch.setattr(decoding, "MAX_PIXELS", 100_000)
        data = entry(encode(Image.new("RGB", (540, 960))))
        with pytest.raises(MediaError, match="540 x 960 pixels, more than the 100,000 that are read"):
            decode_image(data)
        assert decode_image(data, (64, 64)).size == (135, 240)

    def test_fifty_megapixels_at_reduced_scale(self):
        data = encode(Image.new("L", (7000, 7200)), quality=30)
        assert decode_image(entry(data), (224, 224)).size == (875, 900)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
    def test_changed_bytes_give_a_picture_or_the_error(self, file_format):
        exif = Image.Exif()
        exif[0x0112] = 6
        data = encode(textured(40, 30), file_format, exif=exif)
        rng = np.random.default_rng(0)
        outcomes = set()
        for i in range(200):
            damaged = bytearray(data)
            # Half of the changes in what comes before the pixels.
            end = len(damaged) if i % 2 else min(200, len(damaged))
            for place in rng.integers(0, end, size=3):
                damaged[place] = rng.integers(256)
            try:
                outcomes.add(decode_image(entry(bytes(damaged)), (8, 8)).mode)
            except MediaError:
                outcomes.add("error")
        assert outcomes == {"RGB", "error"}


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

    def test_readable_frames_are_all_that_is_opened(self):
        assert self.read(9, [0, 4, 8], {1, 2}) == ([0, 4, 8], [], [0, 4, 8])

    def test_the_nearest_other_frame_takes_the_place(self):
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
