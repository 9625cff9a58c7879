"""Check of a local LPR4M: compares counts with the published ones; reads, decodes and hashes every picture."""

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tqdm.auto import tqdm

from processing_rice import MediaError, open_image
from processing_rice.media_rice import read_media, split_tar_member

from .. import folders, parsing
from ..builder import ProblemLog
from ..files import write_atomically
from . import layout
from .evaluation_rows import EvaluationRows
from .fetch import find_url_lists
from .index import id_of_url
from .media import Lpr4mMedia

_TEST_COUNTS = {
    "test clips": 20_079,
    "test frames": 501_656,
    "test boxes": 669_374,
    "gallery images": 66_358,
    "livestreams": 110,
}
# Source: the data set's description and the paper (section 3).
PUBLISHED_COUNTS = {
    "full": {
        "training clips": 4_013_617,
        "training frames": 473_402_226,
        "training images": 332_438,
        "training boxes": 1_115_629,
        "categories": 34,
        **_TEST_COUNTS,
    },
    "750k": {"categories": 34, **_TEST_COUNTS},
    "none": {},
}
_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class _Picture:
    id: str
    path: str


@dataclass
class Verification:
    """Result of `verify`.

    Attributes:
        counts: counts of the annotation files and media, by the names of `PUBLISHED_COUNTS`.
        expected: the expected counts.
        bad: number of missing or damaged pictures and shards, by kind.
    """

    counts: dict[str, int]
    expected: dict[str, int]
    bad: dict[str, int] = field(default_factory=dict)

    @property
    def differences(self) -> dict[str, tuple[int, int]]:
        """Counts that differ from the expected ones, as ``name -> (found, expected)``."""
        return {
            name: (self.counts.get(name, 0), value)
            for name, value in self.expected.items()
            if self.counts.get(name, 0) != value
        }

    @property
    def whole(self) -> bool:
        """Whether all counts match and nothing is missing or damaged."""
        return not self.differences and not self.bad


def expected_counts(expect: str) -> dict[str, int]:
    """Return the counts to compare with: "full", "750k", "none", or a JSON file ``{"training clips": 10, ...}``.

    Raises:
        FileNotFoundError, ValueError: ``expect`` is none of these, or the file does not hold such counts.
    """
    if expect in PUBLISHED_COUNTS:
        return PUBLISHED_COUNTS[expect]
    if not expect.endswith(".json"):
        raise ValueError(f"--expect must be {', '.join(PUBLISHED_COUNTS)} or a .json file, not {expect!r}.")
    counts = parsing.read_json_object(expect)
    for name, value in counts.items():
        if name not in PUBLISHED_COUNTS["full"] or type(value) is not int:
            names = ", ".join(PUBLISHED_COUNTS["full"])
            raise ValueError(f"{expect}: {name!r}: {value!r} is not a count; the names are {names}.")
    return counts


def published_list(data_dir: str, train_files: str) -> str:
    """Return the name in `PUBLISHED_COUNTS` that fits the training list's file names: "full", "750k" or "none".

    Raises:
        ValueError: some parts of the full list are missing.
    """
    files = layout.training_files(data_dir, train_files)
    if layout.is_whole_list(files):
        return "full"
    return "750k" if len(files) == 1 and "750k" in os.path.basename(files[0]).lower() else "none"


