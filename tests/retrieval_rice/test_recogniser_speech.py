"""Speech in a stream reaches the model window by window, and never affects recognition from the pictures."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, CLIPVisionConfig

from modeling_rice import RiceClips, RiceConfig, RiceFrames, RiceModel
from processing_rice import build_processor, train_tokenizer
from processing_rice.video_container_rice import open_container
from retrieval_rice.index import Answer, GalleryIndex, Hit
from retrieval_rice.recogniser import Recogniser
from retrieval_rice.stream.source import Frame, VideoStream
from retrieval_rice.stream.speech import Hearing, Word
from retrieval_rice.stream.speech_models import listen
from retrieval_rice.stream.timeline import Hysteresis
from rice_cli import main

GREY = (128, 128, 128)
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
EXACT = Hysteresis(enter=0.5, leave=0.5, smoothing=1.0, patience=1)


class Processor:
    """A frame is its mean colour, ASR what it says."""

    video_processor = SimpleNamespace(num_frames=4)

    def __call__(self, videos=None, asr=None):
        if videos is None:
            return {"asr_input_ids": torch.tensor([[ord(letter) for letter in asr[0]]])}
        clips = [[np.asarray(frame).mean(axis=(0, 1)) for frame in clip] for clip in videos]
        return {"pixel_values_videos": torch.tensor(np.array(clips), dtype=torch.float32)}


class Model:
    """A clip is the colour of its frames, and the colour that is said counts three times as much as all of them."""

    training, config = False, SimpleNamespace(text_config="letters")

    def __init__(self):
        self.said = []

    def encode_frames(self, pixel_values, patch_mask=None):
        palette = torch.tensor([*COLOURS.values(), GREY], dtype=torch.float32)
        nearest = torch.cdist(pixel_values, palette).argmin(dim=-1)
        return RiceFrames(nearest, torch.nn.functional.one_hot(nearest, 3).float())

    def pool_frames(self, frames, asr_input_ids=None):
        shares = frames.features.mean(dim=0)
        text = "" if asr_input_ids is None else "".join(map(chr, asr_input_ids[0].tolist()))
        self.said.append(text)
        for i, name in enumerate(COLOURS):
            shares[i] += 3 * (name in text)
        return RiceClips(embeds=(shares / shares.sum())[None])


class Index:
    calibration = SimpleNamespace(threshold=0.5, rerank=2)

    def live_ids(self):
        return []

    def search(self, clips, live_id=None, top_k=10, rerank=100):
        shares = clips.embeds[0][:2].tolist()
        hits = [Hit(name, name, "", name, "", s, s, None, s) for name, s in zip(COLOURS, shares)]
        hits.sort(key=lambda hit: -hit.confidence)
        return [Answer(hits, False, hits[0].confidence)]


def recogniser():
    return Recogniser(Model(), Processor(), Index())


def frames(colour=GREY, seconds=20):
    return [Frame(float(i), Image.new("RGB", (8, 8), colour)) for i in range(seconds)]


def spans(segments):
    return [(s.start_s, s.end_s, s.hit and s.hit.product_id) for s in segments]


def run(speech, source=None, **settings):
    tool = recogniser()
    settings = {"fps": 1.0, "hysteresis": EXACT, **settings}
    return list(tool.stream(frames() if source is None else source, speech=speech, **settings)), tool.model.said


def test_windows_get_the_words_around_them():
    segments, said = run([(9.5, 10.0, "red"), (10.5, 11.0, "mug")], asr_before_s=2.0, asr_after_s=1.0)
    # A window is 4 s long; words end at 10 and 11, and count up to two seconds later.
    assert said[:5] == [""] * 5 and said[5] == "red" and said[6] == "red mug" and said[12] == "red mug"
    assert said[13] == "mug" and said[14] == ""
    assert [product for _, _, product in spans(segments)] == [None, "red", None]
    assert [[word.text for word in segment.said] for segment in segments][1] == ["red", "mug"]


def test_sources_give_words_or_triples():
    triples = run([(3.0, 4.0, "blue")])
    assert run(iter([Word(3.0, 4.0, "blue")])) == triples
    assert run(Hearing([(3.0, 4.0, "blue")])) == triples
    assert "blue" in triples[1]


def forever():
    time.sleep(30)
    yield (0, 1, "red")


def broken():
    yield (0.0, 0.1, "")
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    "speech",
    [[], [(float("nan"), 1, "red"), "red", (0, 1), (0, 1, "")], broken(), forever(), [(1e9, 1e9, "red")]],
    ids=["silence", "no words", "broken", "never comes", "after the end"],
)
def test_words_do_not_affect_the_picture(speech):
    source = frames(COLOURS["blue"], 6) + [
        Frame(6.0 + i, frame.picture) for i, frame in enumerate(frames(COLOURS["red"], 6))
    ]
    alone = spans(recogniser().stream(source, fps=1.0, hysteresis=EXACT))
    start = time.monotonic()
    assert spans(run(speech, source)[0]) == alone == [(0.0, 6.0, "blue"), (6.0, 12.0, "red")]
    assert time.monotonic() - start < 5


def test_without_speech_there_are_no_words():
    segments = list(recogniser().stream(frames(), fps=1.0))
    assert segments[0].said is None


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"speech": "base"}, "an iterable of words"),
        ({"speech": None, "asr_before_s": 3.0}, "`asr_before_s` belongs to `speech`"),
        ({"speech": [], "asr_after_s": -1.0}, "`asr_after_s` must be a number"),
        ({"speech": [], "asr_before_s": float("nan")}, "`asr_before_s` must be a number"),
    ],
)
def test_invalid_sources_of_words_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        recogniser().stream(frames(), **settings)
    tool = recogniser()
    tool.model.config = SimpleNamespace(text_config=None)
    with pytest.raises(ValueError, match="The model reads no text"):
        tool.stream(frames(), speech=[])


class Ear:
    """A speech model: hears "red" in loud sound, at its middle."""

    name, language = "ear", "en"

    def __init__(self, delay_s=0.0):
        self.delay_s, self.heard_s = delay_s, 0.0

    def __call__(self, samples):
        time.sleep(self.delay_s)
        self.heard_s += len(samples) / 16000
        (places,) = np.nonzero(np.abs(samples) > 0.1)
        if not len(places):
            return []
        middle = (places[0] + places[-1]) / 32000
        return [Word(middle, middle + 0.1, " red")]


def test_sound_of_a_file_is_transcribed_before_its_windows_are_scored(write_show, tones):
    path = write_show("show.mkv", [GREY] * 60, tones((0, 40), (0.5, 1), (0, 19)))
    stream = VideoStream(path, 1.0)
    heard = listen(stream, Ear(delay_s=0.1))
    segments, _ = run(Hearing(heard, waits=stream.is_recording), stream, asr_before_s=1.0, asr_after_s=0.0)
    (before, said, after) = spans(segments)
    assert (before[2], said[2], after[2]) == (None, "red", None)
    # Windows from 36.6 to 41.6 seconds are given what is said at 40.5.
    assert said[0] == pytest.approx(38.5, abs=1) and said[1] == pytest.approx(43.5, abs=1)


def test_sound_of_a_live_source_is_transcribed_while_reading(write_show, tones, monkeypatch):
    path = write_show("show.ts", [GREY] * 30, tones((0, 10), (0.5, 1), (0, 19)), codec="mp2")
    monkeypatch.setattr("retrieval_rice.stream.source.is_address", lambda source: True)
    monkeypatch.setattr("retrieval_rice.stream.source._is_recording", lambda container: False)
    stream = VideoStream(
        "rtsp://a/b", 1.0, max_reconnects=0, queue_size=1000, opener=lambda source: open_container(path)
    )
    ear = Ear()
    heard = listen(stream, ear)
    words = Hearing(heard, waits=stream.is_recording)
    assert stream.live and not stream.is_recording

    def slowly():
        for frame in stream:
            time.sleep(0.02)
            yield frame

    run(words, slowly(), asr_before_s=30.0)
    assert ear.heard_s == pytest.approx(30.0, abs=1.0)
    assert words.counts.words == 1 and heard.counts.skipped_s == 0
    assert stream.counts.frames == 30


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A tiny RICE that reads text, in a folder, and an index of two pictures."""
    folder = tmp_path_factory.mktemp("shop")
    torch.manual_seed(0)
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = train_tokenizer(["red mug", "blue mug"] * 20, vocab_size=400)
    config = RiceConfig(
        vision_config=CLIPVisionConfig(**tiny, image_size=32, patch_size=8),
        text_config=BertConfig(**tiny, vocab_size=len(tokenizer)).to_dict(),
        text_score_weight=0.5,
        projection_dim=16,
        use_decoder=False,
    )
    model = RiceModel(config).eval()
    processor = build_processor(tokenizer, image_size=32, patch_size=8, num_frames=4)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows = [
        {"image_id": n, "product_id": n, "image": Image.new("RGB", (32, 32), c), "title": f"{n} mug"}
        for n, c in COLOURS.items()
    ]
    GalleryIndex.build(model, processor, rows, progress=False, dtype="float32").save(folder / "index")
    plain = RiceModel(RiceConfig(vision_config=config.vision_config, projection_dim=16, use_decoder=False)).eval()
    plain.save_pretrained(folder / "plain")
    processor.save_pretrained(folder / "plain")
    GalleryIndex.build(plain, processor, rows, progress=False, dtype="float32").save(folder / "plain_index")
    return folder


