"""Uploads to the demo or the service: read within limits, from one folder only, and deleted at once.

The first bytes of a file decide its kind, never its name. So a playlist, which could name other files, is not opened
as a video. The caller chooses the stored form of a frame; the demo keeps small JPEGs.
"""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from data_rice.folders import natural_key
from processing_rice import MediaError, open_image, sample_frame_indices
from processing_rice.media_rice import FORMATS, image_header
from processing_rice.video_container_rice import PICTURE_BRANDS, open_container
from processing_rice.video_media_rice import VideoReader

from .stream.speech_sound import FILE_CHUNK_S, Block, FileSound, chunks

_SIDE = 640
_FIRST_STEP = 0.2


@dataclass(frozen=True)
class UploadLimits:
    """
    Attributes:
        max_bytes: Maximum bytes of one file, and of all files of a clip together.
        max_files: Maximum number of pictures of a clip.
        max_pixels: Maximum pixels of a picture or a frame.
        max_seconds: Maximum length of a video.
        max_sound_seconds: Maximum seconds of sound that are transcribed.
        reading_seconds: Maximum time for reading.
        max_frames: Maximum number of frames of a video, evenly spaced.
        max_decoded_pixels: Maximum pixels of all decoded frames of a video; some seconds of work.
        max_total_bytes: Maximum bytes of all uploads and shown pictures on the disk.
        keep_seconds: Time after which these are deleted.
        arriving_seconds: Maximum time for sending an upload.
    """

    max_bytes: int = 50_000_000
    max_files: int = 64
    max_pixels: int = 25_000_000
    max_seconds: float = 120.0
    max_sound_seconds: float = 60.0
    reading_seconds: float = 10.0
    max_frames: int = 64
    max_decoded_pixels: int = 1_000_000_000
    max_total_bytes: int = 1_000_000_000
    keep_seconds: float = 1800.0
    arriving_seconds: float = 300.0


class UploadError(ValueError):
    """
    A refused upload; the message is one sentence for the sender.

    Attributes:
        too_large: The upload was refused for its size, length, number of files or pixels, so a smaller one may pass.
    """

    too_large = False


def upload_too_large(words: str) -> UploadError:
    """An error for an upload that is too large."""
    error = UploadError(words)
    error.too_large = True
    return error


@dataclass
class Upload:
    """The stored frames of a clip, a note on them ("" for none), and the clip's sound."""

    frames: list[Any]
    note: str = ""
    sound: list[Block] = field(default_factory=list)


def small_jpeg(picture: Image.Image) -> bytes:
    """A frame in the form of the demo: an encoded JPEG of at most 640 pixels."""
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=92)
    return buffer.getvalue()


def read_upload(
    paths: Sequence[str],
    folder: str | Path,
    limits: UploadLimits = UploadLimits(),
    num_frames: int | None = None,
    keep: Callable[[Image.Image], Any] = small_jpeg,
    with_sound: bool = False,
) -> Upload:
    """
    Frames of uploaded pictures, in the order of their names, or of one uploaded video. The files are always deleted,
    also if they are refused.

    Args:
        paths: Paths of the uploaded files on the server.
        folder: The only folder from which files are read or deleted.
        limits: Limits of reading.
        num_frames: Read only the frames for a model with this number of frames, chosen as in `Recogniser.recognise`.
            By default all pictures, or up to `limits.max_frames` frames of a video, evenly spaced in time.
        keep: Converts a frame (an upright RGB picture) to its stored form.
        with_sound: Also read the sound of a video.

    Raises:
        UploadError: the files are too many, too large, too long, of an unknown kind, damaged, or outside the folder.
    """
    own = [Path(path) for path in paths if _lies_in(Path(path), Path(folder))]
    try:
        if len(own) < len(paths):
            raise UploadError("A file was not uploaded here or was deleted meanwhile; upload it again.")
        own.sort(key=lambda path: natural_key(path.name))
        return _read(own, limits, num_frames, keep, with_sound)
    finally:
        for path in own:
            path.unlink(missing_ok=True)


def _lies_in(path: Path, folder: Path) -> bool:
    return not path.is_symlink() and path.is_file() and path.resolve().is_relative_to(folder.resolve())


