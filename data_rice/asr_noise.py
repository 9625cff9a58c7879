"""Noisy ASR for training and evaluation: missing, with shuffled words, or taken from another clip."""

import random
from collections.abc import Sequence

from datasets import Dataset, Features, Value, concatenate_datasets

ASR_MODES = ("own", "none", "shuffled", "wrong")


def with_asr(queries: Dataset, mode: str) -> Dataset:
    """Return query rows with replaced ASR. Every run gives the same result.

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
    """Return query rows, a share of them with noisy ASR as `RiceCollator` makes it with `asr_noise`.

    Args:
        queries: as `with_asr`.
        rate: probability, 0..1, that a row's ASR is replaced: half of the time by "", half of the time by `wrong_asr`.
            The choice depends on `clip_id` only.
    """

    def choose(clip_id: str, own: str, other: str) -> str:
        draw = random.Random(f"noise {clip_id}")
        noisy, missing = draw.random() < rate, draw.random() < 0.5
        return own if not noisy else "" if missing else other

    texts = zip(queries["clip_id"], queries["asr"], wrong_asr(queries), strict=True)
    return _replace_asr(queries, [choose(*row) for row in texts])


def shuffled_asr(clip_id: str, asr: str) -> str:
    """Shuffle the words of the ASR (its characters where it has no spaces), with `clip_id` as the seed."""
    words, separator = asr.split(), " "
    if len(words) < 2:
        words, separator = list(asr.strip()), ""
    # Python hashes a text seed with SHA-512, so the order is the same in every process.
    random.Random(f"shuffled {clip_id}").shuffle(words)
    return separator.join(words)


def wrong_asr(queries: Dataset) -> list[str]:
    """Return, for each row, the ASR of a clip of another product, from the same livestream where possible.

    The choice depends on `clip_id`. Clips without ASR are not chosen. A row without such a clip gets "".
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
    # Joining the column avoids writing all other columns to the cache again.
    column = Dataset.from_dict({"asr": asr}, features=Features({"asr": Value("string")}))
    replaced = concatenate_datasets([rows.remove_columns("asr"), column], axis=1)
    return replaced.select_columns(rows.column_names)
