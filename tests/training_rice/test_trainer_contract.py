"""
What our trainers count on in the methods of transformers' Trainer that they override, private ones among them: one
test per method, by its name, on a plain Trainer. One that fails names what a new version of transformers has changed.
"""

import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from training_rice.trainer import RiceTrainer

# Method -> its parameters besides self, which ours take and hand on.
PARAMETERS = {
    "_get_grad_norm": ["model", "grad_norm"],
    "_get_output_dir": ["trial"],
    "_get_train_sampler": ["train_dataset"],
    "_load_best_model": [],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_maybe_log_save_evaluate": None,
    "_prepare_inputs": ["inputs"],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "_save_checkpoint": ["model", "trial"],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "create_optimizer": ["model"],
    "create_scheduler": ["num_training_steps", "optimizer"],
    "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
    "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
    "get_decay_parameter_names": ["model"],
    "get_train_dataloader": [],
    "init_hf_repo": ["token", "private"],
    "log": ["logs", "start_time"],
    "push_to_hub": ["commit_message", "blocking", "token", "revision", "private", "kwargs"],
    "train": ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
}


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.norm = nn.LayerNorm(1)

    def forward(self, x, return_loss: bool = True):
        return {"loss": (self.layer(x) ** 2).mean() + 0 * self.norm(x).mean()}


class Events(TrainerCallback):
    """Callbacks of a training, among the calls that a [`Recorded`] trainer notes."""

    def __init__(self, calls: list):
        for name in ("train_begin", "step_begin", "step_end", "epoch_end", "save", "train_end", "optimizer_step"):
            setattr(self, f"on_{name}", lambda *args, name=name, **kwargs: calls.append((f"on_{name}", None, None)))


class Recorded(Trainer):
    """Notes, in `calls`, the name, arguments and result of each call of the methods above, when it begins and ends."""

    def __init__(self, **kwargs):
        self.calls: list[tuple[str, tuple | None, object]] = []
        super().__init__(**kwargs, callbacks=[Events(self.calls)])

    def names(self, *wanted: str) -> list[str]:
        """Those calls, in the order in which they began."""
        return [name for name, _, _ in self.calls if name in wanted]

    def results(self, wanted: str) -> list:
        return [result for name, _, result in self.calls if name == f"end of {wanted}"]

    def arguments(self, wanted: str) -> list[tuple]:
        return [arguments for name, arguments, _ in self.calls if name == wanted]


def _recorded(name: str):
    original = getattr(Trainer, name)

    def method(self, *args, **kwargs):
        bound = inspect.signature(original).bind(self, *args, **kwargs)
        self.calls.append((name, tuple(bound.arguments.values())[1:], None))
        result = original(self, *args, **kwargs)
        self.calls.append((f"end of {name}", None, result))
        return result

    return method