def _read(paths: list[Path], limits: UploadLimits, num_frames: int | None, keep: Callable, with_sound: bool) -> Upload:
    if not paths:
        raise UploadError("Nothing was uploaded: choose pictures or one video.")
    if len(paths) > limits.max_files:
        raise upload_too_large(f"A clip may have at most {limits.max_files} pictures, but this one has {len(paths)}.")
    size = sum(path.stat().st_size for path in paths)
    if size > limits.max_bytes:
        megabytes = limits.max_bytes / 1e6
        raise upload_too_large(f"The upload has {size / 1e6:.1f} MB, more than the maximum of {megabytes:g} MB.")
    deadline = time.monotonic() + limits.reading_seconds
    if any(video_format(path) for path in paths):
        if len(paths) > 1:
            raise UploadError("Upload either pictures or one video, not both or several.")
        upload = _read_video(paths[0], limits, deadline, num_frames, keep)
        return replace(upload, sound=_read_sound(paths[0], limits, deadline)) if with_sound else upload
    chosen = range(len(paths)) if num_frames is None else sample_frame_indices(len(paths), num_frames)
    return Upload([keep(_read_picture(paths[i], limits, deadline)) for i in chosen])


def video_format(path: str | Path) -> str | None:
    """The container format from a file's first bytes, `None` if it is not a supported video."""
    with open(path, "rb") as file:
        start = file.read(12)
    if start[4:8] == b"ftyp" and start[8:12].decode("latin-1") in PICTURE_BRANDS:
        return None
    # Old cameras begin with an empty atom.
    if start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mp4"
    if start[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        return "avi"
    return None


def _check_time(deadline: float, limits: UploadLimits) -> None:
    if time.monotonic() > deadline:
        raise upload_too_large(
            f"Reading took longer than {limits.reading_seconds:g} s; upload something shorter or smaller."
        )


def check_picture(path: str | Path, name: str, limits: UploadLimits) -> None:
    """
    Checks a file by its header only.

    Args:
        path: Path of the file.
        name: Name of the file for messages.
        limits: Limits of its pixels.

    Raises:
        UploadError: the file is not a picture, or has too many pixels.
    """
    try:
        header = image_header(path)
    except MediaError as error:
        if not isinstance(error.__cause__, UnidentifiedImageError):
            raise UploadError(f"{name} {error.reason}.") from error
        raise UploadError(
            f"{name} is neither a picture ({', '.join(FORMATS)}) nor a video (MP4, WebM, MKV, AVI)."
        ) from error
    if header.width * header.height > limits.max_pixels:
        megapixels = limits.max_pixels / 1e6
        raise upload_too_large(
            f"{name} has {header.width} x {header.height} pixels, more than the maximum of {megapixels:g} million."
        )


def _read_picture(path: Path, limits: UploadLimits, deadline: float) -> Image.Image:
    _check_time(deadline, limits)
    check_picture(path, path.name, limits)
    try:
        return open_image(path)
    except MediaError as error:
        raise UploadError(f"{path.name} {error.reason}.") from error


def _read_video(path: Path, limits: UploadLimits, deadline: float, num_frames: int | None, keep: Callable) -> Upload:
    try:
        with VideoReader(path, limits.max_pixels, lambda: _check_time(deadline, limits)) as video:
            if video.end_s > limits.max_seconds:
                raise upload_too_large(
                    f"The video lasts {video.end_s:.0f} s, more than the maximum of {limits.max_seconds:g} s."
                )
            if num_frames is None:
                chosen = _spread(video.times, limits.max_frames)
            else:
                chosen = sample_frame_indices(len(video), num_frames)
            affordable = video.affordable(chosen, limits.max_decoded_pixels)
            frames = [keep(frame.picture) for frame in video.frames(affordable)]
            is_damaged = video.num_missing or video.num_damaged
    except UploadError:
        raise
    except MediaError as error:
        raise UploadError(f"{path.name} {error.reason or error}.") from error
    if not frames:
        raise UploadError(f"{path.name} is damaged: none of its frames can be read.")
    note = ""
    if is_damaged:
        note = f"The video is damaged: only {len(frames)} readable frames were used."
    elif affordable != sorted(set(chosen)):
        note = f"The video has too many frames to decode all of them: only {len(frames)} were used."
    return Upload(frames, note)


def _read_sound(path: Path, limits: UploadLimits, deadline: float) -> list[Block]:
    """The first part of a video's sound, in chunks for transcription; damaged packets are left out."""
    blocks = []
    for block in FileSound(path, 0.0, limits.max_sound_seconds, open_container):
        _check_time(deadline, limits)
        blocks.append(block)
    return list(chunks(blocks, FILE_CHUNK_S))


def _spread(times: Sequence[float], max_frames: int) -> list[int]:
    """Numbers of frames at even times: one per `_FIRST_STEP` seconds, or half as many, and so on."""
    step = _FIRST_STEP
    while True:
        steps = {int((time_s - times[0]) / step + 1e-3): number for number, time_s in reversed(list(enumerate(times)))}
        if len(steps) <= max_frames:
            return sorted(steps.values())
        step *= 2
