"""Transcripts of a data set: written into its rows, recorded with model and language, and continued."""

import json

import numpy as np
import pytest

from retrieval_rice.stream.speech import Word
from rice_cli import main

av = pytest.importorskip("av")

GREY = (128, 128, 128)
LIVE = "00000000-0000-0000-0000-000000000001"


class Ear:
    """Hears the second in which sound begins, as a word."""

    word = "at"

    def __init__(self, name="ear", language="auto", device=None):
        self.name, self.language, self.heard = name, None if language == "auto" else language, 0

    def __call__(self, samples):
        self.heard += 1
        self.language = self.language or "en"
        (places,) = np.nonzero(np.abs(samples) > 0.1)
        return (
            [Word(places[0] / 16000, places[0] / 16000 + 0.1, f" {self.word}{places[0] // 16000}")]
            if len(places)
            else []
        )


@pytest.fixture
def ears(monkeypatch):
    made = []

    def load(*settings):
        made.append(Ear(*settings))
        return made[-1]

    monkeypatch.setattr("retrieval_rice.stream.speech_models.load_transcriber", load)
    return made


@pytest.fixture
def data(tmp_path, write_show, tones):
    """A shop with a video of two clips, one without sound, one of frames, and one that is not there."""
    write_show("show.mkv", [GREY] * 10, tones((0, 2), (0.5, 1), (0, 3), (0.5, 1), (0, 3)))
    write_show("bare.mkv", [GREY] * 2)
    (tmp_path / "gallery.jsonl").write_text('{"gallery_id": "g", "image": "g.jpg"}\n')
    base = {"gt_gallery_ids": ["g"]}
    rows = [
        {"query_id": "a", "video": "show.mkv", "start": 0, "end": 5, "mine": [1, "ü"], **base},
        {"query_id": "b", "video": "show.mkv", "start": 5, "end": 10, "asr": "own", **base},
        {"query_id": "c", "video": "bare.mkv", **base},
        {"query_id": "d", "frames": ["1.jpg"], **base},
        {"query_id": "e", "video": "gone.mkv", **base},
    ]
    write_rows(tmp_path, rows)
    return tmp_path


