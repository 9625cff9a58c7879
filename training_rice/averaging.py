"""Exponential moving average of the weights, for evaluation and for the final model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

AVERAGED_FILE = "averaged.safetensors"


class AveragedWeights:
    """
    Keeps `average <- decay_t * average + (1 - decay_t) * weights`, with `decay_t = min(decay, (1 + t) / (10 + t))`
    after t updates, so that a short run is not an average of its random start. Statistics of batch norms are averaged
    too; frozen weights are not copied.

    Args:
        model: Whose weights to average; on its device.
        decay: In 0..1, e.g. 0.9999 for a long run.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        own = _tensors(model)
        self.average = {name: own[name].detach().clone() for name in _averaged_names(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """To be called after each update of the weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        own = _tensors(model)
        torch._foreach_lerp_(list(self.average.values()), [own[name] for name in self.average], 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights inside, and its own again afterwards, to the bit."""
        tensors = _tensors(model)
        own = {name: tensors[name].detach().clone() for name in self.average}
        self.copy_to(model)
        try:
            yield
        finally:
            _assign(model, own)

    def copy_to(self, model: nn.Module) -> None:
        """Gives the model the averaged weights for good."""
        _assign(model, self.average)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the averaged weights beside a checkpoint's own."""
        tensors = {name: value.contiguous().cpu() for name, value in self.average.items()}
        save_file(tensors, os.path.join(folder, AVERAGED_FILE), metadata={"updates": str(self.updates)})

    def load(self, folder: str | os.PathLike, updates: int) -> None:
        """
        Goes on from what `save` has written, after so many updates.

        Raises:
            ValueError: for the averages of another model.
        """
        saved = load_file(os.path.join(folder, AVERAGED_FILE))
        if saved.keys() != self.average.keys():
            name = min(saved.keys() ^ self.average.keys())
            raise ValueError(f"{os.path.join(folder, AVERAGED_FILE)} is of another model (first difference: {name}).")
        for name, value in saved.items():
            self.average[name].copy_(value)
        self.updates = updates


def load_averaged(model: nn.Module, folder: str | os.PathLike) -> bool:
    """Gives a model the averaged weights of a checkpoint; `False` where the checkpoint has none."""
    path = os.path.join(folder, AVERAGED_FILE)
    if not os.path.isfile(path):
        return False
    _assign(model, load_file(path))
    return True


def _averaged_names(model: nn.Module) -> list[str]:
    """Parameters that train, and statistics that move along and are part of a checkpoint."""
    kept = model.state_dict(keep_vars=True)
    return [
        name
        for name, value in kept.items()
        if value.is_floating_point() and (value.requires_grad or not isinstance(value, nn.Parameter))
    ]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@torch.no_grad()
def _assign(model: nn.Module, values: dict[str, Tensor]) -> None:
    own = _tensors(model)
    for name, value in values.items():
        own[name].copy_(value)