def rice(shop, source, *arguments, model="model", index="index"):
    given = ["--shop", shop / index, "--model", shop / model, "--device", "cpu"]
    return main(["recognise", str(source), *map(str, [*given, *arguments])])


def test_the_command_transcribes_sound(shop, write_show, tones, tmp_path, capsys, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "retrieval_rice.stream.speech_models.load_transcriber", lambda *settings: loaded.append(settings) or Ear()
    )
    path = write_show("show.mkv", [(200, 30, 30)] * 8, tones((0, 2), (0.5, 1), (0, 5)))
    files = ("--jsonl", tmp_path / "a.jsonl", "--vtt", tmp_path / "a.vtt")
    assert rice(shop, path, "--asr", "ear", "--language", "en", "--asr_after", "1", *files) == 0
    assert loaded == [("ear", "en", "cpu")]
    assert "1 words transcribed" in capsys.readouterr().err
    (line,) = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert line["asr"] == "red" and (line["start_s"], line["end_s"]) == (0.0, 8.0)
    cues = (tmp_path / "a.vtt").read_text().split("\n\n")
    assert cues[1].endswith("%)") and cues[2].startswith("00:00:02.") and cues[2].endswith("\n(red)")


class ToldEar(Ear):
    """Says how many titles it expects."""

    titles = ()

    def expecting(self, titles):
        ear = ToldEar()
        ear.titles = list(titles)
        return ear

    def __call__(self, samples):
        return [Word(0.0, 0.1, " ".join(self.titles) or "nothing")]


