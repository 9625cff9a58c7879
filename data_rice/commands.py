"""What the commands of all packages share."""

import argparse
import codecs
import io
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_ERRORS = "rice-escape"


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())


@contextmanager
def mistakes_end(
    parser: argparse.ArgumentParser, kinds: tuple[type[Exception], ...] = (ValueError, OSError), verb: str = ""
) -> Iterator[None]:
    """
    Ends the program with one sentence and status 2 where what is run within raises an error of the user's.

    Args:
        parser: Of the program.
        kinds: Such errors.
        verb: The subcommand that is run, if any.
    """
    try:
        yield
    except kinds as error:
        called = " ".join(filter(None, (parser.prog, verb)))
        parser.exit(2, f"{called}: error: {one_line(error)}\n")


def log_plainly(level: int = logging.INFO) -> None:
    """Show log messages as they are, but not each request that the Hub's client makes."""
    logging.basicConfig(format="%(message)s", level=level)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def print_anywhere() -> None:
    """Let this process print any text: what a terminal's encoding lacks is escaped as JSON does, and stays JSON.

    For the start of a command. Titles may be in any script, names of files may be no text at all, and terminals that
    know ASCII alone are common on servers.
    """
    codecs.register_error(_ERRORS, _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end
