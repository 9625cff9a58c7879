"""Reads and encodes a shop's images, and skips those that are encoded already."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader

from data_rice.collator import RiceCollator, failure_words
from data_rice.parsing import id_text
from data_rice.paths import path_to_text
from evaluation_rice.retrieval import Loading, ModelRetriever
from hub_rice.cores import PICTURES_PER_CORE, map_on_cores
from hub_rice.precision import INT8, PRECISIONS, precision_of
from processing_rice import MediaError, is_missing, open_image, read_text
from processing_rice.media_rice import path_of, read_media

from .table import State

logger = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "float32": torch.float32}
# Precisions in which a picture's encoding is rounded by more than reading it at reduced scale changes it.
_REDUCED = (PRECISIONS["bf16"], PRECISIONS["fp16"], INT8)


@dataclass
class ShopImage:
    """One image of the shop, and the numbers of its rows, of which the first readable one is encoded."""

    image_id: str
    product_id: str
    title: str
    live_ids: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


def as_rows(rows: Any) -> Sequence[dict]:
    """
    Rows of any table by number, with `None` for missing values: from a list of dicts, a pandas or Arrow table, a
    `datasets.Dataset` (returned unchanged), or any iterable of dicts.

    Raises:
        ValueError: `rows` is a mapping, or a row is not a mapping.
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
    An id of a row as text, "" if it is missing; whole numbers are valid ids.

    Raises:
        ValueError: the id is neither text nor a whole number; the message begins with `where`.
    """
    value = row.get(name)
    if is_missing(value) or (isinstance(value, str) and not value):
        return ""
    try:
        return id_text(value)
    except ValueError as error:
        raise ValueError(f"{where}: {name} {error}.") from None


def _without_pictures(rows: Sequence[dict]) -> Sequence[dict]:
    """Rows without the picture columns, if reading a row would read them."""
    names = getattr(rows, "column_names", None)
    return rows if names is None else rows.select_columns([name for name in names if name not in ("image", "frames")])


def collect_images(rows: Sequence[dict]) -> list[ShopImage]:
    """
    Joins rows with the same `image_id`, which several livestreams may show, in the order of their first row.

    Args:
        rows: Rows from `as_rows`.

    Raises:
        ValueError: there are no rows, or a row has no id or a value of a wrong kind; the message names the row.
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
    """
    Decodes batches of `ShopImage` in a loader's workers, except those with known pictures.

    Args:
        collator: Collator of the model.
        rows: Rows of the shop.
        known: `ShopImage.image_id` -> content digest of the images that are encoded already.
    """

    def __init__(self, collator: RiceCollator, rows: Sequence[dict], known: Mapping[str, str] | None = None):
        self.collator, self.rows, self.known = collator, rows, known or {}

    def entry(self, image: ShopImage, attempt: int = 0) -> dict:
        """Row of the image for the collator."""
        picture = self.rows[image.rows[attempt]]["image"]
        # Rows that contain their pictures are checked one shard at a time.
        _check_image(picture, f"row {image.rows[attempt]} of the shop")
        return {"image_id": image.image_id, "image": picture, "title": image.title}

    def content(self, image: ShopImage) -> tuple[str, list[str]]:
        """A digest of the image's pictures (and of the text if the model reads it), and the paths of the pictures."""
        digest = hashlib.blake2b(image.title.encode() if self.collator.use_text else b"", digest_size=16)
        paths: list[str] = []
        for row in range(len(image.rows)):
            picture = self.entry(image, row)["image"]
            path = path_to_text(path_of(picture))
            # Many livestreams may sell an image, usually from the same file.
            if not path or path not in paths:
                paths.append(path)
                digest.update(hashlib.blake2b(_picture_bytes(picture), digest_size=16).digest())
        return digest.hexdigest(), paths

    def __call__(self, images: list[ShopImage]) -> "Batch":
        contents, places = zip(*map(self.content, images))
        new = [image for image, content in zip(images, contents) if self.known.get(image.image_id) != content]
        if not new:
            return Batch(images, contents, places)
        entries = [self.entry(image) for image in new]
        inputs, readable, failures = self.collator.collate_gallery(entries)
        replaced = False
        for i in set(range(len(new))) - set(readable):
            for attempt in range(1, len(new[i].rows)):
                other = self.entry(new[i], attempt)
                if self.collator.collate_gallery([other])[1]:
                    entries[i], replaced = other, True
                    break
        if replaced:
            inputs, readable, failures = self.collator.collate_gallery(entries)
        paths = {new[i].image_id: path_to_text(path_of(entries[i]["image"])) for i in readable}
        return Batch(images, contents, places, inputs, paths, {failure["id"]: failure for failure in failures})


