"""`torch_compile` of the training arguments: the vision encoder is compiled in place, instead of the whole model."""

from collections.abc import Collection
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from transformers import TrainingArguments

from modeling_rice import RiceModel
from modeling_rice.encoders_rice import parts_to_compile


def compile_settings(args: TrainingArguments) -> dict[str, Any] | None:
    """
    Arguments for `torch.compile`, `None` without compilation. They come from `torch_compile`, `torch_compile_backend`
    and `torch_compile_mode`, else from `accelerate launch --dynamo_backend`.

    Raises:
        ValueError: torch does not have the back end or mode, the mode belongs to another back end, or inductor finds
            no C++ compiler.
    """
    backend, mode = args.torch_compile_backend, args.torch_compile_mode
    if backend is not None:
        known = {one.value.lower() for one in DynamoBackend} & set(torch.compiler.list_backends(exclude_tags=None))
        _check("torch_compile_backend", backend, known)
    plugin = TorchDynamoPlugin(backend=backend, mode=mode)
    if plugin.backend == DynamoBackend.NO:
        return None
    settings = plugin.to_kwargs()
    is_inductor = plugin.backend == DynamoBackend.INDUCTOR
    if is_inductor:
        _check("torch_compile_mode", plugin.mode, torch._inductor.list_mode_options())
    elif "mode" in settings:
        raise ValueError(
            f"torch_compile_mode {plugin.mode} belongs to the back end inductor, not to {settings['backend']}; leave "
            f"one of them out."
        )
    if is_inductor and args.device.type == "cpu":
        _find_compiler()
    return settings


def _check(argument: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(f"{argument} {value} does not exist here: choose one of {', '.join(sorted(known))}.")


def _find_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "torch_compile needs a C++ compiler on a CPU, but none was found: install g++, name another in the "
            "environment variable CXX, or leave torch_compile out."
        ) from error


def compile_encoder(model: RiceModel, args: TrainingArguments, accelerator: Accelerator) -> None:
    """Compiles the encoder by [`compile_settings`], instead of the accelerator; call it before `prepare`."""
    settings = compile_settings(args)
    if settings is not None:
        model.compile_encoder(**settings)
        # The accelerator would compile the whole model, which breaks into dozens of graphs.
        accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")


def describe_compilation(model: RiceModel, args: TrainingArguments) -> list[str]:
    """A line on the compiled parts, if there are any."""
    settings = compile_settings(args)
    if settings is None:
        return []
    count = len(parts_to_compile(model.vision_model))
    parts = f"the {count} blocks of the vision encoder are" if count > 1 else "the vision encoder is"
    return [f"{parts} compiled by {settings['backend']} in the first steps and the first validation"]
