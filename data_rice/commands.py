"""Shared helpers of the commands of all packages."""

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
    A context that turns a user's error into one sentence and exit status 2.

    Args:
        parser: The program's parser.
        kinds: Error classes that are a user's mistake.
        verb: The subcommand, if any.
    """
    try:
        yield
    except kinds as error:
        called = " ".join(filter(None, (parser.prog, verb)))
        parser.exit(2, f"{called}: error: {one_line(error)}\n")


def log_plainly(level: int = logging.INFO) -> None:
    """Show log messages without a prefix, and hide the requests of the Hub's client."""
    logging.basicConfig(format="%(message)s", level=level)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def print_anywhere() -> None:
    """Let this process print any text: characters outside the terminal's encoding are escaped as in JSON.

    Commands call it at their start. Titles may be in any script, file names may not be text, and terminals of servers
    often support ASCII only. Printed JSON stays valid.
    """
    codecs.register_error(_ERRORS, _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end
