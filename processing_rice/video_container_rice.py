"""Opens video files with PyAV and gives the time and the image of each frame.

Times are seconds from the start of the file (the first of its audio and video streams), by the frames' time stamps.
"""

import math
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator

from PIL import Image

from .media_rice import (
    MAX_PIXELS,
    MediaError,
    check_is_file,
    check_pixels,
    flatten,
    media_error,
    missing_media_error,
    printable,
)

# Time stamps that go back further than this start a new recording.
BACK_S = 0.1
# So do time stamps that jump ahead further than this, in containers whose clock may jump; FFmpeg uses the same limit.
LEAP_S = 10.0
_LEAPING_FORMATS = 0x0200  # AVFMT_TS_DISCONT
NO_TIME_STAMPS = 0x0080  # AVFMT_NOTIMESTAMPS
_UNTIMED_FORMATS = {"image2", "image2pipe", "rawvideo", "yuv4mpegpipe"}
_WIDEST_PIXEL = 4
# Codecs of pictures: beside a video, such a stream is a cover even if it is not marked as one.
_PICTURE_CODECS = {"bmp", "gif", "mjpeg", "png", "tiff", "webp"}
# Codes of ITU-T H.273: transfer functions of HDR (PQ, HLG), and primaries wider than sRGB (BT.2020, P3).
_HDR_TRANSFERS = {16, 18}
_WIDE_PRIMARIES = {9, 11, 12}
_UNSPECIFIED = 2
_LOCAL = threading.local()
# FFmpeg's own decoders of these codecs leave out the transparency.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# ISO files that hold pictures or sequences of pictures: AVIF and HEIF.
PICTURE_BRANDS = {"avif", "avis", "mif1", "msf1", "heic", "heix", "hevc", "hevx", "heim", "heis"}
_PLAYLIST = re.compile(
    rb"(\xef\xbb\xbf)?\s*(#EXTM3U|ffconcat\s|v=0\s|\[playlist\]|\[reference\]|"
    rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(\w+:)?(MPD|SmoothStreamingMedia|CompositionPlaylist|AssetMap|asx|smil)\b)",
    re.IGNORECASE | re.DOTALL,
)


def import_av():
    """The PyAV module. Raises `MediaError` if it is not installed."""
    try:
        import av
    except ImportError:
        raise MediaError("Video is read with PyAV; install it: pip install av.") from None
    return av


class _Bare:
    """A file without its name, so that FFmpeg detects the format by the content and takes no name for a protocol."""

    def __init__(self, file, seekable: bool):
        self.read, self.close = file.read, file.close
        if seekable:
            self.seek, self.tell = file.seek, file.tell


def is_playlist(path: str | os.PathLike) -> bool:
    """Whether the first bytes of a file are those of a playlist, a text that names other media."""
    with open(path, "rb") as file:
        return _PLAYLIST.match(file.read(4096)) is not None


def open_container(path: str | os.PathLike):
    """
    Opens a video file with PyAV. Other files and addresses that it refers to are not opened.

    Raises:
        MediaError: if it is missing (`MissingMediaError`), a playlist, an image or no media; if PyAV is not installed.
    """
    import_av()
    name = printable(path)
    try:
        check_is_file(path)
        if is_playlist(path):
            reason = "is a playlist, which only names other media"
            hint = "give the video file itself, or follow the playlist with `rice recognise`"
            raise MediaError.of(f"{name} {reason}; {hint}.", reason)
        file = open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise missing_media_error("video", name) from None
    except MediaError:
        raise
    except (OSError, ValueError) as error:
        raise media_error("video", name, f"cannot be read ({_reason(error)})") from error
    container = _open_media(file, name)
    is_picture = container.format.name.endswith("_pipe") or container.format.name == "ico"
    if is_picture or container.metadata.get("major_brand") in PICTURE_BRANDS:
        container.close()
        raise media_error("video", name, "is a picture and holds no video")
    return container


def open_pipe(path: str | os.PathLike | int):
    """
    Opens a source that can only be read from start to end: a named pipe, or standard input by its file descriptor.

    Raises:
        MediaError: if it cannot be read or holds no media; if PyAV is not installed.
    """
    import_av()
    name = "standard input" if isinstance(path, int) else printable(path)
    try:
        file = open(path, "rb", buffering=0, closefd=not isinstance(path, int))
    except (OSError, ValueError) as error:
        raise media_error("video", name, f"cannot be read ({_reason(error)})") from error
    return _open_media(file, name, seekable=False)


def _open_media(file, name: str, seekable: bool = True):
    av = import_av()
    try:
        return av.open(_Bare(file, seekable), container_options={"protocol_whitelist": "none"})
    except (av.FFmpegError, OSError, ValueError) as error:
        file.close()
        raise media_error("video", name, f"cannot be decoded ({_reason(error)})") from error


