"""Sound of files and live sources: times, damage, and chunks."""

import threading
from fractions import Fraction

import numpy as np
import pytest

from processing_rice.video_container_rice import open_container
from retrieval_rice.stream.source import open_stream
from retrieval_rice.stream.speech_sound import RATE, Block, FileSound, LiveSound, chunks

av = pytest.importorskip("av")

GREY = (128, 128, 128)


def heard(path, *span):
    """All of a file's sound with the silence between, from second 0 on."""
    sound = FileSound(path, *span, opener=open_container)
    blocks = list(sound)
    samples = np.zeros(round((blocks[-1].end_s if blocks else 0) * RATE) + 1, np.float32)
    for block in blocks:
        start = round(block.start_s * RATE)
        samples[start : start + len(block.samples)] = block.samples
    return samples, sound


def loud(samples):
    """First and last second that is not silent."""
    (places,) = np.nonzero(np.abs(samples) > 0.05)
    return places[0] / RATE, places[-1] / RATE


def test_sound_keeps_its_times(write_show, tones):
    samples, sound = heard(write_show("show.mkv", [GREY] * 6, tones((0, 2), (0.5, 1), (0, 3))))
    assert loud(samples) == pytest.approx((2.0, 3.0), abs=0.01) and len(samples) == 6 * RATE + 1
    assert sound.has_sound and sound.counts.damaged == 0


@pytest.mark.parametrize("name", ["show.mkv", "show.ts"])
def test_sound_that_starts_later_and_ends_earlier_than_the_picture(write_show, tones, name):
    codec = "pcm_s16le" if name.endswith("mkv") else "mp2"
    path = write_show(name, [GREY] * 8, tones((0.5, 2)), sound_at=3.0, codec=codec)
    assert loud(heard(path)[0]) == pytest.approx((3.0, 5.0), abs=0.1)


def test_a_part_of_a_file(write_show, tones):
    path = write_show("show.mkv", [GREY] * 60, tones((0, 50), (0.5, 2), (0, 8)))
    samples, _ = heard(path, 49.5, 51.0)
    assert loud(samples) == pytest.approx((50.0, 51.0), abs=0.01) and len(samples) == 51 * RATE + 1
    assert len(heard(path, 70.0, 80.0)[0]) == 1


def test_no_sound(write_show):
    samples, sound = heard(write_show("bare.mkv", [GREY] * 2))
    assert len(samples) == 1 and sound.has_sound is False


def test_stereo_at_another_rate(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=44100, layout="stereo")
        wave = (16000 * np.sin(2 * np.pi * 440 * np.arange(44100) / 44100)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(np.repeat(wave, 2)[None], format="s16", layout="stereo")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    samples, _ = heard(tmp_path / "a.wav")
    assert len(samples) == pytest.approx(RATE, abs=64)
    spectrum = np.abs(np.fft.rfft(samples[:RATE]))
    assert spectrum.argmax() == pytest.approx(440, abs=1)


def test_broken_packets_of_sound_are_counted_and_the_rest_is_used(write_show, tones, tmp_path):
    path = write_show("show.mp4", [GREY] * 4, tones((0.5, 4)), codec="aac")
    data = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(audio=0) if packet.size > 30]
    for packet in packets[5::5]:
        data = data.replace(packet, b"\xff" * len(packet))
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data)
    samples, sound = heard(broken)
    assert sound.counts.damaged > 3 and loud(samples)[1] > 3.5
    assert len(list(open_stream(broken, 10.0))) == 40


