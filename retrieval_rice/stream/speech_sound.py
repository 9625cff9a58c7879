"""The sound of a video: mono at 16 kHz, in blocks with times on the clock of the frames, and in chunks for
transcription.

A file is read a second time for its sound, because its frames wait for their consumer. A live source is read once: its
reader passes on the packets of sound, and sound that waits too long is skipped and counted.
"""

import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from processing_rice.video_container_rice import LEAP_S, clock_leaps, import_av, sound_stream, start_of

from .source import open_source

logger = logging.getLogger(__name__)

RATE = 16_000
"""Samples per second for speech models."""

LIVE_CHUNK_S = 6.0
"""Chunk length for a live source in seconds: words are delayed by it, but longer chunks are transcribed better."""

FILE_CHUNK_S = 28.0
"""Chunk length for a file in seconds. Whisper always processes 30 s; shorter chunks did not give better words."""

# Blocks with a larger gap belong to different chunks.
_GAP_S = 0.3
# Shorter sounds hold no word, and a model may hallucinate on them.
_SHORTEST_S = 0.3
_QUIET_S = 0.1
_SEEK_FROM_S = 30.0
_LONGEST_QUEUE_S = 30.0


@dataclass(frozen=True)
class Block:
    """Sound from `start_s` seconds on: `samples` `(n,)` float32, full scale 1."""

    start_s: float
    samples: np.ndarray

    @property
    def end_s(self) -> float:
        return self.start_s + len(self.samples) / RATE


@dataclass
class SoundCounts:
    """
    Counts of a stream's sound so far.

    Attributes:
        damaged: Packets that could not be decoded.
        skipped_s: Seconds of a live source that were skipped because the speech model was too slow.
    """

    damaged: int = 0
    skipped_s: float = 0.0


class _Decoder:
    """Decodes packets of sound to blocks, and counts undecodable packets."""

    def __init__(self, counts: SoundCounts):
        self.av, self.counts = import_av(), counts
        self._resampler, self._format = None, None
        self._next_s = 0.0

    def blocks(self, packet, shift_s: float) -> list[Block]:
        """The sound of a packet, `shift_s` seconds after its time stamps."""
        try:
            return [block for frame in packet.decode() if len((block := self._block(frame, shift_s)).samples)]
        except EOFError:
            return []
        except Exception:
            # Any error of a sound decoder must not stop the pictures.
            self.counts.damaged += 1
            self._format = None
            return []

    def _block(self, frame, shift_s: float) -> Block:
        start_s = self._next_s if frame.time is None else frame.time + shift_s
        self._next_s = start_s + frame.samples / (frame.sample_rate or RATE)
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != self._format:
            # FFmpeg sums float channels, which may exceed full scale; for integers it applies weights.
            self._resampler = self.av.AudioResampler(format="s16", layout="mono", rate=RATE)
            self._format = kind
        frame.pts = None
        parts = [part.to_ndarray()[0] for part in self._resampler.resample(frame)]
        samples = np.concatenate(parts) if parts else np.zeros(0, np.int16)
        return Block(start_s, samples.astype(np.float32) / 32768)


class FileSound:
    """
    The blocks of a file's sound, or of a part of it. Iterate over it once.

    Args:
        source: A file, or the address of a recording.
        start_s, end_s: The part, in seconds from the start of the file.
        opener: Opens a container, see `open_source`.

    Attributes:
        has_sound: Whether the file has sound; known after the iteration.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        start_s: float = 0.0,
        end_s: float = math.inf,
        opener: Callable = open_source,
    ):
        self.source, self.start_s, self.end_s, self.opener = source, start_s, end_s, opener
        self.counts = SoundCounts()
        self.has_sound: bool | None = None
        self._stopping = False

    def stop(self) -> None:
        self._stopping = True

    def __iter__(self) -> Iterator[Block]:
        with self.opener(self.source) as container:
            stream = sound_stream(container)
            self.has_sound = stream is not None
            if stream is None:
                return
            self._seek(container)
            clock, decoder = _PacketClock(container), _Decoder(self.counts)
            for packet in _packets(container, stream, decoder.av):
                if self._stopping:
                    return
                shift_s = clock.shift_of(packet)
                if packet.stream is not stream:
                    continue
                for block in decoder.blocks(packet, shift_s):
                    if block.start_s >= self.end_s:
                        return
                    block = _part(block, self.start_s, self.end_s)
                    if len(block.samples):
                        yield block

    def _seek(self, container) -> None:
        if self.start_s < _SEEK_FROM_S:
            return
        try:
            container.seek(round((self.start_s - 1 + start_of(container)) * 1e6))
        except (import_av().FFmpegError, OSError):
            # A file without seeking is read from its start.
            logger.debug("%s is read from its start", self.source)


def _packets(container, stream, av) -> Iterator:
    """Packets of sound; also of pictures if the clock may jump, because a gap in the sound alone is not a jump."""
    pictures = container.streams.video[:1] if clock_leaps(container) else ()
    packets = container.demux(stream, *pictures)
    while True:
        try:
            yield next(packets)
        except StopIteration:
            return
        except (av.FFmpegError, OSError):
            # The reader of the frames reports where a file breaks off.
            return


def _part(block: Block, start_s: float, end_s: float) -> Block:
    first = max(0, round((start_s - block.start_s) * RATE))
    last = len(block.samples) if end_s == math.inf else max(0, round((end_s - block.start_s) * RATE))
    return Block(block.start_s + first / RATE, block.samples[first:last])


class _PacketClock:
    """Converts a file's time stamps to seconds since its start, in packet order; see `Clock` for frames."""

    def __init__(self, container):
        self.shift_s, self.leaps = -start_of(container), clock_leaps(container)
        self.last_s: float | None = None

    def shift_of(self, packet) -> float:
        stamp = packet.dts if packet.dts is not None else packet.pts
        if stamp is None or not packet.time_base:
            return self.shift_s
        time_s = float(stamp * packet.time_base) + self.shift_s
        passed_s = 0.0 if self.last_s is None else time_s - self.last_s
        if passed_s < -LEAP_S or (self.leaps and passed_s > LEAP_S):
            self.shift_s += self.last_s - time_s
            time_s = self.last_s
        self.last_s = time_s
        return self.shift_s


