"""The work of the routes: reading files within limits, answering clips, changing shops, starting streams."""

import asyncio
import functools
import logging
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from hub_rice.precision import precision_of
from processing_rice import MediaError
from processing_rice.video_media_rice import VideoReader

from ..index.editing import leave_livestream
from ..quota import temporary_folder
from ..recogniser import Recogniser
from ..stream.source import open_stream
from ..uploads import Upload, UploadError, UploadLimits, check_picture, read_upload, video_format
from .batches import Answered, Batches, Clip, frame_tensor
from .fetching import Fetcher
from .metrics import Metrics
from .streams import FollowedStream, Streams

logger = logging.getLogger(__name__)

READERS = 2
"""Number of threads that decode uploads."""


class Refused(Exception):
    """A refused request, with a status and one sentence."""

    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status = status


class Service:
    """
    One model and one index behind HTTP. Any number of services may share an index.

    Args:
        recogniser: Recogniser without boxes; its index needs a processor for changes.
        limits: Limits of uploads.
        fetcher: Fetches clips from addresses; `None` refuses addresses.
        sources: Name -> address of the streams that requests may name.
        max_streams: Maximum number of running streams.
        batch: Maximum number of clips in a batch.
        wait_s: Seconds that the first clip of a batch waits for others.
    """

    def __init__(
        self,
        recogniser: Recogniser,
        limits: UploadLimits = UploadLimits(),
        fetcher: Fetcher | None = None,
        sources: dict[str, str] | None = None,
        max_streams: int = 2,
        batch: int = 16,
        wait_s: float = 0.005,
    ):
        self.recogniser, self.index = recogniser, recogniser.index
        self.limits, self.fetcher, self.sources = limits, fetcher, sources or {}
        self.metrics = Metrics()
        self.batches = Batches(recogniser, batch, wait_s)
        self.streams = Streams(recogniser, self.metrics, max_streams)
        self.precision = precision_of(recogniser.model)
        self.is_stopping = False
        self._readers = ThreadPoolExecutor(READERS, "reading")
        # Changes of the index run one after another, so that they do not undo each other.
        self._writer = ThreadPoolExecutor(1, "writing")
        self.folder = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Context of a running server."""
        with temporary_folder("rice-serve-") as self.folder:
            task = asyncio.create_task(self.batches.run())
            try:
                yield
            finally:
                self.stop()
                task.cancel()
                self.batches.close()
                for pool in (self._readers, self._writer):
                    await asyncio.to_thread(pool.shutdown)

    def stop(self) -> None:
        """Ends streams, and reports the service as not ready."""
        self.is_stopping = True
        self.streams.stop()

    async def recognise(
        self, files: Sequence[Any], url: str | None, asr: str, live_id: str | None, top_k: int
    ) -> tuple[Answered, str]:
        """
        Answers a clip from uploaded files (`UploadFile`s of pictures, or one video) or from an address.

        Returns:
            The answer, and a note on the clip.

        Raises:
            Refused, UploadError: what is wrong with it.
        """
        start = time.perf_counter()
        if asr and not self.recogniser.reads_asr:
            raise Refused(422, "asr: this model reads no text; leave it out.")
        async with self._files(files, url) as paths:
            upload: Upload = await self._in(
                self._readers,
                read_upload,
                paths,
                self.folder,
                self.limits,
                self.recogniser.num_frames,
                functools.partial(frame_tensor, self.recogniser),
            )
        read_ms = 1000 * (time.perf_counter() - start)
        answered = await self.batches.answer(Clip(upload.frames, asr, live_id, top_k))
        answered.timings = {"read_ms": read_ms, **answered.timings}
        if not answered.answer.hits and live_id is not None:
            raise Refused(404, f"The index has no images of livestream {live_id!r}.")
        self.metrics.answered(answered.answer.no_product, answered.timings, answered.batch_size)
        return answered, upload.note

    async def put_images(self, live_id: str, files: Sequence[Any], records: list[dict]) -> list[dict]:
        """
        Writes images of a livestream.

        Args:
            live_id: Id of the livestream.
            files: Pictures.
            records: `image_id`, `product_id` and `title` of each picture.

        Returns:
            The unreadable pictures with `id` and `reason`.

        Raises:
            UploadError: a picture is too large.
        """
        async with self._files(files, None) as paths:
            rows = await self._in(self._readers, self._picture_rows, paths, live_id, records)
        return await self._in(self._writer, self.index.add, rows)

    def _picture_rows(self, paths: Sequence[str], live_id: str, records: list[dict]) -> list[dict]:
        rows = []
        for path, record in zip(paths, records):
            check_picture(path, record["image_id"], self.limits)
            image = {"path": None, "bytes": Path(path).read_bytes()}
            rows.append({**record, "live_id": live_id, "image": image})
        return rows

    async def delete_images(self, live_id: str, image_ids: Sequence[str]) -> tuple[list[str], list[str]]:
        """As `leave_livestream`."""
        return await self._in(self._writer, leave_livestream, self.index, image_ids, live_id)

    async def follow(
        self, files: Sequence[Any], url: str | None, source: str | None, live_id: str | None, settings: dict
    ) -> FollowedStream:
        """
        Starts a stream of an uploaded video, a video at an address, or a named source of the service.

        Raises:
            Refused, UploadError: the video or source is refused, or the maximum number of streams is running.
        """
        if source is not None and source not in self.sources:
            raise Refused(404, "source: this service has no source of this name.")
        if live_id is not None and live_id not in await self._in(self._readers, self.index.live_ids):
            raise Refused(404, f"The index has no images of livestream {live_id!r}.")
        self._check_streams()
        fps = self.recogniser.num_frames / settings["window_s"]
        settings = {**settings, "live_id": live_id}
        if source is not None:
            # Opening a source may take long, which must not block the readers of other uploads.
            opened = await asyncio.to_thread(self._open, self.sources[source], fps)
            return self._start(opened, None, settings)
        async with self._files(files, url) as paths:
            path = Path(paths[0])
            opened = await self._in(self._readers, self._open_video, path, fps)
            # From here the stream owns the file and deletes it.
            path = path.rename(Path(self.folder, path.parent.name + "-stream"))
            return self._start(opened, path, settings)

    def _check_streams(self) -> None:
        if not self.streams.has_room():
            raise Refused(503, f"{self.streams.most} streams are running, which is the maximum; end one, or wait.")

    def _start(self, opened: Any, path: Path | None, settings: dict) -> FollowedStream:
        try:
            # Others may have started meanwhile.
            self._check_streams()
        except Refused:
            if path is not None:
                path.unlink()
            raise
        return self.streams.follow(opened, path, settings)

    def _open(self, address: str, fps: float) -> Any:
        try:
            return open_stream(address, fps)
        except (ValueError, OSError) as error:
            logger.warning("a source cannot be opened: %s", error)
            raise Refused(502, "The source does not answer; see the log of the service.") from error

    def _open_video(self, path: Path, fps: float) -> Any:
        if video_format(path) is None:
            raise UploadError("The stream is not a video (MP4, WebM, MKV, AVI).")
        deadline = time.monotonic() + self.limits.reading_seconds

        def check_time() -> None:
            if time.monotonic() > deadline:
                raise UploadError(f"Opening the video took longer than {self.limits.reading_seconds:g} s.")

        try:
            VideoReader(path, self.limits.max_pixels, check_time).close()
            return open_stream(path, fps)
        except UploadError:
            raise
        except (MediaError, OSError) as error:
            raise UploadError(f"The video {getattr(error, 'reason', '') or 'cannot be read'}.") from error

    @asynccontextmanager
    async def _files(self, files: Sequence[Any], url: str | None) -> AsyncIterator[list[str]]:
        """The uploads as files in a temporary folder, which is deleted afterwards."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            if url is not None:
                if self.fetcher is None:
                    raise Refused(403, "url: this service does not fetch addresses; upload the clip.")
                path = folder / "the clip"
                await self.fetcher.fetch(url, path)
                yield [str(path)]
                return
            # Named by the service, because client names may be anything; the content decides the kind.
            paths = [folder / f"file {number}" for number in range(1, len(files) + 1)]
            await self._in(self._readers, _save, files, paths)
            yield list(map(str, paths))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _in(self, pool: ThreadPoolExecutor, function: Callable, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


def _save(files: Sequence[Any], paths: Sequence[Path]) -> None:
    for upload, path in zip(files, paths):
        with open(path, "wb") as file:
            shutil.copyfileobj(upload.file, file)
