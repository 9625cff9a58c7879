"""
Runs an encoder's last stage on stored outputs of the stages before it, so that the last stage can be trained alone.

Most encoders run only as a whole. Here the whole encoder runs, but its frozen stages on torch's meta device, which
computes shapes and no values. At the start of the last stage the stored states replace those without values. A trial
run first checks that the result equals that of the whole encoder.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from transformers.utils import ModelOutput

from .encoders_rice import EncoderLayout, PatchLayout, encoder_inputs, last_states


@dataclass(frozen=True)
class LastStage:
    """
    The start of an encoder's last stage, and the modules that belong to it.

    Attributes:
        layer: Index of the hidden state that is its input.
        entry: Name of its first module.
        modules: Names of its modules, without their submodules.
        entering: Layout of its input states.
        constants: Other inputs of its first module that are the same for all images, such as rotary positions.
    """

    layer: int
    entry: str
    modules: tuple[str, ...]
    entering: PatchLayout
    constants: tuple[Tensor, ...] = ()

    def owns(self, name: str) -> bool:
        """Whether a module, parameter or buffer of the encoder belongs to the last stage."""
        return any(name == module or name.startswith(f"{module}.") for module in self.modules)

    @contextmanager
    def recorded(self, encoder: nn.Module) -> Iterator[list[Tensor]]:
        """A list that receives the input states `(n, tokens, C)` of each run of the encoder in the block."""
        with _entries(encoder, self.entry) as entries:
            states: list[Tensor] = []
            yield states
            states += [self.entering.tokens(tensors[0]) for tensors in entries]

    # Not compiled, since most of the run has no values.
    @torch.compiler.disable
    def run(self, encoder: nn.Module, tokens: Tensor, layout: EncoderLayout, **options: Any) -> ModelOutput:
        """
        The encoder's output for input states of its last stage. Hidden states up to `layer` have no values.

        Args:
            encoder: The encoder that this stage belongs to.
            tokens (`(n, tokens, C)`): Input states from `recorded`.
            layout: Layout of the encoder.
            options: Further arguments of the encoder.

        Raises:
            ValueError: for states of a shape that the last stage does not take.
        """
        states = self.entering.states(tokens)
        size = _picture_size(layout, self.entering, tokens.shape[1])
        constants = [constant.to(tokens.device) for constant in self.constants]

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            hook.remove()
            leaves, structure = tree_flatten((args, kwargs))
            places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            values = [states, *constants]
            if [leaves[place].shape for place in places] != [value.shape for value in values]:
                raise ValueError(
                    f"The encoded images have {tokens.shape[1]} tokens of {tokens.shape[2]} numbers, which the "
                    f"encoder's last stage does not take; encode them with `encode_pictures` of this model."
                )
            for place, value in zip(places, values, strict=True):
                leaves[place] = value
            return tree_unflatten(leaves, structure)

        hook = encoder.get_submodule(self.entry).register_forward_pre_hook(enter, with_kwargs=True)
        pixels = torch.empty(len(tokens), 3, *size, dtype=tokens.dtype, device="meta")
        try:
            inputs = encoder_inputs(pixels, layout.cut_to) | options
            return functional_call(encoder, self._without_values(encoder), (), inputs, tie_weights=False)
        finally:
            hook.remove()

    def _without_values(self, encoder: nn.Module) -> dict[str, Tensor]:
        """Parameters and buffers of the frozen stages, on the meta device."""
        tensors = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
        return {
            name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items() if not self.owns(name)
        }


def find_last_stage(encoder: nn.Module, layout: EncoderLayout) -> LastStage:
    """
    Finds the last stage of an encoder by running it on noise. For a vision transformer it is the last block; for a
    convolutional or shifted-window encoder, everything after the second-to-last hidden state. It always includes the
    final norm and the pooler.

    Args:
        encoder: An encoder of any family.
        layout: Layout of the encoder.

    Raises:
        ValueError: if no last stage can run on its own.
    """
    # One by one, since a user may have frozen some of them by eval mode.
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        with torch.no_grad():
            return _find(encoder, layout)
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
        raise ValueError(
            f"The last stage of the vision model {encoder.config.model_type!r} cannot run on its own ({reason}); "
            f"train the whole encoder, or none of it."
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass
class _Call:
    """A call of a module: its name, the index of the call around it, and its input if it may be the last stage's."""

    name: str
    parent: int | None
    states: Tensor | None = None


def _find(encoder: nn.Module, layout: EncoderLayout) -> LastStage:
    weights = dict(encoder.named_parameters())
    # Some encoders also list their output before the final norm, which starts no stage.
    for number in (len(layout.hidden) - 2, len(layout.hidden) - 3):
        if number < 0 or layout.hidden[number] is None:
            raise ValueError("the hidden state before its last stage is missing or is not a grid of patches")
        stage = _stage_after(encoder, layout, number)
        if any(stage.owns(name) and weight.ndim > 1 for name, weight in weights.items()):
            _try(encoder, layout, stage)
            return stage
    raise ValueError("it has no weights except those of norms")


