"""`python -m retrieval_rice.detector train|eval|run`, also `rice detector train|eval|run`."""

import argparse
import sys

from data_rice.commands import print_anywhere

from . import commands


def main(arguments: list[str] | None = None) -> int:
    """Runs one step; a mistake of the user ends the program with status 2 and one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m retrieval_rice.detector",
        description=commands.__doc__.partition("\n")[0],
        epilog=commands.__doc__.partition("\n")[2].strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands.add_arguments(parser)
    print_anywhere()
    options = parser.parse_args(arguments)
    try:
        commands.run(options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog} {options.step}: error: {' '.join(str(error).split())}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
