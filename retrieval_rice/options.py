"""Common options of the recognition commands: precision of the model, or an exported encoder."""

import argparse
import sys
from typing import Any

from hub_rice.precision import AUTO, INT8, PRECISIONS, add_precision, choose_precision, in_precision, precision_of

HINTS = ("titles", "none")


def port(text: str) -> int:
    """Type of a port argument."""
    number = int(text)
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text} must be from 1 to 65535")
    return number


def add_precision_and_towers(parser: argparse.ArgumentParser) -> None:
    """Adds `--precision` and `--towers` to a command."""
    add_precision(parser, INT8)
    parser.add_argument(
        "--towers",
        metavar="DIR",
        help="folder of `rice export` for this model; onnxruntime runs its encoder instead of torch, "
        "in fp32 or with --precision int8",
    )


def add_hints(parser: argparse.ArgumentParser) -> None:
    """Adds `--asr_hints` to a command with `--asr`."""
    help_text = (
        "hints for the speech model: titles of the shop, or none (default: titles, if the model supports hints)"
    )
    parser.add_argument("--asr_hints", choices=HINTS, help=help_text)


def check_asr(options: argparse.Namespace) -> None:
    """Raises `ValueError` for settings of the speech model without `--asr`."""
    for name in ("language", "asr_hints"):
        if options.asr is None and getattr(options, name) is not None:
            raise ValueError(f"--{name} belongs to --asr; give both, or leave it out.")


def open_model(options: argparse.Namespace, auto: str = AUTO) -> tuple[Any, Any]:
    """
    Model and processor for `--model`, `--device`, `--precision` and `--towers`; prints the precision.

    Args:
        options: Options of the command.
        auto: Meaning of `--precision auto`, if it is not the best precision of the processor or GPU.

    Raises:
        FileNotFoundError, ValueError: as `hub_rice.loading.load_model`; ValueError also for towers of another model or
            incompatible options.
    """
    from hub_rice.convolutions import speed_up
    from hub_rice.loading import load_model

    towers, named = options.towers, options.precision
    if towers is None and named == INT8:
        raise ValueError("--precision int8 needs an exported model: name one with --towers.")
    if towers is None:
        model, processor = load_model(options.model, options.device)
        chosen = choose_precision(auto if named == AUTO else named, model.device)
        speed_up(model)
        model = in_precision(model, chosen)
    else:
        from hub_rice.export.onnx_encoder import with_towers

        if named not in (AUTO, "fp32", INT8):
            raise ValueError(f"--precision {named}: --towers support fp32 and int8 only.")
        if options.device not in (None, "cpu"):
            raise ValueError(f"--device {options.device}: --towers run on the CPU; leave one of them out.")
        for name in ("detector", "boxes_file"):
            if getattr(options, name, None) is not None:
                raise ValueError(f"--{name}: --towers do not support boxes; leave one of them out.")
        model, processor = load_model(options.model, "cpu")
        model = with_towers(model, towers, named == INT8)
    origin = f", encoder from {towers}" if towers else ""
    tell(f"the model computes in {precision_of(model)} (--precision {named}{origin})")
    return model, processor


def open_index(options: argparse.Namespace, model: Any, processor: Any = None, **settings: Any) -> Any:
    """
    The index of `--shop`; prints a notice if its pictures were encoded in another precision than the model's.

    Args:
        options: Options of the command.
        model, processor: From `open_model`.
        settings: Arguments of `GalleryIndex.load`.

    Raises:
        FileNotFoundError, ValueError: as `GalleryIndex.load`.
    """
    from .index import GalleryIndex

    index = GalleryIndex.load(options.shop, model, processor, **settings)
    own = precision_of(model)
    if index.precision != PRECISIONS.get(own, own):
        tell(f"the pictures of {options.shop} were encoded in {index.precision}: scores differ by its rounding")
    return index


def tell(text: str) -> None:
    """Prints a notice to standard error."""
    print(text, file=sys.stderr, flush=True)
