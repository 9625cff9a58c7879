"""Measure R@k of a checkpoint under one protocol: eval_rice.py, with its arguments; see `rice eval --help`."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Nothing is an option to this parser, not even --help: all of it is for eval_rice.py, which has a parser already.
    parser.prefix_chars = "\0"
    parser.add_argument("arguments", nargs="*")


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: eval_rice.py is not installed beside the packages.
    """
    try:
        import eval_rice
    except ModuleNotFoundError as error:
        if error.name != "eval_rice":
            raise
        raise ValueError("eval_rice.py is not found; run this where the repository is, or install it whole.") from None
    # Its parser takes its name from here.
    called, sys.argv[0] = sys.argv[0], "rice eval"
    try:
        eval_rice.main(options.arguments)
    finally:
        sys.argv[0] = called
