"""The trained tokenizer against SentencePiece itself, its round trips and its refusals."""

import random
import sys

import pytest
import sentencepiece
from transformers import AutoTokenizer, BertTokenizer

from processing_rice.tokenization_rice import fold_texts, train_sentencepiece, train_tokenizer, wrap_sentencepiece

CHINESE = "这款连衣裙是今年的新款面料非常舒服大家可以看一下颜色有黑色白色红色尺码全主播身高一米六五穿的是码链接在一号"
ENGLISH = "the new women dress is very soft and comfortable size large black white red link number one please".split()
AWKWARD = [
    "",
    " ",
    "保湿面霜 50ml 限量版!!",
    "Nike Air-Max 270 (黑/白) US-9.5",
    "全新\u3000宽\t空格\n换行",
    "emoji 😀👩‍👩‍👧 和 生僻字 𠮷 龘",
    "e\u0301 é ﬁ Ａ１，。",
    "</s>不是结尾<s> <pad><unk>",
    "<0x41><0xE4> <0x",
    "zero\u200bwidth and \x00",
    "2.99元 3件8折 #1 @home ~`^",
    "▁ already ▁marked",
]


def _sentence(rng: random.Random) -> str:
    chinese = "".join(rng.choices(CHINESE, k=rng.randint(1, 25)))
    english = " ".join(rng.choices(ENGLISH, k=rng.randint(1, 8)))
    return rng.choice(
        [chinese, english, f"{chinese} {english}", f"{english}{chinese}", f"{chinese}{rng.randint(1, 99)}g"]
    )


def _arbitrary_text(rng: random.Random) -> str:
    ranges = [(0x21, 0x7E), (0x20, 0x20), (0xA1, 0x24F), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF)]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 20)))


def _single_spaced(text: str) -> str:
    return " ".join(text.replace("▁", " ").split())


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    rng = random.Random(0)
    return [_sentence(rng) for _ in range(1500)] + AWKWARD


@pytest.fixture(scope="module")
def model_proto(corpus) -> bytes:
    return train_sentencepiece(corpus)


@pytest.fixture(scope="module")
def tokenizer(model_proto):
    return wrap_sentencepiece(model_proto)


def test_ids_equal_sentencepiece(model_proto, tokenizer):
    sp = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
    rng = random.Random(1)
    texts = AWKWARD + [_sentence(rng) for _ in range(1000)] + [_arbitrary_text(rng) for _ in range(1000)]
    num_ties = 0
    for text in map(_single_spaced, texts):
        expected = sp.encode(text)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids != expected:
            assert sorted(ids) == sorted(expected), text
            num_ties += 1
    assert num_ties <= 0.01 * len(texts)
    assert len(tokenizer) == sp.get_piece_size()


def test_decode_returns_the_text_up_to_whitespace(tokenizer):
    rng = random.Random(2)
    for text in AWKWARD + [_sentence(rng) for _ in range(200)] + [_arbitrary_text(rng) for _ in range(500)]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == _single_spaced(text)
        assert tokenizer.unk_token_id not in ids


def test_special_tokens_written_in_a_text_stay_text(tokenizer):
    ids = tokenizer("a</s>b<pad>")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert not set(ids[1:-1]) & set(tokenizer.all_special_ids)


def test_batch_is_padded_and_truncated(tokenizer):
    batch = tokenizer(["黑色", "black dress " * 100], padding=True, truncation=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 64)
    num_tokens = int(batch["attention_mask"][0].sum())
    assert batch["attention_mask"][0].tolist() == [1] * num_tokens + [0] * (64 - num_tokens)
    assert set(batch["input_ids"][0, num_tokens:].tolist()) == {tokenizer.pad_token_id}
    assert batch["input_ids"][1, -1] == tokenizer.eos_token_id
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_training_is_deterministic(corpus, model_proto):
    assert train_sentencepiece(iter(corpus)) == model_proto


