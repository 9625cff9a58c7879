"""Subtitles in every format and encoding, a container's own track, and captions as JSON lines."""

import os
import threading

import pytest

from retrieval_rice.stream.speech import Word
from retrieval_rice.stream.speech_captions import JsonWords, Subtitles, captions

av = pytest.importorskip("av")

SRT = """1
00:00:01,000 --> 00:00:03,000
Hello <i>red</i> mug & co

2
00:00:09,000 --> 00:00:08,000
ends before it starts

3
00:00:02,500 --> 00:00:06,000
two
lines

4
00:00:00,500 --> 00:00:00,900
{first} {\\an8}of all
"""
CUES = [(0.5, 0.9, "of all"), (1.0, 3.0, "Hello red mug & co"), (2.5, 6.0, "two lines")]


def read(path):
    notices = []
    return list(Subtitles(path, notices.append)), notices


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_overlapping_and_backward_cues(tmp_path):
    found, notices = read(write(tmp_path / "a.srt", SRT))
    assert found[:3] == [Word(*cue) for cue in CUES] and notices == []
    # As it stands; a stream gives it no length.
    assert found[3] == Word(9.0, 8.0, "ends before it starts")


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_line_ends_and_entities(tmp_path, line_end):
    said = "salt &amp; pepper &#39;set&#39;\0 &quot;a&quot;"
    for name, head in (("a.srt", "1\n"), ("a.vtt", "WEBVTT\n\n")):
        text = f"{head}00:00:01.000 --> 00:00:02.000\n{said}\n\n00:00:03.000 --> 00:00:04.000\nred\n"
        found, _ = read(write(tmp_path / name, text.replace("\n", line_end)))
        assert found == [Word(1.0, 2.0, "salt & pepper 'set' \"a\""), Word(3.0, 4.0, "red")]


def test_a_cue_that_ends_before_it_starts_lasts_until_the_next(tmp_path):
    text = SRT.replace("00:00:01,000 --> 00:00:03,000", "00:00:01,000 --> 00:00:00,500")
    assert read(write(tmp_path / "a.srt", text))[0][1] == Word(1.0, 2.5, "Hello red mug & co")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings_recognised_by_their_bytes(tmp_path, encoding):
    text = SRT.replace("two", "红色杯子 für")
    found, notices = read(write(tmp_path / "a.srt", text, encoding))
    assert found[2].text == "红色杯子 für lines" and notices == []


@pytest.mark.parametrize(
    "encoding, said, name",
    [
        ("gb18030", "这个红色的杯子", "GB 18030"),
        ("latin-1", "für die schönste Tasse", "Windows-1252"),
        ("cp1252", "la tasse préférée – 5 €", "Windows-1252"),
    ],
)
def test_guessed_encodings_are_reported(tmp_path, encoding, said, name):
    found, notices = read(write(tmp_path / "a.srt", SRT.replace("two", said), encoding))
    assert found[2].text == f"{said} lines" and len(found) == 4
    assert notices == [f"{tmp_path / 'a.srt'} is not in UTF-8 or UTF-16; it is read as {name}"]


def test_utf_8_with_a_damaged_character(tmp_path):
    data = SRT.replace("two", "这个红色的杯子很好看").encode().replace("很".encode(), b"\xe5\xbe")
    (tmp_path / "a.srt").write_bytes(data)
    found, notices = read(tmp_path / "a.srt")
    assert found[2].text == "这个红色的杯子\ufffd好看 lines"
    assert notices == [f"{tmp_path / 'a.srt'} is not in UTF-8 or UTF-16; it is read as UTF-8 with damaged characters"]


@pytest.mark.parametrize(
    "first",
    [
        "00:00:01,000 --> 00:00:02,000",
        "1\n00:00:01 --> 00:00:02",
        "1\n00:01,000 --> 00:02,000",
        "00:01.000-->00:02.000",
        "1\n00:00:01\uff0c000 --> 00:00:02\uff0c000",
        "1\n0:0:1,000 --> 0:0:2,000 X1:1 X2:2",
    ],
)
def test_times_and_cues_that_are_not_quite_srt(tmp_path, first):
    """Without numbers, milliseconds or hours, and with the comma of Chinese."""
    text = f"{first}\nred\n\n2\n00:00:03,000 --> 00:00:04,000\nmug\n\n{first}\nblue\n"
    found, _ = read(write(tmp_path / "a.srt", text))
    assert found == [Word(1.0, 2.0, "red"), Word(1.0, 2.0, "blue"), Word(3.0, 4.0, "mug")]


def test_times_before_the_start_and_after_99_hours(tmp_path):
    text = "1\n-00:00:01,000 --> 00:00:02,000\nred\n\n2\n123:00:01,000 --> 123:00:02,000\nmug\n"
    assert read(write(tmp_path / "a.srt", text))[0] == [Word(0.0, 2.0, "red"), Word(442801.0, 442802.0, "mug")]


