"""Reading frames: damaged files, folders, and live sources that disconnect or are too fast."""

import os
import threading
import time
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from retrieval_rice.stream.source import FolderStream, VideoStream, open_stream

av = pytest.importorskip("av")


def write_video(path, colours, rate=10, size=64, **options):
    """One frame per colour; MPEG-4 part 2, each twelfth frame whole."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for colour in colours:
            picture = np.full((size, size, 3), colour, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def noise_video(path, count, **options):
    """Frames that do not compress, so that a cut falls into the pictures."""
    generator = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(count):
            picture = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def read(source, fps=10.0, **settings):
    notices = []
    stream = open_stream(source, fps, notify=notices.append, **settings)
    return stream, list(stream), notices


def times(frames):
    return [round(frame.time_s, 3) for frame in frames]


def test_a_file_is_sampled_on_a_grid(tmp_path):
    path = write_video(tmp_path / "clip.mp4", [(200, 30, 30)] * 15 + [(30, 30, 200)] * 15)
    stream, frames, notices = read(path, fps=2.5)
    assert times(frames) == [0.0, 0.4, 0.8, 1.2, 1.6, 2.0, 2.4, 2.8]
    assert (stream.live, stream.duration_s, stream.counts.frames, notices) == (False, 3.0, 8, [])
    colours = [np.asarray(frame.picture).mean(axis=(0, 1)).argmax() for frame in frames]
    assert colours == [0, 0, 0, 0, 2, 2, 2, 2]
    # More than there are is all there are.
    assert len(read(path, fps=100.0)[1]) == 30


def test_a_file_waits_for_recognition_and_loses_no_frame(tmp_path):
    path = write_video(tmp_path / "clip.mp4", [(0, 0, 0)] * 30)
    stream = VideoStream(path, 10.0, queue_size=2)
    taken = []
    for frame in stream:
        time.sleep(0.005)
        taken.append(frame)
    assert len(taken) == 30 and stream.counts.dropped == 0


def test_one_frame(tmp_path):
    _, frames, notices = read(write_video(tmp_path / "clip.mp4", [(9, 9, 9)]))
    assert times(frames) == [0.0] and notices == []


def test_sources_that_are_not_video(tmp_path):
    with pytest.raises(FileNotFoundError, match="no video file or folder"):
        open_stream(tmp_path / "missing.mp4")
    (tmp_path / "text.mp4").write_text("this is no video")
    with pytest.raises(ValueError, match="text.mp4 cannot be decoded"):
        open_stream(tmp_path / "text.mp4")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        for packet in [*stream.encode(sound), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(ValueError, match="sound.wav holds no video"):
        open_stream(tmp_path / "sound.wav")
    with pytest.raises(ValueError, match="cannot be read as a video"):
        open_stream("http://127.0.0.1:9/live.m3u8")
    with pytest.raises(ValueError, match="above 0"):
        open_stream(tmp_path / "text.mp4", fps=0)


def test_a_truncated_file_is_used_up_to_the_cut(tmp_path):
    path = noise_video(tmp_path / "clip.mp4", 60, movflags="faststart")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    stream, frames, notices = read(path)
    assert 20 <= len(frames) <= 32
    notice = next(notice for notice in notices if "cut short" in notice)
    assert f"{frames[-1].time_s:.1f} s of 6.0 s could be read" in notice
    # Where the directory stands at the end, nothing is left of it.
    path = noise_video(tmp_path / "plain.mp4", 60)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="plain.mp4 cannot be decoded"):
        open_stream(path)


def test_damage_in_the_middle_is_counted(tmp_path):
    path = noise_video(tmp_path / "clip.mp4", 60, movflags="faststart")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = bytes(3000)
    path.write_bytes(data)
    stream, frames, notices = read(path)
    assert frames[-1].time_s > 5 and len(frames) >= 50
    assert stream.counts.damaged == 0 or any("damaged" in notice for notice in notices)


@pytest.mark.parametrize(
    "name, rate, first, sound_s, length_s",
    [("late.mkv", 10, 36_000, 0, 1.0), ("slow.mp4", Fraction(1, 10), 0, 0, 100.0), ("talk.mp4", 10, 0, 12, 12.0)],
)
def test_a_whole_file_is_not_called_cut_short(tmp_path, name, rate, first, sound_s, length_s):
    """A clock that starts late, a last frame that lasts long, and sound that goes on."""
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        sound = container.add_stream("aac", rate=8000, layout="mono") if sound_s else None
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = first + i, 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for i in range(round(sound_s * 8000 / 1024) + 1 if sound_s else 0):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            samples.sample_rate, samples.pts = 8000, 1024 * i
            container.mux(sound.encode(samples))
    stream, frames, notices = read(tmp_path / name)
    assert len(frames) == 10 and notices == []
    assert stream.duration_s == pytest.approx(length_s, abs=0.2)


def test_a_video_of_damage_only_is_refused():
    stream = VideoStream("x.mp4", opener=FakeSource([[]], duration=5_000_000))
    with pytest.raises(ValueError, match="x.mp4 holds no frame"):
        list(stream)


def join(path, *parts):
    """Recordings one after the other in one file, whose clock begins anew with each."""
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def test_time_continues_in_joined_recordings(tmp_path):
    part = write_video(tmp_path / "part.ts", [(200, 30, 30)] * 20)
    stream, frames, notices = read(join(tmp_path / "joined.ts", part, part), fps=2.5)
    assert times(frames) == [round(0.4 * i, 1) for i in range(10)]
    assert stream.duration_s is None and not stream.live
    assert stream.counts.leaps == 1 and stream.counts.available == 40
    assert len(notices) == 1 and "joined.ts jump by -1.9 s at 1.9 s; times continue from there" in notices[0]


def test_a_playlist_is_followed_with_one_clock(tmp_path, monkeypatch):
    part = write_video(tmp_path / "0.ts", [(200, 30, 30)] * 20)
    join(tmp_path / "1.ts", part)
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:2", "#EXTINF:2,", "0.ts", "#EXTINF:2,", "1.ts", "#EXT-X-ENDLIST", ""]
    (tmp_path / "live:1.m3u8").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    _, frames, _ = read("live:1.m3u8", fps=2.5)
    assert times(frames) == [round(0.4 * i, 1) for i in range(10)]


def test_any_file_name_with_the_times_of_a_player(tmp_path, monkeypatch):
    """The picture starts a second after the sound."""
    path = tmp_path / "camera:0"
    with av.open(str(path.with_suffix(".mkv")), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.int16), format="s16", layout="mono")
        samples.sample_rate, samples.pts = 8000, 0
        container.mux(sound.encode(samples) + sound.encode())
        for i in range(10):
            frame = av.VideoFrame(64, 64, "yuv420p")
            frame.pts, frame.time_base = 10 + i, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    path.with_suffix(".mkv").rename(path)
    monkeypatch.chdir(tmp_path)
    assert times(read("camera:0")[1]) == [round(1 + 0.1 * i, 1) for i in range(10)]


def save_pictures(folder, *names):
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / name)


def test_a_folder_is_read_in_natural_order(tmp_path):
    save_pictures(tmp_path, "frame-2.png", "frame-10.png", "frame-1.png")
    (tmp_path / "notes.txt").write_text("no picture")
    stream, frames, _ = read(tmp_path)
    assert isinstance(stream, FolderStream) and stream.duration_s == 3.0
    assert [(frame.time_s, frame.picture.getpixel((0, 0))[0]) for frame in frames] == [(0, 2), (1, 0), (2, 1)]
    assert times(read(tmp_path, fps=0.5)[1]) == [0.0, 2.0]
    assert times(read(tmp_path, folder_fps=10.0)[1]) == [0.0, 0.1, 0.2]


@pytest.mark.parametrize(
    "in_order",
    [("①2.png", "②2.png", "③2.png"), ("x¹.png", "x².png", "x³.png"), ("f２.png", "f10.png"), ("٣.png", "١٠.png")],
)
def test_a_folder_with_numbers_of_any_script_is_read_in_natural_order(tmp_path, in_order):
    save_pictures(tmp_path, *in_order[::-1])
    shades = [frame.picture.getpixel((0, 0))[0] for frame in read(tmp_path)[1]]
    assert shades == list(range(len(in_order)))[::-1]


def test_other_files_of_a_folder_are_reported_at_the_end(tmp_path):
    save_pictures(tmp_path, "1.png", "2.PNG", "._1.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "3.jfif", format="JPEG")
    (tmp_path / "sub").mkdir()
    (tmp_path / "notes.txt").write_text("no picture")
    _, frames, notices = read(tmp_path)
    assert len(frames) == 3 and len(notices) == 1
    assert "3 entries were left out: ._1.png (hidden or made by the system); notes.txt (no suffix" in notices[0]


def test_a_frame_whose_name_is_not_utf8_is_read_or_named(tmp_path):
    folder = os.fsencode(tmp_path)
    save_pictures(tmp_path, "1.png")
    os.rename(folder + b"/1.png", folder + b"/\xc8\xcb.png")
    with open(folder + b"/\xff.png", "wb") as file:
        file.write(b"no picture")
    _, frames, notices = read(tmp_path)
    assert len(frames) == 1 and "left out" in notices[0]


def test_pictures_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        open_stream(tmp_path)
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="None of the pictures can be used: .*1.png"):
        read(tmp_path)
    save_pictures(tmp_path, "2.png")
    stream, frames, notices = read(tmp_path)
    assert times(frames) == [1.0] and stream.counts.damaged == 1
    assert "1.png" in notices[0] and "left out" in notices[0]


class FakeSource:
    """
    Opens containers of given time stamps, one after the other. A stamp may be an error to raise, or a function to
    call on the way; a container may be an error that its opening raises.
    """

    def __init__(self, containers, duration=None, picture=Image.new("RGB", (2, 2))):
        self.containers, self.duration, self.picture = list(containers), duration, picture
        self.opened = 0

    def __call__(self, source):
        if self.opened >= len(self.containers):
            raise ValueError(f"{source} does not answer")
        content = self.containers[self.opened]
        self.opened += 1
        if isinstance(content, Exception):
            raise content
        duration, content = content if isinstance(content, tuple) else (self.duration, content)
        video = SimpleNamespace(
            average_rate=Fraction(10),
            thread_type=None,
            disposition=av.stream.Disposition(0),
            codec_context=SimpleNamespace(
                width=2, height=2, is_open=True, name="h264", decode=lambda packet: [packet] if packet else []
            ),
            sample_aspect_ratio=None,
            metadata={},
            duration=None,
        )
        return SimpleNamespace(
            streams=SimpleNamespace(video=[video]),
            format=SimpleNamespace(flags=0, name="rtsp"),
            start_time=0,
            duration=duration,
            demux=lambda stream: self.packets(content),
            close=lambda: None,
        )

    def packets(self, content):
        for stamp in content:
            if isinstance(stamp, Exception):
                raise stamp
            if callable(stamp):
                stamp()
                continue
            yield SimpleNamespace(
                time=stamp,
                time_base=None,
                duration=0,
                width=2,
                height=2,
                format=SimpleNamespace(has_palette=False, components=[], is_rgb=True),
                colorspace=0,
                color_trc=1,
                color_primaries=1,
                side_data={},
                to_ndarray=lambda **settings: np.asarray(self.picture),
            )


def live(containers, **settings):
    notices = []
    settings = {"backoff_s": 0.01, "max_reconnects": 3, **settings}
    source = FakeSource(containers)
    stream = VideoStream("rtsp://shop/1", 10.0, notify=notices.append, opener=source, **settings)
    assert stream.live
    return source, stream, notices


LOST = ConnectionResetError("connection reset")


def test_a_lost_stream_is_opened_again():
    # The second connection counts from another zero, and the third never comes.
    source, stream, notices = live([[5.0, 5.1, 5.2, LOST], [900.0, 900.1]])
    frames = list(stream)
    assert len(frames) == 5 and stream.counts.reconnects == 1
    stamps = [frame.time_s for frame in frames]
    assert stamps[:3] == pytest.approx([0.0, 0.1, 0.2])
    # Time goes on, by the clock.
    assert stamps[2] + 0.09 < stamps[3] < 5.0 and stamps[4] - stamps[3] == pytest.approx(0.1)
    assert "connection reset" in notices[0] and "attempt 1 of 3" in notices[0]
    assert "the stream ended" in notices[1]
    assert stream.error == "rtsp://shop/1 did not come back after 3 attempts (rtsp://shop/1 does not answer)"


def test_attempts_count_from_zero_after_a_frame():
    refused = ValueError("refused")
    content = [[0.0, LOST], refused, refused, [0.0, LOST], refused, refused, [0.0, LOST]]
    source, stream, _ = live(content)
    assert len(list(stream)) == 3 and stream.counts.reconnects == 2
    assert "after 3 attempts" in stream.error


def test_a_stream_that_opens_without_frames_is_given_up():
    source, stream, _ = live([[0.0], [], [], [], [], []])
    assert len(list(stream)) == 1
    assert source.opened == 4 and "after 3 attempts" in stream.error


def test_pauses_between_attempts_grow():
    source, stream, notices = live([[0.0]], backoff_s=0.02)
    started = time.monotonic()
    list(stream)
    assert time.monotonic() - started >= 0.02 + 0.04 + 0.08
    assert [notice.split("again in ")[1].split(" s ")[0] for notice in notices] == ["0.02", "0.04", "0.08"]


def test_a_live_stream_that_became_a_recording_ends():
    source, stream, _ = live([[0.0, 0.1], (60_000_000, [0.0, 0.1, 0.2])])
    assert len(list(stream)) == 2 and stream.error is None and stream.counts.reconnects == 0


def test_time_stamps_that_jump_start_again():
    _, stream, _ = live([[0.0, 0.1, 5000.0, 5000.1, 3.0, 3.1]], max_reconnects=0)
    stamps = [frame.time_s for frame in stream]
    assert len(stamps) == 6 and stamps == sorted(stamps) and stamps[-1] < 5


def test_frames_without_time_stamps_follow_the_rate():
    _, stream, _ = live([[None, None, None]], max_reconnects=0)
    assert times(stream) == [0.0, 0.1, 0.2]


def test_a_live_source_drops_its_oldest_frames_when_recognition_is_slow():
    came = threading.Event()
    stamps = [i / 10 for i in range(200)]
    _, stream, notices = live([[*stamps, came.set]], queue_size=8, max_reconnects=0)
    taken = []
    for frame in stream:
        # As long as a recognition that is much too slow.
        assert came.wait(20)
        taken.append(frame.time_s)
    # The first went out before, and of those that waited the newest are left.
    assert taken[-8:] == pytest.approx(stamps[-8:])
    assert stream.counts.dropped + len(taken) == 200 and len(taken) <= 9
    # Told, and not once per frame.
    assert 1 <= sum("dropped so far" in notice for notice in notices) <= 2


def test_stop_ends_a_stream_that_waits():
    silence = threading.Event()
    _, stream, _ = live([[0.0, silence.wait]])
    threading.Timer(0.1, stream.stop).start()
    assert len(list(stream)) == 1
    silence.set()
    # And one that waits to open again.
    _, stream, _ = live([[0.0]], backoff_s=60.0)
    threading.Timer(0.1, stream.stop).start()
    started = time.monotonic()
    assert len(list(stream)) == 1 and time.monotonic() - started < 20 and stream.error is None


class Broadcast(BaseHTTPRequestHandler):
    """Sends the same minute of television to whoever asks, `connections` times, and breaks off in the middle."""

    data = b""
    connections = 2

    def do_GET(self):
        if self.server.answered >= self.connections:
            self.send_error(503)
            return
        self.server.answered += 1
        # No length: an endless answer, as that of a live encoder.
        self.send_response(200)
        self.send_header("Content-Type", "video/mp2t")
        self.end_headers()
        self.wfile.write(self.data)

    def log_message(self, *arguments):
        pass


def test_a_live_address_through_ffmpeg(tmp_path):
    path = write_video(tmp_path / "live.ts", [(200, 30, 30)] * 20)
    handler = type("Handler", (Broadcast,), {"data": path.read_bytes()})
    server = HTTPServer(("127.0.0.1", 0), handler)
    server.answered = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        notices = []
        address = f"http://127.0.0.1:{server.server_port}/live.ts"
        stream = open_stream(address, 10.0, notify=notices.append, backoff_s=0.01, max_reconnects=2)
        assert stream.live
        frames = list(stream)
    finally:
        server.shutdown()
        server.server_close()
    # FFmpeg loses the last few packets with the connection.
    assert len(frames) + stream.counts.dropped >= 34 and stream.counts.reconnects == 1
    assert times(frames) == sorted(times(frames)) and times(frames)[-1] < 60
    assert f"{address} did not come back after 2 attempts" in stream.error


def test_a_number_of_attempts_is_not_negative(tmp_path):
    with pytest.raises(ValueError, match="`max_reconnects` must be at least 0, got -1"):
        open_stream(tmp_path, max_reconnects=-1)
