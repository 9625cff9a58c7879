"""transformers' Trainer, made to survive: whole checkpoints, exact continuation, bad steps left out, EMA weights."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState

from .averaging import AveragedWeights, load_averaged
from .checkpoints import STAGING, clear_staging, numbered_checkpoints, publish, rotate, why_broken
from .guard import UpdateGuard
from .randomness import EpochCallback, SeededCollator

# In a checkpoint: what is neither model, optimiser, schedule nor random state.
STATE_FILE = "rice_state.pt"


class Stateful(Protocol):
    """What a checkpoint keeps of an object: tensors, numbers, and lists and dicts of them."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class ResumableTrainer(Trainer):
    """
    A run of this trainer can be killed at any moment and goes on from its last whole checkpoint to the same weights,
    to the bit on CPU with the same number of processes.

    Beyond what Trainer restores (weights, optimiser, schedule, random states, position in the epoch), the draws of the
    loader workers are a function of seed, epoch and batch, averaged weights and the count of bad steps are kept, and a
    checkpoint appears under its name only once it is written.

    Attributes:
        stateful: By name, further objects that checkpoints keep; to be filled before `train`. They must be alike on
            all processes, since the first one writes them.
    """

    def __init__(self, model: nn.Module, args, **kwargs):
        super().__init__(model, args, **kwargs)
        self.stateful: dict[str, Stateful] = {}
        self.guard = UpdateGuard(model, args.max_nonfinite_steps, self.last_checkpoint)
        self.averaged: AveragedWeights | None = None
        self._staging: Path | None = None
        if args.ema_decay:
            self.add_callback(_Averaging(self))

    def last_checkpoint(self) -> str | None:
        """The newest whole checkpoint of the output folder."""
        found = numbered_checkpoints(self.args.output_dir)
        return next((str(path) for path in found if why_broken(path, self.args.world_size) is None), None)

    def get_train_dataloader(self) -> DataLoader:
        args, plain = self.args, self.data_collator
        seeded = SeededCollator(plain, args.seed if args.data_seed is None else args.data_seed)
        self.data_collator = seeded
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = plain
        self.callback_handler.callbacks = [
            callback for callback in self.callback_handler.callbacks if not isinstance(callback, EpochCallback)
        ]
        self.add_callback(EpochCallback(seeded))
        # Or each new iterator would draw its workers' seed from the generator that dropout draws from, and there are
        # more new iterators in a run that was interrupted.
        getattr(loader, "base_dataloader", loader).generator = torch.Generator().manual_seed(args.seed)
        return loader

    def get_batch_samples(self, *args, **kwargs):
        samples = super().get_batch_samples(*args, **kwargs)
        self.guard.begin()
        return samples

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.guard.see(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None
        if self.guard.refuses(grad_norm, scaled, self.state.global_step):
            # An optimiser passes over parameters without gradients, weight decay included.
            model.zero_grad(set_to_none=True)
        return grad_norm

    def evaluation_weights(self):
        """The context that validation runs in: with the averaged weights while training goes on."""
        if self.averaged is None or not self.is_in_train:
            return nullcontext()
        return self.averaged.applied(self.accelerator.unwrap_model(self.model))

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """Trainer writes below the staging folder, and the first process moves the result to its place."""
        args, folder = self.args, Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        best = f"checkpoint-{self.state.best_global_step}" if self.state.best_global_step else None
        if args.should_save:
            clear_staging(folder)
        self._barrier()
        self._staging = folder / STAGING
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self._barrier()
        if best is not None and (best == name or (folder / best).is_dir()):
            self.state.best_model_checkpoint = str(folder / best)
        if args.should_save:
            self.state.save_to_json(str(folder / STAGING / name / "trainer_state.json"))
            publish(folder / STAGING / name, folder)
            rotate(folder, args.save_total_limit, self.state.best_model_checkpoint)
            clear_staging(folder).rmdir()
        self._barrier()
        if args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer asks for this while the checkpoint is still being written.
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    @staticmethod
    def _barrier() -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save:
            return
        state = {name: kept.state_dict() for name, kept in self._kept().items()}
        if self.averaged is not None:
            state["averaged_updates"] = self.averaged.updates
            self.averaged.save(output_dir)
        torch.save(state, os.path.join(output_dir, STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = os.path.join(checkpoint or "", STATE_FILE)
        if checkpoint is None or not os.path.isfile(path):
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, kept in self._kept().items():
            if name in state:
                kept.load_state_dict(state[name])
        if self.args.ema_decay and "averaged_updates" in state:
            self.averaged = AveragedWeights(self.accelerator.unwrap_model(self.model), self.args.ema_decay)
            self.averaged.load(checkpoint, state["averaged_updates"])

    def _kept(self) -> dict[str, Stateful]:
        return {"guard": self.guard, **self.stateful}

    def _load_best_model(self) -> None:
        super()._load_best_model()
        load_averaged(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint)
        self.averaged = None

    def load_trained(self, checkpoint: str | os.PathLike) -> None:
        """Takes the weights that a run ends with, the best or the last, from the checkpoint after its last step."""
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            # Looked for beside the last one, since the folder may have moved.
            checkpoint = os.path.join(os.path.dirname(checkpoint), os.path.basename(self.state.best_model_checkpoint))
        self._load_from_checkpoint(checkpoint)
        load_averaged(self.accelerator.unwrap_model(self.model), checkpoint)


class _Averaging(TrainerCallback):
    """Follows the weights update by update, and leaves the averaged ones in the model when training ends."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def _model(self) -> nn.Module:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.averaged is None:
            self.trainer.averaged = AveragedWeights(self._model(), args.ema_decay)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.guard.in_a_row == 0:
            self.trainer.averaged.update(self._model())

    def on_train_end(self, args, state, control, **kwargs):
        # Not where the best checkpoint's averaged weights were taken already.
        if self.trainer.averaged is not None:
            self.trainer.averaged.copy_to(self._model())
            self.trainer.averaged = None
