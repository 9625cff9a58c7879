"""Extracts the frames of MovingFashion's videos once, so that training reads small JPEG files instead of videos.

    python -m data_rice.moving_fashion prepare DIR [--output DIR/frames] [--fps 1] [--short_side 256] [--quality 90]

A video becomes the folder ``OUTPUT/<video path>/``. It holds one JPEG per frame, named after the frame's number in the
video, and a ``clip.json`` with the settings. A folder appears only when it is complete, so the command can be run
again after an interruption. ``manifest.json`` is written last; without it the frames are not used.
"""

import argparse
import json
import math
import os
import shutil
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from os import path as osp

from PIL import Image
from tqdm.auto import tqdm

from processing_rice import MediaError
from processing_rice.media_rice import media_error
from processing_rice.video_media_rice import VideoReader

from .. import folders, parsing
from ..commands import print_anywhere
from ..files import write_atomically
from . import layout

MANIFEST = "manifest.json"
CLIP_FILE = "clip.json"
PROBLEMS = "problems.jsonl"
PARTIAL = ".partial"

MISSING = "the video is missing"
KNOWN = "the video is missing, as it is from the published archive"
UNDECODABLE = "the video cannot be decoded"
CUT_SHORT = "the video is cut short"


def missing_reason(video: str) -> str:
    """Return why ``video`` (its path in the annotations) is missing: also from the published archive, or not."""
    return KNOWN if video in layout.KNOWN_MISSING else MISSING