@dataclass
class Batch:
    """
    A batch of images after reading.

    Attributes:
        images, contents, places: All images, the digests of their pictures, and the paths of these as text.
        inputs: Model inputs of the new, readable images.
        paths: Image id -> path of these images, in the order of `inputs`.
        failures: Image id -> failure of the new, unreadable images.
    """

    images: list[ShopImage]
    contents: Sequence[str]
    places: Sequence[list[str]]
    inputs: dict = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    failures: dict[str, dict] = field(default_factory=dict)


def _picture_bytes(picture: Any) -> bytes:
    """Bytes that identify a picture."""
    if isinstance(picture, Image.Image):
        try:
            picture = open_image(picture)
        except MediaError as error:
            return str(error).encode()
        return str(picture.size).encode() + picture.tobytes()
    try:
        return read_media(picture if isinstance(picture, Mapping) else {"path": path_of(picture)})
    except (OSError, ValueError):
        # The collator reports the reason. A later try, when the file can be read, gives other bytes.
        return b""


@dataclass
class ShopEncoder:
    """
    Encodes shop images with a model. Where it computes in bf16, fp16 or int8, large JPEGs are decoded at reduced scale
    (`decode="fast"` of `RiceCollator`); in fp32 all are read as in evaluation.

    Args:
        model: A model in eval mode.
        processor: The processor saved with the model.
        batch_size: Images per batch; by default 16 on a CPU, where every core encodes a batch of its own, else 64.
        num_workers: Number of processes that decode.
        progress: Show a progress bar.
        dtype: Type of the stored encodings: "float16" halves storage, and changes a cosine by less than 0.001.
    """

    model: Any
    processor: Any
    batch_size: int | None = None
    num_workers: int = 0
    progress: bool = True
    dtype: str = "float16"

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.batch_size is None:
            self.batch_size = PICTURES_PER_CORE if self.model.device.type == "cpu" else 64
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")
        use_text = getattr(self.model.config, "text_config", None) is not None
        decode = "fast" if self.precision in _REDUCED else "exact"
        self.collator = RiceCollator(self.processor, use_text=use_text, decode=decode)

    @property
    def precision(self) -> str:
        """Precision in which the model computes."""
        name = precision_of(self.model)
        return PRECISIONS.get(name, name)

    def settings(self) -> dict:
        """Everything that affects an encoding besides the picture and the model."""
        settings = {
            "processor": _digest(self.processor.image_processor.to_dict()),
            "dtype": self.dtype,
            "precision": self.precision,
            "use_text": self.collator.use_text,
        }
        if self.collator.use_text:
            settings["tokenizer"] = _digest(_tokenizer_settings(self.processor.tokenizer))
        return settings

    def state(self, **values) -> State:
        """State of a table that this encoder fills."""
        return state_of(self.model, dtype=self.dtype, precision=self.precision, settings=self.settings(), **values)

    @torch.no_grad()
    def encode_blank(self) -> Any:
        """Encodings of one grey picture, a `RiceGallery` of one row, which gives the fields and their widths."""
        grey = Image.new("RGB", (32, 32), (128, 128, 128))
        inputs = self.collator.collate_gallery([{"image_id": "", "image": grey, "title": ""}])[0]
        return self._encode(inputs)

    def _encode_batch(self, batch: Batch) -> tuple[Batch, Any]:
        return batch, self._encode(batch.inputs) if batch.paths else None

    def _encode(self, inputs: dict) -> Any:
        inputs = {k: v.to(self.model.device) if hasattr(v, "to") else v for k, v in inputs.items()}
        return self.model.encode_gallery(**inputs).to("cpu", DTYPES[self.dtype])

    @torch.no_grad()
    def batches(self, images: Sequence[ShopImage], reader: ShopReader) -> Iterator[tuple[Batch, Any]]:
        """
        Reads and encodes images in their order.

        Returns:
            Each batch after reading, and the encodings of `Batch.paths`, `None` if there are none. Images whose
            encodings are not finite become failures.
        """
        loader = DataLoader(images, self.batch_size, shuffle=False, num_workers=self.num_workers, collate_fn=reader)
        for batch, features in map_on_cores(self._encode_batch, loader, self.model.device):
            if features is not None:
                finite = finite_rows(features)
                for image_id, good in zip(list(batch.paths), finite.tolist()):
                    if not good:
                        reason = f"its encoding in {self.dtype} is not finite"
                        file = batch.paths.pop(image_id)
                        batch.failures[image_id] = {"id": image_id, "file": file, "reason": reason}
                features = features if finite.all() else features[finite]
            yield batch, features if batch.paths else None


