"""Output of commands: the file of --output, and folders that are written completely or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_rice.files import write_atomically


def check_output(path: str | Path) -> None:
    """
    Refuses a path of `--output` that cannot be written, before the work starts.

    Raises:
        ValueError: if it is a folder, or its parent is a file.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: name a file in it.")
    blocked = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)
    if blocked:
        raise ValueError(f"--output {path} cannot be written, since {blocked} is a file: name another folder.")


def write_output(path: str | Path, text: str) -> None:
    """
    Writes the file of `--output` and creates its folder.

    Raises:
        ValueError: if it cannot be written.
    """
    check_output(path)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise ValueError(f"--output {path} cannot be written ({error.strerror}): name another file.") from error


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """
    A temporary folder that is moved to `path` if the block succeeds, and removed otherwise.

    Raises:
        FileExistsError: if `path` is a file, or a folder that is not empty.
        OSError: if it cannot be written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} already exists; name a new or empty folder.")
    from safetensors import SafetensorError

    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        folder = temporary / path.name
        # `mkdtemp` creates private folders; this one has the user's default mode.
        folder.mkdir()
        yield folder
        os.replace(folder, path)
    except (OSError, SafetensorError) as error:
        # An error without a number is already a message of this project.
        if isinstance(error, OSError) and error.errno is None:
            raise
        raise OSError(f"{path} was not written ({error}): make room, or name another folder.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
