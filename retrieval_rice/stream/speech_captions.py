"""Words from captions: subtitle files, a container's subtitle track, and captions on a pipe.

FFmpeg reads subtitles through PyAV: SRT, WebVTT and others, and the text tracks of MP4 and Matroska.
"""

import codecs
import html
import io
import logging
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator

from data_rice.parsing import decode_line, decode_text, is_number, parse_json_line, row_error
from processing_rice import MediaError
from processing_rice.media_rice import MissingMediaError, printable
from processing_rice.video_container_rice import import_av, open_container, start_of

from .speech import Word

logger = logging.getLogger(__name__)

TRACK = "track"
"""Value that means the subtitle track of the source itself."""

_LARGEST_FILE = 100_000_000
# An ASS event has eight fields, then the text.
_FIELDS = 8
_STYLES = re.compile(r"\{[^}]*\}")
_DRAWING = re.compile(r"\{[^}]*\\p[1-9][^}]*\}.*?(?=\{[^}]*\\p0|$)")
_BREAKS = re.compile(r"\\[Nnh]")
_HIGH = re.compile(rb"[\x80-\xff]+")
_CLOCK = r"(-?)(?:(\d+):)?(\d+):(\d+)(?:[,.\uff0c](\d+))?"
_TIMES = re.compile(rf"[ \t]*{_CLOCK}[ \t]*-->[ \t]*{_CLOCK}(.*)")
# So many whole characters of UTF-8 per damaged one are no accident.
_WHOLE = 4


def captions(name: str, source: str | os.PathLike, notify: Callable[[str], None] = logger.warning):
    """
    The source of words for `--subtitles`.

    Args:
        name: A subtitle file, a video file with a subtitle track, "track" for that of `source`, "-" for JSON lines on
            standard input, or a named pipe or a `.jsonl` file of JSON lines.
        source: The stream's source.
        notify: Called with one sentence on unreadable subtitles.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file holds no text subtitles, or cannot be read.
    """
    if name == "-":
        return JsonWords(sys.stdin.fileno(), "standard input", notify)
    if name == TRACK and not os.path.exists(name):
        if not os.path.isfile(source):
            raise ValueError(f"{printable(source)} is not a video file, so it has no subtitle track to read.")
        name = os.fspath(source)
    if not os.path.exists(name):
        raise MissingMediaError(f"There is no subtitle file {printable(name)}.")
    if os.path.isdir(name):
        raise ValueError(f"{printable(name)} is a folder; name the subtitle file in it.")
    if stat.S_ISFIFO(os.stat(name).st_mode):
        return JsonWords(name, printable(name), notify)
    if name.lower().endswith(".jsonl"):
        # Existing lines should be known before the first window.
        return list(JsonWords(name, printable(name), notify))
    return Subtitles(name, notify)


class Subtitles:
    """
    The cues of a subtitle file or of the first text track of a video file, as [`Word`]s.

    Overlapping cues are all used. A cue that ends before it starts lasts until the next one starts; the last one of a
    file has no length. The order in a subtitle file does not matter. The encoding is detected from the bytes: UTF-8 or
    UTF-16, else GB 18030 or Windows-1252.

    Args:
        path: Path of the file.
        notify: Called if cues cannot be read, or if the encoding had to be guessed.

    Attributes:
        heard_s: Time in seconds before which all cues are known.

    Raises:
        FileNotFoundError, ValueError: the file does not exist, or holds no text subtitles.
    """

    def __init__(self, path: str | os.PathLike, notify: Callable[[str], None] = logger.warning):
        self.path, self.notify, self.name = path, notify, printable(path)
        self.heard_s = -math.inf
        self._stopping = False
        self._container = self._open()
        self._stream = next((s for s in self._container.streams.subtitles if _is_text(s)), None)
        if self._stream is None:
            self._container.close()
            raise ValueError(f"{self.name} holds no text subtitles; give an SRT or WebVTT file.")

    def _open(self):
        try:
            container = open_container(self.path)
        except MediaError as error:
            if isinstance(error, MissingMediaError) or not os.path.isfile(self.path):
                raise
            # Data that FFmpeg does not recognise may be text in an encoding that it does not support.
            container = None
        if container is not None and (container.streams.video or container.streams.audio):
            return container
        if container is not None:
            container.close()
        if os.path.getsize(self.path) > _LARGEST_FILE:
            raise ValueError(f"{self.name} has more than {_LARGEST_FILE / 1e6:g} MB, too much for subtitles.")
        with open(self.path, "rb") as file:
            text, encoding = decode_subtitles(file.read(), self.path)
        if encoding is not None:
            self.notify(f"{self.name} is not in UTF-8 or UTF-16; it is read as {encoding}")
        av = import_av()
        try:
            plain = _plain_lines(text)
            plain = plain if plain.lstrip().startswith("WEBVTT") else _full_times(plain)
            return av.open(io.BytesIO(plain.encode()), container_options={"protocol_whitelist": "none"})
        except (av.FFmpegError, OSError, ValueError):
            raise ValueError(f"{self.name} holds no subtitles; give an SRT or WebVTT file.") from None

    def stop(self) -> None:
        """Stops the iteration."""
        self._stopping = True

    def __iter__(self) -> Iterator[Word]:
        av, lost = import_av(), 0
        media = self._container.streams.video or self._container.streams.audio
        shift_s = -start_of(self._container) if media else 0.0
        with self._container as container:
            packets = container.demux(self._stream)
            while not self._stopping:
                try:
                    packet = next(packets, None)
                except (av.FFmpegError, OSError):
                    break
                if packet is None:
                    break
                if packet.pts is None or not packet.size:
                    continue
                try:
                    events = packet.decode()
                except (av.FFmpegError, ValueError):
                    lost += 1
                    continue
                start_s = float(packet.pts * packet.time_base) + shift_s
                self.heard_s = start_s
                length_s = float((packet.duration or 0) * packet.time_base)
                text = " ".join(filter(None, map(_event_text, events)))
                if text:
                    yield Word(start_s, start_s + length_s, text)
        if lost:
            self.notify(f"{self.name} is damaged: {lost} subtitles could not be read")
        self.heard_s = math.inf