@pytest.mark.parametrize(
    "arguments, heard",
    [((), "red mug blue mug"), (("--asr_hints", "titles"), "red mug blue mug"), (("--asr_hints", "none"), "nothing")],
)
def test_the_speech_model_gets_titles_as_hints(
    shop, write_show, tones, tmp_path, capsys, monkeypatch, arguments, heard
):
    monkeypatch.setattr("retrieval_rice.stream.speech_models.load_transcriber", lambda *settings: ToldEar())
    path = write_show("show.mkv", [GREY] * 4, tones((0.5, 4)))
    assert rice(shop, path, "--asr", "ear", "--jsonl", tmp_path / "a.jsonl", *arguments) == 0
    assert json.loads((tmp_path / "a.jsonl").read_text())["asr"] == heard
    told = "the speech model gets the words of 2 titles of the shop as hints"
    assert (told in capsys.readouterr().err) == (heard != "nothing")


def test_hints_for_a_speech_model_without_hints(shop, write_show, capsys, monkeypatch):
    monkeypatch.setattr("retrieval_rice.stream.speech_models.load_transcriber", lambda *settings: Ear())
    path = write_show("bare.mkv", [GREY] * 2)
    with pytest.raises(SystemExit) as end:
        rice(shop, path, "--asr", "ear", "--asr_hints", "titles")
    assert end.value.code == 2 and "--asr_hints titles works with faster-whisper" in capsys.readouterr().err