@dataclass(frozen=True)
class FrameSettings:
    """Settings of the extraction.

    Attributes:
        fps: frames per second of video; the official RICE code reads one. A slower video gives all its frames.
        short_side: pixels of the shorter side; frames are never enlarged.
        quality: of the JPEG files, 1 to 95.
    """

    fps: float = 1.0
    short_side: int = 256
    quality: int = 90

    def __post_init__(self):
        if not parsing.is_number(self.fps) or self.fps <= 0:
            raise ValueError(f"fps must be a number above 0, not {self.fps!r}.")
        for name, highest in (("short_side", 65500), ("quality", 95)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= highest:
                raise ValueError(f"{name} must be a whole number from 1 to {highest}, not {value!r}.")

    def choose(self, times: Sequence[float], end_s: float) -> list[int]:
        """Numbers of the frames on screen every 1 / ``fps`` seconds. ``times`` are the frames' start times and
        ``end_s`` the end of the video, in seconds."""
        count = math.ceil((end_s - times[0]) * self.fps - 1e-6)
        # Time stamps are rounded, often to milliseconds.
        return sorted({bisect_right(times, times[0] + i / self.fps + 5e-4) - 1 for i in range(max(1, count))})


@dataclass(frozen=True)
class Clip:
    """The extracted frames of one video.

    Attributes:
        frames: their numbers in the video.
        fps, width, height: of the video.
        size: of the video file, in bytes; another size means that the file has changed.
    """

    frames: tuple[int, ...]
    fps: float
    width: int
    height: int
    size: int

    @classmethod
    def parse(cls, value: object) -> "Clip":
        """Convert a value from JSON; raises ValueError if it is not a clip."""
        names = ("frames", "fps", "width", "height", "size")
        if not isinstance(value, dict) or not isinstance(value.get("frames"), list) or not value["frames"]:
            raise ValueError("expected an object with a list of frame numbers")
        if not all(type(number) is int and number >= 0 for number in value["frames"]):
            raise ValueError("frames must be a list of frame numbers")
        if not all(parsing.is_number(value.get(name)) and value[name] > 0 for name in names[1:]):
            raise ValueError("fps, width, height and size must be numbers above 0")
        return cls(tuple(value["frames"]), *(value[name] for name in names[1:]))


def frame_name(number: int) -> str:
    """File name of frame ``number`` of a video."""
    return f"{number:06d}.jpg"


@dataclass(frozen=True)
class ExtractedFrames:
    """A complete folder of extracted frames, as `extract_frames` writes it.

    Attributes:
        folder: absolute path.
        clips: video path in the annotations -> its frames.
        problems: video path -> problem of the video. Such a video is in ``clips`` only if some frames were extracted.
    """

    folder: str
    clips: dict[str, Clip]
    problems: dict[str, str]

    @staticmethod
    def manifest_path(folder: str) -> str:
        """Return the path of the manifest."""
        return osp.join(folder, MANIFEST)

    @classmethod
    def read(cls, folder: str) -> "ExtractedFrames":
        """Read the manifest.

        Raises:
            ValueError: the manifest is missing, because the extraction is not finished, or it is damaged.
        """
        path = cls.manifest_path(folder)
        if not osp.isfile(path):
            raise ValueError(
                f"{folder} holds extracted frames but no {MANIFEST}, so they are not complete; finish with "
                "python -m data_rice.moving_fashion prepare, or remove the folder."
            )
        manifest = parsing.read_json_object(path)
        clips, problems = manifest.get("clips"), manifest.get("problems")
        try:
            if not isinstance(clips, dict) or not isinstance(problems, dict):
                raise ValueError("expected the keys clips and problems")
            if not all(isinstance(reason, str) for reason in problems.values()):
                raise ValueError("problems must map videos to texts")
            for video in clips:
                parsing.check_relative_path(video, "video path")
            parsed = {video: Clip.parse(clip) for video, clip in clips.items()}
        except ValueError as error:
            raise ValueError(f"{path}: {error}; run prepare again.") from None
        return cls(osp.abspath(folder), parsed, problems)

    def paths(self, video: str) -> list[str]:
        """Absolute paths of the frames of ``video``."""
        return [osp.join(self.folder, video, frame_name(number)) for number in self.clips[video].frames]

    def check(self, root: str, videos: Iterable[str]) -> None:
        """Check that the frames belong to ``videos`` of the data folder ``root``.

        Raises:
            ValueError: a video is not in the manifest, its file has changed since, or frames are missing.
        """
        for video in dict.fromkeys(videos):
            try:
                size = os.stat(osp.join(root, video)).st_size
            except OSError:
                size = None
            clip, reason = self.clips.get(video), self.problems.get(video)
            if clip is None and reason is None:
                what = "did not exist at the time of extraction"
            elif clip is None and size is not None and reason in (MISSING, KNOWN):
                what = "was missing at the time of extraction and exists now"
            elif clip is not None and size not in (None, clip.size):
                what = f"has {size} bytes and had {clip.size} at the time of extraction"
            elif clip is not None and not set(map(frame_name, clip.frames)) <= set(
                folders.list_names(osp.join(self.folder, video))
            ):
                what = "lacks frames"
            else:
                continue
            raise ValueError(
                f"The frames in {self.folder} are outdated: {video} {what}; run "
                f"python -m data_rice.moving_fashion prepare {root} again, or remove that folder."
            )


def _save_frame(picture: Image.Image, path: str, settings: FrameSettings) -> None:
    scale = settings.short_side / min(picture.size)
    if scale < 1:
        picture = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
    picture.convert("RGB").save(path, "JPEG", quality=settings.quality)


def _read_finished(folder: str, settings: FrameSettings, size: int | None) -> tuple[Clip, str, str] | None:
    """Return an earlier run's result from a clip's folder, None if it cannot be used."""
    try:
        entry = parsing.read_json_object(osp.join(folder, CLIP_FILE))
        clip = Clip.parse(entry.get("clip"))
    except (OSError, ValueError):
        return None
    names = set(folders.list_names(folder))
    whole = all(frame_name(number) in names for number in clip.frames)
    if not whole or entry.get("settings") != asdict(settings) or size not in (None, clip.size):
        return None
    return clip, str(entry.get("problem", "")), str(entry.get("detail", ""))


def extract_clip(root: str, video: str, output: str, settings: FrameSettings) -> tuple[Clip | None, str, str]:
    """Extract the frames of one video into ``output/<video>/``, or reuse the result of an earlier run.

    Returns:
        The clip, or None if no frame could be extracted; the problem of the video ("" if there is none); and the
        decoder's message.
    """
    path, folder = osp.join(root, video), osp.join(output, video)
    size = osp.getsize(path) if osp.isfile(path) else None
    finished = _read_finished(folder, settings, size)
    if finished is not None:
        return finished
    if size is None:
        return None, missing_reason(video), ""
    partial = osp.join(output, PARTIAL, video)
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    try:
        with VideoReader(path) as video:
            numbers = []
            for number, _, picture in video.frames(settings.choose(video.times, video.end_s)):
                _save_frame(picture, osp.join(partial, frame_name(number)), settings)
                numbers.append(number)
        if not numbers:
            raise media_error("video", path, "cannot be decoded (none of the chosen frames)")
    except MediaError as error:
        shutil.rmtree(partial)
        return None, UNDECODABLE, str(error)
    problem, detail = "", ""
    if video.num_missing:
        problem, detail = CUT_SHORT, f"{len(video)} of {len(video) + video.num_missing} frames can be read"
    fps = len(video) / (video.end_s - video.times[0])
    clip = Clip(tuple(numbers), fps, *picture.size, size)
    with open(osp.join(partial, CLIP_FILE), "w", encoding="utf-8") as file:
        entry = {"settings": asdict(settings), "clip": asdict(clip), "problem": problem, "detail": detail}
        json.dump(entry, file)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(osp.dirname(folder), exist_ok=True)
    os.rename(partial, folder)
    return clip, problem, detail


def extract_frames(
    root: str, output: str, settings: FrameSettings, workers: int = 1, progress: bool = True
) -> ExtractedFrames:
    """Extract the frames of every video in the annotations. Another run resumes, or changes nothing.

    Args:
        root: the data folder.
        output: folder to write; use it for nothing else.
        settings: settings of the extraction; frames with other settings are extracted again.
        workers: number of videos decoded at the same time.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: neither annotation file is there.
        ValueError: an annotation file is malformed.
        OSError: ``output`` cannot be written.
    """
    splits = [split for split, file in layout.ANNOTATIONS.items() if osp.isfile(osp.join(root, file))]
    if not splits:
        raise FileNotFoundError(f"{root} has none of {', '.join(layout.ANNOTATIONS.values())}; put them there.")
    products = [product for split in splits for product in layout.read_products(root, split)]
    videos = sorted({video for product in products for video in product.videos})
    os.makedirs(output, exist_ok=True)
    manifest = ExtractedFrames.manifest_path(output)
    if osp.isfile(manifest):
        os.remove(manifest)
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(extract_clip, root, video, output, settings) for video in videos]
        try:
            bar = tqdm(jobs, desc="Videos", unit="video", disable=not progress)
            found = {video: job.result() for video, job in zip(videos, bar)}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    shutil.rmtree(osp.join(output, PARTIAL), ignore_errors=True)
    clips = {video: clip for video, (clip, _, _) in found.items() if clip is not None}
    problems = {video: problem for video, (_, problem, _) in found.items() if problem}
    lines = [
        json.dumps({"file": video, "reason": reason, "detail": found[video][2]}) + "\n"
        for video, reason in problems.items()
    ]
    write_atomically(osp.join(output, PROBLEMS), "".join(lines))
    entries = {video: asdict(clip) for video, clip in clips.items()}
    write_atomically(manifest, json.dumps({"settings": asdict(settings), "clips": entries, "problems": problems}))
    return ExtractedFrames(osp.abspath(output), clips, problems)


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_rice.moving_fashion", description="Prepares MovingFashion for fast training."
    )
    prepare = parser.add_subparsers(dest="command", required=True).add_parser(
        "prepare", help="extract the frames of all videos once", description="Extracts the frames of all videos once."
    )
    add = prepare.add_argument
    add("dir", help="folder with train.json, test.json and videos/")
    add("--output", help="folder for the frames (default: DIR/frames, which the builder reads)")
    add("--fps", type=float, default=1.0, help="frames per second (default: 1)")
    add("--short_side", type=int, default=256, help="pixels of the shorter side, never enlarged (default: 256)")
    add("--quality", type=int, default=90, help="JPEG quality, 1 to 95 (default: 90)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="videos decoded at the same time")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 if every video exists and is intact (except those missing from the published archive), 1 if
        some are not, 2 if the command could not run.
    """
    print_anywhere()
    options = _parse_arguments(arguments)
    output = options.output or osp.join(options.dir, "frames")
    try:
        settings = FrameSettings(options.fps, options.short_side, options.quality)
        if options.workers < 1:
            raise ValueError(f"--workers must be at least 1, not {options.workers}.")
        extracted = extract_frames(options.dir, output, settings, options.workers)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return 130
    frames = sum(len(clip.frames) for clip in extracted.clips.values())
    print(f"{output}: {len(extracted.clips)} videos, {frames} frames")
    counts = Counter(extracted.problems.values())
    for reason, count in counts.items():
        print(f"{count} videos: {reason}")
    if counts:
        print(f"all of them are listed in {osp.join(output, PROBLEMS)}")
    return 1 if set(counts) - {KNOWN} else 0