def write_rows(folder, rows):
    (folder / "clips_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "clips_val.jsonl").read_text().splitlines()]


def transcripts(folder):
    return [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()]


def transcribe(folder, *arguments):
    return main(["transcribe", str(folder), "--asr", "ear", *map(str, arguments)])


def test_clips_get_the_words_of_their_time_range(data, ears, capsys):
    before = rows_of(data)
    assert transcribe(data) == 0
    # From second 2 of its own on; ASR that was there stays.
    assert rows_of(data) == [before[0] | {"asr": "at2"}, *before[1:]]
    header, line = transcripts(data)
    assert (header["model"], header["language"]) == ("ear", "auto")
    assert line == {"split": "validation", "clip_id": "a", "asr": "at2", "language": "en", "before": ""}
    out = capsys.readouterr().out
    assert "validation: 5 clips; 1 transcribed, 1 with their own ASR, 2 without sound" in out
    assert "not read: e (" in out and "gone.mkv" in out


def test_the_same_command_continues(data, ears):
    transcribe(data)
    (data / "transcripts.jsonl").open("a").write('{"split": "valid')
    transcribe(data)
    assert [ear.heard for ear in ears] == [1, 0] and len(transcripts(data)) == 2
    # What was corrected by hand since then stays.
    rows = rows_of(data)
    write_rows(data, [rows[0] | {"asr": "by hand"}, *rows[1:]])
    transcribe(data)
    assert rows_of(data)[0]["asr"] == "by hand" and ears[-1].heard == 0


class ToldEar(Ear):
    """Hears which titles it expects."""

    titles = ()

    def expecting(self, titles):
        ear = ToldEar(self.name, self.language or "auto")
        ear.titles = titles
        return ear

    def __call__(self, samples):
        return [Word(0.0, 0.1, "+".join(self.titles) or "nothing")]


@pytest.fixture
def told(data, monkeypatch):
    """Clips of two livestreams with titles."""
    monkeypatch.setattr("retrieval_rice.stream.speech_models.load_transcriber", ToldEar)
    images = [("g", "x", "red mug"), ("h", "x", ""), ("i", "y", "blue mug")]
    rows = [{"gallery_id": i, "live_id": live, "title": title, "image": f"{i}.jpg"} for i, live, title in images]
    (data / "gallery.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    a, b = rows_of(data)[:2]
    write_rows(
        data, [a | {"live_id": "x"}, a | {"query_id": "b", "live_id": "y"}, b | {"query_id": "c", "live_id": "z"}]
    )
    return data


def test_each_livestream_uses_its_titles_as_hints(told):
    transcribe(told)
    assert [row["asr"] for row in rows_of(told)] == ["red mug+", "blue mug", "own"]
    assert transcripts(told)[0]["hints"] == "titles"


def test_transcripts_with_and_without_hints_are_not_mixed(told, capsys):
    transcribe(told, "--asr_hints", "none")
    assert rows_of(told)[0]["asr"] == "nothing" and transcripts(told)[0]["hints"] == "none"
    with pytest.raises(SystemExit):
        transcribe(told)
    assert "the language auto and the hints none; give --overwrite" in capsys.readouterr().err
    # A file of before there were hints goes on without them.
    header, *lines = (told / "transcripts.jsonl").read_text().splitlines()
    (told / "transcripts.jsonl").write_text("\n".join([header.replace(', "hints": "none"', ""), *lines]) + "\n")
    assert transcribe(told, "--asr_hints", "none") == 0


def test_finished_transcripts_are_not_repeated_after_an_interruption(data, ears, monkeypatch):
    rows = rows_of(data)
    write_rows(data, [rows[0], {**rows[1], "asr": ""}])
    calls = Ear.__call__

    def interrupted(self, samples):
        if self.heard:
            raise KeyboardInterrupt
        return calls(self, samples)

    monkeypatch.setattr(Ear, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        transcribe(data)
    assert "asr" not in rows_of(data)[0]
    monkeypatch.setattr(Ear, "__call__", calls)
    transcribe(data)
    assert [row["asr"] for row in rows_of(data)] == ["at2", "at1"] and ears[-1].heard == 1


def test_another_model_needs_overwrite(data, ears, capsys, monkeypatch):
    transcribe(data)
    with pytest.raises(SystemExit) as end:
        transcribe(data, "--language", "en")
    assert (
        end.value.code == 2
        and "was begun with the model ear, the language auto and the hints none" in capsys.readouterr().err
    )
    monkeypatch.setattr(Ear, "word", "on")
    transcribe(data, "--language", "en", "--overwrite")
    assert [row.get("asr") for row in rows_of(data)] == ["on2", "on1", None, None, None]
    # Again, nothing is left to do; and what stood in the rows at first is not forgotten.
    transcribe(data, "--language", "en", "--overwrite")
    assert ears[-1].heard == 0 and rows_of(data)[0]["asr"] == "on2"
    header, *lines = transcripts(data)
    assert header["language"] == "en"
    assert [(line["clip_id"], line["asr"], line["before"]) for line in lines] == [
        ("a", None, ""),
        ("a", "on2", "at2"),
        ("b", "on1", "own"),
    ]


def test_a_side_file_of_another_kind(data, ears, capsys):
    for content, words in (
        ("{}\n", "is not a file of transcripts"),
        ('{"format": "rice transcripts"}\n{}\n', "line 2"),
    ):
        (data / "transcripts.jsonl").write_text(content)
        with pytest.raises(SystemExit):
            transcribe(data, "--overwrite")
        assert words in capsys.readouterr().err


def test_sound_beside_frames(data, ears, write_show, tones):
    (data / "sound").mkdir()
    write_show("sound/d.mp4", [GREY] * 3, tones((0, 1), (0.5, 1)), codec="aac")
    transcribe(data, "--sound", data / "sound")
    assert rows_of(data)[3]["asr"] == "at1"


def lpr4m(folder):
    notes = folder / "annotations"
    notes.mkdir()
    clips = [f"{LIVE}-0-5000", f"{LIVE}-5000-10000", f"{LIVE}-10000-15000"]
    (notes / "test_videoid_to_gtimage.json").write_text(json.dumps({clip: ["p-0"] for clip in clips}))
    (notes / "test_videoid_asr.txt").write_text(f"{clips[0]}\t\n{clips[1]}\tpublished\n{clips[2]}\t\n")
    return notes / "test_videoid_asr.txt", clips


def test_lpr4m_by_clips_and_by_livestreams(tmp_path, ears, write_show, tones):
    file, clips = lpr4m(tmp_path)
    (tmp_path / "sound").mkdir()
    write_show(f"sound/{LIVE}.mkv", [GREY] * 15, tones((0, 3), (0.5, 1), (0, 4), (0.5, 1), (0, 6)))
    write_show(f"sound/{clips[2]}.mkv", [GREY] * 2, tones((0.5, 2)))
    transcribe(tmp_path, "--sound", tmp_path / "sound")
    assert file.read_text() == f"{clips[0]}\tat3\n{clips[1]}\tpublished\n{clips[2]}\tat0\n"
    transcribe(tmp_path, "--sound", tmp_path / "sound", "--overwrite")
    assert file.read_text().splitlines()[1] == f"{clips[1]}\tat3"


def test_lpr4m_uses_the_titles_of_a_livestream_as_hints(tmp_path, monkeypatch, write_show, tones):
    monkeypatch.setattr("retrieval_rice.stream.speech_models.load_transcriber", ToldEar)
    file, clips = lpr4m(tmp_path)
    notes = file.parent
    (notes / "test_liveid_to_gallery.json").write_text(json.dumps({LIVE: ["p-0", "q-0"], "other": ["r-0"]}))
    (notes / "test_image_title.txt").write_text("p-0\tred mug\nr-0\tcap\n")
    (tmp_path / "sound").mkdir()
    write_show(f"sound/{LIVE}.mkv", [GREY] * 15, tones((0.5, 15)))
    transcribe(tmp_path, "--sound", tmp_path / "sound")
    assert file.read_text().splitlines()[0] == f"{clips[0]}\tred mug+"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--splits", "train"], "has no clips_train.jsonl"),
        (["--sound", "nowhere"], "--sound nowhere is not a folder"),
        (["--language", "xx"], "does not know"),
        (["--asr_hints", "all"], "invalid choice: 'all'"),
    ],
)
def test_refusals(data, capsys, monkeypatch, arguments, words):
    def refuse(name, language, device):
        raise ValueError(f"The speech model {name} does not know the language {language!r}.")

    monkeypatch.setattr("retrieval_rice.stream.speech_models.load_transcriber", refuse)
    with pytest.raises(SystemExit) as end:
        transcribe(data, *arguments)
    assert end.value.code == 2 and words in capsys.readouterr().err
    # A model that was not loaded heard nothing, and another one may be asked.
    assert not (data / "transcripts.jsonl").exists()


def test_refusals_of_data(tmp_path, ears, capsys):
    lpr4m(tmp_path)
    for folder, arguments, words in (
        (tmp_path, [], "LPR4M has frames without sound"),
        (tmp_path, ["--sound", tmp_path, "--splits", "train"], "--splits of LPR4M must be test"),
        (tmp_path / "nowhere", [], "is neither a data set"),
    ):
        with pytest.raises(SystemExit):
            transcribe(folder, *arguments)
        assert words in capsys.readouterr().err