class LiveSound:
    """
    The blocks of a live source's sound, which its reader passes on packet by packet. The reader never waits: if more
    than `longest_s` seconds are waiting, the oldest are skipped.
    """

    def __init__(self, notify: Callable[[str], None] = logger.warning, longest_s: float = _LONGEST_QUEUE_S):
        self.notify, self.longest_s = notify, longest_s
        self.counts = SoundCounts()
        self._decoder = _Decoder(self.counts)
        self._queue: deque[Block] = deque()
        self._waiting_s = 0.0
        self._changed = threading.Condition()
        self._ended = False
        self._told_s = 10.0

    def take(self, packet, shift_s: float) -> None:
        """Adds a packet, `shift_s` seconds after its time stamps; called by the reader."""
        for block in self._decoder.blocks(packet, shift_s):
            with self._changed:
                self._queue.append(block)
                self._waiting_s += len(block.samples) / RATE
                while self._waiting_s > self.longest_s and len(self._queue) > 1:
                    seconds = len(self._queue.popleft().samples) / RATE
                    self._waiting_s -= seconds
                    self.counts.skipped_s += seconds
                self._changed.notify_all()
        if self.counts.skipped_s >= self._told_s:
            self._told_s = self.counts.skipped_s + 10.0
            self.notify(
                f"speech recognition is slower than the stream: {self.counts.skipped_s:.0f} s of sound skipped so "
                f"far; use a smaller speech model"
            )

    def stop(self) -> None:
        """Ends the sound."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Block]:
        while True:
            with self._changed:
                while not self._queue and not self._ended:
                    self._changed.wait(0.5)
                if not self._queue:
                    return
                block = self._queue.popleft()
                self._waiting_s -= len(block.samples) / RATE
            yield block


def chunks(blocks: Iterable[Block], chunk_s: float) -> Iterator[Block]:
    """
    Sound in chunks of at most about `chunk_s` seconds, cut at the quietest point of the last third, and at gaps.
    """
    parts: list[np.ndarray] = []
    start_s, count = 0.0, 0
    for block in blocks:
        # From the first sample on, because small gaps add up.
        if parts and abs(block.start_s - start_s - count / RATE) > _GAP_S:
            yield from _long_enough(Block(start_s, np.concatenate(parts)))
            parts, count = [], 0
        if not parts:
            start_s = block.start_s
        parts.append(block.samples)
        count += len(block.samples)
        while count >= chunk_s * RATE:
            samples = np.concatenate(parts)
            place = _quietest(samples, round(chunk_s * RATE))
            yield from _long_enough(Block(start_s, samples[:place]))
            start_s, parts, count = start_s + place / RATE, [samples[place:]], count - place
    if parts:
        yield from _long_enough(Block(start_s, np.concatenate(parts)))


def _long_enough(chunk: Block) -> list[Block]:
    return [chunk] if len(chunk.samples) >= _SHORTEST_S * RATE else []


def _quietest(samples: np.ndarray, most: int) -> int:
    """The middle of the quietest tenth of a second in the last third of `most` samples."""
    step = round(_QUIET_S * RATE)
    first = most * 2 // 3
    count = max(1, (most - first) // step)
    energy = np.square(samples[first : first + count * step].reshape(count, -1)).sum(axis=1)
    return first + int(energy.argmin()) * step + step // 2
