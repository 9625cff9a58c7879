"""Pictures of every kind look the same through every entry point; error messages for all others."""

import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from processing_rice import MediaError, open_image, read_video
from processing_rice import media_rice as media
from processing_rice.media_rice import image_header, picture_tensor, tar_member_path


def encode(picture: Image.Image, file_format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def entry(data: bytes) -> dict:
    return {"path": None, "bytes": data}


def textured(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))


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
            assert np.array_equal(open_image(each), picture)

    def test_the_format_is_recognised_by_content(self, tmp_path):
        picture = textured(30, 20)
        path = tmp_path / "really_a_png.jpg"
        path.write_bytes(encode(picture, "PNG"))
        assert np.array_equal(open_image({"path": str(path), "bytes": None}), picture)

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
    def test_every_mode_becomes_rgb(self, mode):
        picture = Image.new("I;16", (9, 5)) if mode == "I;16" else Image.new("RGB", (9, 5), "white").convert(mode)
        image = open_image(entry(encode(picture, "TIFF" if mode == "CMYK" else "PNG")))
        assert image.mode == "RGB" and image.size == (9, 5)

    @pytest.mark.parametrize("target", [None, (10, 20)])
    def test_pictures_are_turned_upright(self, target):
        stored = Image.new("RGB", (100, 60), "blue")
        stored.paste("red", (0, 0, 100, 30))
        exif = Image.Exif()
        exif[0x0112] = 6
        image = open_image(entry(encode(stored, exif=exif)), target=target)
        width, height = image.size
        assert width < height
        # Turned a quarter clockwise, its upper half is on the right.
        assert image.getpixel((width - 3, height // 2))[0] > 200 and image.getpixel((2, height // 2))[2] > 200

    def test_an_open_picture_is_not_changed(self):
        picture = textured(9, 5)
        opened = open_image(picture)
        opened.thumbnail((3, 3))
        assert picture.size == (9, 5) and open_image(picture, copy=False) is picture
        picture.getexif()[0x0112] = 6
        assert open_image(picture).size == open_image(picture, copy=False).size == (5, 9)
        assert picture.size == (9, 5) and picture.getexif()[0x0112] == 6

    def test_the_picture_outlives_its_bytes(self):
        image = open_image(entry(encode(textured(64, 48))))
        assert image.copy().resize((8, 8)).size == (8, 8)


def png(depth: int, colour: int, rows: list[bytes], width: int, transparent: bytes = b"") -> bytes:
    """A PNG of raw rows; `colour` is 0 for grey and 2 for RGB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0))
    extra = chunk(b"tRNS", transparent) if transparent else b""
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + extra + data + chunk(b"IEND", b"")


class TestTransparency:
    """What is transparent is white, whatever colour it hides."""

    @pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "TIFF", "AVIF"])
    @pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 255, 255), (0, 255, 0)])
    def test_in_every_format(self, file_format, hidden):
        picture = Image.new("RGBA", (32, 32), (*hidden, 0))
        picture.paste((200, 10, 10, 255), (8, 8, 24, 24))
        data = encode(picture, file_format, **({"lossless": True} if file_format == "WEBP" else {}))
        for image in (open_image(data), open_image(Image.open(io.BytesIO(data)))):
            assert image.getpixel((0, 0)) == (255, 255, 255)
            np.testing.assert_allclose(image.getpixel((16, 16)), (200, 10, 10), atol=2)

    @pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
    def test_in_every_mode(self, mode):
        """Half of black over white is grey."""
        picture = Image.new("LA", (4, 4), (0, 128))
        if mode in ("RGBa", "PA"):
            picture = picture.convert("RGBA")
        picture = picture.convert(mode)
        assert {abs(level - 127) <= 1 for level in open_image(picture).getpixel((1, 1))} == {True}

    def test_of_one_colour(self):
        """As the chunk tRNS names it, for grey of 8 and 16 bits, RGB of 8 and 16 bits, and a palette."""
        grey8 = png(8, 0, [bytes([0, 100])], 2, struct.pack(">H", 0))
        grey16 = png(16, 0, [struct.pack(">2H", 300, 25700)], 2, struct.pack(">H", 300))
        rgb8 = png(8, 2, [bytes([1, 2, 3, 100, 100, 100])], 2, struct.pack(">3H", 1, 2, 3))
        rgb16 = png(
            16, 2, [struct.pack(">6H", 9000, 9001, 9002, *[25700] * 3)], 2, struct.pack(">3H", 9000, 9001, 9002)
        )
        palette = Image.new("P", (2, 1))
        palette.putpalette([7, 7, 7, 100, 100, 100])
        palette.putpixel((1, 0), 1)
        for data in (grey8, grey16, rgb8, rgb16, encode(palette, "PNG", transparency=0)):
            assert np.asarray(open_image(data))[0].tolist() == [[255] * 3, [100] * 3]


class TestDepth:
    LEVELS = np.arange(256, dtype=np.uint16).reshape(16, 16)

    @pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
    @pytest.mark.parametrize("highest", [65535, 257 * 100])
    def test_sixteen_bits_are_divided_by_the_full_range(self, dtype, highest):
        values = (257 * self.LEVELS).clip(0, highest)
        stored = Image.fromarray(values.astype(dtype))
        for data in (stored, encode(stored, "TIFF")):
            assert np.array_equal(np.asarray(open_image(data))[..., 1], self.LEVELS.clip(0, highest // 257))

    def test_sixteen_bits_of_a_png_and_a_pgm(self):
        values = 257 * self.LEVELS
        pgm = b"P5 16 16 65535\n" + values.astype(">u2").tobytes()
        for data in (png(16, 0, [row.astype(">u2").tobytes() for row in values], 16), pgm):
            assert np.array_equal(np.asarray(open_image(data))[..., 0], self.LEVELS)

    def test_floats_are_taken_as_0_to_1(self):
        stored = Image.fromarray((self.LEVELS / 255).astype(np.float32))
        for data in (stored, encode(stored, "TIFF")):
            assert np.array_equal(np.asarray(open_image(data))[..., 2], self.LEVELS)

    @pytest.mark.parametrize(
        "values", [np.float32([[0, 255]]), np.float32([[0, np.nan]]), np.float32([[-0.5, 1]]), np.int32([[0, 70000]])]
    )
    def test_pictures_without_a_known_range_are_refused(self, values):
        for data in (Image.fromarray(values), encode(Image.fromarray(values), "TIFF")):
            with pytest.raises(MediaError, match=r"not all in 0\.\.(1|65,535), so black and white are unknown"):
                open_image(data)

    @pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
    def test_other_modes(self, mode):
        picture = Image.new("RGB", (4, 4), "white")
        assert open_image(picture.convert(mode)).getcolors() == [(16, (255, 255, 255))]


class TestOrientation:
    TURNS = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: np.rot90(np.fliplr(a)),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(np.fliplr(a), -1),
        8: np.rot90,
    }

    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
    @pytest.mark.parametrize("orientation", TURNS)
    def test_by_every_entry_point(self, file_format, orientation, tmp_path):
        stored = np.zeros((32, 64, 3), np.uint8)
        stored[:16, :32] = 255
        upright = self.TURNS[orientation](stored)
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(Image.fromarray(stored), file_format, exif=exif)
        (tmp_path / "picture").write_bytes(data)
        opened = Image.open(tmp_path / "picture")
        for source in (data, tmp_path / "picture", {"path": str(tmp_path / "picture")}, {"bytes": data}, opened):
            image = np.asarray(open_image(source))
            assert image.shape == upright.shape and np.abs(image.astype(int) - upright).mean() < 3
        # TIFFs are turned by PIL itself.
        assert file_format == "TIFF" or opened.size == (64, 32), "the caller's picture is changed"
        assert image_header(data)[1:] == (upright.shape[1], upright.shape[0])
        assert np.array_equal(picture_tensor(opened).movedim(0, -1), image)

    def test_survives_a_change_of_mode_and_is_not_applied_twice(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        opened = Image.open(io.BytesIO(encode(Image.new("RGB", (64, 32)), exif=exif)))
        assert open_image(opened.convert("L")).size == (32, 64)
        assert open_image(open_image(opened)).size == (32, 64)


class TestNumbers:
    PICTURE = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)

    def test_forms_of_one_picture(self):
        expected = torch.from_numpy(self.PICTURE).movedim(-1, 0)
        for form in (self.PICTURE, expected, torch.from_numpy(self.PICTURE), Image.fromarray(self.PICTURE)):
            assert torch.equal(picture_tensor(form), expected)
        assert torch.equal(picture_tensor(self.PICTURE[:, ::-1]), expected.flip(-1))
        assert torch.equal(picture_tensor(self.PICTURE[..., 0]), expected[:1].expand(3, -1, -1))
        floats = picture_tensor(self.PICTURE / 255)
        assert floats.dtype == torch.float32 and torch.equal((255 * floats).round().byte(), expected)

    @pytest.mark.parametrize(
        "values, message",
        [
            (PICTURE.astype(np.uint16), r"must hold uint8 or floats in 0\.\.1, got torch.uint16; convert it to uint8"),
            (PICTURE.astype(np.int64), "got torch.int64"),
            (PICTURE > 9, "got torch.bool"),
            (PICTURE.astype(np.float32), "got floats from 0 to 248; give 0..255 as uint8"),
            (np.full((6, 5, 3), np.nan), "got floats from nan to nan"),
            (np.full((6, 5, 3), -0.5), "got floats from -0.5 to -0.5"),
            (np.zeros((6, 5, 4), np.uint8), r"must be \(H, W, 3\) or \(3, H, W\), got shape \(6, 5, 4\)"),
            (np.zeros((0, 5, 3), np.uint8), "got shape"),
            (np.array(["a"]), "must be an image, a path, or hold uint8"),
            (None, "got NoneType"),
        ],
    )
    def test_arrays_that_are_not_pictures_get_one_sentence(self, values, message):
        with pytest.raises(ValueError, match=f"^Image 3 .*({message})") as error:
            picture_tensor(values, "Image 3")
        assert "\n" not in str(error.value)

    def test_floats_of_any_range_without_rescaling(self):
        assert picture_tensor(self.PICTURE.astype(np.float64), any_range=True).max() > 100


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
        assert open_image(entry(encode(Image.new("RGB", size))), target=target).size == expected

    def test_other_formats_are_decoded_whole(self):
        assert open_image(entry(encode(Image.new("RGB", (540, 960)), "PNG")), target=(64, 64)).size == (540, 960)

    def test_a_rotated_picture(self):
        exif = Image.Exif()
        exif[0x0112] = 8
        data = encode(Image.new("RGB", (1200, 540)), exif=exif)
        assert open_image(entry(data), target=(448, 224)).size == (270, 600)
        assert open_image(entry(data), target=(224, 448)).size == (540, 1200)

    def test_grey_and_cmyk_are_reduced_too(self):
        for mode in ("L", "CMYK"):
            image = open_image(entry(encode(Image.new(mode, (640, 640), 0))), target=(64, 64))
            assert image.size == (80, 80) and image.mode == "RGB"


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that declares a size and has next to no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


class TestDamaged:
    def test_errors_travel_between_processes(self, tmp_path):
        for source in (b"torn", tmp_path / "absent.jpg"):
            with pytest.raises(MediaError) as error:
                open_image(source)
            copy = pickle.loads(pickle.dumps(error.value))
            assert type(copy) is type(error.value) and str(copy) == str(error.value)
            assert copy.reason == error.value.reason != ""

    @pytest.mark.filterwarnings("ignore")
    def test_the_limit_holds_for_opened_pictures_and_single_bits(self, monkeypatch):
        monkeypatch.setattr(media, "MAX_PIXELS", 100)
        for picture in (Image.new("1", (20, 20)), Image.open(io.BytesIO(encode(Image.new("1", (20, 20)), "PNG")))):
            with pytest.raises(MediaError, match="20 x 20 pixels, more than the 100 that are read"):
                open_image(picture)

    def test_an_opened_picture_that_is_damaged_or_closed(self, tmp_path):
        data = encode(textured(64, 48))
        (tmp_path / "cut.jpg").write_bytes(data[:-200])
        with pytest.raises(MediaError, match=r"cut\.jpg cannot be decoded .*truncated"):
            open_image(Image.open(tmp_path / "cut.jpg"))
        with Image.open(io.BytesIO(data)) as closed:
            pass
        with pytest.raises(MediaError, match="<picture> cannot be decoded"):
            open_image(closed)

    @pytest.mark.parametrize("file_format", ["ICO", "JPEG2000", "PCX"])
    def test_unsupported_formats_are_refused_under_any_name(self, file_format, tmp_path):
        Image.new("RGB", (16, 16)).save(tmp_path / "picture.png", format=file_format)
        with pytest.raises(MediaError, match="it is none of JPEG, PNG, WEBP"):
            open_image(tmp_path / "picture.png")

    @pytest.mark.parametrize("target", [None, (64, 64)])
    def test_a_cut_off_jpeg(self, target):
        data = encode(textured(540, 960))
        with pytest.raises(MediaError, match="<bytes> cannot be decoded .*truncated"):
            open_image(entry(data[: len(data) // 2]), target=target)

    @pytest.mark.parametrize("data", [b"", b"torn", b"\xff\xd8\xff\xe0 torn", b"<svg></svg>", b"%!PS-Adobe EPSF\n"])
    def test_files_that_are_not_pictures(self, data):
        with pytest.raises(MediaError, match="cannot be decoded"):
            open_image(entry(data))

    def test_missing_files_folders_and_entries(self, tmp_path):
        with pytest.raises(MediaError, match=r"There is no image file .*absent\.jpg"):
            open_image({"path": str(tmp_path / "absent.jpg"), "bytes": None})
        with pytest.raises(MediaError, match="cannot be read"):
            open_image({"path": str(tmp_path), "bytes": None})
        with pytest.raises(MediaError, match="entry with the keys 'path', 'bytes' has neither bytes nor a path"):
            open_image({"path": None, "bytes": None})

    def test_pipes_and_devices_are_refused_without_waiting(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", "/dev/zero"):
            for read in (open_image, read_video):
                with pytest.raises(MediaError, match="cannot be read .it is not a file."):
                    read(path)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(("width", "height"), [(12_000, 12_000), (60_000, 60_000), (2**31 - 1, 2)])
    def test_bombs_are_refused_before_they_are_decoded(self, width, height):
        with pytest.raises(MediaError, match="cannot be decoded .*(pixels|bomb)"):
            open_image(entry(png_of_size(width, height)))

    def test_the_limit_counts_pixels_after_reduction(self, monkeypatch):
        monkeypatch.setattr(media, "MAX_PIXELS", 100_000)
        data = entry(encode(Image.new("RGB", (540, 960))))
        with pytest.raises(MediaError, match="540 x 960 pixels, more than the 100,000 that are read"):
            open_image(data)
        assert open_image(data, target=(64, 64)).size == (135, 240)

    def test_fifty_megapixels_at_reduced_scale(self):
        data = encode(Image.new("L", (7000, 7200)), quality=30)
        assert open_image(entry(data), target=(224, 224)).size == (875, 900)

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
            for place in rng.integers(0, end, size=rng.integers(1, 4)):
                damaged[place] = rng.integers(256)
            try:
                outcomes.add(open_image(entry(bytes(damaged)), target=(8, 8)).mode)
            except MediaError:
                outcomes.add("error")
        assert outcomes == {"RGB", "error"}
