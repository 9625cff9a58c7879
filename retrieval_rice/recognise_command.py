"""Recognise the products of a video, a stream or a folder of frames: a time line of the products on screen.

SOURCE is a video file, a folder of pictures, an address (rtsp://..., https://.../live.m3u8), a camera (camera:0), or
piped data (-, or a named pipe). The table goes to standard output, one segment at a time when it ends; notices go to
standard error. A live source that breaks off is opened again. If recognition is slower than a live source, the oldest
frames are dropped and counted. Ctrl-C stops the command and writes the open segment.
"""

import argparse
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .options import add_hints, add_precision_and_towers, check_asr, open_index, open_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", help="video file, folder of pictures, address, camera, or -")
    add("--shop", required=True, metavar="INDEX", help="folder or URI of the shop's index, from `rice index`")
    add("--model", required=True, help="folder or id of the model that the index was built with")
    add("--live_id", help="search the images of this livestream only")
    add("--window", type=_seconds, default=4.0, help="length of a window in seconds (default: %(default)g)")
    add("--hop", type=_seconds, default=1.0, help="seconds from one window to the next (default: %(default)g)")
    add("--fps", type=_seconds, help="frames per second; default: the model's number of frames per window")
    add("--folder_fps", type=_seconds, default=1.0, help="pictures of a folder per second (default: %(default)g)")
    add("--enter", type=float, help="confidence at which a product is on screen; default: the index's threshold")
    add("--leave", type=float, help="confidence below which it is no longer on screen; default: 0.7 times --enter")
    add("--margin", type=float, help="lead that another product needs (default: 0.1; not calibrated: 0)")
    add("--patience", type=int, help="windows in a row that a change needs (default: 2; not calibrated: 3)")
    add("--rerank", type=int, help="images per window that get pair scores; default: as calibrated")
    add("--max_reconnects", type=int, default=5, help="attempts in a row to open a lost stream (default: %(default)s)")
    add("--jsonl", metavar="FILE", help="also write JSON lines; -: to standard output instead of the table")
    add("--vtt", metavar="FILE", type=Path, help="also write WebVTT subtitles")
    words = parser.add_mutually_exclusive_group()
    words.add_argument("--asr", metavar="MODEL", help="transcribe the sound: folder, id or size of a faster-whisper "
        "model, or a speech model of transformers")  # fmt: skip
    words.add_argument("--subtitles", metavar="FILE", help="read the speech from: SRT or WebVTT, a video file with a "
        "subtitle track, track for that of SOURCE, or JSON lines on a named pipe or standard input (-)")  # fmt: skip
    add("--language", help="language of the speech, such as zh or en; auto, the default, detects it")
    add_hints(parser)
    add("--asr_before", type=float, help="a window gets the words from this many seconds before it (default: 6)")
    add("--asr_after", type=float, help="a window gets the words up to this many seconds after it (default: 2)")
    add("--detector", help="folder or id of a product detector, whose boxes the model uses; default: no boxes")
    add_precision_and_towers(parser)
    add("--device", help="such as cpu or cuda; default: cuda if available")


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a finite number above 0")
    return number


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        FileNotFoundError: the video, folder, index or model does not exist.
        ValueError: one of them or an argument cannot be used.
        ConnectionError: a live source did not come back; earlier results are written.
        OSError: an output cannot be written.
    """
    from .recogniser import Recogniser
    from .stream.source import open_stream
    from .stream.timeline import clock, name_of

    model, processor = open_model(options)
    index = open_index(options, model)
    detector = None
    if options.detector is not None:
        from .detector.product_detector import ProductDetector

        detector = ProductDetector.from_pretrained(options.detector, options.device)
    boxes = "none" if detector is None else "detector"
    recogniser = Recogniser(model, processor, index, boxes, detector, rerank=options.rerank)
    check_words(options, recogniser)
    fps = options.fps or recogniser.num_frames / options.window
    rules = choose_hysteresis(index, options)

    def say(text: str) -> None:
        from tqdm.auto import tqdm

        tqdm.write(text, file=sys.stderr)

    words_of = load_words(options, index, say)

    def say_start(hit, start_s: float) -> None:
        if stream.live:
            say(f"{clock(start_s, 0)} now: {'no product' if hit is None else name_of(hit)}")

    with ExitStack() as stack:
        write = stack.enter_context(outputs(options.jsonl, options.vtt))
        settings = {"notify": say, "max_reconnects": options.max_reconnects}
        stream = open_stream(options.source, fps, options.folder_fps, **settings)
        stack.enter_context(stopping(stream))
        hearing = words_of(stream)
        segments = recogniser.stream(
            stream,
            live_id=options.live_id,
            window_s=options.window,
            hop_s=options.hop,
            hysteresis=rules,
            speech=hearing,
            asr_before_s=None if hearing is None else options.asr_before,
            asr_after_s=None if hearing is None else options.asr_after,
            on_start=say_start,
            progress=True,
        )
        for segment in segments:
            write(segment)
    say(summary(stream.counts))
    if hearing is not None:
        say(words_summary(hearing))
    if stream.error:
        raise ConnectionError(stream.error)


def check_words(options: argparse.Namespace, recogniser) -> None:
    """Raises `ValueError` for speech arguments that would have no effect, or are out of range."""
    check_asr(options)
    for name in ("asr_before", "asr_after"):
        seconds = getattr(options, name)
        if seconds is None:
            continue
        if options.asr is None and options.subtitles is None:
            raise ValueError(f"--{name} belongs to --asr or --subtitles; give one of them, or leave it out.")
        if not 0 <= seconds < math.inf:
            raise ValueError(f"--{name} must be a number of seconds of 0 or more, got {seconds:g}.")
    if options.source == options.subtitles == "-":
        raise ValueError(
            "SOURCE and --subtitles cannot both be read from standard input; name a pipe for one of them."
        )
    if not recogniser.reads_asr and (options.asr is not None or options.subtitles is not None):
        name = "--asr" if options.asr is not None else "--subtitles"
        raise ValueError(f"{name} needs a model that reads text, which {options.model} does not; leave it out.")


def load_words(options: argparse.Namespace, index, say):
    """
    A function from the opened stream to a `Hearing` of its speech, or `None`. Errors of loading and reading are raised
    before anything is written.
    """
    from .stream.speech import Hearing

    if options.subtitles is not None:
        from .stream.speech_captions import captions

        read = captions(options.subtitles, options.source, say)
        return lambda stream: Hearing(read, waits=stream.is_recording, notify=say)
    if options.asr is None:
        return lambda stream: None
    from .stream.speech_hints import expect_titles
    from .stream.speech_models import listen, load_transcriber

    transcriber = load_transcriber(options.asr, options.language or "auto", options.device)
    titles = index.titles(options.live_id) if options.asr_hints != "none" else ()
    transcriber, count = expect_titles(transcriber, titles, options.asr_hints)
    if count:
        say(f"the speech model gets the words of {count} titles of the shop as hints")

    def hear(stream):
        heard = listen(stream, transcriber, say)
        if heard is None:
            say(f"{options.source} has no sound; only its pictures are used")
        return heard and Hearing(heard, waits=stream.is_recording, notify=say)

    return hear


def words_summary(hearing) -> str:
    """A summary of the words in one line."""
    counts, sound = hearing.counts, getattr(hearing.speech, "counts", None)
    parts = [f"{counts.words} words {'read' if sound is None else 'transcribed'}"]
    if counts.delay_s:
        parts.append(f"delay {counts.delay_s:.1f} s, at most {counts.longest_delay_s:.1f} s")
    if counts.late:
        parts.append(f"{counts.late} came too late for their window and were used for the next one")
    if counts.lost:
        parts.append(f"{counts.lost} could not be used")
    if sound is not None and sound.skipped_s:
        parts.append(f"{sound.skipped_s:.1f} s of sound skipped, because speech recognition was too slow")
    if sound is not None and sound.damaged:
        parts.append(f"{sound.damaged} packets of sound could not be decoded")
    return "; ".join(parts)


def choose_hysteresis(index, options: argparse.Namespace):
    """The index's default rules, with the options in their place."""
    from dataclasses import replace

    from .stream.timeline import Hysteresis

    asked = {name: getattr(options, name) for name in ("enter", "leave", "margin", "patience")}
    asked = {name: value for name, value in asked.items() if value is not None}
    if "enter" in asked:
        asked.setdefault("leave", 0.7 * asked["enter"])
    return replace(Hysteresis.for_index(index), **asked)