def _plain_lines(text: str) -> str:
    """Text that FFmpeg reads completely: without NUL, where it stops, and with the line ends that it supports."""
    return text.replace("\0", "").replace("\r\n", "\n").replace("\r", "\n")


def _full_times(text: str) -> str:
    """
    SRT in the form that FFmpeg reads: cues with numbers, times with hours and milliseconds. A time before the start
    becomes the start. Other formats do not change.
    """
    lines = []
    for line in text.split("\n"):
        times = _TIMES.fullmatch(line)
        if times is not None:
            if not (lines and lines[-1].strip().isdecimal()):
                lines += ["", str(len(lines) + 1)]
            *clocks, rest = times.groups()
            line = f"{_full_time(*clocks[:5])} --> {_full_time(*clocks[5:])}{rest}"
        lines.append(line)
    return "\n".join(lines)


def _full_time(sign: str, hours: str | None, minutes: str, seconds: str, parts: str | None) -> str:
    return "00:00:00,000" if sign else f"{hours or '00'}:{minutes}:{seconds},{parts or '000'}"


def _is_text(stream) -> bool:
    """Whether a subtitle stream has a text decoder; subtitles of discs are pictures."""
    return stream.codec_context is not None and stream.codec_context.codec.text_sub


def _event_text(event) -> str:
    """The text of an ASS event, without styles, drawings and line breaks."""
    line = bytes(getattr(event, "ass", b"") or b"").decode("utf-8", "replace")
    text = line.split(",", _FIELDS)[-1] if line else ""
    # FFmpeg decodes some entities of WebVTT, and none of SRT.
    return " ".join(html.unescape(_BREAKS.sub(" ", _STYLES.sub("", _DRAWING.sub("", text)))).split())


def decode_subtitles(data: bytes, path: str | os.PathLike) -> tuple[str, str | None]:
    """
    Text of unknown encoding.

    Returns:
        The text, and the name of the encoding if it was guessed, else `None`.
    """
    try:
        return decode_text(data, path), None
    except ValueError:
        # It is none of the encodings that can be detected with certainty.
        runs = [len(run) for run in _HIGH.findall(data)]
    text = data.decode("utf-8", "replace")
    if sum(character > "\x7f" for character in text) > (_WHOLE + 1) * text.count("\ufffd"):
        return text.removeprefix("\ufeff"), "UTF-8 with damaged characters"
    # Chinese characters are pairs of bytes; letters of western Europe are mostly single bytes.
    if sum(length if length % 2 == 0 else -length for length in runs) > 0:
        try:
            return data.decode("gb18030"), "GB 18030"
        except UnicodeDecodeError:
            logger.debug("%s is not in GB 18030", path)
    return data.decode("cp1252", "replace"), "Windows-1252"


class JsonWords:
    """
    Words as JSON lines, `{"start_s": 1.2, "end_s": 1.5, "text": "red"}`, as they arrive. Invalid lines are left out,
    and the first one is reported.

    Args:
        place: A path, or the number of an open file.
        name: Name of the source for messages.
    """

    def __init__(self, place: str | int, name: str, notify: Callable[[str], None] = logger.warning):
        self.place, self.name, self.notify = place, name, notify

    def __iter__(self) -> Iterator[Word]:
        lost = 0
        # Read without Python's buffer, because a thread that waits in it would prevent the program from ending.
        with open(self.place, "rb", buffering=0, closefd=not isinstance(self.place, int)) as file:
            for number, line in enumerate(_lines(file), 1):
                try:
                    word = _json_word(self.name, number, line)
                except ValueError as error:
                    lost += 1
                    if lost == 1:
                        self.notify(f"{str(error).rstrip('.')}; it is left out")
                    continue
                if word is not None:
                    yield word
        if lost > 1:
            self.notify(f"{self.name}: {lost} lines were left out")


def _lines(file) -> Iterator[bytes]:
    rest = b""
    while data := file.read(65_536):
        *whole, rest = (rest + data).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _json_word(name: str, number: int, line: bytes) -> Word | None:
    text = decode_line(name, number, line.removeprefix(codecs.BOM_UTF8)).strip()
    if not text:
        return None
    entry = parse_json_line(name, number, text)
    if not isinstance(entry.get("text"), str):
        raise row_error(name, number, 'words must be objects such as {"start_s": 1.2, "end_s": 1.5, "text": "red"}')
    start_s = entry.get("start_s")
    end_s = entry.get("end_s", start_s)
    for value in (start_s, end_s):
        if not is_number(value):
            raise row_error(name, number, f"start_s and end_s must be seconds, got {repr(value)[:40]}")
    return Word(float(start_s), float(end_s), entry["text"])
