"""
An encoder's last stage apart from the stages before it, so that it can be trained on what these have made of pictures.

Encoders of a hundred families run as one function of pictures. Here the same function runs, its frozen stages on
torch's meta device, which computes shapes and no values; where the last stage begins, the states that were kept take
the place of those without values. Whether that gives what the whole encoder gives is tried before it is relied on.
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
    Where an encoder's last stage begins, and what belongs to it.

    Attributes:
        layer: Number of the hidden state that enters it.
        entry: Name of the module that it begins with.
        modules: Names of all that runs from there on; what lies within them is not named again.
        entering: Of the states that enter.
        constants: What else the entry takes, the same for all pictures, such as rotary positions.
    """

    layer: int
    entry: str
    modules: tuple[str, ...]
    entering: PatchLayout
    constants: tuple[Tensor, ...] = ()

    def owns(self, name: str) -> bool:
        """Whether a module, parameter or buffer of the encoder belongs to it."""
        return any(name == module or name.startswith(f"{module}.") for module in self.modules)

    @contextmanager
    def recorded(self, encoder: nn.Module) -> Iterator[list[Tensor]]:
        """What enters while the encoder runs inside, `(n, tokens, C)`, one entry for each run."""
        with _entries(encoder, self.entry) as entries:
            states: list[Tensor] = []
            yield states
            states += [self.entering.tokens(tensors[0]) for tensors in entries]

    # A graph has no use for it: most of what runs has no values.
    @torch.compiler.disable
    def run(self, encoder: nn.Module, tokens: Tensor, layout: EncoderLayout, **options: Any) -> ModelOutput:
        """
        The encoder's output from the states that enter its last stage; hidden states up to `layer` have no values.

        Args:
            encoder: Whose last stage this is.
            tokens (`(n, tokens, C)`): As `recorded` gives them.
            layout: The encoder's.
            options: Further arguments of the encoder.

        Raises:
            ValueError: for states of pictures that the encoder cannot have been given.
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
                    f"The encoded pictures have {tokens.shape[1]} tokens of {tokens.shape[2]} numbers, which are none "
                    f"that the encoder's last stage takes; encode them with the model's own `encode_pictures`."
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
        """The frozen stages' parameters and buffers on the meta device."""
        tensors = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
        return {
            name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items() if not self.owns(name)
        }


def find_last_stage(encoder: nn.Module, layout: EncoderLayout) -> LastStage:
    """
    The last stage of an encoder: of a convolutional or shifted-window one what follows its last hidden state but one,
    of a vision transformer the last block, and in both cases norm and pooler. The encoder runs on noise to find out.

    Args:
        encoder: Of any family.
        layout: Its own.

    Raises:
        ValueError: when it has no last stage that can run by itself.
    """
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            return _find(encoder, layout)
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
        raise ValueError(
            f"The last stage of the vision model {encoder.config.model_type!r} cannot run by itself ({reason}); train "
            f"the whole encoder, or none of it."
        ) from error
    finally:
        encoder.train(was_training)


@dataclass
class _Call:
    """A module's run: its name, the run it is part of, and which states that may enter the last stage it was given."""

    name: str
    parent: int | None
    states: Tensor | None = None


def _find(encoder: nn.Module, layout: EncoderLayout) -> LastStage:
    weights = dict(encoder.named_parameters())
    # Some encoders list their output before the final norm, too, which is no stage.
    for number in (len(layout.hidden) - 2, len(layout.hidden) - 3):
        if number < 0 or layout.hidden[number] is None:
            raise ValueError("the hidden state before its last stage is no grid of patches, or it gives none")
        stage = _stage_after(encoder, layout, number)
        if any(stage.owns(name) and weight.ndim > 1 for name, weight in weights.items()):
            _try(encoder, layout, stage)
            return stage
    raise ValueError("it has no weights but those of norms")


def _stage_after(encoder: nn.Module, layout: EncoderLayout, number: int) -> LastStage:
    """What follows a hidden state."""
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
        raise ValueError(f"{shared[0]} runs both before and in it")
    own = after - before
    outermost = [name for name in own if not any(name.startswith(f"{other}.") for other in own)]
    # Of another picture than those that it is tried with, for what follows from pictures is not constant.
    with _entries(encoder, calls[entry].name) as entries:
        encoder(**_noise(encoder, layout, count=1, scale=0.5))
    return LastStage(number, calls[entry].name, tuple(sorted(outermost)), entering, tuple(entries[0][1:]))


@contextmanager
def _calls(encoder: nn.Module, wanted: PatchLayout, calls: list[_Call]) -> Iterator[None]:
    """Lists the runs of an encoder's modules in the order in which they begin."""
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
    """The run that the last stage begins with: the last one that takes the hidden state, and not as a part of one."""
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
    """How a tensor holds as many patches of the same width, if it does."""
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
    """Pictures to look at what an encoder does."""
    pixels = torch.randn(count, 3, *layout.image_size, generator=torch.Generator().manual_seed(0))
    return encoder_inputs((scale * pixels).to(encoder.device, encoder.dtype), layout.cut_to)


@contextmanager
def _entries(encoder: nn.Module, name: str) -> Iterator[list[list[Tensor]]]:
    """The tensors that a module is given, for each of its runs."""
    entries: list[list[Tensor]] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        # A copy, since a module may work in place.
        entries.append([leaf.clone() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])

    hook = encoder.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield entries
    finally:
        hook.remove()


def _picture_size(layout: EncoderLayout, entering: PatchLayout, num_tokens: int) -> tuple[int, int]:
    """Height and width of the pictures that so many tokens come from."""
    rows, columns = entering.grid_of(num_tokens)
    height, width = layout.image_size
    return height * rows // entering.grid[0], width * columns // entering.grid[1]


def _try(encoder: nn.Module, layout: EncoderLayout, stage: LastStage) -> None:
    """Raises `ValueError` where the last stage by itself gives something else than the whole encoder."""
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
                raise ValueError("what it gives depends on more than the states that enter it")
