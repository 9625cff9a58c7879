"""Encodes a shop's images shard by shard: resumable, over several processes, with memory bounded by a shard."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from data_rice.collator import RiceCollator
from data_rice.parsing import id_text
from data_rice.paths import path_to_text
from evaluation_rice.retrieval import Loading, ModelRetriever
from processing_rice import MediaError, is_missing, open_image, read_text
from processing_rice.media_rice import path_of

from .index_files import has_shard, read_shard, write_shard
from .index_store import RECORD, Shard

logger = logging.getLogger(__name__)

SHARD_SIZE = 8192
DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass
class ShopImage:
    """One image of the shop, and the numbers of the rows that show it, of which the first readable one is encoded."""

    image_id: str
    product_id: str
    title: str
    live_ids: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


def as_rows(rows: Any) -> Sequence[dict]:
    """
    Rows of any table by number, with `None` where a value is missing: of lists of dicts, a pandas or Arrow table, a
    `datasets.Dataset` (which is left as it is), or anything that gives dicts.

    Raises:
        ValueError: a mapping in the place of rows, or a row that is none.
    """
    if isinstance(rows, (Mapping, str)):
        raise ValueError(f"rows are a {type(rows).__name__}; give a list of dicts, one per row.")
    if hasattr(rows, "column_names") and hasattr(rows, "select_columns"):
        return rows
    if hasattr(rows, "iloc"):
        rows = rows.to_dict("records")
    elif hasattr(rows, "to_pylist"):
        rows = rows.to_pylist()
    clean = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {number} is a {type(row).__name__}; give dicts of column names and values.")
        clean.append({name: None if is_missing(value) else value for name, value in row.items()})
    return clean


def read_id(row: Mapping, name: str, where: str) -> str:
    """
    An id of a row as text, "" where it is missing; whole numbers are ids, too.

    Raises:
        ValueError: it is neither; the message begins with `where`.
    """
    value = row.get(name)
    if is_missing(value) or (isinstance(value, str) and not value):
        return ""
    try:
        return id_text(value)
    except ValueError as error:
        raise ValueError(f"{where}: {name} {error}.") from None


def _without_pictures(rows: Sequence[dict]) -> Sequence[dict]:
    """Rows without the columns that hold pictures, where reading a row would read those."""
    names = getattr(rows, "column_names", None)
    return rows if names is None else rows.select_columns([name for name in names if name not in ("image", "frames")])


def collect_images(rows: Sequence[dict]) -> list[ShopImage]:
    """
    Joins rows of the same `image_id`, which several livestreams may show, in the order of their first row.

    Args:
        rows: From `as_rows`.

    Raises:
        ValueError: a row without an id or with a value of a wrong kind, which it names, or no rows at all.
    """
    images: dict[str, ShopImage] = {}
    for number, row in enumerate(_without_pictures(rows)):
        where = f"row {number} of the shop"
        image_id = read_id(row, "image_id", where)
        if not image_id:
            raise ValueError(f"{where} has no image_id; give every image one.")
        product_id, live = read_id(row, "product_id", where), read_id(row, "live_id", where)
        try:
            title = read_text(row.get("title"))
        except ValueError as error:
            raise ValueError(f"{where}: title {error}.") from None
        if "image" in row or not hasattr(rows, "column_names"):
            _check_image(row.get("image"), where)
        image = images.get(image_id)
        if image is None:
            image = images[image_id] = ShopImage(image_id, product_id or image_id, title)
        image.rows.append(number)
        if live and live not in image.live_ids:
            image.live_ids.append(live)
    if not images:
        raise ValueError("the shop has no images; give at least one row.")
    return list(images.values())


def _check_image(value: Any, where: str) -> None:
    if not isinstance(value, (dict, str, os.PathLike, Image.Image)):
        raise ValueError(
            f"{where}: image must be a path, a PIL image or a dict with path and bytes, got a {type(value).__name__}."
        )


class ShopReader:
    """Decodes batches of `ShopImage` in a loader's workers."""

    def __init__(self, collator: RiceCollator, rows: Sequence[dict]):
        self.collator, self.rows = collator, rows

    def entry(self, image: ShopImage, attempt: int = 0) -> dict:
        """Row of the image as the collator takes it."""
        picture = self.rows[image.rows[attempt]]["image"]
        # Of rows that hold their pictures, these are looked at one shard at a time.
        _check_image(picture, f"row {image.rows[attempt]} of the shop")
        return {"image_id": image.image_id, "image": picture, "title": image.title}

    def __call__(self, images: list[ShopImage]) -> tuple[dict, list[int], list[str], list[dict]]:
        """Model inputs, positions of the images that could be read, their paths, and failures."""
        entries = [self.entry(image) for image in images]
        inputs, readable, failures = self.collator.collate_gallery(entries)
        replaced = False
        for i in set(range(len(images))) - set(readable):
            for attempt in range(1, len(images[i].rows)):
                other = self.entry(images[i], attempt)
                if self.collator.collate_gallery([other])[1]:
                    entries[i], replaced = other, True
                    break
        if replaced:
            inputs, readable, failures = self.collator.collate_gallery(entries)
        return inputs, readable, [path_of(entries[i]["image"]) for i in readable], failures

    def source(self, image: ShopImage) -> list:
        """What tells that the pictures of an image are the same as before."""
        return [_picture_state(self.rows[row]["image"]) for row in image.rows]


