"""Colours, transparency and the chosen stream of a video file: what a player shows."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from processing_rice import MediaError, read_video
from processing_rice.video_container_rice import sound_stream
from processing_rice.video_media_rice import VideoReader, probe_video

av = pytest.importorskip("av")

PATCHES = np.uint8([[(200, 30, 40), (30, 180, 60), (40, 60, 200)], [(128, 128, 128), (240, 240, 240), (220, 200, 40)]])
# Weights of red and blue in the brightness, by the codes of H.273.
BT601, BT709, BT2020 = (6, 0.299, 0.114), (1, 0.2126, 0.0722), (9, 0.2627, 0.0593)
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])


def patches(width: int = 96, height: int = 64) -> np.ndarray:
    return PATCHES.repeat(height // 2, axis=0).repeat(width // 3, axis=1)


def levels(picture: np.ndarray) -> np.ndarray:
    """The colours in the middle of the patches."""
    height, width = picture.shape[:2]
    return picture[height // 4 :: height // 2, width // 6 :: width // 3].astype(int)


def to_yuv(values: np.ndarray, matrix: tuple, full: bool = False, bits: int = 8) -> list[np.ndarray]:
    """RGB in 0..1 -> brightness and two differences as integers."""
    _, red, blue = matrix
    y = values @ [red, 1 - red - blue, blue]
    u, v = (values[..., 2] - y) / (2 - 2 * blue), (values[..., 0] - y) / (2 - 2 * red)
    scale, top = 2 ** (bits - 8), 2**bits - 1
    planes = (top * y, top * u + 128 * scale, top * v + 128 * scale)
    planes = planes if full else ((16 + 219 * y) * scale, (128 + 224 * u) * scale, (128 + 224 * v) * scale)
    return [plane.round().clip(0, top).astype(np.uint16 if bits > 8 else np.uint8) for plane in planes]


def frame_of(planes: list[np.ndarray], pixel_format: str) -> "av.VideoFrame":
    frame = av.VideoFrame(planes[0].shape[1], planes[0].shape[0], pixel_format)
    for target, values in zip(frame.planes, planes, strict=True):
        rows = np.zeros((target.height, target.line_size), np.uint8)
        data = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
        rows[:, : data.shape[1]] = data
        target.update(rows)
    return frame


@pytest.fixture
def write(tmp_path):
    """A function that writes frames; `tags` are attributes of the codec, such as `color_trc`."""

    def make(name, frames, codec="ffv1", options=None, **tags):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream(codec, rate=5, options=options or {})
            stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
            for tag, value in tags.items():
                setattr(stream.codec_context, tag, value)
            for i, frame in enumerate(frames):
                frame.pts, frame.time_base = i, Fraction(1, 5)
                for tag in {"colorspace", "color_range"} & set(tags):
                    setattr(frame, tag, tags[tag])
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return tmp_path / name

    return make


class TestColors:
    @pytest.mark.parametrize("matrix", [BT601, BT709, BT2020])
    @pytest.mark.parametrize("full", [False, True])
    @pytest.mark.parametrize("bits", [8, 10])
    def test_every_matrix_range_and_depth(self, write, matrix, full, bits):
        frame = frame_of(to_yuv(patches() / 255, matrix, full, bits), "yuv444p10le" if bits == 10 else "yuv444p")
        path = write("a.mkv", [frame], colorspace=matrix[0], color_range=2 if full else 1)
        assert np.abs(levels(read_video(path)[0]) - PATCHES).max() <= 3

    @pytest.mark.parametrize(
        "width, height, matrix", [(96, 64, BT601), (720, 576, BT601), (1296, 64, BT709), (96, 720, BT709)]
    )
    def test_a_matrix_that_is_not_named_follows_from_the_size(self, write, width, height, matrix):
        path = write("a.mkv", [frame_of(to_yuv(patches(width, height) / 255, matrix), "yuv444p")])
        assert np.abs(levels(read_video(path)[0]) - PATCHES).max() <= 3

    def test_motion_jpeg_has_one_matrix_in_every_size(self, write):
        frame = frame_of(to_yuv(patches(1296, 64) / 255, BT601, full=True), "yuvj444p")
        path = write("a.avi", [frame], "mjpeg", {"qmin": "1", "q": "1"})
        assert np.abs(levels(read_video(path)[0]) - PATCHES).max() <= 6

    @pytest.mark.parametrize("transfer", ["PQ", "HLG"])
    def test_high_dynamic_range(self, write, transfer):
        """White of 203 candelas per square metre, as BT.2408 places it; greys are exact, colours nearly so."""
        values = patches() / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        nits = 203 * linear @ TO_BT2020.T
        if transfer == "PQ":
            power = (nits / 10_000) ** (2610 / 16384)
            signal = ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
        else:
            shown = nits / 1000
            scene = shown * (shown @ [0.2627, 0.6780, 0.0593])[..., None] ** (-0.2 / 1.2)
            high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
            signal = np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)
        tags = {"colorspace": 9, "color_range": 1, "color_trc": {"PQ": 16, "HLG": 18}[transfer], "color_primaries": 9}
        path = write("a.mkv", [frame_of(to_yuv(signal, BT2020, bits=10), "yuv444p10le")], **tags)
        difference = np.abs(levels(read_video(path)[0]) - PATCHES)
        # Without the conversion, up to 100.
        assert difference.max() <= 20 and difference[1, :2].max() <= 2

    def test_a_wide_gamut(self, write):
        """Colours of BT.2020 with the transfer function of an ordinary video."""
        linear = (patches() / 255) ** 2.4 @ TO_BT2020.T
        tags = {"colorspace": 9, "color_range": 1, "color_trc": 14, "color_primaries": 9}
        path = write("a.mkv", [frame_of(to_yuv(linear ** (1 / 2.4), BT2020, bits=10), "yuv444p10le")], **tags)
        difference = np.abs(levels(read_video(path)[0]) - PATCHES)
        assert difference.max() <= 20 and difference[1, :2].max() <= 2

    def test_colours_that_cannot_be_converted_are_refused(self, write):
        path = write("a.mkv", [frame_of(to_yuv(patches() / 255, BT709), "yuv444p")], colorspace=8)
        for read in (read_video, probe_video):
            with pytest.raises(MediaError, match=r"a\.mkv has colours that cannot be converted \(yuv444p, .* 8\)"):
                read(path)


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_transparent_parts_of_vp8_and_vp9_are_white(write, codec):
    picture = np.dstack([patches(), np.full((64, 96), 255, np.uint8)])
    picture[:, 64:, 3] = 0
    frames = [av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format="yuva420p") for _ in range(3)]
    path = write("a.webm", frames, codec, {"auto-alt-ref": "0"})
    expected = PATCHES.astype(int)
    expected[:, 2] = 255
    for source in (path, {"path": path, "start": 0.2, "end": 0.6}):
        for shown in read_video(source):
            assert np.abs(levels(shown) - expected).max() <= 6
    with VideoReader(path) as video:
        assert [frame.number for frame in video.frames([2])] == [2] and len(list(video.frames([0, 1]))) == 2


class TestStreams:
    @staticmethod
    def join(path, first, second, defaults=()):
        """Both files' videos as two streams; `defaults` are those that are marked as default."""
        with av.open(str(first)) as one, av.open(str(second)) as two, av.open(str(path), "w") as joined:
            sources = (one.streams.video[0], two.streams.video[0])
            streams = [joined.add_stream_from_template(source) for source in sources]
            for number, (source, stream) in enumerate(zip((one, two), streams)):
                stream.disposition = av.stream.Disposition.default if number in defaults else 0
            for source, stream in zip((one, two), streams):
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        joined.mux(packet)
        return path

    @pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
    def test_a_cover_that_is_not_marked_comes_first(self, write, tmp_path, name):
        cover = write("cover.mkv", [frame_of(to_yuv(patches() / 255, BT601, True), "yuvj444p")], "mjpeg")
        grey = np.full((48, 64, 3), 90, np.uint8)
        frames = [av.VideoFrame.from_ndarray(grey, format="rgb24").reformat(format="yuv420p") for _ in range(5)]
        path = self.join(tmp_path / name, cover, write("video.mkv", frames, "mpeg4"), defaults=(0,))
        frames = read_video(path)
        assert frames.shape == (5, 48, 64, 3) and abs(frames.mean() - 90) < 4

    @pytest.mark.parametrize("defaults, level", [((), 60), ((0,), 60), ((1,), 160), ((0, 1), 60)])
    def test_the_default_stream_is_shown(self, write, tmp_path, defaults, level):
        paths = [
            write(f"{value}.mkv", [frame_of([np.full((48, 64), value, np.uint8)], "gray")] * 3) for value in (60, 160)
        ]
        path = self.join(tmp_path / "a.mkv", *paths, defaults=defaults)
        assert abs(read_video(path).mean() - level) < 4


