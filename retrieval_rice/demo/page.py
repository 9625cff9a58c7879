"""The content of the demo, without the page: clips, answers, pictures, and heat maps of a pair."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image, ImageDraw

from data_rice.collator import RiceCollator, failure_words
from data_rice.decoding import read_frames
from data_rice.paths import text_to_path
from evaluation_rice.frames import clip_frames
from evaluation_rice.report.heatmap import PairMaps, draw_grid, has_maps, overlay, patch_at, row_maps, seen_region
from processing_rice import open_image, sample_frame_indices
from processing_rice.video_media_rice import sample_video

from ..index import Answer, GalleryIndex, Hit
from ..recogniser import candidates_of
from ..stream.speech import Word, join_words, phrases
from ..stream.speech_hints import expect_titles
from ..stream.speech_models import words_of
from ..uploads import Upload, UploadError, UploadLimits, read_upload

TOP_K = 10
EXAMPLES = 12
SIDE = 240
UPLOAD = "upload"
"""The clip id of an upload."""
_WORDS = re.compile(r"[a-z0-9]+|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|.", re.IGNORECASE | re.DOTALL)


@dataclass
class Clip:
    """
    Attributes:
        row: A query row, whose frames may be bytes.
        note: A note for the user.
        words: The words of an upload's sound with their times.
    """

    row: dict[str, Any]
    note: str = ""
    words: list[Word] = field(default_factory=list)


@dataclass
class Recognition:
    """
    A clip with its result in a shop.

    Attributes:
        clip: The chosen clip.
        row: Its row with the requested boxes.
        live_id: The shop, "" for the whole index.
        boxes: Source of the boxes, see `Demo.boxes`.
        answer: Answer of the index.
        encode_ms, detect_ms: Milliseconds for reading and encoding the frames, and for the detector.
        silent: For an upload with words, the images found without the words, best first.
    """

    clip: Clip
    row: dict[str, Any]
    live_id: str
    boxes: str
    answer: Answer
    encode_ms: float
    detect_ms: float = 0.0
    silent: list[str] = field(default_factory=list)

    def rank_without_words(self, hit: Hit) -> str:
        """The rank of the hit without the words, "" if there are no words."""
        if not self.silent:
            return ""
        return str(self.silent.index(hit.image_id) + 1) if hit.image_id in self.silent else f"after {len(self.silent)}"


@dataclass
class Pair:
    """A clip and a product image, with the maps of their corresponding patches."""

    picture: Image.Image
    frames: list[Image.Image]
    maps: PairMaps
    title: str = ""


@dataclass
class Demo:
    """
    Args:
        model, processor: From `load_model`.
        index: Index of the shop.
        gallery: The rows from which the index was built, for pictures without a path in the index.
        queries: Query rows for the examples.
        folder: Folder of uploads; nothing outside it is read or deleted for a visitor.
        limits: Limits of uploads.
        detector: Object with `detect(frames)`, as for a `Recogniser`, or `None`.
        transcriber: Transcribes uploads, see `load_transcriber`, or `None`.
        expects_titles: Whether the words of the shop's titles are hints for it.

    Attributes:
        boxes: Possible sources of boxes: "none"; "true" if the queries have boxes; "detector" if there is a detector.
    """

    model: Any
    processor: Any
    index: GalleryIndex
    gallery: Sequence[dict] | None = None
    queries: Any = None
    folder: str = ""
    limits: UploadLimits = field(default_factory=UploadLimits)
    detector: Any = None
    transcriber: Any = None
    expects_titles: bool = True

    def __post_init__(self):
        use_text = getattr(self.model.config, "text_config", None) is not None
        self.collator = RiceCollator(self.processor, use_text=use_text)
        ids = [] if self.gallery is None else column(self.gallery, "image_id")
        self._places = {image_id: i for i, image_id in enumerate(ids)}
        self.live_ids = self.index.live_ids()
        self._examples: dict[str, list[int]] = {}
        if self.queries is not None:
            for number, live_id in enumerate(column(self.queries, "live_id")):
                shop = live_id if live_id in self.live_ids else ""
                self._examples.setdefault(shop, []).append(number)
        exists = {"true": _has_boxes(self.queries), "detector": self.detector is not None}
        self.boxes = ["none", *(source for source, there in exists.items() if there)]

    @property
    def takes_boxes(self) -> bool:
        """Whether the model uses boxes; otherwise they are only drawn."""
        return getattr(self.model.config, "accepts_patch_mask", True)

    @property
    def first_boxes(self) -> str:
        """The initial source of boxes: the detector; true boxes only if the model does not use them."""
        return self.boxes[-1] if self.detector is not None or not self.takes_boxes else "none"

    @property
    def shops(self) -> list[str]:
        """The livestreams of the menu, those with examples first; then "" for the whole index."""
        lives = sorted(self.live_ids, key=lambda live_id: live_id not in self._examples)
        return [*lives, ""]

    @property
    def num_frames(self) -> int:
        """Number of frames that the model uses."""
        return self.processor.video_processor.num_frames

    def example_numbers(self, live_id: str) -> list[int]:
        """Numbers of evenly spaced query rows of a shop."""
        numbers = self._examples.get(live_id, [])
        count = min(EXAMPLES, len(numbers))
        return [numbers[i * len(numbers) // count] for i in range(count)]

    def example_pictures(self, live_id: str) -> list[Image.Image]:
        """A frame from the middle of each example, or a grey tile if the clip cannot be read."""
        pictures = []
        for number in self.example_numbers(live_id):
            try:
                frames = clip_frames(self.queries[number], 3)
                pictures.append(enlarge(frames[len(frames) // 2][0]))
            except (ValueError, OSError):
                pictures.append(Image.new("RGB", (SIDE, SIDE), (220, 220, 220)))
        return pictures

    def example(self, live_id: str, place: int) -> Clip:
        """The example at a position of `example_pictures`; raises `ValueError` if there is none."""
        numbers = self.example_numbers(live_id)
        if not 0 <= place < len(numbers):
            raise ValueError("There is no such example; choose another one.")
        return Clip(self.queries[numbers[place]])

    def upload(self, paths: Sequence[str], live_id: str = "") -> Clip:
        """
        A clip of uploaded files, which are deleted afterwards.

        Args:
            paths: Paths of the uploaded files on the server.
            live_id: Shop whose titles are hints for the speech model, "" for the whole index.

        Raises:
            UploadError: see `read_upload`.
        """
        upload: Upload = read_upload(paths, self.folder, self.limits, with_sound=self.transcriber is not None)
        frames = [{"path": None, "bytes": data} for data in upload.frames]
        words, note = [], upload.note
        try:
            titles = self.index.titles(live_id or None) if upload.sound and self.expects_titles else ()
            # Anew for each upload, whose language is its own.
            ear, _ = expect_titles(self.transcriber, titles)
            words = [word for chunk in upload.sound for word in words_of(chunk, ear)]
        except (RuntimeError, ValueError) as error:
            note = f"{note} The sound could not be transcribed ({error}).".strip()
        row = {"clip_id": UPLOAD, "frames": frames, "boxes": None, "asr": join_words(words), "relevant": []}
        return Clip(row, note, words)

    @torch.no_grad()
    def recognise(self, clip: Clip, live_id: str, asr: str = "", boxes: str = "none") -> Recognition:
        """
        Ranks a shop for a clip.

        Args:
            clip: From `example` or `upload`.
            live_id: Shop to search, "" for the whole index.
            asr: Speech of an uploaded clip; replaces its transcript.
            boxes: Source of the boxes for the model, one of `boxes`.

        Raises:
            ValueError: the clip cannot be read, or the shop or the source of boxes does not exist.
        """
        if live_id and live_id not in self.live_ids:
            raise ValueError("There is no such shop; choose one from the list.")
        if asr:
            clip = replace(clip, row={**clip.row, "asr": asr[:2000]}, words=[])
        start = time.perf_counter()
        row = self.with_boxes(clip.row, boxes)
        detect_ms = 1000 * (time.perf_counter() - start)
        start = time.perf_counter()
        inputs, readable, failures = self._collator(row).collate_queries([row])
        if not readable:
            raise ValueError(f"The clip cannot be read: {failure_words(failures[0])}.")
        clips = self.model.encode_clips(**inputs)
        encode_ms = 1000 * (time.perf_counter() - start)
        answer = self._search(clips, live_id)
        if not answer.hits:
            raise ValueError("This shop has no pictures to search.")
        silent = []
        if row["clip_id"] == UPLOAD and row["asr"] and self.collator.use_text:
            pictures = {name: value for name, value in inputs.items() if not name.startswith("asr_")}
            silent = [hit.image_id for hit in self._search(self.model.encode_clips(**pictures), live_id).hits]
        return Recognition(clip, row, live_id, boxes, answer, encode_ms, detect_ms, silent)

    def _search(self, clips: Any, live_id: str) -> Answer:
        return self.index.search(clips, live_id or None, top_k=TOP_K, rerank=candidates_of(self.index))[0]

    def with_boxes(self, row: dict, source: str) -> dict:
        """A query row with boxes from one of `boxes`; the detector uses the same frames as the model."""
        if source not in self.boxes:
            raise ValueError("There are no such boxes; choose others.")
        if source == "true":
            return row
        if source == "none":
            return {**row, "boxes": None}
        frames = numbered_frames(row, self.num_frames)
        found = dict(zip(frames, self.detector.detect(list(frames.values()))))
        if row.get("video"):
            return {**row, "boxes": list(found.values()), "box_frames": list(found)}
        return {**row, "boxes": [found.get(number) for number in range(len(row["frames"]))]}

    def _collator(self, row: dict) -> RiceCollator:
        return replace(self.collator, use_boxes=self.takes_boxes and any(row.get("boxes") or ()))

    def frames(self, recognition: Recognition) -> list[Image.Image]:
        """The frames that the model uses, with the chosen boxes."""
        return [draw_box(enlarge(frame), box) for frame, box in clip_frames(recognition.row, self.num_frames)]

    def entry(self, image_id: str) -> Any:
        """An image of the shop in a form for `open_image`."""
        if image_id in self._places:
            return self.gallery[self._places[image_id]]["image"]
        return {"path": text_to_path(self.index.records([image_id])[image_id]["image"]), "bytes": None}

    def picture(self, image_id: str) -> Image.Image:
        """An image of the shop, or a grey tile if it can no longer be read."""
        try:
            return enlarge(open_image(self.entry(image_id)))
        except ValueError:
            return Image.new("RGB", (SIDE, SIDE), (220, 220, 220))

    @property
    def explains(self) -> bool:
        """Whether there are heat maps."""
        return has_maps(self.model)

    def pair(self, recognition: Recognition, place: int) -> Pair:
        """
        The clip with one of its hits.

        Raises:
            ValueError: the hit does not exist, a picture cannot be read, or the model has no heat maps.
        """
        hits = recognition.answer.hits
        if not 0 <= place < len(hits):
            raise ValueError("There is no such product; choose another one.")
        hit = hits[place]
        row = {"image_id": hit.image_id, "image": self.entry(hit.image_id), "title": hit.title}
        maps = row_maps(self.model, self._collator(recognition.row), recognition.row, row)
        frames = [enlarge(frame) for frame, _ in clip_frames(recognition.row, self.num_frames)]
        return Pair(enlarge(open_image(row["image"]), 2 * SIDE), frames, maps, hit.title or hit.image_id)

    def patch_at(self, pair: Pair, point: Sequence[float]) -> tuple[int, int] | None:
        """The patch of the pair's picture at a point in pixels, `None` outside all patches."""
        region = seen_region(self.processor.image_processor, pair.picture.size)
        return patch_at(pair.picture.size, pair.maps.grid, (point[0], point[1]), region)

    def heat(self, pair: Pair, patch: tuple[int, int] | None) -> tuple[Image.Image, list[Image.Image]]:
        """The pair's picture with its grid, and the frames with the heat of one patch, or of all patches."""
        seen = seen_region(self.processor.image_processor, pair.picture.size)
        picture = draw_grid(pair.picture, pair.maps.grid, patch, seen)
        part = self.processor.video_processor
        frames = zip(pair.frames, pair.maps.heat(patch))
        return picture, [overlay(frame, values, seen_region(part, frame.size)) for frame, values in frames]


