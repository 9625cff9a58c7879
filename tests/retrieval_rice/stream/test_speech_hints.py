"""Hints for a speech model: which words, how many, and what is refused."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from retrieval_rice.stream.speech import Word
from retrieval_rice.stream.speech_hints import expect_titles, hint_titles, within
from retrieval_rice.stream.speech_models import WhisperTranscriber, whole_words

TITLES = ["Red mug, new", "RED bottle new", "blue mug (new)", "blue T-shirt 500 new", "【新款】红色 mug"]


def test_the_most_distinctive_titles_come_first():
    # Of five titles mug is in 3, red and blue are in 2, new is in 4: they tell as much as 2, 2, 2 and 1. A title is
    # worth that by word: 2 for "mug" alone, then 4/3 for "red bottle new", then 1, then nothing.
    expected = ["mug", "red bottle new", "blue t-shirt new", "red mug new", "blue mug new"]
    assert hint_titles([*TITLES, TITLES[0]], "en") == expected


def test_a_word_of_every_title_has_no_value():
    assert hint_titles(["new", "new shoe", "new mug"], "en") == ["new shoe", "new mug", "new"]
    assert hint_titles(["new mug", "New mug!"], "en") == ["new mug"]


def test_the_beginning_of_a_long_title_is_used():
    assert hint_titles(["mug " + " ".join("abcdefghijklmnopqrstuv")], "en") == ["mug a b c d e f g h i j k l m n o"]


def test_control_tokens_in_titles_are_plain_words():
    assert hint_titles(["red <|endoftext|> mug"], "en") == ["red endoftext mug"]


def test_equal_titles_keep_the_order_of_the_shop():
    titles = [f"w{i} x{i}" for i in range(50)]
    assert hint_titles(titles, "en") == titles


def test_the_order_equals_that_of_a_plain_greedy_search():
    """The plain twin: what each title would bring, again and again."""
    rng = random.Random(0)
    titles = [" ".join(rng.choices("abcdefghijkl", k=rng.randint(1, 6))) for _ in range(60)]
    left = list(dict.fromkeys(tuple(title.split()) for title in titles))
    counts = {word: sum(word in words for words in left) for words in left for word in words}
    worth = {word: min(count, len(left) - count) for word, count in counts.items()}
    known, expected = set(), []
    while left:
        best = max(left, key=lambda words: sum(worth[word] for word in set(words) - known) / len(words))
        left.remove(best)
        expected.append(" ".join(best))
        known |= set(best)
    assert hint_titles(titles, "en") == expected


@pytest.mark.parametrize(
    "titles, language", [([], "en"), (["", "【新款】红色", "42"], "en"), (TITLES, "zh"), (TITLES, "ja")]
)
def test_no_words_to_choose(titles, language):
    assert hint_titles(titles, language) == []


def test_hints_are_cut_between_titles():
    assert within(["red mug", "cap", "bottle"], 15, len) == "red mug, cap"
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
    assert [word.text for word, _ in whole_words((Word(0.0, 0.1, text), 1.0) for text in texts)] == words


def test_a_joined_word_spans_its_parts_with_their_lowest_probability():
    two, tone, mug = Word(0.0, 0.5, " two"), Word(0.5, 1.0, "-tone"), Word(1.0, 1.5, " mug")
    assert whole_words([(two, 0.9), (tone, 0.5), (mug, 0.8)]) == [(Word(0.0, 1.0, " two-tone"), 0.5), (mug, 0.8)]


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


def test_titles_are_cut_to_the_token_limit_of_the_model(ear):
    model = ear()
    told, count = expect_titles(model, TITLES)
    assert count == 5
    assert told(LOUD) == [Word(0.0, 0.5, " Red")]
    # 20 of 29 tokens, a space before the first word included.
    assert [call["hotwords"] for call in model.model.calls] == ["mug, red bottle new"]
    # The one that was given expects nothing still, so that two shops do not share theirs.
    model(LOUD)
    assert model.model.calls[-1]["hotwords"] is None


def test_voice_activity_detection_comes_first(ear):
    """Hints are words that a model writes gladly; what is no speech must not reach it."""
    told, _ = expect_titles(ear(), TITLES)
    told(LOUD)
    assert told.model.calls[-1]["vad_filter"] is True


def test_repeated_hints_are_left_out(ear):
    """In speech that it does not understand a model repeats its hints, of which it thinks nothing without them."""
    told, _ = expect_titles(ear(), TITLES)
    doubtful = [*parts(" a", " Red", " mug!", probability=0.01), *parts(" new.", probability=0.2)]
    told.model.heard = [
        parts(" so", " red", " mug", " New,", " t", "-shirt", probability=0.01),
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
        ({"detected": "en"}, "mug, red bottle new"),
        ({"detected": "zh"}, None),
        ({"detected": "en", "probability": 0.6}, None),
    ],
)
def test_a_detected_language_decides_the_hints(ear, known, hints):
    told, _ = expect_titles(ear(None, **known), TITLES)
    told(LOUD)
    assert told.model.calls[-1]["hotwords"] == hints
    assert told.language == (known["detected"] if "probability" not in known else None)


def test_each_shop_detects_its_own_language(ear):
    model = ear(None)
    told, _ = expect_titles(model, TITLES)
    told(LOUD)
    assert (told.language, model.language) == ("en", None)


def test_hints_without_effect_are_refused(ear):
    def plain(samples):
        return []

    assert expect_titles(plain, TITLES) == (plain, 0)
    with pytest.raises(ValueError, match="--asr_hints titles works with faster-whisper models only"):
        expect_titles(plain, TITLES, "titles")
    with pytest.raises(ValueError, match="the shop's titles have no words to expect in the language zh; leave it out"):
        expect_titles(ear("zh"), TITLES, "titles")
    with pytest.raises(ValueError, match="the shop's titles have no words; leave it out"):
        expect_titles(ear(None), ["", "新款"], "titles")
    told, count = expect_titles(ear(), TITLES, "none")
    assert count == 0 and told.hints("en") == ""
