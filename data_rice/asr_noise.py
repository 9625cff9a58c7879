"""ASR that is missing, in disorder or another clip's: what an evaluation or a training with noisy ASR reads."""

import random
from collections.abc import Sequence

from datasets import Dataset, Features, Value, concatenate_datasets

ASR_MODES = ("own", "none", "shuffled", "wrong")


def with_asr(queries: Dataset, mode: str) -> Dataset:
    """Query rows whose ASR is replaced, the same in every run.

    Args:
        queries: rows with `clip_id`, `live_id`, `product_id`, `relevant` and `asr`.
        mode: "own" (as they are), "none" (empty), "shuffled" (`shuffled_asr`) or "wrong" (`wrong_asr`).

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in ASR_MODES:
        raise ValueError(f"The ASR can be {', '.join(ASR_MODES)}, not {mode!r}; choose one of them.")
    if mode == "own":
        return queries
    if mode == "none":
        return _replace_asr(queries, [""] * len(queries))
    if mode == "shuffled":
        texts = zip(queries["clip_id"], queries["asr"], strict=True)
        return _replace_asr(queries, [shuffled_asr(clip_id, asr) for clip_id, asr in texts])
    return _replace_asr(queries, wrong_asr(queries))


def with_noisy_asr(queries: Dataset, rate: float) -> Dataset:
    """Query rows of which a share has noisy ASR, as `RiceCollator` makes it of training pairs with `asr_noise`.

    Args:
        queries: as `with_asr`.
        rate: probability, 0..1, that a row's ASR is replaced, half of the time by nothing and half of the time by that
            of `wrong_asr`. A row's own `clip_id` decides.
    """

    def choose(clip_id: str, own: str, other: str) -> str:
        draw = random.Random(f"noise {clip_id}")
        noisy, missing = draw.random() < rate, draw.random() < 0.5
        return own if not noisy else "" if missing else other

    texts = zip(queries["clip_id"], queries["asr"], wrong_asr(queries), strict=True)
    return _replace_asr(queries, [choose(*row) for row in texts])


def shuffled_asr(clip_id: str, asr: str) -> str:
    """The words of the ASR, or its characters where it has no spaces, in an order that `clip_id` decides."""
    words, separator = asr.split(), " "
    if len(words) < 2:
        words, separator = list(asr.strip()), ""
    # A seed that is text goes through SHA-512, so the order is the same in every process.
    random.Random(f"shuffled {clip_id}").shuffle(words)
    return separator.join(words)


def wrong_asr(queries: Dataset) -> list[str]:
    """Per row the ASR of another clip, of another product and, where there is one, of the same livestream.

    Which of them `clip_id` decides. Clips without ASR are not chosen; a row for which there is no other clip gets "".
    """
    columns = {name: list(queries[name]) for name in ("clip_id", "live_id", "asr", "relevant")}
    products = [product or clip for product, clip in zip(queries["product_id"], columns["clip_id"], strict=True)]
    relevant = [set(images) for images in columns["relevant"]]
    spoken = [i for i, asr in enumerate(columns["asr"]) if asr.strip()]
    by_live: dict[str, list[int]] = {}
    for i in spoken:
        by_live.setdefault(columns["live_id"][i], []).append(i)

    def find(i: int, rows: Sequence[int]) -> int | None:
        start = int(random.Random(f"wrong {columns['clip_id'][i]}").random() * len(rows))
        turned = (rows[(start + step) % len(rows)] for step in range(len(rows)))
        return next((j for j in turned if products[j] != products[i] and relevant[j].isdisjoint(relevant[i])), None)

    texts = []
    for i, live in enumerate(columns["live_id"]):
        other = find(i, by_live.get(live, []))
        other = find(i, spoken) if other is None else other
        texts.append("" if other is None else columns["asr"][other])
    return texts


def _replace_asr(rows: Dataset, asr: list[str]) -> Dataset:
    # Side by side, since all other columns would otherwise be written to the cache once more.
    column = Dataset.from_dict({"asr": asr}, features=Features({"asr": Value("string")}))
    replaced = concatenate_datasets([rows.remove_columns("asr"), column], axis=1)
    return replaced.select_columns(rows.column_names)
