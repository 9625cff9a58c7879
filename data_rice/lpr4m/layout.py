"""The published annotation files of LPR4M: file names, ids and rows."""

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .. import parsing
from ..builder import ProblemLog

TEST_FILES = {
    "relevant": "test_videoid_to_gtimage*.json",
    "gallery": "test_liveid_to_gallery*.json",
    "boxes": "test_frameid2gtbox*.json",
    "asr": "test_videoid_asr*.txt",
    "title": "test_image_title*.txt",
}
ATTRIBUTES_FILE = "test_videoid_attributes*.txt"
MAIN_IMAGES_FILE = "gallery_main.txt"
NUM_PARTS = 10
_PART = re.compile(r"_part_(\d+)")
_UUID_FIELDS = 5
BOXES_LEFT_OUT = "kept without those boxes that have no area inside the frame"


def live_id_of(clip_id: str) -> str:
    """Return the livestream of a clip id ``<uuid>-<start_ms>-<end_ms>``: its first five dash-separated fields.

    Raises:
        ValueError: the id does not have that form (without file and line, which the caller adds).
    """
    fields = parsing.check_name(clip_id, "clip id").split("-")
    if len(fields) != _UUID_FIELDS + 2 or not all(fields):
        raise ValueError(f"the clip id {clip_id!r} is not of the form <live uuid>-<start_ms>-<end_ms>")
    return "-".join(fields[:_UUID_FIELDS])


def shot_number(image_id: str) -> str | None:
    """Return what follows the five fields of the image id's UUID, ``"0"`` for a product's main image, else None."""
    fields = image_id.split("-")
    return fields[-1] if len(fields) == _UUID_FIELDS + 1 and fields[-1].isdigit() else None


def product_id_of(image_id: str) -> str:
    """Return the image id without its shot number: ``<uuid>-0`` and ``<uuid>-3`` show one product."""
    return image_id if shot_number(image_id) is None else image_id.rpartition("-")[0]


def frame_order(frame_name: str) -> tuple[int, int, str]:
    """Sort key of frame files and ids: by the index after the last dash, then by name."""
    index = os.path.splitext(frame_name)[0].rpartition("-")[2]
    return (0, int(index), frame_name) if index.isascii() and index.isdigit() else (1, 0, frame_name)


def annotation_files(root: str, pattern: str) -> list[str]:
    """Return the files of ``ROOT/annotations`` that match ``pattern``, sorted by name."""
    return sorted(glob.glob(os.path.join(glob.escape(os.path.join(root, "annotations")), pattern)))


def training_files(root: str, pattern: str) -> list[str]:
    """Return the files of the training list. The full list has ten parts with consecutive numbers; all are required.

    Raises:
        ValueError: the pattern finds only some of the parts.
    """
    files = annotation_files(root, pattern)
    parts = {int(match[1]): path for path in files if (match := _PART.search(os.path.basename(path)))}
    # A pattern that names one part selects that part alone.
    if parts and not is_whole_list(files) and not _PART.search(pattern):
        numbers = ", ".join(map(str, sorted(parts)))
        raise ValueError(
            f"{os.path.dirname(files[0])} holds the parts {numbers} of the training list, which has {NUM_PARTS} with "
            "consecutive numbers; add the others, or name the files to use with train_files."
        )
    return files


def is_whole_list(files: Sequence[str]) -> bool:
    """Return whether the training files are the ten parts of the full list, numbered from 0 or from 1."""
    numbers = {int(match[1]) for path in files if (match := _PART.search(os.path.basename(path)))}
    return any(numbers == set(range(first, first + NUM_PARTS)) for first in (0, 1))


def one_annotation_file(root: str, pattern: str) -> str:
    """Return the one file of ``ROOT/annotations`` that matches ``pattern``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there is more than one.
    """
    found = annotation_files(root, pattern)
    if not found:
        wanted = os.path.join(root, "annotations", pattern)
        raise FileNotFoundError(f"{wanted} does not exist; put LPR4M's annotation file there.")
    if len(found) > 1:
        names = ", ".join(os.path.basename(path) for path in found)
        raise ValueError(f"{os.path.join(root, 'annotations')} holds {names}; keep one of them.")
    return found[0]


@dataclass(slots=True)
class TrainingRow:
    """One row of a training list; ``boxes`` are in pixels of the frame, [] if the row has none."""

    clip_id: str
    live_id: str
    frame_ids: list[str]
    boxes: list[list[float]]
    image_id: str
    title: str
    category: str
    asr: str
    product_scale: str
    visible_duration: str
    product_number: str


def parse_training_row(columns: Sequence[str]) -> TrainingRow:
    """Parse the eleven columns of a training list.

    Raises:
        ValueError: a column is malformed (without file and line, which the caller adds).
    """
    clip_id, frames, boxes, image_id, title, category_id, category, asr, scale, duration, number = columns
    live_id = live_id_of(clip_id)
    try:
        frame_ids = [parsing.check_name(frame_id, "frame id") for frame_id in parsing.parse_string_list(frames)]
        pixel_boxes = parsing.parse_box_list(boxes)
    except ValueError as error:
        raise ValueError(f"clip {clip_id}: {error}") from None
    if pixel_boxes and len(pixel_boxes) != len(frame_ids):
        raise ValueError(f"clip {clip_id} lists {len(frame_ids)} frames but {len(pixel_boxes)} boxes")
    return TrainingRow(
        clip_id,
        live_id,
        frame_ids,
        pixel_boxes,
        parsing.check_name(image_id, "image id"),
        title,
        category or category_id,
        asr,
        scale,
        duration,
        number,
    )