class _References:
    """Iterates over all pictures in the annotations and counts them."""

    def __init__(self, data_dir: str, train_files: str, media: Lpr4mMedia):
        self.media = media
        self.train_files = layout.training_files(data_dir, train_files)
        self.test = None
        if any(layout.annotation_files(data_dir, name) for name in layout.TEST_FILES.values()):
            self.test = EvaluationRows(data_dir, "all", media, ProblemLog(None))
        if not self.train_files and self.test is None:
            raise FileNotFoundError(
                f"{os.path.join(data_dir, 'annotations')} holds no training list and no test files; add them."
            )
        self.counts: dict[str, int] = {}

    def __iter__(self) -> Iterator[_Picture]:
        if self.train_files:
            yield from self._training()
        if self.test:
            yield from self._test()

    def _training(self) -> Iterator[_Picture]:
        counts = dict.fromkeys(("training clips", "training frames", "training boxes"), 0)
        images: set[str] = set()
        categories: set[str] = set()
        for _, _, row in layout.read_training_rows(self.train_files):
            counts["training clips"] += 1
            counts["training frames"] += len(row.frame_ids)
            counts["training boxes"] += sum(any(box) for box in row.boxes)
            categories.add(row.category)
            frames = self.media.training_clip(row.clip_id, row.frame_ids).paths
            yield from map(_Picture, row.frame_ids, frames)
            if row.image_id not in images:
                images.add(row.image_id)
                yield _Picture(row.image_id, self.media.training_image(row.image_id))
        self.counts |= counts | {"training images": len(images), "categories": len(categories)}

    def _test(self) -> Iterator[_Picture]:
        boxes = layout.read_test_boxes(self.test.files["boxes"])
        clips = layout.read_id_lists(self.test.files["relevant"], "clip id")
        frames = 0
        for clip_id in clips:
            there = self.media.query_frames(clip_id)
            for frame_id in boxes.get(clip_id, ()):
                there.setdefault(frame_id, self.media.missing_query_frame(clip_id, frame_id))
            frames += len(there)
            if not there:
                yield _Picture(clip_id, self.media.missing_query_frame(clip_id, f"{clip_id}-0000"))
            yield from (_Picture(frame_id, path) for frame_id, path in there.items())
        images: set[str] = set()
        for live_id, image_ids in self.test.gallery.items():
            images.update(image_ids)
            yield from (_Picture(image_id, self.media.gallery_image(live_id, image_id)) for image_id in image_ids)
        self.counts |= {
            "test clips": len(clips),
            "test frames": frames,
            "test boxes": sum(len(found) for clip in boxes.values() for found in clip.values()),
            "gallery images": len(images),
            "livestreams": len(self.test.gallery),
        }


def _check(picture: _Picture, root: str, decode: bool) -> tuple[str | None, str | None]:
    """Return a picture's problem or None, and the hash of its file (None for a member of a tar file)."""
    member = split_tar_member(picture.path)
    try:
        if os.path.islink(picture.path):
            folders.check_link(picture.path, os.path.dirname(picture.path), root)
        data = read_media({"path": picture.path, "bytes": None})
    except FileNotFoundError:
        return "missing", None
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})", None
    digest = None if member else hashlib.sha256(data).hexdigest()
    if decode:
        try:
            open_image(data)
        except MediaError as error:
            return error.reason, digest
    return None, digest


