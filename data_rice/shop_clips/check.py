"""Checks a shop_clips folder and reports each problem with its line.

    python -m data_rice.shop_clips check DIR [--fast] [--json]

The check uses the reading functions of the builder. The builder stops at the first mistake; the check reads every
line, opens every picture, and decodes the first and last frame of every video clip.
"""

import argparse
import difflib
import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from os import path as osp

from tqdm.auto import tqdm

from processing_rice import MediaError, open_image
from processing_rice.media_rice import read_media
from processing_rice.video_media_rice import VideoReader, probe_video

from .. import parsing
from ..commands import print_anywhere
from ..paths import MediaRoot
from . import novel
from . import shop_clips as format_

FEW_PRODUCTS = 10
# Ends are often rounded up to the second; a range may end this many seconds after its video.
_END_TOLERANCE = 0.5


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        file: name of the file inside the folder.
        line: counted from 1; None for a problem of the whole file.
        message: description of the problem.
        level: "error" (the builder refuses the folder, or the row cannot be used) or "warning".
    """

    file: str
    line: int | None
    message: str
    level: str = "error"

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {'warning: ' if self.level == 'warning' else ''}{self.message}"


@dataclass
class Clip:
    """The parts of a clip's row that later checks need."""

    split: str
    file: str
    line: int
    name: str
    frames: list[str]
    video: str
    start: float
    end: float
    product: str
    whole: bool


@dataclass
class Report:
    """Result of the check.

    Attributes:
        problems: problems in the order of files and lines.
        files: per file, the number of rows, products, frames and videos, and the seconds of video.
    """

    problems: list[Problem] = field(default_factory=list)
    files: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not any(problem.level == "error" for problem in self.problems)


def check_folder(root: str, fast: bool = False, workers: int = 1, progress: bool = False) -> Report:
    """Check a shop_clips folder.

    Args:
        root: the folder.
        fast: do not open pictures or decode videos; read only the headers of videos.
        workers: number of files opened at the same time.
        progress: show a progress bar on stderr.

    Raises:
        FileNotFoundError: ``root`` is not a folder.
    """
    if not osp.isdir(root):
        raise FileNotFoundError(f"{root} is not a folder; pass the folder that holds {format_.GALLERY_FILE}.")
    return _Checker(root, fast, workers, progress).run()


