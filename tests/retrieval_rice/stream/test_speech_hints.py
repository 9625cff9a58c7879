"""Words that a speech model is told to expect: which ones, how many, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest

from retrieval_rice.stream.speech import Word
from retrieval_rice.stream.speech_hints import expect_titles, hint_words, within
from retrieval_rice.stream.speech_models import WhisperTranscriber, whole_words

TITLES = ["Red mug, new", "Red bottle new", "blue mug (new)", "blue T-shirt 500 new", "【新款】红色 mug"]


def test_what_stands_in_half_of_the_titles_tells_most():
    # Of five different titles: mug 3, new 4, red 2, blue 2, the others 1.
    assert hint_words([*TITLES, TITLES[0]], "en") == ["red", "mug", "blue", "new", "bottle", "t-shirt"]


def test_a_word_of_every_title_tells_nothing_unless_there_is_one_title():
    assert hint_words(["new mug", "new shoe"], "en") == ["mug", "shoe"]
    assert hint_words(["new mug", "new mug"], "en") == ["new", "mug"]


@pytest.mark.parametrize(
    "titles, language", [([], "en"), (["", "【新款】红色", "42"], "en"), (TITLES, "zh"), (TITLES, "ja")]
)
def test_no_words_to_choose(titles, language):
    assert hint_words(titles, language) == []


def test_words_are_cut_between_words():
    assert within(["red", "mug", "bottle", "of"], 7, len) == "red mug"
    assert within(["umbrella"], 7, len) == "" and within([], 7, len) == ""


def parts(*texts, probability=1.0):
    """As faster-whisper gives them, half a second each."""
    return [
        SimpleNamespace(start=i / 2, end=i / 2 + 0.5, word=text, probability=probability)
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize(
    "texts, words",
    [
        ((" T", "-shirt", " R", "&D", " 1", ".5"), [" T-shirt", " R&D", " 1.5"]),
        (("红", "色", "T", "恤", "，", "好"), ["红", "色T恤", "，", "好"]),
        (("สวั", "สดี"), ["สวั", "สดี"]),
        ((), []),
    ],
)
def test_parts_of_words_are_joined(texts, words):
    assert [word.text for word, _ in whole_words(parts(*texts))] == words


def test_a_joined_word_lasts_as_long_as_its_parts_and_is_as_likely_as_the_least():
    (word, probability), _ = whole_words([*parts(" two"), *parts("", "-tone", " mug", probability=0.5)[1:]])
    assert word == Word(0.0, 1.0, " two-tone") and probability == 0.5


class Whisper:
    """Remembers how it is called; a token is a letter."""

    max_length = 60
    supported_languages = ["en", "zh"]

    def __init__(self, detected="en", probability=0.9):
        self.calls, self.heard = [], [parts(" Red")]
        self.info = SimpleNamespace(language=detected, language_probability=probability)
        self.hf_tokenizer = SimpleNamespace(encode=lambda text, **_: SimpleNamespace(ids=list(text)))

    def transcribe(self, samples, **settings):
        self.calls.append(settings)
        return iter([SimpleNamespace(words=words) for words in self.heard] if samples.any() else []), self.info


@pytest.fixture
def ear():
    def make(language="en", **known):
        model = WhisperTranscriber.__new__(WhisperTranscriber)
        model.model, model.name, model.language = Whisper(**known), "ear", language
        return model.expecting(())

    return make


LOUD = np.ones(16000, np.float32)


def test_titles_are_told_within_what_the_model_takes(ear):
    model = ear()
    told, count = expect_titles(model, TITLES)
    assert count == 6
    assert told(LOUD) == [Word(0.0, 0.5, " Red")]
    # 29 tokens, a space before the first word included.
    assert [call["hotwords"] for call in model.model.calls] == ["red mug blue new bottle"]
    # The one that was given expects nothing still, so that two shops do not share theirs.
    model(LOUD)
    assert model.model.calls[-1]["hotwords"] is None


def test_speech_is_looked_for_first(ear):
    """Hints are words that a model writes gladly; what is no speech must not reach it."""
    told, _ = expect_titles(ear(), TITLES)
    told(LOUD)
    assert told.model.calls[-1]["vad_filter"] is True


def test_hints_that_are_only_repeated_are_not_heard(ear):
    """In speech that it does not understand a model repeats its hints, of which it thinks nothing without them."""
    told, _ = expect_titles(ear(), TITLES)
    doubtful = [*parts(" a", " Red", " mug!", probability=0.01), *parts(" new.", probability=0.2)]
    told.model.heard = [
        parts(" so", " red", " mug", " Blue,", " t", "-shirt", probability=0.01),
        doubtful,
        parts(" wait", " bottles", probability=0.01),
    ]
    said = [" a", " Red", " mug!", " new.", " wait", " bottles"]
    # Only what was told is doubted, and " t-shirt" was beyond what the model takes.
    assert [word.text for word in told(LOUD)] == [" so", " t-shirt", *said]
    told.model.max_length = 200
    told, _ = expect_titles(told, TITLES)
    assert [word.text for word in told(LOUD)] == [" so", *said]
    # A model that expects nothing repeats nothing.
    plain, _ = expect_titles(told, ())
    assert len(plain(LOUD)) == 11


@pytest.mark.parametrize(
    "known, hints",
    [
        ({"detected": "en"}, "red mug blue new bottle"),
        ({"detected": "zh"}, None),
        ({"detected": "en", "probability": 0.6}, None),
    ],
)
def test_a_detected_language_chooses_the_words(ear, known, hints):
    told, _ = expect_titles(ear(None, **known), TITLES)
    told(LOUD)
    assert told.model.calls[-1]["hotwords"] == hints
    assert told.language == (known["detected"] if "probability" not in known else None)


def test_each_shop_hears_its_own_language(ear):
    model = ear(None)
    told, _ = expect_titles(model, TITLES)
    told(LOUD)
    assert (told.language, model.language) == ("en", None)


def test_hints_that_would_change_nothing_are_refused(ear):
    def plain(samples):
        return []

    assert expect_titles(plain, TITLES) == (plain, 0)
    with pytest.raises(ValueError, match="--asr_hints titles needs a faster-whisper model"):
        expect_titles(plain, TITLES, "titles")
    with pytest.raises(ValueError, match="the shop's titles have no words to expect in the language zh; leave it out"):
        expect_titles(ear("zh"), TITLES, "titles")
    with pytest.raises(ValueError, match="the shop's titles have no words; leave it out"):
        expect_titles(ear(None), ["", "新款"], "titles")
    told, count = expect_titles(ear(), TITLES, "none")
    assert count == 0 and told.hints("en") == ""