def _stage_after(encoder: nn.Module, layout: EncoderLayout, number: int) -> LastStage:
    """The stage that starts with a hidden state."""
    wanted = layout.hidden[number]
    calls: list[_Call] = []
    with _calls(encoder, wanted, calls):
        output = encoder(**_noise(encoder, layout), output_hidden_states=True)
    patches = wanted.tokens(output.hidden_states[number])[:, wanted.num_prefix_tokens :]
    entry, entering = _entry(calls, wanted, patches)
    before = {call.name for call in calls[:entry]}
    after = {call.name for call in calls[entry:]}
    modules = dict(encoder.named_modules())
    shared = [name for name in sorted(before & after) if modules[name].state_dict()]
    if shared:
        raise ValueError(f"{shared[0]} runs both before it and in it")
    own = after - before
    outermost = [name for name in own if not any(name.startswith(f"{other}.") for other in own)]
    # With another image than in the trial run, because inputs that depend on the image are not constant.
    with _entries(encoder, calls[entry].name) as entries:
        encoder(**_noise(encoder, layout, count=1, scale=0.5))
    return LastStage(number, calls[entry].name, tuple(sorted(outermost)), entering, tuple(entries[0][1:]))


@contextmanager
def _calls(encoder: nn.Module, wanted: PatchLayout, calls: list[_Call]) -> Iterator[None]:
    """Records the calls of an encoder's modules in the order in which they start."""
    running: list[int] = []
    hooks = []

    def begin(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fits = bool(tensors) and _as_patches(tensors[0], wanted) is not None
        calls.append(_Call(name, running[-1] if running else None, tensors[0] if fits else None))
        running.append(len(calls) - 1)

    def end(*_: object) -> None:
        running.pop()

    for name, module in encoder.named_modules():
        hooks.append(module.register_forward_pre_hook(partial(begin, name), with_kwargs=True))
        hooks.append(module.register_forward_hook(end))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _entry(calls: list[_Call], wanted: PatchLayout, patches: Tensor) -> tuple[int, PatchLayout]:
    """The first call of the last stage: the last outermost call whose input is the hidden state."""
    found: dict[int, PatchLayout] = {}
    inside: set[int] = set()
    for number, call in enumerate(calls):
        if call.parent in inside:
            inside.add(number)
            continue
        entering = None if call.states is None else _as_patches(call.states, wanted)
        if entering is not None and torch.equal(_patches(call.states, entering), patches):
            found[number] = entering
            inside.add(number)
    if not found:
        raise ValueError("none of its modules takes the hidden state before the last")
    number = max(found)
    return number, found[number]


def _as_patches(states: Tensor, wanted: PatchLayout) -> PatchLayout | None:
    """The layout in which a tensor holds the wanted patches; `None` if it does not."""
    width, grid, shape = wanted.width, wanted.grid, tuple(states.shape[1:])
    if shape == (width, *grid):
        return PatchLayout(width, grid, 0, "channels_first")
    if shape == (*grid, width):
        return PatchLayout(width, grid, 0, "channels_last")
    if len(shape) == 2 and shape[1] == width and shape[0] >= wanted.num_patches:
        return PatchLayout(width, grid, shape[0] - wanted.num_patches, "tokens")
    return None


def _patches(states: Tensor, layout: PatchLayout) -> Tensor:
    return layout.tokens(states)[:, layout.num_prefix_tokens :]


def _noise(encoder: nn.Module, layout: EncoderLayout, count: int = 2, scale: float = 1.0) -> dict[str, Tensor | None]:
    """Inputs of an encoder with random pixels."""
    pixels = torch.randn(count, 3, *layout.image_size, generator=torch.Generator().manual_seed(0))
    return encoder_inputs((scale * pixels).to(encoder.device, encoder.dtype), layout.cut_to)


@contextmanager
def _entries(encoder: nn.Module, name: str) -> Iterator[list[list[Tensor]]]:
    """The input tensors of a module, for each of its calls."""
    entries: list[list[Tensor]] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        # A copy, since a module may change its input in place.
        entries.append([leaf.clone() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])

    hook = encoder.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield entries
    finally:
        hook.remove()


def _picture_size(layout: EncoderLayout, entering: PatchLayout, num_tokens: int) -> tuple[int, int]:
    """Height and width of images that have `num_tokens` tokens."""
    rows, columns = entering.grid_of(num_tokens)
    height, width = layout.image_size
    return height * rows // entering.grid[0], width * columns // entering.grid[1]


def _try(encoder: nn.Module, layout: EncoderLayout, stage: LastStage) -> None:
    """Raises `ValueError` if the last stage on its own gives other outputs than the whole encoder."""
    for options in ({}, {"output_hidden_states": True}):
        with stage.recorded(encoder) as entered:
            whole = encoder(**_noise(encoder, layout), **options)
        apart = stage.run(encoder, entered[0], layout, **options)
        pairs = [(last_states(whole), last_states(apart))]
        if whole.get("pooler_output") is not None:
            pairs.append((whole.pooler_output, apart.pooler_output))
        if options:
            pairs += list(zip(whole.hidden_states, apart.hidden_states, strict=True))[stage.layer + 1 :]
        for expected, found in pairs:
            if found.is_meta or not torch.allclose(
                expected, found, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
            ):
                raise ValueError("its output depends on more than its input states")
