"""The file that a command's --output names: looked at before the work, written after it."""

from pathlib import Path

from data_rice.files import write_atomically


def check_output(path: str | Path) -> None:
    """
    Refuses a file that cannot be written there, before the work.

    Raises:
        ValueError: it is a folder, or in something that is none.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: name a file in it.")
    blocked = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)
    if blocked:
        raise ValueError(f"--output {path} cannot be written, as {blocked} is a file: name another folder.")


def write_output(path: str | Path, text: str) -> None:
    """
    Writes the file of `--output`, with its folder.

    Raises:
        ValueError: it cannot be written.
    """
    check_output(path)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise ValueError(f"--output {path} cannot be written ({error.strerror}): name another file.") from error
