"""Replaced ASR: its source, and that every run replaces it equally."""

import pytest
from datasets import Dataset

from data_rice.asr_noise import shuffled_asr, with_asr, with_noisy_asr, wrong_asr
from data_rice.features import clip_row, query_features


def make_queries(rows: list[tuple[str, str, str]], relevant: dict[int, list[str]] | None = None) -> Dataset:
    """Query rows from (livestream, product, ASR)."""
    frames = [{"path": "frame.jpg", "bytes": None}]
    rows = [
        {
            **clip_row(clip_id=f"c{i}", live_id=live, product_id=product, frames=frames, boxes=[None]),
            "asr": asr,
            "relevant": (relevant or {}).get(i, [f"image-{product}"] if product else []),
        }
        for i, (live, product, asr) in enumerate(rows)
    ]
    return Dataset.from_list(rows, features=query_features())


@pytest.fixture
def queries():
    """Two mugs and a hat in one shop, a shoe alone in another."""
    return make_queries(
        [("a", "mug", "red mug"), ("a", "mug", "the mug"), ("a", "hat", "a hat"), ("b", "shoe", "shoe")]
    )


def test_wrong_asr_is_of_another_product_of_the_shop_or_else_of_another_shop(queries):
    texts = wrong_asr(queries)
    assert texts[:2] == ["a hat", "a hat"] and texts[2] in ("red mug", "the mug")
    assert texts[3] in ("red mug", "the mug", "a hat")


def test_wrong_asr_skips_clips_without_asr_and_is_empty_if_no_other_product_has_asr():
    queries = make_queries([("a", "mug", "red mug"), ("a", "hat", " "), ("b", "shoe", "shoe"), ("a", "", "")])
    assert wrong_asr(queries)[0] == "shoe" and wrong_asr(queries)[2] == "red mug"
    # A clip of an unknown product, without ASR of its own, gets one like the others.
    assert wrong_asr(queries)[3] == "red mug"
    assert wrong_asr(make_queries([("a", "mug", "red mug"), ("a", "mug", "the mug")])) == ["", ""]


def test_clips_that_share_an_answer_show_the_same_product():
    rows = [("a", "mug", "red mug"), ("a", "set", "mug and plate"), ("b", "hat", "a hat")]
    queries = make_queries(rows, {1: ["image-plate", "image-mug"]})
    assert wrong_asr(queries)[:2] == ["a hat", "a hat"]


def test_the_chosen_clip_depends_on_the_clip_id():
    queries = make_queries([("a", f"p{i}", f"text {i}") for i in range(40)])
    texts = wrong_asr(queries)
    assert texts == wrong_asr(queries) and len(set(texts)) > 15
    assert all(texts[i] != f"text {i}" for i in range(40))


def test_shuffled_keeps_words_or_characters():
    words = "look at this red mug please"
    # The order is that of SHA-512 and the Mersenne Twister, in every process and version of Python.
    assert shuffled_asr("c0", words) == "please at this red look mug"
    assert sorted(shuffled_asr("c1", words).split()) == sorted(words.split()) != shuffled_asr("c1", words).split()
    assert shuffled_asr("c0", words) != shuffled_asr("c1", words)
    chinese = "喜欢的扣一点右角小黄车"
    assert sorted(shuffled_asr("c0", chinese)) == sorted(chinese) and shuffled_asr("c0", chinese) != chinese
    assert shuffled_asr("c0", "") == "" and shuffled_asr("c0", " 好 ") == "好"


def test_other_columns_are_unchanged(queries):
    changed = [with_asr(queries, mode) for mode in ("none", "shuffled", "wrong")]
    for replaced in (*changed, with_noisy_asr(queries, 0.5)):
        assert replaced.features == queries.features and replaced.column_names == queries.column_names
        assert replaced.remove_columns("asr").to_list() == queries.remove_columns("asr").to_list()
    assert with_asr(queries, "own") is queries
    assert list(with_asr(queries, "none")["asr"]) == [""] * 4
    assert list(with_asr(queries, "wrong")["asr"]) == wrong_asr(queries)
    # Of rows that were chosen among others, too.
    chosen = with_asr(queries.select([3, 0]), "shuffled")
    assert list(chosen["asr"]) == [shuffled_asr("c3", "shoe"), shuffled_asr("c0", "red mug")]
    with pytest.raises(ValueError, match="The ASR can be own, none, shuffled, wrong, not 'louder'; choose one"):
        with_asr(queries, "louder")


def test_the_requested_share_of_rows_is_noisy_and_half_of_these_empty():
    queries = make_queries([("a", f"p{i}", f"text {i}") for i in range(600)])
    own, wrong = list(queries["asr"]), wrong_asr(queries)

    def noisy(rate: float) -> set[int]:
        texts = list(with_noisy_asr(queries, rate)["asr"])
        changed = {i for i in range(600) if texts[i] != own[i]}
        empty = {i for i in changed if not texts[i]}
        assert all(texts[i] == wrong[i] for i in changed - empty)
        assert not changed or 0.4 < len(empty) / len(changed) < 0.6
        return changed

    some, more = noisy(0.3), noisy(0.6)
    assert 0.25 < len(some) / 600 < 0.35 and 0.55 < len(more) / 600 < 0.65 and some < more
    assert noisy(0.0) == set() and len(noisy(1.0)) == 600
