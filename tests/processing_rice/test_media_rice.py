"""Pictures of every kind look the same by every door; what is refused, with which sentence."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFilter

from processing_rice import MediaError, open_image
from processing_rice import media_rice as media
from processing_rice.media_rice import tar_member_path


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

    def test_the_content_tells_the_format(self, tmp_path):
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
    def test_pictures_come_upright(self, target):
        stored = Image.new("RGB", (100, 60), "blue")
        stored.paste("red", (0, 0, 100, 30))
        exif = Image.Exif()
        exif[0x0112] = 6
        image = open_image(entry(encode(stored, exif=exif)), target=target)
        width, height = image.size
        assert width < height
        # Turned a quarter clockwise, its upper half is on the right.
        assert image.getpixel((width - 3, height // 2))[0] > 200 and image.getpixel((2, height // 2))[2] > 200

    def test_the_picture_outlives_its_bytes(self):
        image = open_image(entry(encode(textured(64, 48))))
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
        assert open_image(entry(encode(Image.new("RGB", size))), target=target).size == expected

    def test_other_formats_are_decoded_whole(self):
        assert open_image(entry(encode(Image.new("RGB", (540, 960)), "PNG")), target=(64, 64)).size == (540, 960)

    def test_a_picture_on_its_side(self):
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
    @pytest.mark.parametrize("target", [None, (64, 64)])
    def test_a_cut_off_jpeg(self, target):
        data = encode(textured(540, 960))
        with pytest.raises(MediaError, match="<bytes> cannot be decoded .*truncated"):
            open_image(entry(data[: len(data) // 2]), target=target)

    @pytest.mark.parametrize("data", [b"", b"torn", b"\xff\xd8\xff\xe0 torn", b"<svg></svg>", b"%!PS-Adobe EPSF\n"])
    def test_what_is_no_picture(self, data):
        with pytest.raises(MediaError, match="cannot be decoded"):
            open_image(entry(data))

    def test_missing_files_folders_and_entries(self, tmp_path):
        with pytest.raises(MediaError, match=r"There is no image file .*absent\.jpg"):
            open_image({"path": str(tmp_path / "absent.jpg"), "bytes": None})
        with pytest.raises(MediaError, match="cannot be read"):
            open_image({"path": str(tmp_path), "bytes": None})
        with pytest.raises(MediaError, match="cannot be read"):
            open_image({"path": None, "bytes": None})

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
