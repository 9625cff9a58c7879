"""Files that are whole or not there, on the floor on which everybody can use them."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRITING = ".writing-"
"""How the names of unfinished files begin; one that is left was being written by a process that was killed."""


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """
    A temporary path beside ``path``, with its suffix, which takes its place when the block ends well: a reader sees
    the old file or the whole new one, also after a crash. After a failure, such as a full disk, it is gone.

    Raises:
        OSError: the file cannot be written; ``filename`` is ``path``.
    """
    path = Path(path)
    temporary = path.with_name(f"{WRITING}{os.getpid()}-{threading.get_native_id()}-{path.name}")
    try:
        temporary.touch()
        # Some writers make files that only their owner can read.
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
    """Writes a text file, in UTF-8, in the manner and with the errors of `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cut_torn_line(path: str | os.PathLike) -> None:
    """Cuts off the line without an end that an interrupted process leaves in a file that it was adding lines to."""
    data = Path(path).read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
