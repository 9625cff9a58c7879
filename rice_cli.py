"""The `rice` command, e.g. `rice convert CHECKPOINT OUTPUT_DIR`.

Each verb is a module with a docstring, `add_arguments(parser)` and `run(options)`. `rice train` and `rice eval` run
train_rice.py and eval_rice.py with the same arguments.
"""

import argparse
import sys

from hub_rice import convert, encoders, mteb_wrapper, publish, publish_dataset, untrained
from hub_rice.export import onnx_export
from retrieval_rice import index_command, recognise_command, transcribe_command
from retrieval_rice.demo import command as demo_command
from retrieval_rice.detector import commands as detector
from retrieval_rice.service import command as serve_command

# Verb modules do slow imports inside `run`, so that `rice --help` is fast.
VERBS = {
    "encoder": encoders,
    "init": untrained,
    "convert": convert,
    "publish": publish,
    "publish-dataset": publish_dataset,
    "export": onnx_export,
    "mteb": mteb_wrapper,
    "transcribe": transcribe_command,
    "index": index_command,
    "recognise": recognise_command,
    "demo": demo_command,
    "serve": serve_command,
    "detector": detector,
}

# Verb -> script and its line in `rice --help`.
SCRIPTS = {
    "train": ("train_rice", "train a model from a recipe (runs train_rice.py)"),
    "eval": ("eval_rice", "measure R@k of a checkpoint under one protocol (runs eval_rice.py)"),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs. The help of a verb is the docstring of its module."""
    parser = argparse.ArgumentParser(prog="rice", description="Livestreaming product recognition with RICE.")
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")
    for name, (_, summary) in SCRIPTS.items():
        # Listed for --help only: `main` passes such a verb to its script before parsing.
        verbs.add_parser(name, help=summary, add_help=False)
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
    verbs.choices["export"].set_defaults(run=_export)
    return parser


def _export(options: argparse.Namespace) -> None:
    model, processor = onnx_export.run(options)
    if options.evaluate:
        from evaluation_rice.exported import compare_export

        compare_export(
            model,
            processor,
            options.output_dir,
            options.evaluate,
            split=options.split,
            data_dir=options.data_dir,
            int8=options.int8,
            num_workers=options.num_workers,
        )


def _run_script(verb: str, arguments: list[str]) -> None:
    """Runs a script's `main` under the name `rice VERB`, which its error messages then show."""
    import importlib

    called, sys.argv[0] = sys.argv[0], f"rice {verb}"
    try:
        importlib.import_module(SCRIPTS[verb][0]).main(arguments)
    finally:
        sys.argv[0] = called


def main(arguments: list[str] | None = None) -> int:
    """
    Runs one verb.

    Returns:
        0. A user error ends the program with status 2 and one sentence.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] in SCRIPTS:
        _run_script(arguments[0], arguments[1:])
        return 0
    parser = build_parser()
    options = parser.parse_args(arguments)
    # Imported after parsing, so that --help is fast.
    from data_rice.commands import mistakes_end, print_anywhere

    print_anywhere()
    with mistakes_end(parser, verb=options.verb):
        options.run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