for _name in PARAMETERS:
    setattr(Recorded, _name, _recorded(_name))


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A function that builds a trainer: three steps of four rows an epoch, four steps, validated and saved by two."""

    def make(folder: Path | None = None, **overrides) -> Recorded:
        torch.manual_seed(0)
        arguments = {
            "output_dir": str(folder or tmp_path_factory.mktemp("contract")),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "load_best_model_at_end": True,
            "remove_unused_columns": False,
            **overrides,
        }
        rows = [{"x": torch.tensor([float(i)])} for i in range(12)]
        arguments = TrainingArguments(**arguments)
        return Recorded(model=Toy(), args=arguments, train_dataset=rows, eval_dataset=rows[:4])

    return make


@pytest.fixture(scope="module")
def trained(make):
    trainer = make()
    trainer.output = trainer.train()
    return trainer


@pytest.fixture(scope="module")
def resumed(make, trained):
    """Trained on from the second of the four steps."""
    folder = Path(trained.args.output_dir)
    trainer = make(folder)
    trainer.output = trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return trainer


def test_each_overridden_method_is_here():
    classes = RiceTrainer.__mro__[: RiceTrainer.__mro__.index(Trainer)]
    ours = {name for one in classes for name in vars(one) if inspect.isfunction(getattr(Trainer, name, None))}
    assert ours - {"__init__"} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    found = list(inspect.signature(getattr(Trainer, name)).parameters)
    # Of the one without a list ours looks at none of them.
    assert found[0] == "self" and found[1:] == (PARAMETERS[name] or found[1:])


def test_train(trained):
    """Its result is a named tuple with the metrics of the end, `train_loss` among them."""
    assert trained.output._fields == ("global_step", "training_loss", "metrics")
    assert trained.output._replace(training_loss=1.0).training_loss == 1.0
    assert trained.output.metrics["train_loss"] == trained.output.training_loss


def test_get_train_dataloader(trained):
    """Called once, with the collator of that moment; its inner loader takes a generator and an initialiser."""
    assert trained.names("get_train_dataloader", "on_train_begin") == ["get_train_dataloader", "on_train_begin"]
    (loader,) = trained.results("get_train_dataloader")
    inner = getattr(loader, "base_dataloader", loader)
    assert inner.collate_fn is trained.data_collator
    inner.generator, inner.worker_init_fn = torch.Generator().manual_seed(1), print
    assert next(iter(loader))["x"].shape == (4, 1)


def test_get_train_sampler(make):
    """What it returns is cut into batches in its order."""
    trainer = make()
    trainer._get_train_sampler = lambda train_dataset=None: list(range(11, -1, -1))
    assert next(iter(trainer.get_train_dataloader()))["x"].flatten().tolist() == [11, 10, 9, 8]


def test_create_optimizer_and_scheduler(trained, make):
    """The optimiser comes before the schedule and is kept where there is one; both are asked for once."""
    assert trained.names("create_optimizer", "create_scheduler") == ["create_optimizer", "create_scheduler"]
    assert trained.arguments("create_scheduler")[0][0] == 4
    trainer = make()
    trainer.optimizer = own = torch.optim.SGD(trainer.model.parameters(), lr=0.5)
    assert trainer.create_optimizer() is own
    trainer.lr_scheduler = schedule = torch.optim.lr_scheduler.ConstantLR(own)
    assert trainer.create_scheduler(4, own) is schedule


def test_get_decay_parameter_names(make):
    """Decides which parameters decay."""
    trainer = make(weight_decay=0.1)
    trainer.get_decay_parameter_names = lambda model: ["norm.weight"]
    decayed = [group["params"] for group in trainer.create_optimizer().param_groups if group["weight_decay"] == 0.1]
    assert len(decayed) == 1 and decayed[0][0] is trainer.model.norm.weight and len(decayed[0]) == 1


def test_get_batch_samples(trained, make):
    """Once per update, before it, for as many batches as are accumulated."""
    assert trained.names("get_batch_samples", "on_step_begin")[:4] == ["get_batch_samples", "on_step_begin"] * 2
    assert [len(batches) for batches, _ in trained.results("get_batch_samples")] == [1] * 4
    accumulated = make(gradient_accumulation_steps=2, max_steps=2)
    accumulated.train()
    assert [len(batches) for batches, _ in accumulated.results("get_batch_samples")] == [2, 1]


def test_training_step(trained, make):
    """Once per batch; prepares the batch, computes the loss, and returns it divided by the accumulated steps."""
    order = ("training_step", "_prepare_inputs", "compute_loss", "_get_grad_norm", "on_optimizer_step")
    assert trained.names(*order)[:5] == list(order)
    # Validation asks for the outputs too.
    losses = [loss for loss in trained.results("compute_loss") if isinstance(loss, torch.Tensor)]
    for step, loss in zip(trained.results("training_step"), losses, strict=True):
        assert step == loss and not step.requires_grad
    accumulated = make(gradient_accumulation_steps=2, max_steps=1, eval_strategy="no", load_best_model_at_end=False)
    accumulated.train()
    assert accumulated.results("training_step") == [loss / 2 for loss in accumulated.results("compute_loss")]


def test_prepare_inputs(make):
    """What it returns is what the loss is computed from."""
    trainer = make(max_steps=1, eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
    trainer._prepare_inputs = lambda inputs: {"x": torch.full((4, 1), 7.0)}
    trainer.train()
    assert trainer.arguments("compute_loss")[0][1]["x"].flatten().tolist() == [7.0] * 4


def test_compute_loss(make):
    """What it returns is what is differentiated."""
    trainer = make(max_steps=1, eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
    trainer.compute_loss = lambda model, inputs, **_: 3 * model.layer.bias.sum()
    before = trainer.model.layer.weight.clone()
    trainer.train()
    assert trainer.arguments("_get_grad_norm")[0][1] == pytest.approx(3.0)
    assert torch.equal(trainer.model.layer.weight, before)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_get_grad_norm(make, max_grad_norm):
    """Once per update, after the backward passes; without gradients afterwards the update changes nothing."""
    trainer = make(max_grad_norm=max_grad_norm, weight_decay=0.1, learning_rate=1.0, max_steps=2)
    inner = trainer._get_grad_norm

    def left_out(model, grad_norm=None):
        assert all(parameter.grad is not None for parameter in model.layer.parameters())
        norm = inner(model, grad_norm=grad_norm)
        assert torch.isfinite(torch.as_tensor(norm))
        model.zero_grad(set_to_none=True)
        return norm

    trainer._get_grad_norm = left_out
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert len(trainer.results("_get_grad_norm")) == 2
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_maybe_log_save_evaluate(trained):
    """After each step and once more after each epoch, the second of which broke off after its first step here."""
    after_step = ["on_step_end", "_maybe_log_save_evaluate"]
    after_epoch = ["on_epoch_end", "_maybe_log_save_evaluate"]
    expected = [*after_step * 3, *after_epoch, *after_step, *after_epoch]
    assert trained.names("on_step_end", "on_epoch_end", "_maybe_log_save_evaluate") == expected
    order = ("_maybe_log_save_evaluate", "log", "evaluate", "_save_checkpoint", "on_save")
    # The second log is that of the validation.
    expected = [*order[:1] * 2, "log", "evaluate", "log", "_save_checkpoint", "on_save"]
    assert trained.names(*order)[:7] == expected


def test_maybe_log_save_evaluate_does_what_control_says(make):
    """A checkpoint that is not asked for is not written."""
    trainer = make()
    inner = trainer._maybe_log_save_evaluate

    def without_saving(*args, **kwargs):
        trainer.control.should_save = False
        inner(*args, **kwargs)

    trainer._maybe_log_save_evaluate = without_saving
    trainer.args.load_best_model_at_end = False
    trainer.train()
    assert trainer.names("evaluate") and not trainer.names("_save_checkpoint")


def test_evaluate(trained):
    """Its result decides which step is the best."""
    results = [metrics["eval_loss"] for metrics in trained.results("evaluate")]
    assert len(results) == 2
    assert trained.state.best_metric == min(results)
    assert trained.state.best_global_step == 2 * (1 + results.index(min(results)))


def test_save_checkpoint_and_get_output_dir(make, tmp_path):
    """All of a checkpoint lies below the folder that `_get_output_dir` names at that time."""
    trainer = make(load_best_model_at_end=False, max_steps=2)
    trainer._get_output_dir = lambda trial: str(tmp_path / "elsewhere")
    trainer.train()
    (folder,) = (tmp_path / "elsewhere").iterdir()
    assert folder.name == "checkpoint-2" and not list(Path(trainer.args.output_dir).glob("checkpoint-*"))
    names = {path.name for path in folder.iterdir()}
    assert names >= {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    state = json.loads((folder / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"]) == (2, 2)


def test_save_optimizer_and_scheduler(trained):
    """Within the writing of a checkpoint, with its folder, by when there is one."""
    order = ("_save_checkpoint", "_save_optimizer_and_scheduler", "end of _save_checkpoint")
    assert trained.names(*order) == list(order) * 2
    expected = [(f"{trained.args.output_dir}/checkpoint-{step}",) for step in (2, 4)]
    assert trained.arguments("_save_optimizer_and_scheduler") == expected


def test_load_from_checkpoint_and_load_optimizer_and_scheduler(resumed):
    """Weights, then the optimiser's state, both before training begins."""
    order = ("_load_from_checkpoint", "create_optimizer", "_load_optimizer_and_scheduler", "on_train_begin")
    assert resumed.names(*order) == list(order)
    checkpoint = f"{resumed.args.output_dir}/checkpoint-2"
    assert resumed.arguments("_load_from_checkpoint")[0][0] == checkpoint
    assert resumed.arguments("_load_optimizer_and_scheduler") == [(checkpoint,)]
    assert resumed.output.global_step == 4 and len(resumed.results("training_step")) == 2


