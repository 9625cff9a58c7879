"""`python -m retrieval_rice.detector train|eval|run`, also `rice detector train|eval|run`."""

import argparse
import sys

from data_rice.commands import mistakes_end, print_anywhere

from . import commands


def main(arguments: list[str] | None = None) -> int:
    """Runs one step; a user's mistake ends the program with status 2 and one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m retrieval_rice.detector",
        description=commands.__doc__.partition("\n")[0],
        epilog=commands.__doc__.partition("\n")[2].strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands.add_arguments(parser)
    print_anywhere()
    options = parser.parse_args(arguments)
    with mistakes_end(parser, verb=options.step):
        commands.run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
