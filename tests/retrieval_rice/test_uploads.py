import io
import struct
import zlib

import pytest
from PIL import Image, ImageFile

from processing_rice.video_media_rice import VideoReader
from retrieval_rice.uploads import UploadError, UploadLimits, read_upload, video_format

RED, BLUE = (220, 20, 20), (20, 20, 220)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "uploads"
    path.mkdir()
    return path


@pytest.fixture
def make_video(folder):
    """A function that writes an MP4 whose picture turns from red to blue."""
    av = pytest.importorskip("av", reason="needs PyAV")

    def make(frames: int = 20, fps: int = 10, name: str = "clip.mp4", side: int = 64, options: dict | None = None):
        path = folder / name
        with av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream("mpeg4", rate=fps, options=options or {})
            stream.width = stream.height = side
            stream.pix_fmt = "yuv420p"
            for i in range(frames):
                share = i / max(1, frames - 1)
                colour = tuple(round(a + (b - a) * share) for a, b in zip(RED, BLUE))
                frame = av.VideoFrame.from_image(Image.new("RGB", (side, side), colour))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return make


def picture(path, colour=RED, size=(40, 30), **options):
    Image.new("RGB", size, colour).save(path, **options)
    return str(path)


def colours(upload):
    return [Image.open(io.BytesIO(data)).getpixel((5, 5)) for data in upload.frames]


def refusal(paths, folder, **limits) -> str:
    with pytest.raises(UploadError) as error:
        read_upload([str(path) for path in paths], folder, UploadLimits(**limits))
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message and str(folder) not in message
    return message


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG file whose header announces many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_pictures_are_in_order_of_their_names_and_deleted(folder):
    shades = {"①.png": 220, "frame10.png": 200, "frame2.png": 100, "frame1.png": 50, "١.png": 20}
    paths = [picture(folder / name, (shade, shade, shade)) for name, shade in shades.items()]
    upload = read_upload(paths, folder)
    in_order = (20, 220, 50, 100, 200)
    assert [abs(colour[0] - shade) <= 2 for colour, shade in zip(colours(upload), in_order)] == [True] * 5
    assert upload.note == "" and list(folder.iterdir()) == []


def test_large_pictures_are_reduced(folder):
    upload = read_upload([picture(folder / "wide.jpg", size=(2000, 1000))], folder)
    assert Image.open(io.BytesIO(upload.frames[0])).size == (640, 320)


def test_an_avif_is_a_picture_although_its_container_is_that_of_videos(folder):
    upload = read_upload([picture(folder / "a.avif"), picture(folder / "b.avif", BLUE)], folder)
    assert [max(range(3), key=colour.__getitem__) for colour in colours(upload)] == [0, 2]


def test_the_reason_is_told_for_a_picture_that_cannot_be_used(folder):
    message = refusal([picture(folder / "strip.png", size=(2, 2000))], folder)
    assert message.startswith("strip.png cannot be decoded (2 x 2000 pixels, one side more than 500 times the other)")


def test_a_quicktime_file_that_begins_with_an_empty_atom(folder, make_video):
    path = make_video()
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"wide" + data[8:])
    assert len(read_upload([str(path)], folder).frames) == 10


def test_content_decides_and_not_the_extension(folder):
    Image.new("RGB", (8, 8), RED).save(folder / "really_jpeg.png", format="JPEG")
    assert len(read_upload([str(folder / "really_jpeg.png")], folder).frames) == 1
    (folder / "text.jpg").write_text("hello")
    assert refusal([folder / "text.jpg"], folder).startswith("text.jpg is neither a picture")
    (folder / "empty.png").touch()
    assert "neither a picture" in refusal([folder / "empty.png"], folder)
    assert list(folder.iterdir()) == []