def video_stream(container, name: object, max_pixels: int | None = None):
    """
    The video stream of a container that a player shows: no cover image, and the default one if one is marked.

    Args:
        container: A container of PyAV.
        name: Name of the file, for error messages.
        max_pixels: Maximum number of pixels of a frame, by default `MAX_PIXELS`; larger frames that come later are not
            decoded.

    Raises:
        MediaError: if there is no video stream, no decoder for it, or if its frames have too many pixels.
    """
    flags = import_av().stream.Disposition
    covers = flags.attached_pic | flags.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams:
        beside = " but a cover picture" if container.streams.video else ""
        raise media_error("video", name, f"holds no video{beside}")
    stream = min(streams, key=lambda stream: (_holds_pictures(stream), not stream.disposition & flags.default))
    context = stream.codec_context
    if context is None:
        raise media_error("video", name, "cannot be decoded (no decoder for its picture)")
    try:
        check_pixels(context.width, context.height, max_pixels)
    except ValueError as error:
        raise media_error("video", name, f"has frames of {error}") from None
    if not context.is_open:
        context.options = {"max_pixels": str(max_pixels or MAX_PIXELS)}
    return stream


def decoder_of(stream):
    """The decoder of a video stream, a codec context of PyAV."""
    context = stream.codec_context
    if stream.metadata.get("alpha_mode") != "1" or context.name not in _ALPHA_DECODERS:
        return context
    decoder = import_av().CodecContext.create(_ALPHA_DECODERS[context.name], "r")
    decoder.options = context.options
    return decoder


def _holds_pictures(stream) -> bool:
    return stream.codec_context is not None and stream.codec_context.name in _PICTURE_CODECS


def sound_stream(container):
    """The audio stream of a PyAV container that a player plays, the default or the first one; `None` for no sound."""
    default = import_av().stream.Disposition.default
    streams = [stream for stream in container.streams.audio if stream.codec_context is not None]
    return min(streams, key=lambda stream: not stream.disposition & default, default=None)


def start_of(container) -> float:
    """Time stamp at which a player starts, in seconds: the first one of all streams, including audio."""
    return container.start_time / 1e6 if container.start_time is not None else 0.0


def clock_leaps(container) -> bool:
    """Whether time stamps in this container format may jump from one recording to the next."""
    return bool(container.format.flags & _LEAPING_FORMATS)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def has_time_stamps(container) -> bool:
    """
    Whether a container stores when its frames are shown. Raw streams, MJPEG over HTTP and image sequences do not;
    FFmpeg numbers their frames at an assumed rate.
    """
    name = container.format.name
    return not (container.format.flags & NO_TIME_STAMPS or name in _UNTIMED_FORMATS or name.endswith("_pipe"))


class Clock:
    """
    Converts time stamps of frames, in display order, to seconds since the start.

    A frame without a time stamp comes one frame duration after the last frame; so does a frame whose stamp equals the
    last one or is slightly earlier. Larger steps back, and jumps of more than ten seconds in a container whose clock
    may jump, mean that recordings were joined; time then continues by one frame duration.

    Args:
        container: A container of PyAV.
        stream: Its video stream.
        on_leap: Called with the size of each jump in seconds.

    Attributes:
        shift_s: Seconds to add to the time stamps of any stream of the container; `None` before the first stamp of a
            container without a start time.
        last_s: Time of the last frame in seconds.
        step_s: Duration of a frame in seconds.
    """

    def __init__(self, container, stream, on_leap: Callable[[float], None] = lambda leap_s: None):
        rate = float(stream.average_rate or 0)
        self.step_s = 1 / rate if 1e-3 < rate < 1e3 else 0.04
        self.leaps = clock_leaps(container)
        self.on_leap = on_leap
        # A container without a start time starts with its first frame.
        self.shift_s = None if container.start_time is None else -start_of(container)
        self.last_s: float | None = None
        self._stamp_s = -math.inf

    def time_of(self, stamp_s: float | None) -> float:
        """Time in seconds since the start of the next frame, whose time stamp is `stamp_s` seconds."""
        known = stamp_s is not None and math.isfinite(stamp_s)
        if known and self.shift_s is None:
            self.last_s = 0.0 if self.last_s is None else self.last_s + self._gap_s()
            self.shift_s = self.last_s - stamp_s
        elif self.last_s is None:
            self.last_s = stamp_s + self.shift_s if known else 0.0
        elif not known or self._stamp_s - BACK_S <= stamp_s <= self._stamp_s:
            self.last_s += self._unstamped_s()
        else:
            self._follow(stamp_s)
        if known:
            self._stamp_s = stamp_s
        return self.last_s

    def _follow(self, stamp_s: float) -> None:
        passed_s = stamp_s + self.shift_s - self.last_s
        if not -BACK_S <= passed_s <= self._longest_s():
            gap_s = self._gap_s()
            self.on_leap(passed_s)
            self.shift_s += gap_s - passed_s
            self.last_s += gap_s
        elif passed_s > 0:
            self.step_s = passed_s
            self.last_s += passed_s

    def _longest_s(self) -> float:
        """Largest step between two stamps of one recording, in seconds."""
        return LEAP_S if self.leaps else math.inf

    def _gap_s(self) -> float:
        """Seconds from the last frame to a frame whose stamp jumps."""
        return self.step_s

    def _unstamped_s(self) -> float:
        """Seconds from the last frame to a frame without a stamp."""
        return self.step_s


