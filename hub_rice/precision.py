"""The precision in which a model computes: named by the user, or chosen for the hardware."""

import argparse
from functools import cache
from pathlib import Path
from typing import Any

AUTO, INT8 = "auto", "int8"
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Names of the precisions here and in torch."""


def add_precision(parser: argparse.ArgumentParser, *more: str, default: str = AUTO) -> None:
    """Adds `--precision` to a command; `more` are further choices besides `PRECISIONS`."""
    parser.add_argument(
        "--precision",
        default=default,
        choices=(AUTO, *PRECISIONS, *more),
        help="precision in which the model computes; auto: bf16 if the CPU or GPU has instructions for it, else fp32 "
        "(default: %(default)s)",
    )


@cache
def computes_bf16(device_type: str) -> bool:
    """
    Whether a device type ("cpu", "cuda") has instructions for matrix products in bfloat16. Without them bfloat16 is
    slower than single precision.
    """
    import torch

    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def choose_precision(name: str, device: Any) -> str:
    """
    Resolves "auto" for a device.

    Args:
        name: "auto" or one of `PRECISIONS`.
        device: `torch.device` of the model.

    Returns:
        One of `PRECISIONS`.
    """
    if name != AUTO:
        return name
    return "bf16" if computes_bf16(device.type) else "fp32"


def in_precision(model: Any, name: str) -> Any:
    """Casts the model to one of `PRECISIONS` in place, for inference only. It keeps its fingerprint."""
    import torch

    return model.settle().to(getattr(torch, PRECISIONS[name]))


def precision_of(model: Any) -> str:
    """The precision of a model: one of `PRECISIONS` or `INT8`."""
    own = getattr(model, "precision", None)
    if own is not None:
        return own
    dtype = str(getattr(model, "dtype", "torch.float32")).removeprefix("torch.")
    return {torch_name: name for name, torch_name in PRECISIONS.items()}.get(dtype, dtype)
