"""Streams in background threads, with their segments as server-sent events."""

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from ..recogniser import Recogniser
from ..stream.timeline import json_line
from .metrics import Metrics

logger = logging.getLogger(__name__)

KEPT = 64
"""Number of finished streams whose segments are kept; older ones are deleted."""

_SEGMENTS = 10_000
_POLL_SECONDS = 0.1
_BEAT_SECONDS = 15.0


class FollowedStream:
    """
    One stream in its own thread.

    Args:
        stream_id: Id of the stream.
        recogniser: Recogniser with model and index.
        opened: Result of `open_stream`.
        file: Uploaded file, which is deleted at the end; `None` for other sources.
        settings: Arguments of `Recogniser.stream`.
        on_segment: Called with each segment.

    Attributes:
        lines: JSON of the last `_SEGMENTS` segments.
        first: Number of the first of these.
        error: Reason of an early end.
        ended_at: End on the monotonic clock, `None` while it runs.
    """

    def __init__(
        self,
        stream_id: str,
        recogniser: Recogniser,
        opened: Any,
        file: Path | None,
        settings: dict,
        on_segment: Callable[[Any], None],
    ):
        self.stream_id, self.recogniser, self.opened, self.file = stream_id, recogniser, opened, file
        self.settings, self.on_segment = settings, on_segment
        self.lines: list[str] = []
        self.first = 0
        self.error: str | None = None
        self.ended_at: float | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"stream {stream_id}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the stream cleanly; the open segment is still reported."""
        self.opened.stop()

    @property
    def count(self) -> int:
        """Number of segments so far."""
        return self.first + len(self.lines)

    def _run(self) -> None:
        try:
            for segment in self.recogniser.stream(self.opened, **self.settings):
                self.on_segment(segment)
                with self._lock:
                    self.lines.append(json_line(segment))
                    if len(self.lines) > _SEGMENTS:
                        self.first += 1
                        del self.lines[0]
            self.error = getattr(self.opened, "error", None) and "the source ended and did not come back."
        except (ValueError, OSError) as error:
            logger.warning("stream %s ended: %s", self.stream_id, error)
            self.error = "the rest of the video cannot be read."
        except Exception:
            # Nobody waits for this thread; requests for the stream get the error.
            logger.exception("stream %s ended", self.stream_id)
            self.error = "an error of the service; see its log."
        finally:
            if self.file is not None:
                self.file.unlink(missing_ok=True)
            self.ended_at = time.monotonic()

    async def events(self, after: int) -> AsyncIterator[str]:
        """
        Server-sent events: "segment" with its number as id and the JSON of `rice recognise --jsonl`, a comment after a
        long pause, and "end" with `{"segments", "error"}`.

        Args:
            after: Number of segments that the client already has.
        """
        silent_since = time.monotonic()
        while True:
            # In this order, so that no segment is missed at the end.
            has_ended = self.ended_at is not None
            with self._lock:
                first, lines = self.first, list(self.lines)
            if after < first + len(lines):
                for number in range(max(after, first), first + len(lines)):
                    yield f"id: {number + 1}\nevent: segment\ndata: {lines[number - first]}\n\n"
                after, silent_since = first + len(lines), time.monotonic()
            elif has_ended:
                break
            elif time.monotonic() - silent_since > _BEAT_SECONDS:
                silent_since = time.monotonic()
                yield ": nothing new\n\n"
            if not has_ended:
                await asyncio.sleep(_POLL_SECONDS)
        error = "null" if self.error is None else f'"{self.error}"'
        yield f'event: end\ndata: {{"segments": {self.count}, "error": {error}}}\n\n'


class Streams:
    """
    The streams of a service.

    Args:
        recogniser: Recogniser with model and index.
        metrics: Counts segments.
        most: Maximum number of running streams.
    """

    def __init__(self, recogniser: Recogniser, metrics: Metrics, most: int):
        self.recogniser, self.metrics, self.most = recogniser, metrics, most
        self.known: dict[str, FollowedStream] = {}

    @property
    def running(self) -> list[FollowedStream]:
        return [stream for stream in self.known.values() if stream.ended_at is None]

    def has_room(self) -> bool:
        """Whether another stream may start."""
        return len(self.running) < self.most

    def follow(self, opened: Any, file: Path | None, settings: dict) -> FollowedStream:
        """Starts a stream from `open_stream`; `settings` are arguments of `Recogniser.stream`."""
        ended = [stream for stream in self.known.values() if stream.ended_at is not None]
        for stream in sorted(ended, key=lambda one: one.ended_at)[: max(0, len(ended) - KEPT + 1)]:
            del self.known[stream.stream_id]
        # A random id, so that clients cannot guess the streams of others.
        stream_id = secrets.token_hex(8)
        stream = FollowedStream(stream_id, self.recogniser, opened, file, settings, self._count)
        self.known[stream_id] = stream
        stream.start()
        return stream

    def _count(self, segment: Any) -> None:
        self.metrics.segments.labels("no_product" if segment.hit is None else "product").inc()

    def stop(self) -> None:
        """Ends all streams cleanly."""
        for stream in self.running:
            stream.stop()
