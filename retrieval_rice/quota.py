"""Bounds on what all who use the demo or the service together send, whoever they are and however they send it.

Gradio takes files before anyone asks for recognition, any number of times, and keeps what was shown or broken off.
"""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .uploads import UploadLimits

OVERHEAD = 1_000_000
"""Bytes that a request may have beyond the files in it."""


class FolderQuota:
    """
    Keeps what a folder holds young and within bounds; what is there at the beginning stays, and counts.

    Args:
        folder: Nothing outside of it is looked at or deleted; links are not followed.
        max_bytes: Of all files.
        keep_seconds: Age from which on files are deleted anyway.
    """

    def __init__(self, folder: str | Path, max_bytes: int, keep_seconds: float):
        self.folder, self.max_bytes, self.keep_seconds = os.fspath(folder), max_bytes, keep_seconds
        self.kept = {entry.path for entry in _entries(self.folder)}

    def make_room(self, wanted: int = 0) -> bool:
        """Deletes what is too old, then the oldest files until `wanted` more bytes fit; returns whether they do."""
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
                # Gone meanwhile, or not empty.
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
    """Everything in a folder, what lies in a subfolder before that itself."""
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
    ASGI middleware: what is sent is bounded in size, in time and, over all who send, in what it takes of the disk.

    Args:
        app: The server.
        limits: Of uploads.
        quota: Of the folder that the server puts files in and does not clear by itself; without one, what is arriving
            or in work is all that there is.
    """

    methods = ("POST",)

    def __init__(self, app: Any, limits: UploadLimits, quota: FolderQuota | None = None):
        self.app, self.limits, self.quota = app, limits, quota
        self.arriving = 0

    def is_upload(self, scope: dict) -> bool:
        """Whether a request carries files; any other is short."""
        return scope["path"].rstrip("/").endswith("/upload")

    def has_room(self, wanted: int) -> bool:
        """Whether so many bytes more fit beside those that are arriving."""
        # Uploads arrive beside each other, and each may become as long as it says.
        if self.quota is not None:
            return self.quota.make_room(self.arriving + wanted)
        return self.arriving + wanted <= self.limits.max_total_bytes

    async def refuse(self, send: Any, status: int, words: str) -> None:
        """Answers with one sentence."""
        await answer(send, status, words.encode(), b"text/plain; charset=utf-8")

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] not in self.methods:
            return await self.app(scope, receive, send)
        is_upload = self.is_upload(scope)
        seconds = self.limits.arriving_seconds if is_upload else None
        most = self.limits.max_bytes if is_upload else 0
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return await self.refuse(send, 411, "The length of what is sent must be given.")
        size = int(length)
        if size > most + OVERHEAD:
            words = (
                f"This is {size / 1e6:.0f} MB, more than the {(most or OVERHEAD) / 1e6:g} MB that are taken at once."
            )
            return await self.refuse(send, 413, words)
        wanted = size if is_upload else 0
        if not self.has_room(wanted) and is_upload:
            words = "Others are uploading, and there is no room; try again in some minutes."
            return await self.refuse(send, 503, words)
        self.arriving += wanted
        try:
            async with asyncio.timeout(seconds) as clock:
                await self.app(scope, receive, send)
        except TimeoutError:
            if not clock.expired():
                raise
            await self.refuse(send, 408, f"The upload took longer than {seconds:g} s; send something smaller.")
        finally:
            self.arriving -= wanted


async def answer(send: Any, status: int, body: bytes, kind: bytes, *headers: tuple[bytes, bytes]) -> None:
    """Sends a whole answer, after which the connection is closed: what was to come on it is not read."""
    headers = ((b"content-type", kind), (b"content-length", str(len(body)).encode()), *headers)
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
