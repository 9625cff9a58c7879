"""Frames and times of a video file: those of a player, in every container, without needless decoding."""

import os
import random
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from processing_rice import MediaError, read_video
from processing_rice import video_media_rice as reader
from processing_rice.video_media_rice import VideoReader, probe_video, sample_video

av = pytest.importorskip("av")


def numbered(i: int) -> np.ndarray:
    """Twelve black or white squares, the digits of a number, which survive any codec."""
    bits = np.array([i >> bit & 1 for bit in range(12)], dtype=np.uint8).reshape(3, 4)
    return np.repeat(255 * bits.repeat(16, axis=0).repeat(16, axis=1)[..., None], 3, axis=2)


def number_of(picture) -> int:
    """The number that `numbered` drew."""
    squares = np.asarray(picture, dtype=float).reshape(3, 16, 4, 16, 3).mean(axis=(1, 3, 4)) > 128
    return sum(1 << bit for bit, is_white in enumerate(squares.ravel()) if is_white)


@pytest.fixture
def write(tmp_path):
    """A function that writes frames with given time stamps, in ticks of 1 / rate seconds, and perhaps sound."""

    def make(
        name,
        frames=60,
        codec="libx264",
        rate=5,
        stamps=None,
        draw=numbered,
        b_frames=2,
        key_every=10,
        sound_s=0.0,
        options=None,
        prepare=lambda stream: None,
    ):
        path = tmp_path / name
        with av.open(os.fspath(path), "w", options=options or {}) as container:
            first = draw(0)
            # Key frames only where they are asked for.
            settings = {"x264-params": "scenecut=0"} if codec == "libx264" else {}
            stream = container.add_stream(codec, rate=rate, options=settings)
            stream.width, stream.height, stream.pix_fmt = first.shape[1], first.shape[0], "yuv420p"
            stream.codec_context.gop_size, stream.codec_context.max_b_frames = key_every, b_frames
            prepare(stream)
            if sound_s:
                sound = container.add_stream("aac", rate=8000, layout="mono")
            for i in range(frames):
                frame = av.VideoFrame.from_ndarray(draw(i), format="rgb24")
                frame.pts, frame.time_base = (stamps[i] if stamps else i), Fraction(1, rate)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
            for i in range(round(sound_s * 8000 / 1024)):
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                samples.sample_rate, samples.pts = 8000, 1024 * i
                container.mux(sound.encode(samples))
            if sound_s:
                container.mux(sound.encode())
        return path

    return make


def shown(source):
    """Numbers of the drawn frames, and their times."""
    with VideoReader(source) as video:
        numbers = [number_of(frame.picture) for frame in video.frames()]
        assert video.num_damaged == 0
        return numbers, [round(time_s, 3) for time_s in video.times]