def frame_picture(frame, stream, name: object) -> Image.Image:
    """
    A decoded frame as a player shows it: upright, with square pixels, sRGB, transparent parts white.

    Raises:
        MediaError: if its colours cannot be converted; `name` is that of the file.
    """
    settings = _colors_of(frame)
    ratio = stream.sample_aspect_ratio
    if ratio and ratio != 1 and 1 / _WIDEST_PIXEL <= ratio <= _WIDEST_PIXEL:
        settings |= {"width": max(1, round(frame.width * ratio)), "height": frame.height}
    has_alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    try:
        settings["format"] = "rgba" if has_alpha else "rgb24"
        if "dst_color_primaries" in settings:
            values = _shared_reformatter().reformat(frame, **settings).to_ndarray()
        else:
            values = frame.to_ndarray(**settings)
    except (import_av().FFmpegError, OSError, ValueError) as error:
        kind = f"{frame.format.name}, colour space {frame.colorspace}"
        raise media_error("video", name, f"has colours that cannot be converted ({kind})") from error
    picture = flatten(Image.fromarray(values)) if has_alpha else Image.fromarray(values)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    # With rows (a, b, .) and (c, d, .), a point (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = struct.unpack_from("<5i", bytes(matrix))
    if abs(b) > abs(a):
        picture, a, d = picture.transpose(Image.Transpose.TRANSPOSE), c, b
    if a < 0:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if d < 0 else picture


def _shared_reformatter():
    """The converter of a thread, which keeps the slowly built table of a conversion; that of a frame would not."""
    if not hasattr(_LOCAL, "reformatter"):
        _LOCAL.reformatter = import_av().video.reformatter.VideoReformatter()
    return _LOCAL.reformatter


def _colors_of(frame) -> dict:
    """Arguments of PyAV that convert a frame's colours to those of an ordinary screen."""
    kinds, settings = import_av().video.reformatter, {}
    is_large = frame.width >= 1280 or frame.height > 576
    if frame.colorspace == _UNSPECIFIED and is_large and not frame.format.is_rgb:
        # As players guess; FFmpeg takes BT.601 for all sizes.
        settings["src_colorspace"] = kinds.Colorspace.ITU709
    if frame.color_trc in _HDR_TRANSFERS:
        settings["dst_color_trc"] = kinds.ColorTrc.IEC61966_2_1
    if settings.get("dst_color_trc") or frame.color_primaries in _WIDE_PRIMARIES:
        settings["dst_color_primaries"] = kinds.ColorPrimaries.BT709
    return settings


def decoded_frames(
    packets: Iterator, stream, on_damage: Callable[[], None], on_break: Callable[[str], None]
) -> Iterator:
    """
    Decodes the packets of a stream and yields the frames in display order.

    Args:
        packets: From `container.demux(stream)`.
        on_damage: Called for each packet that cannot be decoded.
        on_break: Called with the reason if the container cannot be read to its end.
    """
    errors = (import_av().FFmpegError, OSError)
    decoder, ended = decoder_of(stream), False
    while not ended:
        try:
            packet = next(packets, None)
        except errors as error:
            on_break(_reason(error))
            packet = None
        # After a read error the decoder still holds a few frames; at a normal end the last, empty packet flushes them.
        ended = packet is None
        try:
            frames = decoder.decode(packet)
        except EOFError:
            frames = []
        except errors:
            on_damage()
            frames = []
        yield from frames


__all__ = [
    "BACK_S",
    "LEAP_S",
    "NO_TIME_STAMPS",
    "PICTURE_BRANDS",
    "Clock",
    "clock_leaps",
    "decoded_frames",
    "decoder_of",
    "frame_picture",
    "has_time_stamps",
    "import_av",
    "is_playlist",
    "open_container",
    "open_pipe",
    "sound_stream",
    "start_of",
    "video_stream",
]