def _picture_state(image: Any) -> list:
    data = image.get("bytes") if isinstance(image, Mapping) else None
    if isinstance(image, Image.Image):
        try:
            picture = open_image(image)
        except MediaError as error:
            return [str(error)]
        data = str(picture.size).encode() + picture.tobytes()
    if data is not None:
        return [hashlib.blake2b(data, digest_size=16).hexdigest()]
    path = path_of(image)
    try:
        state = os.stat(path)
        return [path, state.st_size, state.st_mtime_ns]
    except OSError:
        return [path]


@dataclass
class ShopEncoder:
    """
    Encodes shop images with a model.

    Args:
        model: In eval mode.
        processor: Saved with the model.
        batch_size: Images per batch.
        num_workers: Processes that decode.
        progress: Show a bar.
        dtype: Of the stored encodings: "float16" halves storage, and moves a cosine by less than 0.001.
    """

    model: Any
    processor: Any
    batch_size: int = 64
    num_workers: int = 0
    progress: bool = True
    dtype: str = "float16"

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")
        use_text = getattr(self.model.config, "text_config", None) is not None
        self.collator = RiceCollator(self.processor, use_text=use_text)

    def settings(self) -> dict:
        """What an encoding depends on besides the picture."""
        part = self.processor.image_processor.to_dict()
        processor = hashlib.blake2b(json.dumps(part, sort_keys=True, default=str).encode(), digest_size=12)
        return {
            "model_fingerprint": self.model.fingerprint(),
            "processor": processor.hexdigest(),
            "dtype": self.dtype,
            "use_text": self.collator.use_text,
        }

    def key(self, images: Sequence[ShopImage], reader: ShopReader) -> str:
        """Name of the shard that these images give: changes with the model, the records and the picture files."""
        digest = hashlib.blake2b(json.dumps(self.settings(), sort_keys=True).encode(), digest_size=12)
        for image in images:
            parts = [image.image_id, image.product_id, image.title, image.live_ids, reader.source(image)]
            digest.update(json.dumps(parts).encode())
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, images: Sequence[ShopImage], reader: ShopReader, bar: tqdm | None = None) -> Shard:
        """Encodes images into one shard; what cannot be read, or encodes to numbers that are not finite, is listed."""
        loader = DataLoader(
            images, self.batch_size, shuffle=False, num_workers=self.num_workers, collate_fn=_AsBatch(reader)
        )
        parts, records, skipped = [], [], []
        for batch, (inputs, readable, paths, failures) in loader:
            skipped += [{name: failure[name] for name in ("id", "file", "reason")} for failure in failures]
            if readable:
                inputs = {k: v.to(self.model.device) if hasattr(v, "to") else v for k, v in inputs.items()}
                features = self.model.encode_gallery(**inputs).to("cpu", DTYPES[self.dtype])
                finite = _finite_rows(features)
                for i, path, good in zip(readable, paths, finite.tolist()):
                    if good:
                        records.append(_record(batch[i], path))
                    else:
                        reason = f"its encoding in {self.dtype} is not finite"
                        skipped.append({"id": batch[i].image_id, "file": path, "reason": reason})
                if finite.any():
                    parts.append(features if finite.all() else features[finite])
            if bar is not None:
                bar.update(len(batch))
        features = type(parts[0]).cat(parts) if parts else None
        return Shard(pa.Table.from_pylist(records, schema=RECORD), features, skipped)


class _AsBatch:
    """Hands the images on beside what was read of them."""

    def __init__(self, reader: ShopReader):
        self.reader = reader

    def __call__(self, images: list[ShopImage]) -> tuple[list[ShopImage], tuple]:
        return images, self.reader(images)


def _finite_rows(features) -> torch.Tensor:
    finite = torch.ones(len(features), dtype=torch.bool)
    for name in features.fields:
        tensor = getattr(features, name)
        if tensor is not None and tensor.is_floating_point():
            finite &= tensor.isfinite().flatten(1).all(dim=1)
    return finite


