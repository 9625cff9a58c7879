"""The tokenizer command: from a data set's texts to a folder that reads them back."""

import json
import subprocess
import sys

import pytest
from PIL import Image
from transformers import AutoTokenizer

from data_rice.train_tokenizer import coverage, main, parse_arguments, read_texts

TITLES = ["红色连衣裙 red dress", "blue mug", "", "green shoe"]
ASR = ["家人们看一下这条红色连衣裙", "this blue mug is sold out", "", "今天直播给大家 green shoe"]


@pytest.fixture
def shop(tmp_path):
    """A shop_clips folder of four pairs in Chinese and English; the third has no text, the last repeats a title."""
    folder = tmp_path / "shop"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "picture.png")
    gallery, clips = [], []
    for i, (title, asr) in enumerate(zip(TITLES, ASR, strict=True)):
        gallery.append({"gallery_id": f"image{i}", "image": "picture.png", "title": title})
        clips.append({"query_id": f"clip{i}", "frames": ["picture.png"], "gt_gallery_ids": [f"image{i}"], "asr": asr})
    for name, rows in (("gallery", gallery), ("clips_train", clips), ("clips_test", clips)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_texts_are_distinct_and_not_empty(shop):
    texts, read, total = read_texts(str(shop))
    assert sorted(texts) == sorted(text for text in (*TITLES, *ASR) if text)
    assert (read, total) == (4, 4)
    texts, read, total = read_texts(str(shop), max_rows=2)
    assert (read, total) == (2, 4) and set(texts) == {TITLES[0], ASR[0]}


def test_the_saved_tokenizer_decodes_every_text(shop, tmp_path, capsys):
    folder = tmp_path / "tokenizer"
    main(["--dataset", str(shop), "--output_dir", str(folder), "--vocab_size", "500", "--max_length", "32"])
    assert "6 different texts from 4 of 4 rows" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 32 and (folder / "tokenizer.json").is_file()
    for text in (*TITLES, *ASR, "未登录的字 ☃ and words"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.unk_token_id not in ids
    # As a speech model writes it.
    assert tokenizer("Blue mug.")["input_ids"] == tokenizer("blue mug")["input_ids"]
    # What nothing else is installed for reads it too.
    code = "import sys; from transformers import AutoTokenizer; sys.modules['sentencepiece'] = None; "
    code += f"print(AutoTokenizer.from_pretrained({str(folder)!r})('blue mug')['input_ids'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(found) == tokenizer("blue mug")["input_ids"]


def test_coverage_counts_bytes_and_cut_texts(shop):
    from processing_rice import train_tokenizer

    tokenizer = train_tokenizer(["blue mug"] * 3, vocab_size=400, model_max_length=4)
    figures = coverage(tokenizer, ["a", "☃☃"])
    pieces = [tokenizer.tokenize(text) for text in ("a", "☃☃")]
    assert figures["tokens_per_text"] == sum(map(len, pieces)) / 2
    assert figures["bytes"] == 6 / sum(map(len, pieces))
    assert figures["cut"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "nowhere"], "'nowhere' is neither a data set"),
        (["--vocab_size", "10"], "vocab_size is 10; use at least 400"),
        (["--max_rows", "-1"], "--max_rows must be at least 0, not -1"),
        (["--max_length", "2"], "model_max_length is 2; use at least 3"),
    ],
)
def test_bad_input_ends_with_a_sentence(shop, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["--dataset", str(shop), "--output_dir", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("python -m data_rice.train_tokenizer: error: ") and message in last


def test_no_text_at_all_is_refused(shop):
    for name in ("gallery", "clips_train"):
        path = shop / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        cleared = [{k: "" if k in ("title", "asr") else v for k, v in row.items()} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in cleared), encoding="utf-8")
    with pytest.raises(ValueError, match="not one of the 4 rows of .* has a title or ASR"):
        read_texts(str(shop))


def test_the_defaults_are_those_of_training():
    _, options = parse_arguments(["--dataset", "mini_lpr4m", "--output_dir", "out"])
    assert (options.vocab_size, options.max_length, options.split) == (2000, 64, "train")