class _Checker:
    def __init__(self, root: str, fast: bool, workers: int, progress: bool):
        self.root, self.fast, self.workers, self.progress = osp.abspath(root), fast, workers, progress
        self.media = MediaRoot(root)
        self.report = Report()
        self.clips: list[Clip] = []
        self.pictures: dict[str, tuple[str, int]] = {}
        self.digests: dict[str, str] = {}
        self.seconds_of: dict[str, float] = {}

    def run(self) -> Report:
        gallery = self.read_gallery()
        for split, file in format_.CLIP_FILES.items():
            if osp.isfile(osp.join(self.root, file)):
                self.read_clips(split, file, gallery)
        self.check_splits()
        self.open_pictures()
        self.open_videos()
        self.find_leaks()
        self.summarise(gallery)
        order = {name: i for i, name in enumerate((format_.GALLERY_FILE, *format_.CLIP_FILES.values()))}
        self.report.problems.sort(key=lambda problem: (order.get(problem.file, -1), problem.line or 0))
        return self.report

    def add(self, file: str, line: int | None, message: str, level: str = "error") -> None:
        self.report.problems.append(Problem(file, line, message, level))

    def attempt(self, file: str, line: int, function: Callable, *arguments, default=None):
        """Call a function of the builder; a ValueError becomes a problem, and the result is ``default``."""
        try:
            return function(*arguments)
        except ValueError as error:
            self.add(file, line, str(error).removeprefix(f"{osp.join(self.root, file)}, line {line}: "))
            return default

    def rows(self, file: str, keys: Iterable[str]) -> Iterator[tuple[int, dict]]:
        """Yield the readable rows of a file."""
        path, unknown, hints, count = osp.join(self.root, file), {}, {}, 0
        lines = self.attempt(file, 1, parsing.scan_lines, path, default=())
        for number, _, raw in lines:
            count += 1
            row = self.attempt(file, number, _parse, path, number, raw)
            if row is None:
                continue
            for key in row:
                if key not in keys:
                    unknown.setdefault(key, []).append(number)
                    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
                    if near and near[0] not in row:
                        hints[key] = f"; did you mean {near[0]!r}?"
            yield number, row
        self.report.files[file] = {"rows": count, "products": 0, "frames": 0, "videos": 0, "seconds": 0.0}
        for key, numbers in unknown.items():
            more = f" (and in {len(numbers) - 1} more lines)" if len(numbers) > 1 else ""
            self.add(
                file, numbers[0], f"the key {key!r} is not known and ignored{more}{hints.get(key, '')}", "warning"
            )

    def read_gallery(self) -> dict[str, dict]:
        """Read the gallery as id -> live_id; keep partly wrong rows, so that their clips give no further problems."""
        file = format_.GALLERY_FILE
        gallery: dict[str, dict] = {}
        if not osp.isfile(osp.join(self.root, file)):
            self.add(file, None, "the file does not exist; write one JSON object per shop image")
            return gallery
        first: dict[str, int] = {}
        with_live_ids: bool | None = None
        for line, row in self.rows(file, format_.GALLERY_KEYS):
            image_id = self.attempt(file, line, format_.id_value, row, "gallery_id")
            live_id = self.attempt(file, line, format_.optional_id, row, "live_id", default="")
            for name in ("title", "name", "category"):
                self.attempt(file, line, format_.text_value, row, name)
            path = self.attempt(file, line, self.media.path, row.get("image"), "image path")
            if path is not None:
                self.pictures.setdefault(path, (file, line))
            if with_live_ids is None:
                with_live_ids = bool(live_id)
            elif bool(live_id) != with_live_ids:
                self.add(file, line, "some gallery rows have a live_id and some have none; give one to all or to none")
            if image_id is None:
                continue
            if image_id in first:
                self.add(
                    file, line, f"the gallery_id {image_id!r} appears a second time, first in line {first[image_id]}"
                )
                continue
            first[image_id] = line
            gallery[image_id] = {"live_id": live_id}
        if not gallery:
            self.add(file, None, "it holds no usable image; write one JSON object per shop image")
        return gallery

    def read_clips(self, split: str, file: str, gallery: dict[str, dict]) -> None:
        lives = {image["live_id"] for image in gallery.values()}
        first: dict[str, int] = {}
        for line, row in self.rows(file, format_.CLIP_KEYS):
            before = len(self.report.problems)
            name = self.attempt(file, line, format_.id_value, row, "query_id", default="")
            if name and name in first:
                self.add(file, line, f"the query_id {name!r} appears a second time, first in line {first[name]}")
            first.setdefault(name, line)
            live_id = self.attempt(file, line, format_.optional_id, row, "live_id", default="")
            relevant = None
            if gallery:
                live_id = self.attempt(file, line, format_.check_live_id, live_id, lives)
                if live_id is not None:
                    relevant = self.attempt(
                        file, line, format_.check_relevant, row.get("gt_gallery_ids"), live_id, gallery
                    )
            if relevant == []:
                self.add(file, line, "gt_gallery_ids is empty; name the gallery image that shows the product")
            for key in format_.CLIP_TEXT_KEYS:
                self.attempt(file, line, format_.text_value, row, key)
            frames, _ = self.attempt(file, line, format_.frames_and_boxes, self.media, row, default=([], []))
            video, start, end = self.attempt(
                file, line, format_.video_range, self.media, row, default=("", -1.0, -1.0)
            )
            if row.get("frames") == [] and not video:
                self.add(file, line, "the clip has no frames; name some or remove the row")
            if row.get("video") is None and (row.get("start") is not None or row.get("end") is not None):
                self.add(file, line, "start and end belong to a video, but the clip has none", "warning")
            for frame in frames:
                self.pictures.setdefault(frame, (file, line))
            product = relevant[0] if relevant else ""
            whole = len(self.report.problems) == before
            self.clips.append(Clip(split, file, line, name, frames, video, start, end, product, whole))

    def check_splits(self) -> None:
        files = {split: file for split, file in format_.CLIP_FILES.items() if file in self.report.files}
        if not files:
            names = ", ".join(format_.CLIP_FILES.values())
            self.add(format_.CLIP_FILES["train"], None, f"none of {names} exists; write the clips of each split")
            return
        without = {
            "train": "no model can be trained on this folder",
            "validation": "train with --eval_strategy no, or hold out some clips",
            "test": "no result on unseen clips can be measured",
        }
        for split, consequence in without.items():
            if split not in files:
                file = format_.CLIP_FILES[split]
                self.add(file, None, f"the file does not exist: {consequence}", "warning")
            elif not self.report.files[files[split]]["rows"]:
                self.add(files[split], None, f"it holds no clip: {consequence}")
        products = {clip.product for clip in self.clips if clip.split == "train" and clip.product}
        if "train" in files and len(products) < FEW_PRODUCTS:
            level = "error" if len(products) < 2 else "warning"
            message = f"its clips show {len(products)} products; contrastive training needs more products"
            self.add(files["train"], None, message, level)

    def open_pictures(self) -> None:
        """Find missing, empty and damaged pictures; each is reported once, where it is first named."""
        check = partial(_missing, self.media) if self.fast else self.decode
        for path, message in self.in_threads(check, list(self.pictures), "Pictures"):
            if message:
                self.add(*self.pictures[path], f"{osp.relpath(path, self.root)} {message}")

    def decode(self, path: str) -> str:
        if message := _missing(self.media, path):
            return message
        try:
            data = read_media({"path": path})
            open_image(data)
        except MediaError as error:
            return error.reason
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        self.digests[path] = hashlib.sha256(data).hexdigest()
        return ""

    def in_threads(self, function: Callable, paths: list[str], title: str) -> Iterator[tuple[str, object]]:
        with ThreadPoolExecutor(self.workers) as pool:
            results = pool.map(function, paths)
            results = tqdm(results, total=len(paths), desc=title, disable=not self.progress or not paths)
            for result, path in zip(results, paths):
                yield path, result

    def open_videos(self) -> None:
        """Find missing and damaged videos, and time ranges outside their videos."""
        clips: dict[str, list[Clip]] = {}
        for clip in self.clips:
            if clip.video:
                clips.setdefault(clip.video, []).append(clip)
        for path, result in self.in_threads(lambda path: self.open_video(path, clips[path]), list(clips), "Videos"):
            name = osp.relpath(path, self.root)
            if isinstance(result, str):
                self.add(clips[path][0].file, clips[path][0].line, f"{name}: {result}")
                continue
            for clip, message, level in result:
                self.add(clip.file, clip.line, f"{message} {name}", level)

    def open_video(self, path: str, clips: list[Clip]) -> str | list[tuple[Clip, str, str]]:
        if message := _missing(self.media, path):
            return f"the video {message}"
        try:
            seconds = self.seconds_of[path] = self.read_length(path)
        except MediaError as error:
            return error.reason or str(error).rstrip(".")
        problems = []
        for clip in clips:
            if clip.start >= seconds:
                problems.append((clip, f"the clip starts at {clip.start:g} s, after the {seconds:g} s of", "error"))
            elif clip.end > seconds + _END_TOLERANCE:
                problems.append((clip, f"the clip ends at {clip.end:g} s, after the {seconds:g} s of", "error"))
            elif not self.fast and (found := self.read_ends(clip)):
                problems.append((clip, *found))
        return problems

    def read_length(self, path: str) -> float:
        """Return the length of a video in seconds; a fast check reads only its header."""
        if self.fast:
            return probe_video(path).seconds
        with VideoReader(path) as video:
            return video.end_s

    def read_ends(self, clip: Clip) -> tuple[str, str] | None:
        """Read the first and last frame of a clip as the loader does; return the problem and its level, or None."""
        try:
            with VideoReader({"path": clip.video, "start": clip.start, "end": clip.end}) as video:
                ends = {0, len(video) - 1}
                if len(list(video.frames(ends))) < len(ends):
                    return "the first or last frame of the clip cannot be decoded, in", "error"
                if video.num_missing:
                    return f"{video.num_missing} frames at the end are missing, it is cut short:", "warning"
                if video.num_damaged:
                    return "frames cannot be decoded and are replaced by others, it is damaged:", "warning"
        except MediaError as error:
            return f"the clip cannot be read ({error.reason}):", "error"
        return None

    def find_leaks(self) -> None:
        """Find clips that share frames or parts of a video with a clip of another split."""
        owners: dict[str, Clip] = {}
        ranges: dict[str, list[Clip]] = {}
        for clip in (clip for clip in self.clips if clip.whole):
            other = None
            for frame in clip.frames:
                key = self.digests.get(frame) or osp.realpath(frame)
                found = owners.setdefault(key, clip)
                other = other or (found if found.split != clip.split else None)
            if clip.video:
                same = ranges.setdefault(osp.realpath(clip.video), [])
                other = next((one for one in same if one.split != clip.split and _overlap(one, clip)), None)
                same.append(clip)
            if other is not None:
                what = "part of its video" if clip.video else "one of its frames"
                message = f"{what} is also in {other.file}:{other.line} ({other.name}); a clip belongs in one split"
                self.add(clip.file, clip.line, message)

    def summarise(self, gallery: dict[str, dict]) -> None:
        files = self.report.files
        if format_.GALLERY_FILE in files:
            files[format_.GALLERY_FILE] |= {"products": len(gallery), "frames": len(gallery)}
        for file in format_.CLIP_FILES.values():
            clips = [clip for clip in self.clips if clip.file == file]
            if file in files:
                files[file]["products"] = len({clip.product for clip in clips if clip.product})
                files[file]["frames"] = sum(len(clip.frames) for clip in clips)
                files[file]["videos"] = len({clip.video for clip in clips if clip.video})
                files[file]["seconds"] = round(sum(self.seconds(clip) for clip in clips), 3)

    def seconds(self, clip: Clip) -> float:
        whole = self.seconds_of.get(clip.video, 0.0)
        end = whole if clip.end < 0 else min(clip.end, whole)
        return max(0.0, end - max(clip.start, 0.0))


