"""The `rice` command, e.g. `rice convert CHECKPOINT OUTPUT_DIR`.

Each verb is a module with a docstring, `add_arguments(parser)` and `run(options)`.
"""

import argparse

from . import (
    convert,
    demo_command,
    eval_command,
    index_command,
    mteb_wrapper,
    onnx_export,
    publish,
    publish_dataset,
    recognise_command,
)
from .detector import commands as detector

# Verb modules import what is slow to load inside `run`, so that `rice --help` answers at once.
VERBS = {
    "convert": convert,
    "publish": publish,
    "publish-dataset": publish_dataset,
    "export": onnx_export,
    "mteb": mteb_wrapper,
    "eval": eval_command,
    "recognise": recognise_command,
    "index": index_command,
    "demo": demo_command,
    "detector": detector,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; a verb's help is its module's docstring."""
    parser = argparse.ArgumentParser(prog="rice", description="Livestreaming product recognition with RICE.")
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")
    for name, module in VERBS.items():
        summary, _, details = module.__doc__.partition("\n")
        verb = verbs.add_parser(
            name,
            help=summary[0].lower() + summary[1:].rstrip("."),
            description=summary,
            epilog=details.strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """
    Runs one verb.

    Returns:
        0. A mistake of the user ends the program with status 2 and one sentence.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"rice {options.verb}: error: {error}\n")
    return 0


if __name__ == "__main__":
    main()