def _digest(settings: dict) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()


def _tokenizer_settings(tokenizer: Any) -> dict:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    # Every call sets its own padding and truncation.
    return {name: part for name, part in json.loads(backend.to_str()).items() if name not in ("padding", "truncation")}


def state_of(model: Any, **values) -> State:
    """State of a table with encodings of a model."""
    config = model.config
    return State(
        model_fingerprint=model.fingerprint() if hasattr(model, "fingerprint") else None,
        model_name=getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", ""),
        model_revision=getattr(config, "_commit_hash", None),
        **values,
    )


def finite_rows(features: Any) -> torch.Tensor:
    """Whether each row of encodings is finite, `(n,)` bool."""
    finite = torch.ones(len(features), dtype=torch.bool)
    for name in features.fields:
        tensor = getattr(features, name)
        if tensor is not None and tensor.is_floating_point():
            finite &= tensor.isfinite().flatten(1).all(dim=1)
    return finite


def record_of(image: ShopImage, path: str, position: int, content: str, reason: str | None = None) -> dict:
    """Record of an image, without its encodings."""
    return {
        "image_id": image.image_id,
        "product_id": image.product_id,
        "live_ids": image.live_ids,
        "title": image.title,
        "image": path,
        "position": position,
        "content": content,
        "reason": reason,
    }


def process_group() -> tuple[int, int]:
    """
    Number of this process, and number of processes that `accelerate` or `torch.distributed.run` started.

    Raises:
        ValueError: the processes are not connected.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    # Reading accelerate's state fixes it for the whole process, which a library should not do without need.
    if started == 1 and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Shares of a shop may differ by more than the default waiting time of half an hour.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU", default=not torch.cuda.is_available())
    state = PartialState(cpu=cpu, timeout=timedelta(days=2))
    if state.num_processes < started:
        raise ValueError(
            f"{started} processes were started, but this one sees {state.num_processes}; on a CPU start them with "
            f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {started}."
        )
    return state.process_index, state.num_processes


def report_skipped(skipped: Sequence[dict], total: int) -> None:
    """Logs one warning for all images that were left out."""
    if skipped:
        first = skipped[0]
        logger.warning(
            "%d of %d images were left out of the index, such as %s (%s); `index.skipped` lists them.",
            *(len(skipped), total, first["id"], failure_words(first)),
        )


def query_answers(queries: Sequence[dict]) -> tuple[list[list[str]], list[str]]:
    """
    The ids of the relevant images of each query row, and its livestream or "".

    Raises:
        ValueError: an id is neither text nor a whole number, or `relevant` is not a list; the message names the row.
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
    """
    Batches of clips with their relevant images, the searched livestreams, and whether the clips include speech. Each
    clip is encoded without speech and, if the model scores texts and there is a transcript, again with it.
    """
    batch_size, num_workers, progress = reading
    rows = as_rows(rows)
    relevant, searched = query_answers(rows)
    retriever = ModelRetriever(model, collator)
    loading = Loading(batch_size, num_workers, quiet=not progress)
    for loaded, inputs, failures in loading.batches(rows, list(range(len(rows))), retriever.load_clips, "calibrating"):
        unreadable += [failure for failure in failures if failure.get("outcome", "skipped") == "skipped"]
        if not loaded:
            continue
        scopes = [(searched[i],) if live_ids and searched[i] else None for i in loaded]
        answers = [relevant[i] for i in loaded]
        silent = {name: value for name, value in inputs.items() if not name.startswith("asr_")}
        with torch.no_grad():
            clips = retriever.encode_clips(silent)
            spoken = retriever.encode_clips(inputs) if len(silent) < len(inputs) else clips
        yield clips, answers, scopes, False
        said = [i for i in range(len(spoken)) if has_words(spoken, i)]
        if said:
            yield spoken[said], [answers[i] for i in said], [scopes[i] for i in said], True


def has_words(clips: Any, row: int) -> bool:
    """Whether a row of `RiceClips` has words for the text score."""
    return getattr(clips, "text_embeds", None) is not None and bool(clips.text_embeds[row].any())
