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
    Keeps other runs out of an output folder, until the block ends or the process dies, however it dies.

    The lock belongs to this process and not to its children, so that loader workers that outlive it by some seconds
    hold nothing. Where the file system knows no locks, a warning says so and the run goes on.

    Args:
        folder: Of the run; created when it is missing.

    Raises:
        BlockingIOError: another run is writing there.
        OSError: the system has no such locks (Windows).
    """
    if fcntl is None:
        raise OSError(
            "training keeps a second run out of output_dir by file locks (fcntl), which this system does not have; "
            "train on Linux or macOS."
        )
    path = Path(folder) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    # Nothing else may open this file in this process: closing it anywhere would release the lock.
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise BlockingIOError(
                f"{folder} is in use by another training run ({_holder(file)}); wait for its end, or choose another "
                f"output_dir."
            ) from None
        except OSError as error:
            logger.warning("The file system of %s has no locks (%s): nothing keeps a second run out.", folder, error)
        with writing(LOCK_FILE, folder):
            file.truncate(0)
            file.write(f"process id {os.getpid()} on {socket.gethostname()}".encode())
        yield
        file.truncate(0)


def _holder(file: FileIO) -> str:
    """Who wrote its name there; one that has the lock since a moment ago may still be about to."""
    for _ in range(20):
        file.seek(0)
        if text := file.read():
            return text.decode()
        time.sleep(0.05)
    return "process id unknown"