def test_drawings_are_no_words(tmp_path):
    text = (
        "[Script Info]\nScriptType: v4.00+\n\n[Events]\n"
        "Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
        "Dialogue: 0,0:00:01.00,0:00:02.00,,,0,0,0,,{\\pos(1,2)\\p1}m 0 0 l 9 0{\\p0}a {\\b1}red{\\b0} mug\n"
        "Dialogue: 0,0:00:03.00,0:00:04.00,,,0,0,0,,{\\p2}m 0 0 l 9 0\n"
    )
    assert read(write(tmp_path / "a.ass", text))[0] == [Word(1.0, 2.0, "a red mug")]


def test_webvtt(tmp_path):
    text = (
        "WEBVTT\n\nNOTE nothing\n\nintro\n00:01.000 --> 00:03.000 align:start\n<v Ann>Hello <b>red</b> &lt;3\n\n"
        "00:00:02.500 --> 00:00:06.000\nthis<00:00:03.000><c> one</c>\n"
    )
    found, _ = read(write(tmp_path / "a.vtt", text))
    assert found == [Word(1.0, 3.0, "Hello red <3"), Word(2.5, 6.0, "this one")]


@pytest.mark.parametrize(
    "content", [b"", b"nothing of the kind\n", bytes(range(256)) * 8, b"#EXTM3U\n#EXTINF:1,\nx.ts\n"]
)
def test_files_without_subtitles(tmp_path, content):
    (tmp_path / "a.srt").write_bytes(content)
    with pytest.raises(ValueError, match="a.srt holds no subtitles"):
        Subtitles(tmp_path / "a.srt")


def test_a_track_of_the_source(write_show, tmp_path):
    path = write_show("show.mkv", [(200, 0, 0)] * 4, cues=[(1.0, 2.0, "a red mug"), (2.5, 3.0, "look")])
    for name in ("track", str(path)):
        source = captions(name, path)
        assert list(source) == [Word(1.0, 2.0, "a red mug"), Word(2.5, 3.0, "look")] and source.heard_s == float("inf")
    with pytest.raises(ValueError, match="holds no text subtitles"):
        captions("track", write_show("bare.mkv", [(200, 0, 0)]))
    with pytest.raises(ValueError, match="rtsp://a/b is not a video file"):
        captions("track", "rtsp://a/b")
    with pytest.raises(FileNotFoundError, match="There is no subtitle file nowhere.srt"):
        captions("nowhere.srt", path)


def test_json_lines_as_they_arrive():
    reading, writing = os.pipe()
    notices, found, second = [], [], threading.Event()

    def listen():
        for word in JsonWords(reading, "standard input", notices.append):
            found.append(word)
            second.set()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    os.write(writing, '\n{"start_s": 1, "end_s": 1.5, "text": "红色"}\n{"start_s": 2, "te'.encode())
    # The first is there before the second is whole.
    assert second.wait(5) and found == [Word(1.0, 1.5, "红色")]
    os.write(
        writing, b'xt": "mug"}\nnonsense\n[1]\n{"start_s": NaN, "text": "x"}\n\xff\n{"start_s": 3, "text": "end"}'
    )
    os.close(writing)
    thread.join(5)
    os.close(reading)
    assert found[1:] == [Word(2.0, 2.0, "mug"), Word(3.0, 3.0, "end")]
    assert notices[0].startswith("standard input, line 4: ") and notices[0].endswith("; it is left out")
    assert notices[1] == "standard input: 4 lines were left out"


def test_a_named_pipe_and_a_file_of_json_lines(tmp_path):
    line = '{"start_s": 1, "end_s": 2, "text": "mug"}\n'
    (tmp_path / "a.jsonl").write_text(line)
    assert list(captions(str(tmp_path / "a.jsonl"), "x")) == [Word(1.0, 2.0, "mug")]
    os.mkfifo(tmp_path / "pipe")
    source = captions(str(tmp_path / "pipe"), "x")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(line), daemon=True)
    writer.start()
    assert list(source) == [Word(1.0, 2.0, "mug")]
    writer.join(5)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"start_s": 1' + "0" * 350 + ', "text": "a"}', "start_s and end_s must be seconds, got 1000"),
        ('{"start_s": 1' + "0" * 5000 + ', "text": "a"}', "a number has 5001 digits"),
        ("[" * 100_000, "the value is nested too deeply"),
        ('{"start_s": 1, "text": "\\ud800"}', "a text holds half of a surrogate pair"),
        ('{"start_s": 1, "start_s": 2, "text": "a"}', "the key 'start_s' appears twice"),
        ('{"start_s": "1", "text": "a"}', "start_s and end_s must be seconds, got '1'"),
        ('{"start_s": 1, "text": 5}', "words must be objects such as"),
        ("null", "expected a JSON object, found a NoneType"),
    ],
)
def test_invalid_json_lines(tmp_path, line, words):
    path, notices = tmp_path / "a.JSONL", []
    path.write_text(line + '\n{"start_s": 1, "end_s": 2, "text": "mug"}\n')
    assert captions(str(path), "x", notices.append) == [Word(1.0, 2.0, "mug")]
    (notice,) = notices
    assert notice.startswith(f"{path}, line 1: {words}") and notice.endswith("; it is left out")


def test_a_folder_is_no_subtitle_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder; name the subtitle file in it"):
        captions(str(tmp_path), "x")