def test_round_trip_through_auto_tokenizer_without_sentencepiece(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert len(loaded) == len(tokenizer)
    assert loaded.model_max_length == 64
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    for text in AWKWARD + [" ".join(ENGLISH), CHINESE]:
        assert dict(loaded(text)) == dict(tokenizer(text))
        assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == _single_spaced(text)


@pytest.mark.parametrize("text", ["a", "你", "😀", "\x00", "x" * 5000 + "长" * 5000])
def test_tiny_corpus_gives_a_smaller_vocabulary(text):
    tokenizer = train_tokenizer([text], model_max_length=20_000)
    assert 355 <= len(tokenizer) < 400
    for sample in [text, "从没见过 never seen 🧸"]:
        assert tokenizer.decode(tokenizer(sample)["input_ids"], skip_special_tokens=True) == sample


def test_vocab_size_is_an_upper_bound_with_more_characters_than_entries():
    rng = random.Random(3)
    texts = ["".join(chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(20)) for _ in range(300)]
    tokenizer = train_tokenizer(texts, vocab_size=500)
    assert len(tokenizer) <= 500
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"], skip_special_tokens=True) == texts[0]


def test_words_of_the_corpus_become_pieces(tokenizer):
    assert tokenizer.tokenize("comfortable") == ["▁comfortable"]
    assert len(tokenizer.tokenize("comfortable women dress")) == 3


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        (["ok", None], {}, TypeError, r"texts\[1\] is a NoneType"),
        ("single string", {}, TypeError, "pass a list of strings"),
        ([], {}, ValueError, "no visible character"),
        (["", " \n"], {}, ValueError, "no visible character"),
        (["ok", "\ud800"], {}, ValueError, r"texts\[1\] is not valid Unicode"),
        (["ok"], {"vocab_size": 399}, ValueError, "vocab_size is 399; use at least 400"),
        (["ok"], {"model_max_length": 2}, ValueError, "model_max_length is 2; use at least 3"),
    ],
)
def test_bad_input_is_refused(texts, options, error, message):
    with pytest.raises(error, match=message):
        train_tokenizer(texts, **options)


def test_missing_sentencepiece_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match="pip install sentencepiece"):
        train_tokenizer(["ok"])


@pytest.mark.parametrize(
    "written, plain",
    [
        ("Red Mug.", "red mug"),
        ("So pretty, right?! Red mug…", "so pretty right red mug"),
        ("ＲＥＤ　ｍｕｇ！红色，马克杯。好、看", "red mug 红色 马克杯 好 看"),
        ("T恤 T-Shirt", "t恤 t-shirt"),
        ("1.5 L at 10:30, node.js", "1.5 l at 10:30 node.js"),
        (" \u2581 RED \n mug ", "red mug"),
    ],
)
def test_folded_texts_have_no_case_width_or_punctuation(written, plain):
    texts = ["red mug so pretty right", "红色 马克杯 好 看 t恤", "node.js 10:30 1.5 l"] * 20
    tokenizer = train_tokenizer(texts, vocab_size=450, fold=True)
    assert tokenizer(written)["input_ids"] == tokenizer(plain)["input_ids"]
    # Its pieces are those of the same texts without capitals.
    assert tokenizer.get_vocab() == train_tokenizer(texts, vocab_size=450).get_vocab()
    assert train_tokenizer([text.upper() + "!" for text in texts], vocab_size=450, fold=True).get_vocab() == (
        tokenizer.get_vocab()
    )


def test_a_tokenizer_can_be_made_to_fold_with_the_same_vocabulary(tokenizer, tmp_path):
    folding = fold_texts(tokenizer)
    assert folding("Black DRESS, size 1.5!")["input_ids"] == tokenizer("black dress size 1.5")["input_ids"]
    assert folding.get_vocab() == tokenizer.get_vocab()
    # The one that was given reads as before, and the saved one folds.
    assert tokenizer("Black")["input_ids"] != tokenizer("black")["input_ids"]
    folding.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert dict(loaded("Black DRESS.")) == dict(folding("Black DRESS.")) == dict(tokenizer("black dress"))
    assert loaded.model_max_length == tokenizer.model_max_length


def test_only_its_own_tokenizers_can_be_made_to_fold(tokenizer):
    twice = fold_texts(fold_texts(tokenizer))
    assert twice("Black DRESS.")["input_ids"] == fold_texts(tokenizer)("Black DRESS.")["input_ids"]
    other = BertTokenizer(
        vocab={word: number for number, word in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", "a"])}
    )
    with pytest.raises(
        ValueError, match="The BertTokenizer is not one of `train_tokenizer`; train one with `fold=True`"
    ):
        fold_texts(other)


def test_texts_of_punctuation_only_are_not_training_texts():
    with pytest.raises(ValueError, match="no visible character"):
        train_tokenizer(["...", "？！"], fold=True)
