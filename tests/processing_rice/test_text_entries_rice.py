"""Texts from tables: what is a text, what is missing, and which entry is refused."""

import datetime
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from processing_rice import is_missing, read_text, read_texts

MISSING = [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT, np.datetime64("NaT"), np.ma.masked, Decimal("NaN")]


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_missing_values_are_empty_texts(value):
    assert is_missing(value) and read_text(value) == "" and read_texts([value, "a"], "titles") == ["", "a"]


@pytest.mark.parametrize("value", ["", "nan", 0, 0.0, False, [], np.zeros(2), torch.zeros(1), {}, b""], ids=repr)
def test_other_values_are_not_missing(value):
    assert not is_missing(value)


@pytest.mark.parametrize(
    "values",
    [
        ["a", None],
        ("a", ""),
        pd.Series(["a", None]),
        pd.Series(["a", "b"], index=[7, 9]).where([True, False]),
        pd.Series(["a", pd.NA], dtype="string"),
        pd.Series(["a", None], dtype="category"),
        pd.Index(["a", None]),
        np.array(["a", ""]),
        np.array(["a", None], dtype=object),
        pa.array(["a", None]),
        pa.chunked_array([["a"], [None]]),
        (text for text in ("a", None)),
        {"a": 1, "": 2}.keys(),
    ],
    ids=lambda values: type(values).__name__,
)
def test_columns_of_any_kind_are_lists_of_text(values):
    texts = read_texts(values, "titles")
    assert texts == ["a", ""] and all(type(text) is str for text in texts)


def test_one_text_is_one_entry():
    assert read_texts("ab", "titles") == ["ab"] and read_texts(np.str_("ab"), "titles") == ["ab"]


@pytest.mark.parametrize(
    "text, clean",
    [
        ("a\ud83d", "a\ufffd"),
        ("\ude00b", "\ufffdb"),
        ("\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("a\udcc8\udccb", "a\ufffd\ufffd"),
        ("é\U0001f600\0", "é\U0001f600\0"),
    ],
)
def test_halves_of_surrogate_pairs_are_joined_or_replaced(text, clean):
    assert read_text(text) == clean


@pytest.mark.parametrize("value", [3, 2.5, True, b"a", ["a"], {"a": 1}, np.int64(3), np.bytes_(b"a"), torch.ones(1)])
def test_entries_that_are_not_texts_are_refused(value):
    with pytest.raises(ValueError, match=f"^Entry 1 of `asr` is a {type(value).__name__} .*; give text, or None"):
        read_texts(["a", value], "asr")


@pytest.mark.parametrize(
    "values",
    [
        b"ab",
        {"a": "b"},
        {"a", "b"},
        3,
        pd.DataFrame({"a": ["x"]}),
        np.array([["a"]]),
        np.array("a"),
        datetime.date.max,
    ],
    ids=lambda values: type(values).__name__,
)
def test_values_that_are_not_columns_are_refused(values):
    with pytest.raises(ValueError, match="^`titles` is a .*; give a text, or a list of texts in order"):
        read_texts(values, "titles")


@pytest.mark.parametrize("name, keys", [("titles", "title_"), ("asr", "asr_"), ("text", "")])
def test_the_processor_reads_all_texts_by_this_rule(processor, name, keys):
    plain = processor(**{name: ["a red cup", "", "x\ufffd"]})
    column = pd.Series(["a red cup", float("nan"), "x\ud83d"], index=[5, 6, 7], dtype=object)
    for values in (column, column.to_numpy(), tuple(column)):
        inputs = processor(**{name: values})
        for key in (f"{keys}input_ids", f"{keys}attention_mask"):
            assert torch.equal(inputs[key], plain[key])
    assert name == "text" or plain[f"{keys}attention_mask"][1].sum() == 0
    with pytest.raises(ValueError, match=f"Entry 2 of `{name}` is a float"):
        processor(**{name: ["a", "b", 2.5]})


def test_counts_are_those_of_the_column(processor, make_picture):
    pictures = [make_picture(), make_picture(seed=1)]
    assert len(processor(images=pictures, titles=pd.Series(["a", None]))["title_input_ids"]) == 2
    with pytest.raises(ValueError, match="`titles` has 3 entries for 2 images"):
        processor(images=pictures, titles=pd.Series(["a", "b", "c"]))