def test_load_best_model(trained):
    """After the last checkpoint and before the end of training, with the best checkpoint's name in the state."""
    order = ("_save_checkpoint", "_load_best_model", "on_train_end")
    assert trained.names(*order)[1:] == list(order)
    best = f"{trained.args.output_dir}/checkpoint-{trained.state.best_global_step}"
    assert trained.state.best_model_checkpoint == best


def test_log(trained):
    """The mean loss since the last log; at the end `train_loss`, in the very metrics that `train` returns."""
    logs = [logs for logs, *_ in trained.arguments("log")]
    losses = [loss.item() for loss in trained.results("training_step")]
    means = [logs["loss"] for logs in logs if "loss" in logs]
    assert means == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2])
    assert logs[-1] is trained.output.metrics


def test_push_from_checkpoint(make, monkeypatch):
    """Within the writing of a checkpoint, with its folder, where pushing is asked for."""
    pushed = []
    for name in ("init_hf_repo", "_finish_current_push"):
        monkeypatch.setattr(Recorded, name, lambda self, *args, **kwargs: None)
    monkeypatch.setattr(Recorded, "_push_from_checkpoint", lambda self, folder: pushed.append(folder))
    trainer = make(push_to_hub=True, max_steps=2, load_best_model_at_end=False)
    trainer.train()
    assert pushed == [f"{trainer.args.output_dir}/checkpoint-2"]


def test_init_hf_repo(make, monkeypatch):
    """Called at construction, without arguments, where pushing is asked for."""
    calls = []
    monkeypatch.setattr(Recorded, "init_hf_repo", lambda self, *args, **kwargs: calls.append((args, kwargs)))
    make()
    assert calls == []
    make(push_to_hub=True)
    assert calls == [((), {})]


def test_push_to_hub(make, monkeypatch):
    """Trainer itself calls it when a user saves the model, and not for the checkpoints of a run."""
    calls = []
    monkeypatch.setattr(Recorded, "init_hf_repo", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(Recorded, "push_to_hub", lambda self, *args, **kwargs: calls.append(sorted(kwargs)))
    trainer = make(push_to_hub=True)
    trainer.save_model(trainer.args.output_dir, _internal_call=True)
    assert calls == []
    trainer.save_model(trainer.args.output_dir)
    assert calls == [["commit_message", "revision"]]
