"""What the commands of all packages share."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())


@contextmanager
def mistakes_end(
    parser: argparse.ArgumentParser, kinds: tuple[type[Exception], ...] = (ValueError, OSError)
) -> Iterator[None]:
    """Ends the program with one sentence and status 2 where what is run within raises an error of the user's."""
    try:
        yield
    except kinds as error:
        parser.exit(2, f"{parser.prog}: error: {one_line(error)}\n")