def _parse(path: str, number: int, raw: bytes) -> dict:
    return parsing.parse_json_line(path, number, parsing.decode_line(path, number, raw))


def _missing(media: MediaRoot, path: str) -> str:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        near = media.near(path)
        return f"does not exist, but {near} does" if near else "does not exist"
    if not osp.isfile(path):
        return "is not a file"
    return "" if status.st_size else "is empty (0 bytes)"


def _overlap(one: Clip, other: Clip) -> bool:
    ends = [clip.end if clip.end >= 0 else math.inf for clip in (one, other)]
    return max(one.start, other.start, 0.0) < min(ends)


def format_summary(report: Report) -> str:
    """Return the summary table at the end of the check."""
    header = ["file", "rows", "products", "pictures", "videos", "seconds of video"]
    lines = [
        [name, *(str(values[key]) for key in ("rows", "products", "frames", "videos")), f"{values['seconds']:.1f}"]
        for name, values in report.files.items()
    ]
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in (header, *lines)
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 without errors, 1 with errors, 2 for wrong arguments."""
    print_anywhere()
    parser = argparse.ArgumentParser(prog="python -m data_rice.shop_clips", description="Works on shop_clips folders.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check", help="report the problems of a folder", description="Reports the problems of a folder, line by line."
    )
    check.add_argument("dir", help=f"folder with {format_.GALLERY_FILE} and clips_*.jsonl")
    check.add_argument("--fast", action="store_true", help="do not open pictures or decode videos")
    check.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    check.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="files opened at once")
    about = "Writes the folder of the novel-product protocol: training on some products, test on other products."
    novel.add_arguments(commands.add_parser("novel", help="hold out products for the test", description=about))
    options = parser.parse_args(arguments)
    if options.command == "novel":
        return novel.run(options)
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, not {options.workers}")
    try:
        report = check_folder(options.dir, options.fast, options.workers, progress=not options.json)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = Counter(problem.level for problem in report.problems)
    if options.json:
        problems = [asdict(problem) for problem in report.problems]
        print(json.dumps({"ok": report.ok, "problems": problems, "files": report.files}, ensure_ascii=False))
    else:
        for problem in report.problems:
            print(problem)
        print(format_summary(report))
        print(f"{counts['error']} errors, {counts['warning']} warnings")
    return 0 if report.ok else 1