def test_recordings_that_were_joined_keep_sound_and_picture_together(write_show, tones, tmp_path):
    parts = [
        write_show("a.ts", [GREY] * 3, tones((0, 1), (0.5, 1), (0, 1)), codec="mp2"),
        write_show("b.ts", [GREY] * 3, tones((0, 2), (0.5, 1)), codec="mp2"),
    ]
    with av.open(str(tmp_path / "later.ts"), "w") as out, av.open(str(parts[1])) as second:
        streams = [out.add_stream_from_template(stream) for stream in second.streams]
        for packet in second.demux():
            if packet.dts is not None:
                ahead = round(5000 / packet.time_base)
                packet.pts, packet.dts = packet.pts + ahead, packet.dts + ahead
                packet.stream = streams[packet.stream.index]
                out.mux(packet)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(parts[0].read_bytes() + (tmp_path / "later.ts").read_bytes())
    samples, _ = heard(joined)
    assert loud(samples[: 3 * RATE]) == pytest.approx((1.0, 2.0), abs=0.2)
    assert loud(samples) == pytest.approx((1.0, 6.0), abs=0.3)
    assert list(open_stream(joined, 10.0))[-1].time_s == pytest.approx(5.9, abs=0.3)


def block(start_s, *parts):
    return Block(start_s, np.concatenate([np.full(round(s * RATE), level, np.float32) for level, s in parts]))


def test_chunks_are_cut_where_it_is_quiet():
    found = list(chunks([block(0, (0.5, 5), (0.0, 0.3), (0.5, 4))], 6.0))
    assert [chunk.start_s for chunk in found] == pytest.approx([0, 5.15], abs=0.11)
    assert found[-1].end_s == pytest.approx(9.3) and found[0].end_s == found[1].start_s
    # No quiet place: not longer than what was asked for.
    found = list(chunks([block(i, (0.5, 1)) for i in range(20)], 6.0))
    assert all(4 <= len(chunk.samples) / RATE <= 6 for chunk in found[:-1]) and found[-1].end_s == 20


def test_chunks_end_where_sound_is_missing():
    found = list(chunks([block(0, (0.5, 2)), block(7, (0.5, 2)), block(9.1, (0.5, 0.5)), block(30, (0.5, 0.1))], 6.0))
    # Small gaps are rounding, and a tenth of a second holds no word.
    assert [(chunk.start_s, round(chunk.end_s, 2)) for chunk in found] == [(0, 2), (7, 9.5)]
    # Many small gaps are a large one.
    many = list(chunks([block(1.2 * i, (0.5, 1)) for i in range(6)], 6.0))
    assert all(abs(chunk.end_s - chunk.start_s - len(chunk.samples) / RATE) < 1e-6 for chunk in many)
    assert max(chunk.end_s for chunk in many) == pytest.approx(7.0, abs=0.31)


class Packet:
    """A packet of one second of sound."""

    def __init__(self, second):
        frame = av.AudioFrame.from_ndarray(np.full((1, RATE), 0.5, np.float32), format="flt", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), second * RATE
        self.decode = lambda: [frame]


def test_a_live_source_does_not_wait_and_skipped_sound_is_reported():
    notices = []
    sound = LiveSound(notices.append, longest_s=5.0)
    for second in range(30):
        sound.take(Packet(second), shift_s=100.0)
    sound.stop()
    blocks = list(sound)
    assert [round(one.start_s) for one in blocks] == [125, 126, 127, 128, 129]
    assert sound.counts.skipped_s == pytest.approx(25.0, abs=0.1)
    assert [notice.split(":")[1].split(" of")[0] for notice in notices] == [" 10 s", " 20 s"]


def test_a_live_source_passes_blocks_on_as_they_arrive():
    sound, taken = LiveSound(), []
    thread = threading.Thread(target=lambda: taken.extend(sound), daemon=True)
    thread.start()
    for second in range(3):
        sound.take(Packet(second), shift_s=0.0)
    sound.stop()
    thread.join(5)
    assert [round(one.start_s) for one in taken] == [0, 1, 2] and sound.counts.skipped_s == 0


@pytest.mark.parametrize("layout, channels", [("stereo", 2), ("5.1", 6)])
def test_equal_channels_are_as_loud_as_one(tmp_path, layout, channels):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout=layout)
        samples = np.full((1, channels * 1600), 16384, np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=layout)
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    (block,) = FileSound(path)
    np.testing.assert_allclose(block.samples, np.full(1600, 0.5, np.float32), atol=1e-3)