@contextmanager
def outputs(jsonl: str | None, vtt: Path | None) -> Iterator:
    """A function that writes a segment to every output at once, so that nothing is lost if the program ends."""
    from tqdm.auto import tqdm

    from .stream.timeline import TABLE_HEADER, VTT_HEADER, json_line, table_row, vtt_cue

    with ExitStack() as stack:
        lines = cues = None
        for option, path in (("--jsonl", jsonl), ("--vtt", vtt)):
            # Earlier results may be impossible to repeat.
            if path is not None and path != "-" and os.path.isfile(path) and os.path.getsize(path):
                raise ValueError(f"{option} {path} is not empty; name another file, or delete it.")
        if jsonl is not None and vtt is not None and os.path.abspath(jsonl) == os.path.abspath(vtt):
            raise ValueError(f"--jsonl and --vtt are both {vtt}; name two files.")
        if jsonl is not None and jsonl != "-":
            lines = stack.enter_context(_open_output("--jsonl", jsonl))
        if vtt is not None:
            cues = stack.enter_context(_open_output("--vtt", vtt))
        if jsonl != "-":
            tqdm.write(TABLE_HEADER)

        def write(segment) -> None:
            tqdm.write(json_line(segment) if jsonl == "-" else table_row(segment))
            sys.stdout.flush()
            if lines is not None:
                print(json_line(segment), file=lines, flush=True)
            if cues is not None:
                print("" if cues.tell() else VTT_HEADER, vtt_cue(segment), sep="", end="", file=cues, flush=True)

        yield write
        # Opened late, because a file left by a user's mistake would be refused in the next try.
        if cues is not None and not cues.tell():
            print(VTT_HEADER, end="", file=cues)


def _open_output(option: str, path: str | Path):
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written ({error.strerror}); name another file.") from None


@contextmanager
def stopping(stream) -> Iterator[None]:
    """A context in which Ctrl-C or SIGTERM ends the stream cleanly; the second signal ends the program."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number, _) -> None:
        signal.signal(number, before[number])
        stream.stop()

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summary(counts) -> str:
    """A summary of the frames in one line."""
    parts = [f"{counts.frames} frames recognised of {counts.available} that can be decoded"]
    if counts.dropped:
        parts.append(f"{counts.dropped} dropped, because recognition was slower than the stream")
    if counts.damaged:
        parts.append(f"{counts.damaged} packets or pictures could not be decoded")
    if counts.leaps:
        parts.append(f"time stamps jumped {counts.leaps} times")
    if counts.reconnects:
        parts.append(f"opened again {counts.reconnects} times")
    return "; ".join(parts)
