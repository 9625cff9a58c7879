"""Options of eval_rice.py: valid values and combinations."""

import argparse

from modeling_rice.scoring_rice import FusionWeights


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} must be at least {least}")
    return number


def fusion_weight(text: str) -> float | str:
    """`auto`, `fit`, or a number above 0."""
    if text in ("auto", "fit"):
        return text
    try:
        return FusionWeights(float(text)).fusion_weight
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor fit nor a number above 0") from error


def check_options(options: argparse.Namespace) -> None:
    """
    Refuses incompatible options, before anything is loaded.

    Raises:
        ValueError: options are incompatible; the message names them.
    """
    if options.model is not None and options.baseline_model is not None:
        raise ValueError("--baseline_model goes with --baseline, not with --model: give one of them.")
    if options.baseline is not None and options.fusion_weight != "auto":
        raise ValueError(f"--fusion_weight goes with --model, but {options.baseline} has only one score.")
    if options.fit_data_dir is not None and options.fusion_weight != "fit":
        raise ValueError("--fit_data_dir goes with --fusion_weight fit: give both, or neither.")
    given = [name for name in ("detector", "boxes_file") if getattr(options, name) is not None]
    if options.boxes == "detector" and len(given) != 1:
        raise ValueError("--boxes detector needs either --detector or --boxes_file: give one of them.")
    if options.boxes != "detector" and given:
        raise ValueError(f"--{given[0]} goes with --boxes detector, not with --boxes {options.boxes}.")


def check_asr(options: argparse.Namespace, reads_text: bool) -> None:
    """Refuses to change the ASR if the model does not read it."""
    if options.asr != "own" and not reads_text:
        name = options.model or options.baseline
        why = f"which {name} does not" if options.text else "but --no-text turns it off"
        raise ValueError(f"--asr {options.asr} needs a model that reads text, {why}: leave it out.")