def _record(image: ShopImage, path: str) -> dict:
    return {
        "image_id": image.image_id,
        "product_id": image.product_id,
        "live_ids": image.live_ids,
        "title": image.title,
        "image": path_to_text(path),
    }


def process_group() -> tuple[int, int]:
    """
    Number of this process, and of all processes that `accelerate` or `torch.distributed.run` started.

    Raises:
        ValueError: the processes do not know of each other.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    # Asking accelerate settles its state for the whole process, which is not for a library to do without need.
    if started == 1 and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Shares of a shop differ by more than the half an hour that processes wait for each other otherwise.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU", default=not torch.cuda.is_available())
    state = PartialState(cpu=cpu, timeout=timedelta(days=2))
    if state.num_processes < started:
        raise ValueError(f"{started} processes were started, but this one sees {state.num_processes}: it is alone.")
    return state.process_index, state.num_processes


def shards_of(images: list[ShopImage], size: int) -> list[list[ShopImage]]:
    """The shop in pieces, the same in every process and run."""
    return [images[start : start + size] for start in range(0, len(images), size)]


def encode_shards(
    encoder: ShopEncoder,
    rows: Sequence[dict],
    folder: Path | None,
    shard_size: int,
    process_index: int,
    num_processes: int,
) -> tuple[list[str], list[Shard]]:
    """
    Encodes every `num_processes`-th shard; into a folder, where shards of an earlier run are kept, or into memory.

    Returns:
        The keys of all shards of the shop, and without a folder the shards.
    """
    reader = ShopReader(encoder.collator, rows)
    pieces = shards_of(collect_images(rows), shard_size)
    keys, shards = [], []
    mine = sum(len(piece) for piece in pieces[process_index::num_processes])
    title = "encoding" if num_processes == 1 else f"encoding ({process_index + 1} of {num_processes})"
    with tqdm(total=mine, desc=title, unit="image", disable=not encoder.progress) as bar:
        for number, piece in enumerate(pieces):
            key = encoder.key(piece, reader)
            keys.append(key)
            if number % num_processes != process_index:
                continue
            if folder is not None and has_shard(folder, key):
                bar.update(len(piece))
                continue
            shard = encoder.encode(piece, reader, bar)
            shard.key = key
            if folder is None:
                shards.append(shard)
            else:
                write_shard(folder, shard)
    return keys, shards


def stored_shards(folder: Path, keys: Sequence[str], features_class: type) -> Iterator[Shard]:
    """The shards of a folder that are there, in the order of their keys."""
    return (read_shard(folder, key, features_class) for key in keys)


def report_skipped(skipped: Sequence[dict], total: int) -> None:
    """One warning for all images that were left out."""
    if skipped:
        first = skipped[0]
        logger.warning(
            "%d of %d images were left out of the index, such as %s (%s); `index.skipped` lists them.",
            *(len(skipped), total, first["id"], first["reason"]),
        )


def query_answers(queries: Sequence[dict]) -> tuple[list[list[str]], list[str]]:
    """
    The ids of the images that answer each query row, and its livestream or "".

    Raises:
        ValueError: an id is neither text nor a whole number, or `relevant` is no list; the message names the row.
    """
    relevant, lives = [], []
    for number, row in enumerate(_without_pictures(queries)):
        where, images = f"query row {number}", row.get("relevant")
        if isinstance(images, (str, Mapping)) or not hasattr(images, "__iter__"):
            raise ValueError(f"{where}: relevant is {images!r}; give a list of image ids.")
        relevant.append([read_id({"relevant": image_id}, "relevant", where) for image_id in images])
        lives.append(read_id(row, "live_id", where))
    return relevant, lives


def encoded_queries(model, collator, rows, live_ids: list[str], reading: tuple[int, int, bool], unreadable: list):
    """Batches of clips with the images that answer them and the livestreams they search."""
    batch_size, num_workers, progress = reading
    rows = as_rows(rows)
    relevant, searched = query_answers(rows)
    retriever = ModelRetriever(model, collator)
    loading = Loading(batch_size, num_workers, quiet=not progress)
    for loaded, inputs, failures in loading.batches(rows, list(range(len(rows))), retriever.load_clips, "calibrating"):
        unreadable += [failure for failure in failures if failure.get("outcome", "skipped") == "skipped"]
        if not loaded:
            continue
        with torch.no_grad():
            clips = retriever.encode_clips(inputs)
        scopes = [(searched[i],) if live_ids and searched[i] else None for i in loaded]
        yield clips, [relevant[i] for i in loaded], scopes
