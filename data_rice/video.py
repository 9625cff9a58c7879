"""What preparing and checking ask of video files: their size and length, and their frames one after the other.

Training and evaluation sample clips with `processing_rice.read_video`; this module walks through whole files.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class VideoInfo:
    """What the header of a video file says.

    Attributes:
        num_frames: number of frames; counted where the container does not state it.
        fps: average frames per second.
        width, height: pixels of a frame as it is shown.
    """

    num_frames: int
    fps: float
    width: int
    height: int

    @property
    def seconds(self) -> float:
        """Length of the video."""
        return self.num_frames / self.fps


def _open(path: str | os.PathLike):
    try:
        import av
    except ImportError:
        raise ValueError("Video files are read with PyAV; install it: pip install av.") from None
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        container = av.open(str(path))
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"{path} is no video file that can be read ({_reason(error)}).") from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{path} holds no video stream.")
    return av, container


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _upright(frame) -> Image.Image:
    """Turn a frame as its display matrix asks: phones store upright videos lying on their side."""
    picture = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def probe_video(path: str | os.PathLike) -> VideoInfo:
    """Read a video's header and its first frame.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it cannot be read as a video, or PyAV is not installed.
    """
    av, container = _open(path)
    with container:
        stream = container.streams.video[0]
        try:
            first = next(container.decode(stream), None)
            num_frames = stream.frames
            if not num_frames:
                container.seek(0)
                num_frames = sum(packet.size > 0 for packet in container.demux(stream))
        except av.FFmpegError as error:
            raise ValueError(f"{path} cannot be decoded ({_reason(error)}).") from error
        if first is None or not stream.average_rate:
            raise ValueError(f"{path} holds no frame.")
        width, height = (first.height, first.width) if abs(first.rotation) == 90 else (first.width, first.height)
        return VideoInfo(num_frames, float(stream.average_rate), width, height)


def decode_frames(path: str | os.PathLike, indices: Iterable[int]) -> Iterator[tuple[int, Image.Image]]:
    """Yield ``(index, RGB picture)`` of the frames ``indices``; the file is decoded once, one frame is kept at a time.

    A file that is cut short yields the frames before the damage and ends there: count what comes.

    Args:
        indices: frame numbers in rising order, counted from 0.

    Raises:
        FileNotFoundError, ValueError: as `probe_video`; ValueError also when not even the first frame can be decoded.
    """
    wanted = list(indices)
    av, container = _open(path)
    with container:
        stream = container.streams.video[0]
        frames = enumerate(container.decode(stream))
        decoded = False
        for index in wanted:
            try:
                frame = next((frame for number, frame in frames if number == index), None)
            except av.FFmpegError as error:
                if not decoded:
                    raise ValueError(f"{path} cannot be decoded ({_reason(error)}).") from error
                return
            if frame is None:
                return
            decoded = True
            yield index, _upright(frame)
