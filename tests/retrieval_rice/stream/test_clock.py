"""One clock for all sources: time stamps if they are valid, else the time of arrival; jumps are reported."""

import io
import os
import socket
import threading
import time
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from retrieval_rice.stream.clock import StreamClock
from retrieval_rice.stream.source import open_stream

av = pytest.importorskip("av")


class Wall:
    """A clock that goes on when it is told to."""

    def __init__(self):
        self.time_s = 1000.0

    def __call__(self):
        return self.time_s


def container(name, flags=0, start_s=None):
    start_time = None if start_s is None else round(start_s * 1e6)
    return SimpleNamespace(format=SimpleNamespace(name=name, flags=flags), start_time=start_time)


RATE_25 = SimpleNamespace(average_rate=Fraction(25))


def clock_of(kind, is_file=False, is_live=True, wall=None):
    """A clock that has begun, the clock on the wall, what was told, and the leaps."""
    wall, told, leaps = wall or Wall(), [], []
    clock = StreamClock("x", wall, told.append, leaps.append)
    clock.begin(kind, RATE_25, is_file, is_live)
    return clock, wall, told, leaps


def run(clock, wall, *frames):
    """Times of frames, each of a stamp and the seconds that it is waited for."""
    times = []
    for stamp_s, waited_s in frames:
        wall.time_s += waited_s
        times.append(round(clock.time_of(stamp_s), 3))
    return times


@pytest.mark.parametrize("name", ["mpjpeg", "h264", "image2pipe", "jpeg_pipe", "rawvideo", "yuv4mpegpipe"])
def test_a_live_source_without_time_stamps_counts_by_arrival(name):
    flags = 0x80 if name in ("mpjpeg", "h264") else 0
    clock, wall, told, leaps = clock_of(container(name, flags))
    # Stamps that a demuxer makes up, and none at all, of a camera of 5 frames per second that stalls for 3 s.
    stamps = [(0.0, 7.0), (0.04, 0.2), (None, 0.2), (0.12, 3.0), (0.16, 0.2)]
    assert run(clock, wall, *stamps) == [0.0, 0.2, 0.4, 3.4, 3.6]
    assert told == ["x has no time stamps; its times are those at which frames arrive"] and not leaps
    assert clock.shift_s is None


def test_a_file_without_time_stamps_counts_by_its_rate_and_says_so():
    clock, wall, told, _ = clock_of(container("h264", 0x80), is_file=True, is_live=False)
    assert run(clock, wall, (None, 5), (None, 5), (None, 5)) == [0.0, 0.04, 0.08]
    assert told == ["x has no time stamps; its times count 25 frames per second"]


def packets_of(wall, clock, *waits):
    """Packets that are waited for so long each, and the times of the frames that come of them."""

    def come():
        for number, wait_s in enumerate(waits):
            wall.time_s += wait_s
            yield number

    return [(number, round(clock.time_of(None), 3)) for number in clock.arriving(come())]


def test_frames_received_while_opening_are_spaced_evenly():
    clock, wall, _, _ = clock_of(container("h264", 0x80))
    clock.opening()
    wall.time_s += 2.0
    clock.begin(container("h264", 0x80), RATE_25, False, True)
    # Four packets are there already, of which it took two seconds to come.
    assert packets_of(wall, clock, 0.0, 0.01, 0.01, 0.0, 0.5, 0.5) == list(enumerate([0.0, 0.5, 1.0, 1.5, 2.52, 3.02]))


def test_packets_before_a_disconnection_are_not_lost():
    clock, _, _, _ = clock_of(container("h264", 0x80))

    def breaks():
        yield from (1, 2)
        raise OSError("gone")

    packets = clock.arriving(breaks())
    assert [next(packets), next(packets)] == [1, 2]
    with pytest.raises(OSError, match="gone"):
        next(packets)


def test_delayed_decoder_frames_have_the_times_of_their_packets():
    clock, wall, _, _ = clock_of(container("h264", 0x80))
    packets = clock.arriving(iter([]))
    assert list(packets) == []

    def come():
        for number in range(4):
            wall.time_s += 1.0
            yield number

    assert list(clock.arriving(come())) == [0, 1, 2, 3]
    # One packet is damaged and brings no frame.
    clock.time_of(None)
    clock.lost_packet()
    assert run(clock, wall, (None, 0), (None, 0)) == [2.0, 3.0]


def test_a_live_source_with_time_stamps_counts_by_them():
    clock, wall, told, leaps = clock_of(container("rtsp", start_s=90))
    # Late and early arrival says nothing.
    assert run(clock, wall, (90.0, 1), (90.1, 0), (90.2, 3), (90.3, 0.1)) == [0.0, 0.1, 0.2, 0.3]
    assert (told, leaps, round(clock.shift_s, 3)) == ([], [], -90.0)