class TestTimes:
    @pytest.mark.parametrize(
        "name, codec, b_frames",
        [
            ("a.mp4", "libx264", 2),
            ("a.mkv", "libx264", 2),
            ("a.webm", "libvpx", 0),
            ("a.ts", "libx264", 2),
            ("a.flv", "libx264", 2),
            ("a.avi", "mpeg4", 0),
            ("a.wmv", "wmv2", 0),
        ],
    )
    def test_frames_are_numbered_and_timed_alike_in_every_container(self, write, name, codec, b_frames):
        path = write(name, codec=codec, b_frames=b_frames)
        numbers, times = shown(path)
        assert numbers == list(range(60)) and times == [round(i / 5, 3) for i in range(60)]
        numbers, times = shown({"path": path, "start": 2.0, "end": 3.0})
        assert numbers == [10, 11, 12, 13, 14] and times == [2.0, 2.2, 2.4, 2.6, 2.8]

    def test_a_range_by_time_where_the_rate_changes(self, write):
        """A frame a second for ten seconds, then thirty a second."""
        stamps = [30 * i for i in range(10)] + [300 + i for i in range(60)]
        path = write("vfr.mp4", frames=70, rate=30, stamps=stamps)
        assert shown({"path": path, "start": 2, "end": 9})[0] == [2, 3, 4, 5, 6, 7, 8]
        # What is on screen at the start of the range belongs to it.
        assert shown({"path": path, "start": 8.5, "end": 10.04}) == ([8, 9, 10, 11], [8.0, 9.0, 10.0, 10.033])
        assert len(read_video({"path": path, "start": 2, "end": 9}, 5)) == 5

    @pytest.mark.parametrize("name", ["late.mp4", "late.mkv"])
    def test_the_picture_may_start_after_the_sound(self, write, name):
        path = write(name, frames=10, stamps=range(25, 35), sound_s=7)
        assert shown(path)[1] == pytest.approx([5 + i / 5 for i in range(10)], abs=0.002)
        assert shown({"path": path, "start": 0, "end": 5.5})[0] == [0, 1, 2]
        with pytest.raises(MediaError, match=r"range 0.0..3.0 s of .* holds no frame, since its video begins at 5"):
            VideoReader({"path": path, "start": 0, "end": 3})

    def test_packets_before_the_start_of_a_cut_are_not_shown(self, write, tmp_path):
        """As `ffmpeg -ss 3 -c copy` cuts: from the key frame before, with an edit list that hides the beginning."""
        source, path = write("whole.mp4"), tmp_path / "cut.mp4"
        with av.open(str(source)) as whole, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as cut:
            stream = cut.add_stream_from_template(whole.streams.video[0])
            for packet in whole.demux(video=0):
                if packet.size and packet.pts >= 10 * 2048:
                    packet.pts, packet.dts = packet.pts - 15 * 2048, packet.dts - 15 * 2048
                    packet.stream = stream
                    cut.mux(packet)
        with av.open(str(path)) as container:
            assert container.streams.video[0].frames == 50
        numbers, times = shown(path)
        assert numbers == list(range(15, 60)) and times[:2] == [0.0, 0.2]
        assert shown({"path": path, "start": 1.0, "end": 2.0})[0] == [20, 21, 22, 23, 24]
        assert len(read_video(path, 5)) == 5

    @pytest.mark.parametrize(
        "name, codec, b_frames",
        [("a.ts", "libx264", 2), ("a.mkv", "libx264", 2), ("a.webm", "libvpx", 0), ("a.mpg", "mpeg2video", 2)],
    )
    def test_time_continues_in_joined_recordings(self, write, name, codec, b_frames):
        rate = 25 if name.endswith("mpg") else 5
        path = write(name, codec=codec, b_frames=b_frames, rate=rate)
        path.write_bytes(2 * path.read_bytes())
        numbers, times = shown(path)
        assert numbers == [*range(60), *range(60)] and times == [round(i / rate, 3) for i in range(120)]
        reader._TABLES.tables.clear()
        assert shown({"path": path, "start": 58 / rate, "end": 62 / rate})[0] == [58, 59, 0, 1]

    def test_clock_jumps_of_transport_streams_are_removed_but_pauses_of_files_are_not(self, write):
        first, second = write("a.ts", frames=20), write("b.ts", frames=20, stamps=range(50_000, 50_020))
        first.write_bytes(first.read_bytes() + second.read_bytes())
        assert shown(first)[1] == [round(i / 5, 3) for i in range(40)]
        stamps = [*range(10), *range(100, 110)]
        assert shown(write("pause.mp4", frames=20, stamps=stamps))[1] == [round(i / 5, 3) for i in stamps]

    def test_a_recording_without_rate_and_length(self, write, tmp_path):
        """As browsers record: Matroska as a live stream, without a default duration."""
        stamps = [0, 61, 111, 154, 254, 301]
        path = write("live.webm", 6, "libvpx", 1000, stamps, b_frames=0, options={"live": "1"})
        # The element that states the rate becomes one that says nothing, of the same length.
        data = path.read_bytes()
        place = data.index(b"\x23\xe3\x83")
        length = 4 + (data[place + 3] & 0x7F)
        path.write_bytes(
            data[:place] + b"\xec" + bytes([0x80 | (length - 2)]) + bytes(length - 2) + data[place + length :]
        )
        with av.open(str(path)) as container:
            assert container.duration is None and not container.streams.video[0].average_rate
        assert shown(path) == ([0, 1, 2, 3, 4, 5], [stamp / 1000 for stamp in stamps])
        assert read_video(path, 3).shape == (3, 48, 64, 3)
        assert probe_video(path).seconds == pytest.approx(0.348)

    def test_more_frames_than_a_clock_of_milliseconds_can_tell_apart(self, write):
        assert shown(write("fast.mkv", 20, rate=2000, b_frames=0))[0] == list(range(20))

    def test_frames_without_time_stamps_follow_each_other(self, write):
        numbers, times = shown(write("raw.h264"))
        assert numbers == list(range(60)) and times[:3] == [0.0, 0.04, 0.08]

    def test_a_recording_that_begins_in_the_middle(self, write, tmp_path):
        """Nothing can be decoded before the first key frame; a player shows nothing either."""
        path = write("a.ts", b_frames=0)
        with av.open(str(path)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        path.write_bytes(path.read_bytes()[packets[3].pos :])
        numbers, times = shown(path)
        assert numbers == list(range(10, 60)) and np.diff(times) == pytest.approx([0.2] * 49)


class TestPictures:
    @pytest.mark.parametrize("turned", range(4))
    @pytest.mark.parametrize("mirrored", [False, True])
    def test_frames_are_turned_upright(self, write, turned, mirrored):
        upright = np.zeros((48, 64, 3), np.uint8)
        upright[:24, :32], upright[24:, :32] = (250, 250, 250), (200, 30, 30)
        # Stored so that the matrix, which turns counter-clockwise and then mirrors, brings it back.
        stored = np.ascontiguousarray(np.rot90(upright[:, ::-1] if mirrored else upright, -turned))

        def prepare(stream):
            stream.set_display_rotation(90 * turned, hflip=mirrored)

        path = write("turned.mp4", 2, "mpeg4", draw=lambda i: stored, prepare=prepare)
        frames = read_video(path)
        assert frames.shape == (2, 48, 64, 3) and np.abs(frames[1].astype(int) - upright).mean() < 6
        assert probe_video(path)[:2] == (64, 48)

    def test_pixels_that_are_not_square(self, write):
        def prepare(stream):
            stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

        assert read_video(write("wide.mp4", 2, "mpeg4", prepare=prepare)).shape == (2, 48, 128, 3)

    def test_a_size_that_changes_in_the_middle(self, write):
        first, second = write("a.ts", 10, draw=lambda i: np.full((48, 64, 3), 80, np.uint8)), None
        second = write("b.ts", 10, draw=lambda i: np.full((64, 96, 3), 160, np.uint8), stamps=range(10, 20))
        first.write_bytes(first.read_bytes() + second.read_bytes())
        frames = read_video(first, 4)
        assert frames.shape == (4, 48, 64, 3)
        np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), [80, 80, 160, 160], atol=3)
        assert [frame.size for frame in sample_video(first, 4).values()] == [(64, 48)] * 2 + [(96, 64)] * 2

    def test_transparent_parts_become_white(self, tmp_path):
        frames = [Image.new("RGBA", (16, 16), (0, 200, 0, 0)) for _ in range(2)]
        for i, frame in enumerate(frames):
            frame.paste((200, 0, 0, 255), (4 * i, 0, 4 * i + 4, 16))
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100, disposal=2)
        first, second = read_video(tmp_path / "a.gif")
        assert first[0, 0].tolist() == [200, 0, 0] and first[0, 12].tolist() == [255, 255, 255]
        assert second[0, 5].tolist() == [200, 0, 0] and second[0, 0].tolist() == [255, 255, 255]


