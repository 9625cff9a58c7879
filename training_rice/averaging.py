"""Exponential moving average of the weights, for evaluation and for the final model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

AVERAGED_FILE = "averaged.safetensors"
# Statistics that validation fits to the averaged weights. They stay as fitted: an average of several fits, or the
# statistics from before the fit, would not belong to any weights.
_FITTED = "alignment."


class AveragedWeights:
    """
    Keeps `average <- decay_t * average + (1 - decay_t) * weights`, with `decay_t = min(decay, (1 + t) / (10 + t))`
    after t updates, so that the random start has little weight in a short run. Batch norm statistics are averaged too.
    Frozen weights are not copied.

    Args:
        model: Model whose weights are averaged, on its device.
        decay: Decay in 0..1, e.g. 0.9999 for a long run.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        own = _tensors(model)
        self.average = {name: own[name].detach().clone() for name in _averaged_names(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Updates the average; call it after each update of the weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        own = _tensors(model)
        torch._foreach_lerp_(list(self.average.values()), [own[name] for name in self.average], 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """A context in which the model has the averaged weights; its own are restored exactly afterwards."""
        tensors = _tensors(model)
        own = {name: tensors[name].detach().clone() for name in self.average}
        self.copy_to(model)
        try:
            yield
        finally:
            _assign(model, own)

    def copy_to(self, model: nn.Module) -> None:
        """Replaces the model's weights by the averaged ones."""
        _assign(model, self.average)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the averaged weights into a checkpoint folder."""
        tensors = {name: value.contiguous().cpu() for name, value in self.average.items()}
        save_file(tensors, os.path.join(folder, AVERAGED_FILE), metadata={"updates": str(self.updates)})

    def load(self, folder: str | os.PathLike, updates: int) -> None:
        """
        Loads what `save` wrote after `updates` updates.

        Raises:
            ValueError: the averages belong to another model.
        """
        saved = load_file(os.path.join(folder, AVERAGED_FILE))
        if saved.keys() != self.average.keys():
            name = min(saved.keys() ^ self.average.keys())
            raise ValueError(f"{os.path.join(folder, AVERAGED_FILE)} is of another model (first difference: {name}).")
        for name, value in saved.items():
            self.average[name].copy_(value)
        self.updates = updates


def load_averaged(model: nn.Module, folder: str | os.PathLike) -> bool:
    """Loads the averaged weights of a checkpoint into a model; returns `False` if the checkpoint has none."""
    path = os.path.join(folder, AVERAGED_FILE)
    if not os.path.isfile(path):
        return False
    _assign(model, load_file(path))
    return True


def _averaged_names(model: nn.Module) -> list[str]:
    """Names of trained parameters, and of running statistics that are part of a checkpoint."""
    kept = model.state_dict(keep_vars=True)
    return [
        name
        for name, value in kept.items()
        if value.is_floating_point()
        and not name.startswith(_FITTED)
        and (value.requires_grad or not isinstance(value, nn.Parameter))
    ]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@torch.no_grad()
def _assign(model: nn.Module, values: dict[str, Tensor]) -> None:
    own = _tensors(model)
    for name, value in values.items():
        own[name].copy_(value)
