"""Words that somebody else has written down: subtitle files, a container's subtitle track, and captions on a pipe.

FFmpeg reads subtitles, through PyAV: SRT, WebVTT and others, and the text tracks of MP4 and Matroska.
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
"""Names the subtitle track of the source itself."""

_LARGEST_FILE = 100_000_000
# An event of ASS: eight fields, and then the text.
_FIELDS = 8
_STYLES = re.compile(r"\{[^}]*\}")
_BREAKS = re.compile(r"\\[Nnh]")
_HIGH = re.compile(rb"[\x80-\xff]+")


def captions(name: str, source: str | os.PathLike, notify: Callable[[str], None] = logger.warning):
    """
    The source of words that `--subtitles` names.

    Args:
        name: A subtitle file, a video file with a subtitle track, "track" for that of `source`, "-" for JSON lines on
            standard input, or a named pipe or a `.jsonl` file of these.
        source: The stream's.
        notify: Is told in one sentence what could not be read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no subtitles in text, or cannot be read.
    """
    if name == "-":
        return JsonWords(sys.stdin.fileno(), "standard input", notify)
    if name == TRACK and not os.path.exists(name):
        if not os.path.isfile(source):
            raise ValueError(f"{printable(source)} is no video file, and has no subtitle track that can be read.")
        name = os.fspath(source)
    if not os.path.exists(name):
        raise MissingMediaError(f"There is no subtitle file {printable(name)}.")
    if os.path.isdir(name):
        raise ValueError(f"{printable(name)} is a folder; name the subtitle file in it.")
    if stat.S_ISFIFO(os.stat(name).st_mode):
        return JsonWords(name, printable(name), notify)
    if name.lower().endswith(".jsonl"):
        # What is there already is known before the first window.
        return list(JsonWords(name, printable(name), notify))
    return Subtitles(name, notify)


class Subtitles:
    """
    The cues of a subtitle file or of the first text track of a video file, a [`Word`] each.

    Overlapping cues are all said; one that ends before it starts lasts until the next one starts, and the last of a
    file has no length; the order in a subtitle file does not matter. Its encoding is told by its bytes: UTF-8 and
    UTF-16, else GB 18030 or Windows-1252.

    Args:
        path: Of the file.
        notify: Is told when cues cannot be read, or the encoding had to be guessed.

    Attributes:
        heard_s: The second before which all cues are known.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or no subtitles in text in it.
    """

    def __init__(self, path: str | os.PathLike, notify: Callable[[str], None] = logger.warning):
        self.path, self.notify, self.name = path, notify, printable(path)
        self.heard_s = -math.inf
        self._stopping = False
        self._container = self._open()
        self._stream = next((s for s in self._container.streams.subtitles if _is_text(s)), None)
        if self._stream is None:
            self._container.close()
            raise ValueError(f"{self.name} holds no subtitles in text.")

    def _open(self):
        try:
            container = open_container(self.path)
        except MediaError as error:
            if isinstance(error, MissingMediaError) or not os.path.isfile(self.path):
                raise
            # What FFmpeg does not know by its bytes may be text in an encoding that it does not know.
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
            return av.open(io.BytesIO(_plain_lines(text).encode()), container_options={"protocol_whitelist": "none"})
        except (av.FFmpegError, OSError, ValueError):
            raise ValueError(f"{self.name} holds no subtitles; give an SRT or WebVTT file.") from None

    def stop(self) -> None:
        """No more cues are wanted."""
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
    """Text of which FFmpeg loses nothing: it ends at a NUL, and of WebVTT knows one kind of line ends."""
    return text.replace("\0", "").replace("\r\n", "\n").replace("\r", "\n")


def _is_text(stream) -> bool:
    """Whether there is a decoder that gives text; subtitles of discs are pictures."""
    return stream.codec_context is not None and stream.codec_context.codec.text_sub


def _event_text(event) -> str:
    """What is said in an event of ASS, without its styles and breaks."""
    line = bytes(getattr(event, "ass", b"") or b"").decode("utf-8", "replace")
    text = line.split(",", _FIELDS)[-1] if line else ""
    # FFmpeg knows some entities of WebVTT, and none of SRT.
    return " ".join(html.unescape(_BREAKS.sub(" ", _STYLES.sub("", text))).split())


def decode_subtitles(data: bytes, path: str | os.PathLike) -> tuple[str, str | None]:
    """
    Text of unknown encoding.

    Returns:
        The text, and the name of the encoding where that had to be guessed.
    """
    try:
        return decode_text(data, path), None
    except ValueError:
        # It is none of the encodings that tell themselves.
        runs = [len(run) for run in _HIGH.findall(data)]
    # Chinese letters are pairs of bytes, those of western Europe stand alone more often than not.
    if sum(length if length % 2 == 0 else -length for length in runs) > 0:
        try:
            return data.decode("gb18030"), "GB 18030"
        except UnicodeDecodeError:
            logger.debug("%s is not in GB 18030", path)
    return data.decode("cp1252", "replace"), "Windows-1252"


class JsonWords:
    """
    Words as JSON lines, `{"start_s": 1.2, "end_s": 1.5, "text": "red"}`, as they arrive. Lines that are none are left
    out, and the first is told.

    Args:
        place: A path, or the number of an open file.
        name: What messages call it.
    """

    def __init__(self, place: str | int, name: str, notify: Callable[[str], None] = logger.warning):
        self.place, self.name, self.notify = place, name, notify

    def __iter__(self) -> Iterator[Word]:
        lost = 0
        # Read without a buffer of Python's: a thread that waits in one would keep the program from ending.
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
        raise row_error(name, number, 'words are objects such as {"start_s": 1.2, "end_s": 1.5, "text": "red"}')
    start_s = entry.get("start_s")
    end_s = entry.get("end_s", start_s)
    for value in (start_s, end_s):
        if not is_number(value):
            raise row_error(name, number, f"start_s and end_s must be seconds, got {repr(value)[:40]}")
    return Word(float(start_s), float(end_s), entry["text"])