@pytest.mark.parametrize("defaults, chosen", [((), 0), ((1,), 1), ((0, 1), 0)])
def test_the_default_sound_is_heard(tmp_path, defaults, chosen):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        streams = [container.add_stream("pcm_s16le", rate=8000, layout="mono") for _ in range(2)]
        for number, stream in enumerate(streams):
            stream.disposition = av.stream.Disposition.default if number in defaults else 0
        for stream in streams:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
            samples.sample_rate = 8000
            container.mux(stream.encode(samples))
    with av.open(str(tmp_path / "a.mkv")) as container:
        assert sound_stream(container).index == chosen


@pytest.mark.parametrize("file_format", ["AVIF", "ICO"])
@pytest.mark.parametrize("count", [1, 3])
def test_pictures_in_containers_hold_no_video(tmp_path, file_format, count):
    pictures = [Image.new("RGB", (32, 32), (80 * i, 0, 0)) for i in range(count)]
    options = {"save_all": True, "append_images": pictures[1:]} if file_format == "AVIF" else {}
    pictures[0].save(tmp_path / "a.mp4", format=file_format, **options)
    for read in (read_video, VideoReader, probe_video):
        with pytest.raises(MediaError, match=r"a\.mp4 is a picture and holds no video"):
            read(tmp_path / "a.mp4")