def column(rows: Sequence[dict], name: str) -> list[str]:
    """A text column of a data set or of a list of rows, "" for rows without it."""
    if hasattr(rows, "column_names"):
        return list(rows[name])
    return [row.get(name) or "" for row in rows]


def _has_boxes(rows: Sequence[dict] | None) -> bool:
    if hasattr(rows, "column_names"):
        # Iterating reads no other column, and stops at the first clip with a box.
        return any(any(boxes or ()) for boxes in rows["boxes"])
    return any(any(row.get("boxes") or ()) for row in rows or ())


def numbered_frames(row: dict, num_frames: int) -> dict[int, Image.Image]:
    """The frames of a query row that the model uses, by their numbers in the clip."""
    if not row.get("video"):
        chosen = sample_frame_indices(len(row["frames"]), num_frames) if row["frames"] else []
        return read_frames(row["frames"], chosen)[0]
    return sample_video({"path": row["video"], "start": row.get("start"), "end": row.get("end")}, num_frames)


def enlarge(picture: Image.Image, side: int = SIDE) -> Image.Image:
    """A copy whose longer side has at least, and at most twice, `side` pixels."""
    longest = max(picture.size)
    scale = max(side, min(longest, 2 * side)) / longest
    size = [max(1, round(value * scale)) for value in picture.size]
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def draw_box(picture: Image.Image, box: Sequence[float] | None) -> Image.Image:
    """Draws a box (ltrb in 0..1) into a picture, white inside black; `None` draws nothing."""
    if box is None or len(box) != 4:
        return picture
    corners = [value * side for value, side in zip(box, picture.size * 2)]
    draw, width = ImageDraw.Draw(picture), max(2, max(picture.size) // 100)
    draw.rectangle(corners, outline=(0, 0, 0), width=3 * width)
    inner = [value + sign * width for value, sign in zip(corners, (1, 1, -1, -1))]
    if inner[0] < inner[2] and inner[1] < inner[3]:
        draw.rectangle(inner, outline=(255, 255, 255), width=width)
    return picture


def shared_words(text: str, title: str) -> list[tuple[str, bool]]:
    """
    The text in pieces, each with a flag whether it is also in the title: whole words, or runs of at least two
    characters in scripts without spaces.
    """
    words = {word for word in _WORDS.findall(title.lower()) if len(word) > 2}
    pieces: list[tuple[str, bool]] = []

    def add(piece: str, shared: bool) -> None:
        if pieces and pieces[-1][1] == shared:
            piece = pieces.pop()[0] + piece
        pieces.append((piece, shared))

    for word in _WORDS.findall(text):
        if word[0] < "\u3040":
            add(word, word.lower() in words)
            continue
        place = 0
        while place < len(word):
            length = next((n for n in range(len(word) - place, 1, -1) if word[place : place + n] in title), 1)
            add(word[place : place + length], length > 1)
            place += length
    return pieces


def table_rows(recognition: Recognition) -> list[list[str]]:
    """Rank, product, title, confidence and the scores of each hit, as text."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    return [
        [
            str(rank),
            hit.product_id,
            hit.title,
            f"{100 * hit.confidence:.1f} %",
            *map(number, (hit.score, hit.embedding_score, hit.matching_score, hit.alignment_score)),
        ]
        for rank, hit in enumerate(recognition.answer.hits, 1)
    ]


def said_pieces(recognition: Recognition) -> list[tuple[str, str | None]]:
    """The speech in labelled pieces: times of the transcript, and words of the first title."""
    hit, words = recognition.answer.hits[0], recognition.clip.words
    parts = [(f"{part.start_s:.0f} s ", part.text + " ") for part in phrases(words)]
    pieces: list[tuple[str, str | None]] = []
    for time_s, text in parts or [("", recognition.row.get("asr") or "")]:
        pieces += [(time_s, "time")] if time_s else []
        pieces += [(piece, "in the title" if shared else None) for piece, shared in shared_words(text, hit.title)]
    return pieces


def caption(hit: Hit, rank: int, relevant: Sequence[str], before: str = "") -> str:
    """Line under a product's picture. A known right answer is marked. If the words changed its rank, the rank without
    them is added."""
    mark = " ✓" if hit.image_id in relevant else ""
    moved = f" (without speech: {before})" if before not in ("", str(rank)) else ""
    return f"{rank}.{mark} {100 * hit.confidence:.0f} % {hit.title or hit.image_id}{moved}"


__all__ = [
    "Clip",
    "Demo",
    "Pair",
    "Recognition",
    "UploadError",
    "UploadLimits",
    "caption",
    "said_pieces",
    "shared_words",
    "table_rows",
]