class _Reports:
    """The files that a verification writes; they get their final names at the end."""

    def __init__(self, output_dir: str, root: str):
        os.makedirs(output_dir, exist_ok=True)
        self.root = os.path.abspath(root)
        self.paths = {name: os.path.join(output_dir, name) for name in ("missing.jsonl", "manifest.sha256")}
        self.files = {name: open(f"{path}.part", "w", encoding="utf-8") for name, path in self.paths.items()}
        self.bad: dict[str, int] = {}
        self.missing_ids: set[str] = set()

    def add_bad(self, media_id: str, path: str, reason: str) -> None:
        kind = reason.partition(" (")[0].partition(":")[0]
        self.bad[kind] = self.bad.get(kind, 0) + 1
        self.missing_ids.add(media_id)
        entry = {"id": media_id, "file": path, "reason": reason}
        self.files["missing.jsonl"].write(json.dumps(entry, ensure_ascii=False) + "\n")

    def add_hash(self, path: str, digest: str) -> None:
        relative = os.path.relpath(os.path.abspath(path), self.root)
        name = os.path.abspath(path) if relative.startswith("..") else relative
        self.files["manifest.sha256"].write(f"{digest}  {name}\n")

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def finish(self) -> None:
        self.close()
        for path in self.paths.values():
            os.replace(f"{path}.part", path)


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def verify(
    data_dir: str,
    output_dir: str,
    *,
    expected: Mapping[str, int] | None = None,
    train_files: str = "training_videoinfo*.txt",
    media_dirs: list[str] | None = None,
    cache_dir: str,
    decode: bool = True,
    num_workers: int = 4,
) -> Verification:
    """Check an LPR4M folder and write four kinds of reports to ``OUTPUT_DIR``.

    ``missing.jsonl`` lists missing and damaged pictures and shards with the reason. ``manifest.sha256`` hashes the
    annotation files, the pictures that are files, and the tar shards; ``sha256sum -c`` in the data folder reads it.
    ``missing_urls-*.txt`` holds the urls of missing pictures for another fetch, if the url lists are in the data
    folder; those of an earlier run are removed. ``verify.json`` is the summary.

    Args:
        data_dir: the data folder.
        output_dir: the folder for the reports.
        expected: expected counts, see `expected_counts`.
        train_files, media_dirs: see `Lpr4mConfig`.
        cache_dir: folder of the index of img2dataset's shards.
        decode: decode every picture; False only reads it.
        num_workers: number of threads.

    Raises:
        FileNotFoundError: there are no annotation files.
        ValueError: an annotation file is malformed; the message names it and the line.
    """
    if not os.path.isdir(data_dir):
        raise FileNotFoundError(f"{data_dir} is not a folder; pass the folder that holds the data.")
    # All links are checked below, and those that lead out of the folder are listed.
    media = Lpr4mMedia(data_dir, cache_dir, media_dirs, check_links=False)
    references = _References(data_dir, train_files, media)
    reports = _Reports(output_dir, data_dir)
    try:
        for path in layout.annotation_files(data_dir, "*"):
            reports.add_hash(path, parsing.file_sha256(path))
        _check_pictures(references, reports, data_dir, decode, num_workers)
        _check_shards(media, reports)
        urls = _check_urls(data_dir, media, reports)
        reports.finish()
    finally:
        reports.close()
    for former in glob.glob(os.path.join(glob.escape(output_dir), "missing_urls-*.txt")):
        os.remove(former)
    if urls:
        text = "".join(f"{url}\n" for url in urls)
        name = f"missing_urls-{hashlib.sha256(text.encode()).hexdigest()[:8]}.txt"
        write_atomically(Path(output_dir, name), text)
    result = Verification(references.counts, dict(expected or {}), reports.bad)
    summary = {"whole": result.whole, "counts": result.counts, "expected": result.expected, "bad": result.bad}
    write_atomically(Path(output_dir, "verify.json"), json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return result


def _check_pictures(references, reports: _Reports, root: str, decode: bool, num_workers: int) -> None:
    with ThreadPoolExecutor(max(1, num_workers)) as pool, tqdm(desc="Pictures", unit="picture") as progress:
        for chunk in _chunks(references, _CHUNK):
            for picture, (reason, digest) in zip(chunk, pool.map(lambda item: _check(item, root, decode), chunk)):
                if reason is not None:
                    reports.add_bad(picture.id, picture.path, reason)
                if digest is not None:
                    reports.add_hash(picture.path, digest)
            progress.update(len(chunk))


def _check_shards(media: Lpr4mMedia, reports: _Reports) -> None:
    for path, reason in media.shard_problems:
        reports.add_bad(path, path, f"shards {reason}")
    if media.index:
        for path in tqdm(media.index.tar_files(), desc="Hashing shards", unit="shard"):
            reports.add_hash(path, parsing.file_sha256(path))


def _check_urls(data_dir: str, media: Lpr4mMedia, reports: _Reports) -> list[str]:
    """Return the urls whose pictures are missing; pictures that no report lists yet are added."""
    try:
        lists = find_url_lists(data_dir)
    except FileNotFoundError:
        return []
    gallery: dict[str, str] = {}
    for path in layout.annotation_files(data_dir, layout.TEST_FILES["gallery"]):
        gallery = {image: live for live, images in layout.read_id_lists(path, "live id").items() for image in images}
    urls: list[str] = []
    for path in lists:
        for chunk in _chunks(parsing.read_lines(path, f"Looking up {os.path.basename(path)}"), _CHUNK):
            ids = {}
            for line, url in chunk:
                try:
                    ids[id_of_url(url)] = url.strip()
                except ValueError as error:
                    raise parsing.row_error(path, line, f"{error}; repair or remove the line.") from None
            there = media.index.find(list(ids)) if media.index else {}
            for media_id in ids.keys() - there.keys():
                if media_id not in reports.missing_ids and _in_tree(media_id, media, gallery):
                    continue
                urls.append(ids[media_id])
                if media_id not in reports.missing_ids:
                    reports.add_bad(media_id, ids[media_id], "missing")
    return sorted(urls)


def _in_tree(media_id: str, media: Lpr4mMedia, gallery: Mapping[str, str]) -> bool:
    clip_id = media_id.rpartition("-")[0]
    places = [
        *media.training_clip(clip_id, [media_id]).paths,
        media.missing_query_frame(clip_id, media_id),
        media.training_image(media_id),
    ]
    if media_id in gallery:
        places.append(media.gallery_image(gallery[media_id], media_id))
    return any(os.path.isfile(place) for place in places)
