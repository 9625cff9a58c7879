"""Images with colour profiles and gamma look the same as in sRGB, through every entry point."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from processing_rice import open_image
from processing_rice.media_rice import picture_tensor

D50 = (0.9642, 1.0, 0.8249)
# The primaries of sRGB, adapted to D50.
RED, GREEN, BLUE = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(65536 * value)) for value in values)


def xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(*values)


def curve(gamma: float) -> bytes:
    return b"curv" + struct.pack(">IIH", 0, 1, round(256 * gamma)) + b"\0\0"


def profile(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    tags = {b"desc": b"desc\0\0\0\0\0\0\0\1".ljust(92, b"\0"), b"wtpt": xyz(D50), **tags}
    place, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(
        ">I4sI4s4s4s12s4s", place + len(body), b"test", 0x02400000, kind, space, connection, b"", b"acsp"
    )
    head = head.ljust(68, b"\0") + fixed(*D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def rgb_profile(red=RED, green=GREEN, blue=BLUE, gamma: float = 2.2) -> bytes:
    colors = {b"rXYZ": xyz(red), b"gXYZ": xyz(green), b"bXYZ": xyz(blue)}
    return profile(b"RGB ", colors | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma)))


def cmyk_profile() -> bytes:
    """Any ink is black on white paper; a table of two points per ink."""
    ramp, black = bytes(range(256)), bytes([0, 128, 128])
    table = b"mft1\0\0\0\0\4\3\2\0" + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + 4 * ramp + bytes([255, 128, 128]) + 15 * black
    return profile(b"CMYK", {b"A2B0": table + 3 * ramp}, b"Lab ", b"prtr")


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = rgb_profile(red=GREEN, green=RED)
"""Red and green are exchanged."""


def encode(picture: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def color(picture, place=(8, 8)) -> tuple:
    return np.asarray(open_image(picture))[place[1], place[0]].tolist()


class TestProfiles:
    @pytest.mark.parametrize(
        "file_format, options",
        [
            ("PNG", {}),
            ("JPEG", {"quality": 100}),
            ("WEBP", {"lossless": True}),
            ("TIFF", {}),
            ("AVIF", {"quality": 100}),
        ],
    )
    def test_by_every_entry_point(self, file_format, options, tmp_path):
        data = encode(Image.new("RGB", (32, 32), (200, 30, 40)), file_format, icc_profile=SWAPPED, **options)
        (tmp_path / "a").write_bytes(data)
        opened = Image.open(io.BytesIO(data))
        for source in (data, tmp_path / "a", {"bytes": data}, opened, opened.convert("RGB"), opened.copy()):
            np.testing.assert_allclose(color(source), (30, 200, 40), atol=6)
            np.testing.assert_allclose(picture_tensor(source)[:, 8, 8], (30, 200, 40), atol=6)
        np.testing.assert_allclose(np.asarray(opened)[8, 8], (200, 30, 40), atol=6, err_msg="the caller's picture")

    def test_not_applied_twice(self):
        picture = open_image(encode(Image.new("RGB", (32, 32), (200, 30, 40)), icc_profile=SWAPPED))
        assert color(picture) == color(open_image(picture)) == color(encode(picture))

    def test_a_wide_gamut(self):
        """As a colour management of its own computes it."""
        wide = rgb_profile((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
        srgb = ImageCms.createProfile("sRGB")
        expected = ImageCms.profileToProfile(picture, ImageCms.ImageCmsProfile(io.BytesIO(wide)), srgb)
        opened = open_image(encode(picture, icc_profile=wide))
        assert np.array_equal(opened, expected) and not np.array_equal(opened, picture)

    @pytest.mark.parametrize("mode", ["RGBA", "P", "PA", "RGBa"])
    def test_transparent_parts_stay_white(self, mode):
        picture = Image.new("RGBA", (32, 32), (200, 30, 40, 255))
        picture.paste((0, 255, 0, 0), (16, 0, 32, 32))
        picture = picture.quantize() if mode == "P" else picture.convert(mode)
        picture.info["icc_profile"] = SWAPPED
        np.testing.assert_allclose(color(picture), (30, 200, 40), atol=6)
        assert color(picture, (24, 8)) == [255, 255, 255]

    @pytest.mark.parametrize("mode", ["YCbCr", "HSV"])
    def test_modes_that_become_rgb_first(self, mode):
        picture = Image.new("RGB", (32, 32), (200, 30, 40)).convert(mode)
        picture.info["icc_profile"] = SWAPPED
        for source in (picture, open_image(picture)):
            np.testing.assert_allclose(color(source), (30, 200, 40), atol=10)

    @pytest.mark.parametrize("mode, alpha", [("L", 255), ("LA", 128)])
    def test_grey(self, mode, alpha):
        """The linear value 55 is 128 in sRGB; half of it over white is 191."""
        data = encode(Image.new("L", (32, 32), 55).convert(mode), icc_profile=profile(b"GRAY", {b"kTRC": curve(1)}))
        picture = Image.open(io.BytesIO(data))
        if mode == "LA":
            picture.putalpha(alpha)
        np.testing.assert_allclose(color(picture), [255 - (255 - 128) * alpha / 255] * 3, atol=2)

    def test_inks(self):
        picture = Image.new("CMYK", (32, 32), (0, 0, 0, 0))
        picture.paste((255, 0, 0, 0), (16, 0, 32, 32))
        for file_format in ("JPEG", "TIFF"):
            data = encode(picture, file_format, icc_profile=cmyk_profile())
            np.testing.assert_allclose(color(data), [255] * 3, atol=4)
            # Without the profile it is cyan.
            np.testing.assert_allclose(color(data, (24, 8)), [0] * 3, atol=4)

    def test_a_reduced_jpeg(self):
        data = encode(Image.new("RGB", (256, 256), (200, 30, 40)), "JPEG", icc_profile=SWAPPED)
        picture = open_image(data, target=(32, 32))
        assert picture.size == (64, 64)
        np.testing.assert_allclose(color(picture), (30, 200, 40), atol=6)

    def test_srgb_changes_nothing(self):
        picture = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3))
        assert np.array_equal(open_image(encode(picture, icc_profile=SRGB)), picture)
        picture.info["icc_profile"] = SRGB
        assert open_image(picture, copy=False) is picture

    @pytest.mark.parametrize("data", [b"", b"rubbish", SWAPPED[:150], cmyk_profile(), SWAPPED[:40] + bytes(500)])
    def test_a_profile_that_fits_nothing_is_ignored(self, data):
        """Damaged, cut short, or of another kind of image."""
        picture = Image.new("RGB", (32, 32), (200, 30, 40))
        picture.info["icc_profile"] = data
        assert color(picture) == [200, 30, 40]


class TestGamma:
    @staticmethod
    def png(picture: Image.Image, gamma: float, *names: bytes) -> bytes:
        data = encode(picture)
        for name, content in ((b"gAMA", struct.pack(">I", round(gamma * 1e5))), *((name, b"\0") for name in names)):
            chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
            data = data[:33] + chunk + data[33:]
        return data

    @pytest.mark.parametrize("gamma, level", [(1.0, 186), (0.55555, 145), (0.45455, 128), (0.47, 128), (0.0, 128)])
    @pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
    def test_a_png(self, mode, gamma, level):
        """255 * (128 / 255) ** (1 / (2.2 * gamma))"""
        grey = Image.new("RGB", (32, 32), (128, 128, 128))
        data = self.png(grey.quantize() if mode == "P" else grey.convert(mode), gamma)
        for source in (data, Image.open(io.BytesIO(data)), open_image(data)):
            np.testing.assert_allclose(color(source), [level] * 3, atol=1)

    def test_srgb_and_profiles_take_precedence(self):
        picture = Image.new("RGB", (32, 32), (128, 128, 128))
        assert color(self.png(picture, 1.0, b"sRGB")) == [128] * 3
        picture.info |= {
            "gamma": 1.0,
            "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        }
        assert color(picture) == [128] * 3