def test_the_command_reads_subtitles(shop, write_show, tmp_path, capsys):
    path = write_show("show.mkv", [(200, 30, 30)] * 8, cues=[(2.0, 3.0, "a <b>red</b> mug")])
    assert rice(shop, path, "--subtitles", "track", "--jsonl", tmp_path / "a.jsonl") == 0
    assert json.loads((tmp_path / "a.jsonl").read_text())["asr"] == "a red mug"
    assert "1 words read" in capsys.readouterr().err


def test_missing_sound_is_reported_once_and_the_picture_continues(shop, write_show, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("retrieval_rice.stream.speech_models.load_transcriber", lambda *settings: Ear())
    Image.new("RGB", (32, 32)).save(tmp_path / "1.png")
    for source in (write_show("bare.mkv", [GREY] * 5), tmp_path):
        assert rice(shop, source, "--asr", "ear") == 0
        captured = capsys.readouterr()
        assert captured.err.count("has no sound; only its pictures are used") == 1
        assert len(captured.out.strip().splitlines()) == 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--asr", "nowhere/at/all"], "There is no folder nowhere/at/all with a speech model"),
        (["--subtitles", "nowhere.srt"], "There is no subtitle file nowhere.srt"),
        (["--subtitles", "track"], "holds no text subtitles"),
        (["--language", "en"], "--language belongs to --asr"),
        (["--asr_hints", "none"], "--asr_hints belongs to --asr"),
        (["--asr_hints", "prices"], "invalid choice: 'prices'"),
        (["--subtitles", "track", "--asr_hints", "titles"], "--asr_hints belongs to --asr"),
        (["--asr_before", "3"], "--asr_before belongs to --asr or --subtitles"),
        (["--subtitles", "track", "--asr_after", "-1"], "--asr_after must be a number of seconds"),
        (["--subtitles", "track", "--language", "en"], "--language belongs to --asr"),
    ],
)
def test_the_command_refuses_in_one_sentence(shop, write_show, tmp_path, capsys, arguments, words):
    path = write_show("bare.mkv", [GREY] * 2)
    with pytest.raises(SystemExit) as end:
        rice(shop, path, *arguments, "--vtt", tmp_path / "a.vtt")
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and message.startswith("rice recognise: error: ") and words in message
    # Nothing stands in the way of the next try.
    assert not (tmp_path / "a.vtt").exists()


def test_a_model_that_reads_no_text_is_refused(shop, write_show, capsys):
    for arguments in (["--asr", "base"], ["--subtitles", "a.srt"]):
        with pytest.raises(SystemExit):
            rice(shop, "show.mkv", *arguments, model="plain", index="plain_index")
        assert f"{arguments[0]} needs a model that reads text" in capsys.readouterr().err


def test_windows_with_words_are_scored_like_clips_with_asr(shop):
    """Of the real model: the pooled window with its words equals the clip that is encoded with them."""
    model = RiceModel.from_pretrained(shop / "model").eval()
    processor = build_processor(train_tokenizer(["red mug", "blue mug"] * 20, vocab_size=400), 32, 8, 4)
    index = GalleryIndex.load(shop / "index", model)
    pictures = [Image.new("RGB", (32, 32), COLOURS["blue"])] * 4
    expected = Recogniser(model, processor, index).recognise(pictures, asr="red mug")
    silent = Recogniser(model, processor, index).recognise(pictures)
    stream = [Frame(float(i), picture) for i, picture in enumerate(pictures)]
    for speech, answer in (([(0.0, 1.0, "red mug")], expected), ([], silent)):
        (segment,) = Recogniser(model, processor, index).stream(stream, fps=1.0, speech=speech)
        assert segment.confidence == pytest.approx(answer.hits[0].confidence, abs=1e-5)
        assert segment.hit.score == pytest.approx(answer.hits[0].score, abs=1e-5)
    assert expected.hits[0].score != pytest.approx(silent.hits[0].score, abs=1e-3)