def test_fifty_megapixels_and_decompression_bombs_are_refused_unread(folder, monkeypatch):
    def load(self):
        raise AssertionError("the pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for name, size in {"large.png": (8000, 6300), "bomb.png": (30000, 30000)}.items():
        (folder / name).write_bytes(png_claiming(*size))
        words = refusal([folder / name], folder)
        assert name in words and "pixels" in words
    assert list(folder.iterdir()) == []


def test_a_damaged_picture_is_named(folder):
    path = folder / "cut.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:600])
    assert refusal([path], folder).startswith("cut.png cannot be decoded (")


def test_too_many_and_too_large_files_are_refused(folder):
    paths = [picture(folder / f"{i}.png") for i in range(3)]
    assert "at most 2 pictures" in refusal(paths, folder, max_files=2)
    assert list(folder.iterdir()) == []
    assert "more than the maximum of 0.0001 MB" in refusal([picture(folder / "a.png")], folder, max_bytes=100)
    assert "Nothing was uploaded" in refusal([], folder)


def test_files_of_other_folders_are_neither_read_nor_deleted(folder, tmp_path):
    secret = tmp_path / "secret.png"
    picture(secret)
    (folder / "link.png").symlink_to(secret)
    inside = picture(folder / "inside.png")
    for path in (secret, folder / "link.png", folder / ".." / "secret.png", tmp_path / "missing.png"):
        assert refusal([path], folder) == "A file was not uploaded here or was deleted meanwhile; upload it again."
    assert "not uploaded here" in refusal([inside, secret], folder)
    assert secret.is_file() and not (folder / "inside.png").exists()


def test_a_video_becomes_frames_in_order(folder, make_video):
    upload = read_upload([str(make_video(20, 10))], folder)
    reds = [colour[0] for colour in colours(upload)]
    # Two seconds, a frame every fifth of a second.
    assert len(reds) == 10 and reds == sorted(reds, reverse=True) and reds[0] > 180 > 60 > reds[-1]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("frames", [40, 41, 47])
def test_frames_of_a_longer_video_stay_few_and_evenly_spaced(folder, make_video, frames):
    upload = read_upload([str(make_video(frames, 10))], folder, UploadLimits(max_frames=6))
    reds = [colour[0] for colour in colours(upload)]
    steps = [a - b for a, b in zip(reds, reds[1:])]
    assert 3 <= len(reds) <= 6 and min(steps) > 0 and max(steps) - min(steps) < 15


def test_a_video_that_is_too_long_or_has_large_frames_is_refused(folder, make_video):
    assert refusal([make_video(30, 10)], folder, max_seconds=2) == "The video lasts 3 s, more than the maximum of 2 s."
    assert "64 x 64 pixels" in refusal([make_video()], folder, max_pixels=1000)


def test_a_truncated_video_gives_its_first_frames_or_an_error(folder, make_video):
    av = pytest.importorskip("av")
    path = make_video(40, 10)
    # A fragmented file can be read as far as it goes; this one keeps its index at the end.
    path.write_bytes(path.read_bytes()[:-200])
    assert refusal([path], folder).startswith("clip.mp4 cannot be decoded (")
    stream_file = folder / "clip.mkv"
    with av.open(str(make_video(40, 10))) as source, av.open(str(stream_file), "w", format="matroska") as target:
        copy = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    stream_file.write_bytes(stream_file.read_bytes()[: stream_file.stat().st_size // 2])
    assert 1 <= len(read_upload([str(stream_file)], folder).frames) < 20


def test_a_playlist_is_not_followed(folder, make_video, tmp_path):
    target = tmp_path / "elsewhere.mp4"
    make_video().rename(target)
    for text in (f"ffconcat version 1.0\nfile {target}\n", f"#EXTM3U\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n"):
        (folder / "clip.mp4").write_text(text)
        assert "neither a picture" in refusal([folder / "clip.mp4"], folder)


def test_a_video_without_pictures_is_refused(folder):
    av = pytest.importorskip("av", reason="needs PyAV")
    numpy = pytest.importorskip("numpy")
    path = folder / "sound.mp4"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        stream.layout = "mono"
        for _ in range(4):
            samples = av.AudioFrame.from_ndarray(numpy.zeros((1, 1024), numpy.float32), "fltp", "mono")
            samples.sample_rate = 44100
            container.mux(stream.encode(samples))
        container.mux(stream.encode())
    assert refusal([path], folder) == "sound.mp4 holds no video."


def test_pictures_and_video_do_not_mix(folder, make_video):
    words = refusal([make_video(), picture(folder / "a.png")], folder)
    assert words == "Upload either pictures or one video, not both or several."


@pytest.fixture
def decoded(monkeypatch):
    """How many packets are decoded, by file."""
    counts = []
    close = VideoReader.close

    def count(self):
        counts.append(self.num_decoded)
        close(self)

    monkeypatch.setattr(VideoReader, "close", count)
    return counts


def test_decoding_is_limited_for_a_video_of_many_frames(folder, make_video, decoded):
    """Ten seconds of 240 frames: every twelfth frame is a key frame, or the first one alone."""
    pixels = 64 * 64
    upload = read_upload([str(make_video(2400, 240))], folder, UploadLimits(max_decoded_pixels=250 * pixels))
    assert max(decoded) <= 250 and 40 <= len(upload.frames) <= 64 and "too many frames" in upload.note
    reds = [colour[0] for colour in colours(upload)]
    # From the start to the end.
    assert reds == sorted(reds, reverse=True) and reds[0] > 210 and reds[-1] < 35
    decoded.clear()
    path = make_video(2400, 240, options={"g": "9999", "keyint_min": "9999", "sc_threshold": "1000000000"})
    upload = read_upload([str(path)], folder, UploadLimits(max_decoded_pixels=300 * pixels))
    assert max(decoded) <= 300 and len(upload.frames) >= 5 and "too many frames" in upload.note
    # What can be paid for is read as before.
    decoded.clear()
    upload = read_upload([str(make_video(60, 10))], folder)
    assert upload.note == "" and len(upload.frames) == 30


def test_reading_time_is_limited(folder, make_video):
    assert "took longer than 0 s" in refusal([make_video()], folder, reading_seconds=0)
    assert "took longer than 0 s" in refusal([picture(folder / "a.png")], folder, reading_seconds=0)


@pytest.mark.parametrize(
    "start, kind",
    [
        (b"\x00\x00\x00\x20ftypisom", "mp4"),
        (b"\x1a\x45\xdf\xa3\x01\x00\x00\x00\x00\x00\x00\x1f", "matroska"),
        (b"RIFF\x10\x00\x00\x00AVI LIST", "avi"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", None),
        (b"#EXTM3U\n#EXT", None),
        (b"", None),
    ],
)
def test_the_first_bytes_decide_the_kind(tmp_path, start, kind):
    (tmp_path / "file").write_bytes(start)
    assert video_format(tmp_path / "file") == kind