@pytest.mark.parametrize("stamp_s, told_leap", [(3.0, -97.1), (5000.0, 4899.9), (130.0, 29.9)])
def test_live_time_stamps_that_jump_continue_by_elapsed_time(stamp_s, told_leap):
    clock, wall, _, leaps = clock_of(container("hls", 0x200))
    stamps = [(100.0, 0), (100.1, 0.1), (stamp_s, 0.7), (stamp_s + 0.1, 0.1)]
    assert run(clock, wall, *stamps) == [0.0, 0.1, 0.8, 0.9]
    assert leaps == pytest.approx([told_leap])


def test_live_time_stamps_that_jump_with_elapsed_time_are_used():
    clock, wall, _, leaps = clock_of(container("rtsp"))
    assert run(clock, wall, (0.0, 0), (40.0, 40.0), (40.1, 0.1)) == [0.0, 40.0, 40.1] and not leaps


def test_a_server_that_sends_early_leaves_no_gap_at_a_jump():
    """The first 12 s of a live playlist come at once, and the segment behind an advertisement when it is due."""
    clock, wall, _, leaps = clock_of(container("hls", 0x200))
    run(clock, wall, *((float(i), 0) for i in range(13)))
    assert run(clock, wall, (7.0, 6.0), (8.0, 0)) == [13.0, 14.0] and leaps == [-5.0]


def test_live_frames_partly_without_time_stamps():
    clock, wall, _, leaps = clock_of(container("rtsp"))
    assert run(clock, wall, (5.0, 0), (5.1, 0.1), (None, 0.1), (None, 0.5), (5.8, 0.1)) == [0, 0.1, 0.2, 0.7, 0.8]
    # What a decoder gives up at a break comes at once, and is no more than a second.
    times = run(clock, wall, *[(None, 0)] * 30)
    assert times[0] > 0.8 and 1.7 < times[-1] <= 1.9 and not leaps


def test_constant_live_time_stamps_count_as_missing():
    clock, wall, _, leaps = clock_of(container("rtsp"))
    times = run(clock, wall, *[(0.0, 0.2)] * 30)
    assert times[-1] == pytest.approx(29 * 0.2) and not leaps


@pytest.mark.parametrize("wait_s, step_s", [(0.2, 0.04), (0.01, 0.5)])
def test_live_time_stamps_at_another_speed_are_reported(wait_s, step_s):
    clock, wall, told, _ = clock_of(container("mpegts", 0x200))
    run(clock, wall, *((i * step_s, wait_s) for i in range(200)))
    assert len(told) == 1 and "has time stamps, which are used, of" in told[0]


def test_a_reopened_source_continues_its_time():
    wall = Wall()
    clock, _, _, leaps = clock_of(container("rtsp"), wall=wall)
    run(clock, wall, (50.0, 0), (50.1, 0.1))
    clock.begin(container("rtsp"), RATE_25, False, True)
    assert run(clock, wall, (900.0, 4.0), (900.1, 0.1), (900.2, 0.1)) == [4.1, 4.2, 4.3] and not leaps
    # And with what has no stamps.
    clock.begin(container("mpjpeg", 0x80), RATE_25, False, True)
    assert run(clock, wall, (0.0, 2.0), (0.04, 0.2)) == [6.3, 6.5]


@pytest.mark.parametrize(
    "stamps",
    [
        [0.0] * 6,
        [None] * 6,
        [7.0] * 6,
        [5.0, 4.96, 4.92, 4.88, 4.84, 4.8],
        [0.0, 0.04, 0.04, 0.04, 0.16, 0.2],
        [0.0, 0.04, 0.02, 0.12, 0.16, 0.2],
        [0.0, 0.04, None, float("nan"), 0.16, 0.2],
        [0.0, 0.04, 0.08, -50.0, -49.96, -49.92],
    ],
)
def test_invalid_time_stamps_of_a_file(stamps):
    clock, wall, _, _ = clock_of(container("matroska"), is_file=True, is_live=False)
    assert run(clock, wall, *((stamp_s, 0) for stamp_s in stamps)) == [0.0, 0.04, 0.08, 0.12, 0.16, 0.2]


def jpeg(size=64):
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def send_at(rate, parts, send):
    started_s = time.monotonic()
    for number, part in enumerate(parts):
        time.sleep(max(0.0, started_s + number / rate - time.monotonic()))
        send(part)
    time.sleep(max(0.0, started_s + len(parts) / rate - time.monotonic()))


