"""Output that any terminal takes."""

import codecs
import io
import json
import sys

_ERRORS = "rice-escape"


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
