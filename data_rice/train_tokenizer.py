"""Trains a tokenizer on a data set's titles and ASR.

    python -m data_rice.train_tokenizer --dataset mini_lpr4m --output_dir runs/tokenizer
    python train_rice.py RECIPE --use_text true --tokenizer runs/tokenizer --output_dir runs/text

The tokenizer has a SentencePiece unigram vocabulary for Chinese and English. Unknown characters become bytes. It
ignores case, character width and sentence punctuation, because speech models write them, but many transcripts do not.
The output folder holds tokenizer.json, which `AutoTokenizer.from_pretrained` reads without sentencepiece.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

from .commands import mistakes_end, print_anywhere
from .views import DATASET_NAMES, load_dataset_view

_AT_ONCE = 10_000


def read_texts(
    dataset: str, data_dir: str | None = None, cache_dir: str | None = None, split: str = "train", max_rows: int = 0
) -> tuple[list[str], int, int]:
    """
    The distinct titles and ASR of a data set's pairs, in the order of its rows.

    Args:
        dataset, data_dir, cache_dir, split: As `load_dataset_view`.
        max_rows: Maximum number of rows to read, evenly spread; 0 reads all.

    Returns:
        The texts, the number of rows read, and the number of all rows.

    Raises:
        FileNotFoundError, ValueError: as `load_dataset_view`; ValueError also if no row has a text.
    """
    pairs = load_dataset_view(dataset, "pairs", split, data_dir=data_dir, cache_dir=cache_dir)
    total = len(pairs)
    pairs = pairs.select_columns(["title", "asr"])
    if 0 < max_rows < total:
        pairs = pairs.select([i * total // max_rows for i in range(max_rows)])
    texts = dict.fromkeys(text for text in _texts(pairs) if text and text.strip())
    if not texts:
        raise ValueError(
            f"not one of the {len(pairs)} rows of {dataset} has a title or ASR; choose a data set with texts."
        )
    return list(texts), len(pairs), total


def _texts(pairs) -> Iterator[str]:
    starts = range(0, len(pairs), _AT_ONCE)
    for start in tqdm(starts, desc="texts", unit="block", disable=len(starts) < 4):
        rows = pairs[start : start + _AT_ONCE]
        for title, asr in zip(rows["title"], rows["asr"], strict=True):
            yield title
            yield asr


def coverage(tokenizer, texts: list[str]) -> dict[str, float]:
    """
    Figures of a tokenizer on texts: `tokens_per_text`, `cut` (share of texts longer than its maximum length) and
    `bytes` (share of tokens that are single bytes of unknown characters). Special tokens are not counted.
    """
    ids = tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    pieces = [tokenizer.convert_ids_to_tokens(row) for row in ids]
    count = sum(map(len, pieces))
    spelled = sum(piece.startswith("<0x") for row in pieces for piece in row)
    marks = tokenizer.num_special_tokens_to_add()
    return {
        "tokens_per_text": count / len(texts),
        "cut": sum(len(row) + marks > tokenizer.model_max_length for row in pieces) / len(texts),
        "bytes": spelled / max(count, 1),
    }


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m data_rice.train_tokenizer", description="Trains a tokenizer on a data set's titles and ASR."
    )
    add = parser.add_argument
    add("--dataset", required=True, help=f"{DATASET_NAMES}, or a folder in one of their layouts")
    add("--data_dir", help="folder of the data set's files")
    add("--cache_dir", help="where the data set's tables are cached")
    add("--split", default="train", choices=("train", "validation"), help="split of the texts (default train)")
    add("--output_dir", required=True, help="folder for tokenizer.json and its settings")
    add("--vocab_size", type=int, default=2000, help="maximum number of entries, at least 400 (default 2000)")
    add("--max_length", type=int, default=64, help="maximum tokens per text (default 64)")
    add("--max_rows", type=int, default=200_000, help="maximum rows to read, evenly spread; 0: all (default 200000)")
    return parser, parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    print_anywhere()
    parser, options = parse_arguments(arguments)
    from processing_rice import train_tokenizer

    with mistakes_end(parser, (ValueError, OSError, ImportError)):
        if options.max_rows < 0:
            raise ValueError(f"--max_rows must be at least 0, not {options.max_rows}.")
        texts, read, total = read_texts(
            options.dataset, options.data_dir, options.cache_dir, options.split, options.max_rows
        )
        limits = {"vocab_size": options.vocab_size, "model_max_length": options.max_length}
        tokenizer = train_tokenizer(texts, **limits, fold=True)
        Path(options.output_dir).mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(options.output_dir)
    figures = coverage(tokenizer, texts)
    print(
        f"{len(texts)} different texts from {read} of {total} rows; {len(tokenizer)} entries in {options.output_dir}; "
        f"{figures['tokens_per_text']:.1f} tokens per text, {figures['bytes']:.1%} of them bytes, "
        f"{figures['cut']:.1%} of the texts longer than {tokenizer.model_max_length} tokens"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
