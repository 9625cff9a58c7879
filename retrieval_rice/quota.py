"""Limits on the uploads of all users of the demo or the service together.

Gradio accepts any number of files before a recognition starts, and keeps shown files and interrupted uploads.
"""

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:
    fcntl = None

from .uploads import UploadLimits

OVERHEAD = 1_000_000
"""Bytes of a request beyond its files; also the interval in bytes between checks for free space."""
NO_ROOM = "Others are uploading and the space is used up; try again in some minutes."


_LOCK = ".in-use"
# A folder without a lock is being created, or its process was killed at once.
_MAKING_SECONDS = 3600.0


@contextmanager
def temporary_folder(prefix: str) -> Iterator[str]:
    """
    A new folder in the system's temporary folder, deleted at the end. Folders of killed processes are deleted at the
    start.

    Args:
        prefix: Prefix of its name; no other folder may use it.
    """
    for entry in os.scandir(tempfile.gettempdir()):
        if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False):
            _delete_unused(entry)
    with tempfile.TemporaryDirectory(prefix=prefix) as folder, open(os.path.join(folder, _LOCK), "ab") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _delete_unused(folder: os.DirEntry) -> None:
    try:
        status = folder.stat(follow_symlinks=False)
        if fcntl is None or status.st_uid != os.getuid():
            return
        with open(os.path.join(folder.path, _LOCK), "rb") as lock:
            # The process that created the folder holds the lock as long as it lives.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        if time.time() - status.st_mtime < _MAKING_SECONDS:
            return
    except OSError:
        return
    shutil.rmtree(folder.path, ignore_errors=True)


class FolderQuota:
    """
    Limits age and size of the files in a folder. Existing files count from the start.

    Args:
        folder: The folder; nothing outside of it is read or deleted, and links are not followed.
        max_bytes: Maximum size of all files.
        keep_seconds: Age at which files are deleted.
    """

    def __init__(self, folder: str | Path, max_bytes: int, keep_seconds: float):
        self.folder, self.max_bytes, self.keep_seconds = os.fspath(folder), max_bytes, keep_seconds
        self.kept = {entry.path for entry in _entries(self.folder)}

    def make_room(self, wanted: int = 0) -> bool:
        """Deletes expired files, then the oldest files until `wanted` more bytes fit; returns whether they fit."""
        too_old = time.time() - self.keep_seconds
        files, used = [], 0
        for entry in _entries(self.folder):
            try:
                status = entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    if status.st_mtime < too_old and entry.path not in self.kept:
                        os.rmdir(entry.path)
                    continue
            except OSError:
                # Deleted meanwhile, or not empty.
                continue
            used += status.st_size
            if entry.path not in self.kept:
                files.append((status.st_mtime, entry.path, status.st_size))
        for age, path, size in sorted(files):
            if age >= too_old and used + wanted <= self.max_bytes:
                break
            Path(path).unlink(missing_ok=True)
            used -= size
        return used + wanted <= self.max_bytes


def _entries(folder: str) -> Iterator[os.DirEntry]:
    """All entries of a folder; the content of a subfolder comes before the subfolder."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(entry.path)
        yield entry


class UploadGate:
    """
    ASGI middleware that limits uploads in size, in time and, for all users together, in disk space. It counts the
    bytes that have arrived, not the announced ones.

    Args:
        app: The server.
        limits: Limits of uploads.
        quota: Quota of the folder in which the server stores arriving files without deleting them. Without a quota,
            only uploads in progress count.
    """

    methods = ("POST",)

    def __init__(self, app: Any, limits: UploadLimits, quota: FolderQuota | None = None):
        self.app, self.limits, self.quota = app, limits, quota
        self.arrived = 0

    def is_upload(self, scope: dict) -> bool:
        """Whether a request may carry files; other requests are short."""
        return scope["path"].rstrip("/").endswith("/upload")

    def has_room(self, arriving: int) -> bool:
        """Whether all arrived bytes fit, including those that are not on the disk yet."""
        if self.quota is not None:
            return self.quota.make_room(arriving)
        return self.arrived <= self.limits.max_total_bytes

    async def refuse(self, send: Any, status: int, words: str) -> None:
        """Answers with one sentence."""
        await answer(send, status, words.encode(), b"text/plain; charset=utf-8")

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] not in self.methods:
            return await self.app(scope, receive, send)
        is_upload = self.is_upload(scope)
        most = self.limits.max_bytes if is_upload else 0
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return await self.refuse(send, 411, "The request must give its length (Content-Length).")
        size = int(length)
        if size > most + OVERHEAD:
            words = f"This is {size / 1e6:.0f} MB, more than the maximum of {(most or OVERHEAD) / 1e6:g} MB."
            return await self.refuse(send, 413, words)
        if not self.has_room(0) and is_upload:
            return await self.refuse(send, 503, NO_ROOM)
        if not is_upload:
            return await self.app(scope, receive, send)
        arrival = _Arrival(self, receive)
        try:
            async with asyncio.timeout(self.limits.arriving_seconds) as arrival.clock:
                await self.app(scope, arrival.receive, send)
        except TimeoutError:
            if not arrival.clock.expired():
                raise
            seconds = self.limits.arriving_seconds
            late = (408, f"The upload took longer than {seconds:g} s; send something smaller.")
            await self.refuse(send, *((503, NO_ROOM) if arrival.is_refused else late))
        finally:
            self.arrived -= arrival.size


class _Arrival:
    """The body of one upload, which is ended when the space is used up."""

    def __init__(self, gate: UploadGate, receive: Any):
        self.gate, self._receive = gate, receive
        self.clock: Any = None
        self.size, self.is_refused = 0, False
        self._checked = 0

    async def receive(self) -> dict:
        message = await self._receive()
        self.size += len(message.get("body", b""))
        self.gate.arrived += len(message.get("body", b""))
        # At intervals, because each check reads the folder.
        new = self.size - self._checked
        if new >= OVERHEAD or not message.get("more_body", False):
            self._checked = self.size
            if not self.gate.has_room(new):
                self.is_refused = True
                self.clock.reschedule(0)
                await asyncio.Event().wait()
        return message


async def answer(send: Any, status: int, body: bytes, kind: bytes, *headers: tuple[bytes, bytes]) -> None:
    """Sends a complete answer and closes the connection; the rest of the request is not read."""
    headers = ((b"content-type", kind), (b"content-length", str(len(body)).encode()), *headers)
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
