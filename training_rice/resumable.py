"""transformers' Trainer with atomic checkpoints, exact resumption, skipping of bad steps, and EMA weights."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from .averaging import AveragedWeights, load_averaged
from .checkpoints import (
    STAGING,
    clear_staging,
    newest_whole,
    publish,
    publish_model,
    rotate,
    why_broken,
    writing,
)
from .guard import UpdateGuard
from .processes import failing_together, on_first_process
from .randomness import EpochCallback, SeededCollator
from .stopping import Stopped, StopRequest, outlive_signals, signals_call

# In a checkpoint: state other than model, optimiser, schedule and random states.
STATE_FILE = "rice_state.pt"


class Stateful(Protocol):
    """An object with a state for checkpoints: tensors, numbers, and lists and dicts of them."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class ResumableTrainer(Trainer):
    """
    A run of this trainer can be killed at any moment. It resumes from its last intact checkpoint and ends with the
    same weights, bit for bit on CPU with the same number of processes.

    Trainer restores weights, optimiser, schedule, random states and the position in the epoch. In addition, the draws
    of the loader workers are a function of seed, epoch and batch; checkpoints keep averaged weights, the count of bad
    steps, the sum of the losses and the values fitted by validation; and a checkpoint appears only when it is
    complete.

    With `save_on_signal`, Ctrl-C and SIGTERM let the step finish, including its validation, and then write a
    checkpoint.

    Attributes:
        stateful: Name -> further objects in checkpoints; fill it before `train`. They must be equal on all processes,
            because the first process writes them.
        fitted_fields: Fields of the model's config that validation fits; they are restored with the weights.
    """

    fitted_fields: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, args, **kwargs):
        super().__init__(model, args, **kwargs)
        self.stateful: dict[str, Stateful] = {}
        self.guard = UpdateGuard(model, args.max_nonfinite_steps, self.last_checkpoint)
        self.averaged: AveragedWeights | None = None
        self._staging: Path | None = None
        self._losses, self._total_loss = _LossSum(), 0.0
        self._stop = StopRequest()
        self._saved_step: int | None = None
        self._epochs = _EpochEnds()
        self.add_callback(self._epochs)
        if args.ema_decay:
            self.add_callback(_Averaging(self))

    def last_checkpoint(self) -> str | None:
        """The newest intact checkpoint of the output folder."""
        return newest_whole(self.args.output_dir, self.args.world_size)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """
        As `Trainer.train`. `train_loss` is the mean over all steps of the run, including those before an interruption.

        Raises:
            Stopped: after a signal, with `save_on_signal`.
        """
        on_start = self.args.eval_on_start
        # This was done at the start of the run. Repeating it would fit weights that an uninterrupted run lacks.
        self.args.eval_on_start = on_start and not resume_from_checkpoint
        self._stop.number = 0
        self._losses = _LossSum()
        try:
            with signals_call(self._stop) if self.args.save_on_signal else nullcontext():
                output = super().train(resume_from_checkpoint, *args, **kwargs)
        except Exception as error:
            if not self._stop.number:
                raise
            # The signal also ended another process for which this one was waiting.
            raise Stopped(self._stop.number) from error
        finally:
            self.args.eval_on_start = on_start
        if self._stop.number:
            raise Stopped(self._stop.number)
        return output._replace(training_loss=output.metrics["train_loss"])

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
        # Otherwise each new iterator would draw the seed of its workers from dropout's generator, and an interrupted
        # run creates more iterators.
        inner = getattr(loader, "base_dataloader", loader)
        inner.generator = torch.Generator().manual_seed(args.seed)
        if args.save_on_signal:
            inner.worker_init_fn = partial(outlive_signals, inner.worker_init_fn)
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
            # An optimiser skips parameters without gradients, including their weight decay.
            model.zero_grad(set_to_none=True)
        else:
            self._losses.add(self.guard.loss())
        return grad_norm

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "train_loss" in logs and self._losses.count:
            # Trainer's own value covers only the steps since its start.
            logs["train_loss"] = self._summed_losses() / self._losses.count
        super().log(logs, *args, **kwargs)

    def _summed_losses(self) -> float:
        """Mean over processes, each with the losses of its own part; all processes must call it."""
        total = torch.tensor(self._losses.total, device=self.args.device)
        return self.accelerator.reduce(total, "mean").item()

    def evaluation_weights(self):
        """The context of validation: with the averaged weights during training."""
        if self.averaged is None or not self.is_in_train:
            return nullcontext()
        return self.averaged.applied(self.accelerator.unwrap_model(self.model))

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """
        Logs, saves and evaluates after a step. Trainer calls this again at the end of an epoch. The checkpoint of an
        epoch's last step waits for that second call; otherwise a run resumed from it would never do the epoch's part.
        """
        last = self.control.should_training_stop or self.state.epoch == int(self.state.epoch)
        if last and not self._epochs.ended:
            self._epochs.save_due, self.control.should_save = self.control.should_save, False
            return super()._maybe_log_save_evaluate(*args, **kwargs)
        self.control.should_save |= self._epochs.save_due
        self._epochs.save_due = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.args.save_on_signal and (number := self._stop.agreed(self.args.device)):
            if self._saved_step != self.state.global_step:
                if self.state.best_global_step == self.state.global_step:
                    # An uninterrupted run has no checkpoint of this step.
                    self.state.best_global_step = None
                self._save_checkpoint(self.model_wrapped, None)
            raise Stopped(number)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """
        Trainer writes to the staging folder, and the first process moves the result to its final place. A process that
        cannot write ends all processes, unless the model is sharded: its parts are gathered while they are written.
        """
        args, folder = self.args, Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        best = f"checkpoint-{self.state.best_global_step}" if self.state.best_global_step else None
        # Before any process can have failed.
        self._total_loss = self._summed_losses()
        self._on_first(name, folder, clear_staging)
        self._staging, best_step = folder / STAGING, self.state.best_global_step
        # In a run with a best step, Trainer waits for all processes, but one may have failed.
        self.state.best_global_step = None
        try:
            with failing_together(), writing(name, folder):
                super()._save_checkpoint(model, trial)
        finally:
            self._staging, self.state.best_global_step = None, best_step
        if best is not None and (best == name or (folder / best).is_dir()):
            self.state.best_model_checkpoint = str(folder / best)
        self._on_first(name, folder, partial(self._publish_checkpoint, name))
        self._saved_step = self.state.global_step
        if args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    def _publish_checkpoint(self, name: str, folder: Path) -> None:
        self.state.save_to_json(str(folder / STAGING / name / "trainer_state.json"))
        publish(folder / STAGING / name, folder)
        rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        clear_staging(folder).rmdir()

    def _on_first(self, what: str, folder: Path, write: Callable[[Path], object]) -> None:
        """Lets the first process write `what`; if that fails, all processes end."""

        def decide() -> None:
            with writing(what, folder):
                write(folder)

        on_first_process(decide)

    def save_final(self) -> None:
        """Writes the model and its processor to the output folder, where they appear when they are complete."""
        folder = Path(self.args.output_dir)
        self._on_first("the model", folder, clear_staging)
        with failing_together(), writing("the model", folder):
            self.save_model(str(folder / STAGING / "model"), _internal_call=True)
        self._on_first("the model", folder, self._publish_final)

    @staticmethod
    def _publish_final(folder: Path) -> None:
        publish_model(folder / STAGING / "model", folder)
        clear_staging(folder).rmdir()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer calls this while the checkpoint is still being written.
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save:
            return
        state = {name: kept.state_dict() for name, kept in self._kept().items()}
        state["losses"] = {"total": self._total_loss, "count": self._losses.count}
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
        return {"guard": self.guard, "losses": self._losses, **self.stateful}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore_fitted(resume_from_checkpoint)

    def _restore_fitted(self, checkpoint: str) -> None:
        """Restores the fitted fields of the config from a checkpoint, because mining reads them."""
        if not self.fitted_fields:
            return
        config = self.accelerator.unwrap_model(self.model).config
        saved = type(config).from_pretrained(checkpoint)
        for name in self.fitted_fields:
            setattr(config, name, getattr(saved, name))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if reason := why_broken(best, model_only=True):
            raise ValueError(
                f"the run ends with its best checkpoint {best}, but it is incomplete or damaged ({reason}); restore "
                f"that folder and run the same command again, or train in another output_dir."
            )
        super()._load_best_model()
        self._restore_fitted(best)
        load_averaged(self.accelerator.unwrap_model(self.model), best)
        self.averaged = None

    def load_trained(self, checkpoint: str | os.PathLike) -> dict[str, float]:
        """
        Loads the final weights of a run, the best or the last, from the checkpoint after its last step.

        Returns:
            `train_loss` as in [`train`], if the checkpoint has it.
        """
        losses = torch.load(os.path.join(checkpoint, STATE_FILE), weights_only=True).get("losses")
        metrics = {} if losses is None else {"train_loss": losses["total"] / max(losses["count"], 1)}
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            # Searched beside the last one, because the folder may have moved.
            best = os.path.basename(self.state.best_model_checkpoint)
            self.state.best_model_checkpoint = os.path.join(os.path.dirname(checkpoint), best)
            self._load_best_model()
            return metrics
        self._load_from_checkpoint(str(checkpoint))
        load_averaged(self.accelerator.unwrap_model(self.model), checkpoint)
        return metrics


class _LossSum:
    """Sum of the losses of all updates of the run."""

    def __init__(self):
        self.total, self.count = 0.0, 0

    def add(self, loss: float) -> None:
        self.total += loss
        self.count += 1

    def state_dict(self) -> dict[str, float]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.total, self.count = state["total"], state["count"]


class _EpochEnds(TrainerCallback):
    """Distinguishes the end of a step from the end of an epoch, and holds a checkpoint until the epoch ends."""

    ended = save_due = False

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.ended = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self.ended = True


class _Averaging(TrainerCallback):
    """Averages the weights after each update, and puts the averaged weights into the model at the end."""

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
        # Not if the averaged weights of the best checkpoint are loaded already.
        if self.trainer.averaged is not None:
            self.trainer.averaged.copy_to(self._model())
            self.trainer.averaged = None
