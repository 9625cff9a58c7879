"""The speech study: its measures worked out by hand, its streams, and the lines that it prints."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from retrieval_rice.stream.speech import Word

av = pytest.importorskip("av")


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import bench_speech

    yield bench_speech
    sys.modules.pop("bench_speech")


@pytest.mark.parametrize(
    "said, heard, errors",
    [
        ("a red mug", "a red mug", 0),
        ("a red mug", "a red mud", 1),
        ("a red mug", "", 3),
        ("", "a red", 2),
        ("look at the red mug", "look red mug now", 3),
    ],
)
def test_word_errors(study, said, heard, errors):
    assert study.word_errors(said.split(), heard.split()) == errors


def test_tokens_and_english(study):
    assert study.tokens("Okay, GUYS: look-here!") == ["okay", "guys", "look", "here"]
    assert study.tokens("321 the link") == ["three", "two", "one", "the", "link"]
    assert [study.is_english(text) for text in ("red mug", "红色", "", " ", "red 红")] == [
        True,
        False,
        False,
        False,
        False,
    ]


@pytest.fixture
def streams(study, monkeypatch, tmp_path):
    """Two livestreams; a text is as many tenths of a second long as it has letters."""
    spoken = []

    def speak(text, voice, folder):
        spoken.append((text, voice))
        return 0.5 * np.sin(np.arange(1600 * len(text)) / 5).astype(np.float32)

    monkeypatch.setattr(study, "speak", speak)
    frame = tmp_path / "frame.png"
    Image.new("RGB", (64, 64), (200, 30, 30)).save(frame)
    rows = [
        {"clip_id": str(i), "live_id": live, "asr": asr, "relevant": ["p"], "frames": [{"path": str(frame)}] * 2}
        for i, (live, asr) in enumerate(
            [("x", "red mug"), ("x", "红"), ("y", "a" * 100), ("x", "blue shoe"), ("z", "b")]
        )
    ]
    return study.build_streams(rows, 2, 10, tmp_path), spoken


def test_clips_follow_each_other_in_time(streams):
    (first, second), spoken = streams
    assert [clip.row["asr"] for clip in first.clips] == ["red mug", "blue shoe"]
    assert [(clip.start_s, clip.said_s, clip.end_s) for clip in first.clips] == [(0.0, 0.6, 8.0), (8.0, 8.6, 16.0)]
    assert second.end_s == pytest.approx(11.2)
    voices = dict(spoken)
    assert voices["red mug"] == voices["blue shoe"] != voices["a" * 100] and "b" not in voices


def test_a_stream_has_pictures_and_words_at_their_times(study, streams, tmp_path):
    from retrieval_rice.stream.source import open_source, open_stream
    from retrieval_rice.stream.speech_sound import FileSound

    (stream, _), _ = streams
    study.mux(tmp_path / "a.mp4", stream, 20.0, np.random.default_rng(0))
    assert len(list(open_stream(tmp_path / "a.mp4", 5.0))) == 80
    sound = np.zeros(17 * study.RATE)
    for block in FileSound(tmp_path / "a.mp4", opener=open_source):
        place = round(block.start_s * study.RATE)
        sound[place : place + len(block.samples)] = block.samples
    power = [np.square(sound[round(a * 16000) : round(b * 16000)]).mean() for a, b in ((0.7, 1.2), (2, 7), (8.7, 9.4))]
    assert 10 * np.log10(power[0] / power[1]) == pytest.approx(20, abs=1.5)
    assert power[2] == pytest.approx(power[0], rel=0.2)


def test_true_and_transcribed_words_of_a_clip(study, streams):
    (stream, _), _ = streams
    words = study.true_words(stream, [clip.row["asr"] for clip in stream.clips])
    assert words[:2] == [Word(0.6, pytest.approx(0.95), "red"), Word(pytest.approx(0.95), pytest.approx(1.3), "mug")]
    assert [study.text_of(clip, words) for clip in stream.clips] == ["red mug", "blue shoe"]


def test_a_missing_text_has_no_words(study, streams):
    (stream, _), _ = streams
    assert study.true_words(stream, ["", "shoe"]) == [Word(8.6, pytest.approx(9.5), "shoe")]


def test_name_words_in_a_transcript(study):
    names = study.name_words()
    assert {"red", "zigzag", "two", "tone", "mug", "bolt"} <= names and "guys" not in names
    said, heard = ["a red red mug", "look", "blue cap"], ["red mud a", "red", "blue cap cap"]
    assert study.name_recall([t.split() for t in said], [t.split() for t in heard], names) == 3 / 5
    assert study.as_sentence("red mug") == "Red mug."


def test_transcripts_are_cached(study, streams, tmp_path):
    (stream, other), _ = streams
    words = [Word(0.6, 0.9, "red"), Word(0.9, 1.3, "杯")]
    study.Heard(tmp_path / "heard", "20dB-none.jsonl").add(stream, words)
    again = study.Heard(tmp_path / "heard", "20dB-none.jsonl")
    assert again.of(stream) == words and again.of(other) is None
    # Of a stream that was cut otherwise nothing is known.
    stream.clips.pop()
    assert again.of(stream) is None


def test_a_stream_is_transcribed_with_and_without_titles(study, streams, tmp_path, monkeypatch):
    calls = []

    class Ear:
        def __init__(self, titles=()):
            self.titles = titles

        def expecting(self, titles):
            return Ear(list(titles))

        def __call__(self, samples):
            calls.append(self.titles)
            return [Word(0.7, 0.9, "red" if self.titles else "read")]

    monkeypatch.setattr("retrieval_rice.stream.speech_models.load_transcriber", lambda *settings: Ear())
    (stream, _), _ = streams
    index = SimpleNamespace(titles=lambda live_id: [f"red mug of {live_id}"])
    options = study.parse_arguments(
        ["--model", "m", "--asr", "a", "--snr", "20", "--heard_dir", str(tmp_path / "kept")]
    )
    plain, told = study.heard(options, [stream], index, tmp_path)
    assert (plain.name, told.name) == ("heard at 20 dB", "heard at 20 dB, titles expected")
    assert plain.texts == [["read", ""]] and told.texts == [["red", ""]] and calls == [[], ["red mug of x"]]
    assert plain.cpu_s_per_s_of_sound > 0
    again, _ = study.heard(options, [stream], index, tmp_path)
    assert again.texts == plain.texts and again.cpu_s_per_s_of_sound is None and len(calls) == 2


def test_lines_have_intervals_and_the_difference_to_no_text(study):
    results = [{"text": "none", "hits": np.array([0.0, 1, 0, 0])}, {"text": "true", "hits": np.array([1.0, 1, 1, 0])}]
    none, true = study.with_intervals(results, ["x", "x", "y", "y"])
    assert (none["R@1"], true["R@1"], true["over_none"]) == (0.25, 0.75, 0.5) and "over_none" not in none
    assert true["kept"] == 1.0
    assert true["over_none_ci95"][0] <= 0.5 <= true["over_none_ci95"][1] and true["livestreams"] == 2


def test_the_spoken_text_is_the_source_of_the_noisy_asr(study, tmp_path):
    from data_rice.mini_lpr4m.writer import render_mini_lpr4m

    sizes = {"num_train_lives": 0, "num_test_lives": 2, "products_per_live": 6, "num_frames": 1, "image_size": 32}
    folder = render_mini_lpr4m(tmp_path / "mini", **sizes, num_workers=1, progress=False)
    lines = (folder / "annotations" / "test_videoid_asr.txt").read_text(encoding="utf-8").splitlines()
    heard = dict(line.split("\t") for line in lines)
    relevant = study.json.loads((folder / "annotations" / "test_videoid_to_gtimage.json").read_text())
    rows = [
        {"clip_id": clip, "product_id": ids[0].rpartition("-")[0], "asr": heard[clip]}
        for clip, ids in relevant.items()
    ]
    said = study.as_said(rows, folder)
    assert [bool(row["asr"]) for row in said] == [bool(row["asr"]) for row in rows]
    # Letters are dropped or doubled, and none is new.
    assert all(set(before["asr"]) <= set(after["asr"]) for before, after in zip(rows, said))
    assert any(len(before["asr"]) < len(after["asr"]) for before, after in zip(rows, said))