def read_training_rows(files: Sequence[str]) -> Iterator[tuple[str, int, TrainingRow]]:
    """Yield ``(file, line, row)`` of training lists.

    Raises:
        ValueError: a row is malformed, or a clip id appears twice; the message names the file and the line.
    """
    # Hashes instead of ids save memory: the full list has four million ids.
    seen: set[int] = set()
    for path in files:
        for line, columns in parsing.read_table(path, 11):
            try:
                row = parse_training_row(columns)
            except ValueError as error:
                raise parsing.row_error(path, line, f"{error}; repair or remove the row.") from None
            key = hash(row.clip_id)
            if key in seen:
                raise parsing.row_error(
                    path,
                    line,
                    f"the clip id {row.clip_id} appears a second time; remove the row, or name one list with "
                    "train_files when the folder holds overlapping lists.",
                )
            seen.add(key)
            yield path, line, row


def products_of_livestreams(files: Sequence[str]) -> dict[str, set[str]]:
    """Return the products of each livestream of the training lists, livestreams in file order."""
    products: dict[str, set[str]] = {}
    for path in files:
        description = f"Listing livestreams of {os.path.basename(path)}"
        for line, columns in parsing.read_table(path, 11, description):
            try:
                live_id = live_id_of(columns[0])
            except ValueError as error:
                raise parsing.row_error(path, line, f"{error}; repair or remove the row.") from None
            products.setdefault(live_id, set()).add(product_id_of(columns[3]))
    return products


def choose_livestreams(live_ids: Sequence[str], count: int) -> frozenset[str]:
    """Choose ``count`` livestreams by a hash of their ids, so the choice depends on the ids alone."""
    return frozenset(sorted(live_ids, key=lambda live_id: hashlib.sha256(live_id.encode()).hexdigest())[:count])


def read_id_table(path: str, num_columns: int, what: str) -> dict[str, list[str]]:
    """Read a tab-separated table whose first column is a unique id.

    Returns:
        id -> the other columns.

    Raises:
        ValueError: a row is malformed or an id appears twice; the message names the file and the line.
    """
    table: dict[str, list[str]] = {}
    for line, (key, *values) in parsing.read_table(path, num_columns, f"Reading {os.path.basename(path)}"):
        if key in table:
            raise parsing.row_error(path, line, f"the {what} {key} appears a second time; remove one of the rows.")
        table[key] = values
    return table


def read_id_lists(path: str, what: str) -> dict[str, list[str]]:
    """Read ``{id: [image_id, ...]}``; every id must be a plain name.

    Raises:
        ValueError: an entry is malformed; the message names the file and the key.
    """
    table = parsing.read_json_object(path)
    for key, values in table.items():
        try:
            parsing.check_name(key, what)
            if not isinstance(values, list):
                raise ValueError("expected a list of image ids")
            for value in values:
                parsing.check_name(value, "image id")
        except ValueError as error:
            raise ValueError(f"{path}, {what} {key!r}: {error}; repair the entry.") from None
    return table


def read_test_boxes(path: str, problems: ProblemLog | None = None) -> dict[str, dict[str, list[list[float]]]]:
    """Read ``{frame_id: [[l, t, r, b], ...]}`` (fractions of the frame) as clip id -> frame id -> boxes with an area.

    Args:
        path: the file.
        problems: receives the clips with boxes without area; an all-zero box means "no box".

    Raises:
        ValueError: an entry is malformed; the message names the file and the frame.
    """
    clips: dict[str, dict[str, list[list[float]]]] = {}
    without_area: dict[str, None] = {}
    for frame_id, boxes in parsing.read_json_object(path).items():
        try:
            parsing.check_name(frame_id, "frame id")
            if not isinstance(boxes, list):
                raise ValueError("expected a list of boxes")
            checked = [parsing.check_box(box) for box in boxes]
            if any(abs(value) > 2 for box in checked for value in box):
                raise ValueError("the boxes are not fractions of the frame (0 to 1)")
        except ValueError as error:
            raise ValueError(f"{path}, frame {frame_id!r}: {error}; repair the entry.") from None
        clip_id = frame_id.rpartition("-")[0]
        clipped = [parsing.clip_box(box) for box in checked]
        if any(inside is None and any(box) for inside, box in zip(clipped, checked)):
            without_area[clip_id] = None
        clips.setdefault(clip_id, {})[frame_id] = [box for box in clipped if box is not None]
    if problems is not None:
        for clip_id in without_area:
            problems.add(clip_id, path, None, BOXES_LEFT_OUT)
    return clips


def read_main_images(path: str) -> set[str]:
    """Read the list of main images: one image id per line, or a path that ends in it."""
    names = (text.strip().replace("\\", "/").rpartition("/")[2] for _, text in parsing.read_lines(path))
    return {name.removesuffix(".jpg") for name in names}
