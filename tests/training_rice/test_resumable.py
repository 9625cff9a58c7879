"""Killed and continued runs: the same weights bit for bit, from complete checkpoints only."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_rice.augmentation import ClipAugmentation
from data_rice.collator import RiceCollator
from tests.training_rice.texts import TEXT
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
        steps = []

        def die(*_):
            steps.append(None)
            if len(steps) == number:
                kill()

        trainer.model.visual_projection.weight.register_hook(lambda gradient: die())

    return change


def in_save(part: str, number: int):
    """Kills in a part of a checkpoint, the number-th that is written in this process."""

    def change(trainer):
        saves = []
        function = {"optimizer": "_save_optimizer_and_scheduler", "rng": "_save_rng_state"}[part]
        original = getattr(trainer, function)

        def save(folder):
            saves.append(None)
            if len(saves) == number:
                original(folder)
                name = {"optimizer": "optimizer.pt", "rng": "rng_state.pth"}[part]
                path = Path(folder) / name
                path.write_bytes(path.read_bytes()[:100])
                kill()
            original(folder)

        setattr(trainer, function, save)

    return change


class TestKilled:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_same_weights(self, run, tmp_path, workers):
        """Three steps are an epoch: killed in the first, second and third, within steps and within checkpoints."""
        options = {"ema_decay": 0.9, "dataloader_num_workers": workers}
        run("whole", **options)
        where = [in_step(4), in_save("optimizer", 1), in_step(4), in_save("rng", 1), in_step(1)]
        for change in where[:: 2 if workers else 1]:
            assert killed(run, "killed", change, **options)
            assert not (tmp_path / "killed" / "model.safetensors").exists()
        run("killed", **options)
        assert_same_weights(tmp_path / "killed", tmp_path / "whole")
        assert_same_weights(tmp_path / "killed" / "checkpoint-8", tmp_path / "whole" / "checkpoint-8")
        assert_same_weights(tmp_path / "killed" / "checkpoint-8", tmp_path / "whole" / "checkpoint-8", AVERAGED_FILE)

    def test_batch_norms_and_workers_that_stay(self, run, resnet_settings, tmp_path):
        """Another number of workers than before changes nothing either."""
        run("whole", settings=resnet_settings, dataloader_num_workers=1, dataloader_persistent_workers=True)
        assert killed(run, "killed", in_step(6), settings=resnet_settings)
        run("killed", settings=resnet_settings, dataloader_num_workers=2)
        assert_same_weights(tmp_path / "killed", tmp_path / "whole")

    def test_accumulated_steps(self, run, tmp_path):
        options = {"gradient_accumulation_steps": 2, "max_steps": 5, "save_steps": 1}
        run("whole", **options)
        assert killed(run, "killed", in_step(8), **options)
        run("killed", **options)
        assert_same_weights(tmp_path / "killed", tmp_path / "whole")

    def test_half_written_checkpoint_has_no_name(self, run, tmp_path):
        assert killed(run, "killed", in_save("optimizer", 2))
        folder = tmp_path / "killed"
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
        assert (folder / checkpoints.STAGING / "checkpoint-4" / "optimizer.pt").is_file()
        run("killed")
        assert not (folder / checkpoints.STAGING).exists()

    def test_kept_objects(self, run, tmp_path):
        def count(trainer):
            trainer.stateful["counter"] = counter = Counter()
            original = trainer.compute_loss

            def compute_loss(*args, **kwargs):
                counter.rows = counter.rows * 2 + torch.rand(2)
                return original(*args, **kwargs)

            trainer.compute_loss = compute_loss

        def count_and_die(trainer):
            count(trainer)
            in_step(5)(trainer)

        whole = run("whole", count).stateful["counter"].rows
        assert killed(run, "killed", count_and_die)
        assert torch.equal(run("killed", count).stateful["counter"].rows, whole)

    def test_without_data_seeds_the_weights_differ(self, run, tmp_path, monkeypatch):
        """The tests above would notice."""
        from training_rice import randomness

        monkeypatch.setattr(randomness.SeededCollator, "__call__", lambda self, rows: self.collator(rows))
        run("whole")
        assert killed(run, "killed", in_step(4))
        run("killed")
        with pytest.raises(AssertionError):
            assert_same_weights(tmp_path / "killed", tmp_path / "whole")


class TestFitted:
    """Validation fits weights of the text, which the mining of the next steps reads."""

    @pytest.fixture
    def reads(self, model_settings, text_pairs, text_validation):
        """Settings of a model with text, its data, and arguments with a validation that no checkpoint follows."""
        settings = {"text_config": TEXT | {"vocab_size": 400}, "text_score_weight": 0.37, "num_hard_negatives": 1}
        return {
            "settings": model_settings | settings,
            "views": (text_pairs, text_validation),
            "eval_strategy": "steps",
            "eval_steps": 3,
            "ema_decay": 0.5,
        }

    @pytest.mark.parametrize("best", [False, True])
    def test_killed(self, run, reads, tmp_path, best):
        if best:
            reads |= {"load_best_model_at_end": True, "eval_steps": 2}
        run("whole", **reads)
        for change in (in_step(6), in_save("optimizer", 1)):
            assert killed(run, "killed", change, **reads)
        run("killed", **reads)
        for folder in ("", "checkpoint-8"):
            whole, other = tmp_path / "whole" / folder, tmp_path / "killed" / folder
            assert_same_weights(other, whole)
            config = json.loads((whole / "config.json").read_text())
            assert json.loads((other / "config.json").read_text()) == config
            assert config["text_score_weight"] != 0.37 and config["fusion_weight"] > 0

    def test_the_best_checkpoint_restores_its_fitted_weights(self, run, reads, tmp_path, monkeypatch):
        fitted = iter([(0.5, 2.0), (0.9, 3.0), (0.3, 4.0), (0.2, 5.0)])

        def validate(self, prefix):
            score, self.model.config.text_score_weight = next(fitted)
            return {f"{prefix}_fused_R@1": score}

        monkeypatch.setattr(RiceTrainer, "_validate", validate)
        trainer = run("run", **reads | {"load_best_model_at_end": True, "eval_steps": 2})
        assert trainer.model.config.text_score_weight == 3.0

    def test_without_fitted_weights_it_differs(self, run, reads, tmp_path, monkeypatch):
        """The tests above would notice."""
        monkeypatch.setattr(RiceTrainer, "fitted_fields", ())
        run("whole", **reads)
        assert killed(run, "killed", in_step(6), **reads)
        run("killed", **reads)
        with pytest.raises(AssertionError):
            assert_same_weights(tmp_path / "killed", tmp_path / "whole")

    def test_validation_before_the_first_step_is_not_repeated(self, run, reads):
        reads |= {"eval_on_start": True, "eval_steps": 100}
        assert killed(run, "killed", in_step(6), **reads)
        history = run("killed", **reads).state.log_history
        assert [entry["step"] for entry in history if "eval_fused_R@1" in entry] == [0, 8]


class TestEndOfAnEpoch:
    def test_checkpoint_waits_for_the_validation_of_its_epoch(self, run, validation, pairs, tmp_path):
        """Three steps are an epoch; what goes on from its last step must not lack its validation."""
        options = {"views": (pairs, validation), "eval_strategy": "epoch", "save_steps": 3, "max_steps": 7}
        whole = run("whole", **options)
        assert killed(run, "killed", in_step(5), **options)
        resumed = run("killed", **options)
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
    def test_update_is_skipped(self, run, resnet_settings, tmp_path):
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

    def test_count_continues_after_an_interruption(self, run, tmp_path):
        def change(trainer):
            poison(1, 2, 3)(trainer)
            in_step(6)(trainer)

        assert killed(run, "bad", change)
        with pytest.raises(FloatingPointError, match="5 steps in a row, up to step 6"):
            run("bad", poison(0, 1), max_nonfinite_steps=5)

    def test_infinite_gradient_of_a_scaled_loss_is_left_to_the_scaler(self, make_model):
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