class TestSeeking:
    @pytest.mark.parametrize("name", ["long.mp4", "long.mkv", "long.ts"])
    def test_late_frames_cost_no_more_than_early_ones(self, write, name):
        path = write(name, frames=1500, key_every=50)
        decoded = {}
        for start in (10, 290):
            with VideoReader({"path": path, "start": start, "end": start + 5}) as video:
                pictures = [frame.picture for frame in video.frames(range(0, 25, 5))]
            assert [number_of(picture) for picture in pictures] == [5 * start + i for i in range(0, 25, 5)]
            decoded[start] = video.num_decoded
        assert decoded[290] <= 2 * decoded[10]

    @pytest.mark.parametrize("name", ["long.mp4", "long.mkv"])
    def test_a_part_is_read_alone(self, write, name):
        path, packets = write(name, frames=1500, key_every=50), []
        with VideoReader({"path": path, "start": 290, "end": 295}, on_packet=lambda: packets.append(None)) as video:
            list(video.frames([0, 24]))
        assert len(packets) < 300

    @pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.ts", "libx264"), ("a.avi", "mpeg4")])
    def test_chosen_frames_equal_those_of_reading_everything(self, write, name, codec):
        path = write(name, codec=codec)
        with av.open(str(path)) as container:
            plain = [np.asarray(frame.to_image()) for frame in container.decode(video=0)]
        draw = random.Random(0)
        for _ in range(6):
            numbers = sorted(draw.sample(range(60), 5))
            frames = read_video(path, 5, lambda total, limit, numbers=numbers: numbers)
            assert np.array_equal(frames, np.stack([plain[i] for i in numbers]))

    def test_a_reader_can_be_used_again_in_any_order(self, write):
        with VideoReader(write("a.mp4")) as video:
            for numbers in ([40, 41], [5], [59, 0], [0]):
                assert [frame.number for frame in video.frames(numbers)] == sorted(numbers)
            next(video.frames())
            assert [number_of(frame.picture) for frame in video.frames([7])] == [7]
            with pytest.raises(ValueError, match=r"Frames 3 to 60 of .*a\.mp4 were requested, but it has 60 frames"):
                next(video.frames([3, 60]))

    def test_a_file_that_changed_is_read_again(self, write):
        path = write("a.ts", 30)
        assert len(shown(path)[0]) == 30
        assert len(shown(write("a.ts", 20))[0]) == 20
        assert len(reader._TABLES.tables) <= reader._KEPT_TABLES


