"""Runs that are killed and go on: the same weights to the bit, from whole checkpoints only."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_rice.augmentation import ClipAugmentation
from data_rice.collator import RiceCollator
from training_rice import checkpoints
from training_rice.arguments import RiceTrainingArguments
from training_rice.averaging import AVERAGED_FILE
from training_rice.guard import UpdateGuard
from training_rice.setup import find_checkpoint
from training_rice.trainer import RiceTrainer


class Counter:
    """Something with a state, such as a queue of former batches."""

    def __init__(self):
        self.rows = torch.zeros(2)

    def state_dict(self):
        return {"rows": self.rows}

    def load_state_dict(self, state):
        self.rows = state["rows"]


@pytest.fixture
def run(make_model, processor, pairs, tmp_path):
    """A function that trains in a folder, going on from what is there; everything that draws numbers is on."""

    def run(name: str, change=None, settings: dict | None = None, views=None, **overrides) -> RiceTrainer:
        arguments = {
            "output_dir": str(tmp_path / name),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "per_device_train_batch_size": 4,
            "max_steps": 8,
            "save_steps": 2,
            "save_strategy": "steps",
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "seed": 3,
            **overrides,
        }
        arguments = RiceTrainingArguments(**arguments)
        checkpoint = find_checkpoint(arguments)
        torch.manual_seed(arguments.seed)
        trainer = RiceTrainer(
            model=make_model(settings, decoder_dropout=0.1),
            args=arguments,
            train_dataset=views[0] if views else pairs,
            eval_dataset=views[1] if views else None,
            data_collator=RiceCollator(
                processor, num_frames=1, sampling="random", augmentation=ClipAugmentation(), use_text=views is not None
            ),
            processing_class=processor,
        )
        if change:
            change(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        return trainer

    return run


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(function, *args, **kwargs) -> bool:
    """Runs a function in a process of its own; whether that was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*args, **kwargs)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def assert_same_weights(one: Path, other: Path, name: str = "model.safetensors") -> None:
    one, other = load_file(one / name), load_file(other / name)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def in_step(number: int):
    """Kills during the backward pass of a step, counted from 1 in this process."""

    def change(trainer):
        steps = [
            [entry["step"] for entry in one.state.log_history if "eval_fused_R@1" in entry] for one in (whole, resumed)
        ]
        assert steps[0] == steps[1] == [3, 6, 7]
        assert_same_weights(tmp_path / "killed", tmp_path / "whole")


def test_train_loss_is_of_all_steps(run):
    """Also of those that were logged together across the interruption; a step that was left out does not count."""
    options = {"logging_steps": 3, "max_steps": 7}
    whole = run("whole", poison(1), logging_steps=1, max_steps=7)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    del losses[1]

    def poison_and_die(trainer):
        poison(1)(trainer)
        in_step(6)(trainer)

    assert killed(run, "killed", poison_and_die, **options)
    resumed = run("killed", **options)
    (entry,) = [entry for entry in resumed.state.log_history if "train_loss" in entry]
    assert entry["train_loss"] == pytest.approx(sum(losses) / 6, rel=1e-4)
    assert resumed.load_trained(resumed.last_checkpoint()) == {"train_loss": pytest.approx(entry["train_loss"])}


def poison(*steps: int):
    """Makes the losses of these steps, counted from 0, not finite."""

    def change(trainer):
        calls = []
        original = trainer.compute_loss

        def compute_loss(model, inputs, **kwargs):
            calls.append(None)
            if len(calls) - 1 in steps:
                inputs = inputs | {"pixel_values": inputs["pixel_values"] * float("nan")}
            return original(model, inputs, **kwargs)

        trainer.compute_loss = compute_loss

    return change


class TestNotFinite:
    def test_update_is_left_out(self, run, resnet_settings, tmp_path):
        """Weights, averages and batch norms stay as they were before the step, and the count is logged."""
        options = {"settings": resnet_settings, "save_steps": 1, "save_total_limit": None, "ema_decay": 0.9}
        options |= {"weight_decay": 0.1, "max_steps": 4}
        trainer = run("bad", poison(2), **options)
        folder = tmp_path / "bad"
        for name in ("model.safetensors", AVERAGED_FILE):
            assert_same_weights(folder / "checkpoint-2", folder / "checkpoint-3", name)
        before, after = (load_file(folder / f"checkpoint-{step}" / "model.safetensors") for step in (3, 4))
        assert not torch.equal(before["visual_projection.weight"], after["visual_projection.weight"])
        assert all(value.isfinite().all() for value in after.values())
        counts = [entry["nonfinite_steps"] for entry in trainer.state.log_history if "loss" in entry]
        assert counts == [0, 0, 1, 1]
        assert all(
            entry[name] == entry[name]
            for entry in trainer.state.log_history
            for name in ("loss", "contrastive_loss", "matching_accuracy")
            if name in entry
        )

    def test_stops_after_several_in_a_row(self, run, tmp_path):
        options = {"max_nonfinite_steps": 3}
        with pytest.raises(FloatingPointError) as error:
            run("bad", poison(0, 3, 4, 5), **options)
        checkpoint = tmp_path / "bad" / "checkpoint-4"
        assert "3 steps in a row, up to step 6, had a loss" in str(error.value)
        assert f"the last good checkpoint is {checkpoint}:" in str(error.value)
        assert checkpoints.why_broken(checkpoint) is None

    def test_count_goes_on_after_an_interruption(self, run, tmp_path):
        def change(trainer):
            poison(1, 2, 3)(trainer)
            in_step(6)(trainer)

        assert killed(run, "bad", change)
        with pytest.raises(FloatingPointError, match="5 steps in a row, up to step 6"):
            run("bad", poison(0, 1), max_nonfinite_steps=5)

    def test_infinite_gradient_of_a_scaled_loss_is_the_scalers_business(self, make_model):
        guard = UpdateGuard(make_model(), 10, lambda: None)
        guard.begin()
        guard.see(torch.tensor(1.0))
        assert not guard.refuses(torch.tensor(float("inf")), scaled=True, step=0)
        assert guard.refuses(torch.tensor(float("inf")), scaled=False, step=0)
        guard.see(torch.tensor(float("nan")))
        assert guard.refuses(torch.tensor(1.0), scaled=True, step=0)
        assert (guard.skipped, guard.in_a_row) == (2, 2)

    def test_without_a_limit_it_never_stops(self, make_model):
        guard = UpdateGuard(make_model(), 0, lambda: None)
        guard.begin()
        guard.see(torch.tensor(float("nan")))
        assert all(guard.refuses(None, scaled=False, step=step) for step in range(50))
