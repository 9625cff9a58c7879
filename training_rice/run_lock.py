"""One training run per output folder: the second one is refused while the first is alive."""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None

from .checkpoints import writing

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


@contextmanager
def run_lock(folder: str | os.PathLike) -> Iterator[None]:
    """
    A context that locks an output folder against other runs, until it ends or the process dies.

    The lock belongs to this process, not to its children, so loader workers that live some seconds longer do not hold
    it. If the file system does not support locks, the run continues with a warning.

    Args:
        folder: Folder of the run; created if missing.

    Raises:
        BlockingIOError: another run uses the folder.
        OSError: the operating system has no such locks (Windows).
    """
    if fcntl is None:
        raise OSError(
            "training locks output_dir with file locks (fcntl), which this system does not have; "
            "train on Linux or macOS."
        )
    path = Path(folder) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    # Do not open this file elsewhere in this process: closing it anywhere would release the lock.
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise BlockingIOError(
                f"{folder} is in use by another training run ({_holder(file)}); wait for its end, or choose another "
                f"output_dir."
            ) from None
        except OSError as error:
            logger.warning("The file system of %s has no locks (%s): a second run is not refused.", folder, error)
        with writing(LOCK_FILE, folder):
            file.truncate(0)
            file.write(f"process id {os.getpid()} on {socket.gethostname()}".encode())
        yield
        file.truncate(0)


def _holder(file: FileIO) -> str:
    """The holder of the lock as written in the file; a very recent holder may not have written it yet."""
    for _ in range(20):
        file.seek(0)
        if text := file.read():
            return text.decode()
        time.sleep(0.05)
    return "process id unknown"