class TestDamage:
    def test_a_truncated_file_is_read_up_to_the_cut(self, write):
        path = write("a.mp4", options={"movflags": "faststart"})
        with av.open(str(path)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        path.write_bytes(path.read_bytes()[: packets[40].pos])
        with VideoReader(path) as video:
            assert len(video) == 40 and video.num_missing == 20
            assert len(list(video.frames([0, 39]))) == 2

    def test_a_frame_that_cannot_be_decoded_is_replaced_by_the_one_before(self, write):
        path = write("a.mp4", b_frames=0)
        with av.open(str(path)) as container:
            packet = [packet for packet in container.demux(video=0) if packet.size][25]
        data = bytearray(path.read_bytes())
        data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
        path.write_bytes(data)
        with VideoReader(path) as video:
            numbers = [(frame.number, number_of(frame.picture)) for frame in video.frames([24, 25, 30])]
        assert numbers == [(24, 24), (25, 24), (30, 30)] and video.num_damaged >= 1

    def test_frames_that_are_lost_without_an_error_are_counted(self, write):
        path = write("a.mkv", b_frames=0)
        with av.open(str(path)) as container:
            packet = [packet for packet in container.demux(video=0) if packet.size][20]
        data = bytearray(path.read_bytes())
        data[packet.pos : packet.pos + packet.size // 2] = bytes(packet.size // 2)
        path.write_bytes(data)
        with VideoReader(path) as video:
            assert [frame.number for frame in video.frames([19, 40])] == [19, 40] and video.num_damaged == 0
            frames = [number_of(frame.picture) for frame in video.frames([22])]
            assert frames != [22] and video.num_damaged > 0


class TestRefusals:
    def test_covers_are_not_videos(self, write, tmp_path):
        path = tmp_path / "podcast.m4a"
        with av.open(str(path), "w", format="mp4") as container:
            sound = container.add_stream("aac", rate=8000, layout="mono")
            cover = container.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = 16, 16, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
            for packet in cover.encode(av.VideoFrame(16, 16, "yuvj420p")) + cover.encode():
                container.mux(packet)
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            samples.sample_rate = 8000
            container.mux(sound.encode(samples) + sound.encode())
        for read in (read_video, VideoReader, probe_video):
            with pytest.raises(MediaError, match=r"podcast\.m4a holds no video"):
                read(path)

    @pytest.mark.parametrize("name", ["a.mp4", "%03d.png", "-.mkv"])
    @pytest.mark.parametrize(
        "text",
        [
            "#EXTM3U\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n",
            "ffconcat version 1.0\nfile {}\n",
            "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n",
            '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
        ],
    )
    def test_playlists_by_any_name(self, write, tmp_path, name, text):
        (tmp_path / name).write_text(text.format(write("target.mp4", 2)))
        with pytest.raises(MediaError, match="is a playlist, which only names other media; give the video file"):
            read_video(tmp_path / name)

    def test_pictures_texts_folders_and_what_is_missing(self, tmp_path):
        Image.new("RGB", (8, 8)).save(tmp_path / "picture.mp4", format="PNG")
        (tmp_path / "text.mp4").write_text("no video")
        (tmp_path / "empty.mp4").touch()
        with pytest.raises(MediaError, match=r"picture\.mp4 is a picture and holds no video"):
            read_video(tmp_path / "picture.mp4")
        for name in ("text.mp4", "empty.mp4"):
            with pytest.raises(MediaError, match=rf"The video file .*{name} cannot be decoded \(.*\); replace it"):
                read_video(tmp_path / name)
        with pytest.raises(MediaError, match="cannot be read"):
            read_video(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"There is no video file .*absent\.mp4") as error:
            read_video(tmp_path / "absent.mp4")
        assert isinstance(error.value, MediaError)

    @pytest.mark.parametrize(
        "source, message",
        [
            ({"start": 1.0}, "A video is a path or"),
            ({"path": ""}, "A video is a path or"),
            (3, "A video is a path or"),
            ({"path": "a.mp4", "start": "1"}, "`start` of the video a.mp4 must be a number of seconds, got '1'"),
            ({"path": "a.mp4", "end": float("nan")}, "`end` of the video a.mp4 must be a number of seconds, got nan"),
        ],
    )
    def test_arguments_that_name_no_video(self, source, message):
        with pytest.raises(MediaError, match=message):
            read_video(source)

    def test_ranges_of_a_video_file(self, write):
        path = write("clip.mp4", frames=20)
        assert shown({"path": path, "start": None, "end": 0.4})[0] == [0, 1]
        assert shown({"path": path, "start": 3.6, "end": -1.0})[0] == [18, 19]
        assert list(sample_video({"path": path, "start": 0.0, "end": 99.0}, 2)) == [0, 10]
        assert list(sample_video({"path": path, "start": 1.0, "end": 3.0}, 3, "train")) == [0, 4, 9]
        assert shown({"path": path, "start": 3.6, "end": float("inf")})[0] == [18, 19]
        for start in (float("inf"), 1e300, 10**400):
            with pytest.raises(MediaError, match=r"holds no frame, since its video ends at 4 s; give another range"):
                read_video({"path": path, "start": start})
        for start, end in ((4.0, 5.0), (2.0, 1.0), (2.0, 2.0)):
            with pytest.raises(
                ValueError, match=rf"range {start}..{end} s of .*clip.mp4 holds no frame, since its video"
            ):
                read_video({"path": path, "start": start, "end": end})

    def test_pixels_and_reading_can_be_limited(self, write):
        path = write("a.mp4", 4)
        with pytest.raises(MediaError, match="has frames of 64 x 48 pixels, more than the 1,000 that are read"):
            VideoReader(path, max_pixels=1000)

        def stop():
            raise TimeoutError

        with pytest.raises(TimeoutError):
            VideoReader(path, on_packet=stop)


@pytest.mark.parametrize(
    "name",
    ["live:01.mp4", "concat:a.mp4", "data:,a.mp4", "http:a.mp4", "-", "100%.mp4", "%03d.mp4", "a?b#c.mp4", "a*.mp4"],
)
def test_any_name_the_system_allows(write, monkeypatch, tmp_path, name):
    write("plain.mp4", 4).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert len(read_video(name)) == 4


def test_a_name_that_is_not_utf8(write, tmp_path):
    path = os.fsencode(tmp_path) + b"/\xe8\xb1\xff.mp4"
    os.rename(write("plain.mp4", 4), path)
    assert len(read_video(os.fsdecode(path))) == 4
    os.truncate(path, 10)
    with pytest.raises(MediaError, match="cannot be decoded") as error:
        read_video(os.fsdecode(path))
    str(error.value).encode()


def test_pictures_load_without_pyav(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MediaError, match="Video is read with PyAV; install it: pip install av"):
        read_video(tmp_path / "a.mp4")
