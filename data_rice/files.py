"""Atomic writing of files."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRITING = ".writing-"
"""Prefix of the names of unfinished files. A remaining one belonged to a process that was killed."""


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yields a temporary path beside ``path``, with the same suffix. It replaces ``path`` when the block succeeds, so a
    reader sees the old file or the whole new one, even after a crash. After an error, such as a full disk, it is
    deleted.

    Raises:
        OSError: the file cannot be written; ``filename`` is ``path``.
    """
    path = Path(path)
    temporary = path.with_name(f"{WRITING}{os.getpid()}-{threading.get_native_id()}-{path.name}")
    try:
        temporary.touch()
        # Some writers create files that only their owner can read.
        mode = temporary.stat().st_mode
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 text file through `replacing`; raises the same errors."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cut_torn_line(path: str | os.PathLike) -> None:
    """Removes an unfinished last line, which an interrupted process leaves in a file of appended lines."""
    data = Path(path).read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