@pytest.fixture
def camera():
    """A function that starts a camera of so many frames per second, for some seconds, and returns its address."""
    servers = []

    def start(rate, seconds):
        part = b"--frame\r\nContent-Type: image/jpeg\r\n\r\n" + jpeg() + b"\r\n"

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if server.answered:
                    self.send_error(503)
                    return
                server.answered = True
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                send_at(rate, [part] * round(rate * seconds), self.wfile.write)

            def log_message(self, *arguments):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        server.answered = False
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/video"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("rate, seconds", [(5, 3.0), (250, 1.5)])
def test_times_of_an_mjpeg_camera_are_elapsed_seconds(camera, rate, seconds):
    notices = []
    stream = open_stream(camera(rate, seconds), 2.5, notify=notices.append, max_reconnects=0)
    assert stream.live
    frames = list(stream)
    assert frames[-1].time_s + 0.4 == pytest.approx(seconds, abs=0.5)
    assert len(frames) == pytest.approx(2.5 * seconds, abs=1)
    assert stream.counts.available == pytest.approx(rate * seconds, rel=0.05, abs=2)
    assert any("no time stamps; its times are those at which frames arrive" in notice for notice in notices)


def encoded(form, codec, count, **options):
    """A stream as one part of bytes per frame."""
    buffer, parts, position = io.BytesIO(), [], 0
    generator = np.random.default_rng(0)
    with av.open(buffer, "w", format=form) as out:
        stream = out.add_stream(codec, rate=25, options=options)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(count):
            noise = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
            parts.append(buffer.getvalue()[position:])
            position += len(parts[-1])
        out.mux(stream.encode())
    return [*parts, buffer.getvalue()[position:]]


RAW_H264 = ("h264", "libx264", 30)


def test_times_of_a_raw_socket_stream_are_elapsed_seconds():
    parts = encoded(*RAW_H264, tune="zerolatency")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listener.accept()
        with connection:
            send_at(10, parts, connection.sendall)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    stream = open_stream(f"tcp://127.0.0.1:{listener.getsockname()[1]}", 10.0, max_reconnects=0)
    frames = list(stream)
    listener.close()
    assert stream.live and frames[-1].time_s == pytest.approx(2.9, abs=0.4) and len(frames) >= 25


@pytest.mark.parametrize(
    "form, codec, rate, expected_s",
    [("h264", "libx264", 10, 1.9), ("yuv4mpegpipe", "rawvideo", 10, 1.9), ("mpegts", "mpeg4", 100, 0.76)],
)
def test_a_pipe_counts_by_arrival_unless_it_has_stamps(tmp_path, form, codec, rate, expected_s):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    options = {"tune": "zerolatency"} if codec == "libx264" else {}
    parts = encoded(form, codec, 20, **options)

    def write():
        with open(path, "wb", buffering=0) as pipe:
            send_at(rate, parts, pipe.write)

    threading.Thread(target=write, daemon=True).start()
    stream = open_stream(path, 25.0)
    frames = list(stream)
    assert not stream.live and frames[-1].time_s == pytest.approx(expected_s, abs=0.4 if rate == 10 else 0.01)
    assert stream.counts.dropped == 0 and stream.counts.available == 20


def test_standard_input(monkeypatch):
    read_end, write_end = os.pipe()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(fileno=lambda: read_end))
    parts = encoded("mpegts", "mpeg4", 10)

    def write():
        with open(write_end, "wb") as pipe:
            pipe.write(b"".join(parts))

    threading.Thread(target=write, daemon=True).start()
    assert [round(frame.time_s, 2) for frame in open_stream("-", 25.0)] == [round(0.04 * i, 2) for i in range(10)]
    os.close(read_end)


def test_a_raw_file_counts_by_its_rate(tmp_path):
    (tmp_path / "raw.h264").write_bytes(b"".join(encoded(*RAW_H264, tune="zerolatency")))
    notices = []
    frames = list(open_stream(tmp_path / "raw.h264", 25.0, notify=notices.append))
    assert [round(frame.time_s, 2) for frame in frames] == [round(0.04 * i, 2) for i in range(30)]
    assert any("its times count 25 frames per second" in notice for notice in notices)


def write_stamped(path, stamps):
    """A Flash video of a frame per time stamp in milliseconds, which are written over those of a sound file."""
    content = bytearray(b"".join(encoded("flv", "flv", len(stamps))))
    position, waiting = 13, list(stamps)
    while position < len(content):
        size = int.from_bytes(content[position + 1 : position + 4])
        if content[position] == 9 and waiting:
            stamp = waiting.pop(0)
            content[position + 4 : position + 8] = (stamp & 0xFFFFFF).to_bytes(3) + bytes([stamp >> 24])
        position += 11 + size + 4
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "stamps, leaps",
    [
        ([0] * 50, 0),
        ([7000] * 50, 0),
        ([5000 - 40 * i for i in range(50)], None),
        ([40 * i for i in range(25)] + [40 * i for i in range(25)], 1),
        ([40 * i for i in range(50)], 0),
    ],
)
def test_a_file_with_invalid_time_stamps_still_shows_its_frames(tmp_path, stamps, leaps):
    stream = open_stream(write_stamped(tmp_path / "show.flv", stamps), 25.0)
    frames = list(stream)
    assert len(frames) == stream.counts.available == 50
    assert frames[-1].time_s - frames[0].time_s == pytest.approx(49 * 0.04, abs=0.1)
    assert leaps is None or stream.counts.leaps == leaps
