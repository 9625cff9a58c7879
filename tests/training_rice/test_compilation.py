"""`torch_compile` of the training arguments: what is compiled, saved and refused."""

import re

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from data_rice.collator import RiceCollator
from training_rice.arguments import RiceTrainingArguments, parse_arguments
from training_rice.trainer import RiceTrainer


@pytest.fixture
def make_trainer(make_model, model_settings, processor, pairs, tmp_path):
    """A function that builds a trainer on an encoder of two layers."""
    model_settings["vision_config"]["num_hidden_layers"] = 2

    def make(folder: str = "run", **overrides) -> RiceTrainer:
        torch.compiler.reset()
        arguments = {"output_dir": str(tmp_path / folder), "use_cpu": True, "report_to": "none", "max_steps": 2}
        arguments |= {"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", **overrides}
        return RiceTrainer(
            model=make_model(),
            args=RiceTrainingArguments(**arguments, disable_tqdm=True),
            train_dataset=pairs,
            data_collator=RiceCollator(processor),
            processing_class=processor,
        )

    return make


def losses(trainer: RiceTrainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def is_compiled(module) -> bool:
    return module._compiled_call_impl is not None


def test_the_blocks_of_the_encoder_are_compiled_and_nothing_else(make_trainer):
    plain, compiled = make_trainer(learning_rate=1e-3), make_trainer(torch_compile_backend="eager", learning_rate=1e-3)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    names = [name for name, module in compiled.model.named_modules() if is_compiled(module)]
    assert len(names) == 2 and all(name.startswith("vision_model.") for name in names)
    # Neither did accelerate wrap the model.
    assert type(compiled.model_wrapped) is type(compiled.model)
    assert AcceleratorState().dynamo_plugin.backend.value == "NO"
    assert "the 2 blocks of the vision encoder are compiled by eager" in compiled.describe()
    assert "compiled" not in plain.describe()


def test_one_set_of_arguments_for_two_trainers(make_trainer, make_model):
    first = make_trainer(torch_compile_backend="eager")
    second = RiceTrainer(make_model(), first.args, first.train_dataset, first.data_collator)
    assert all(any(map(is_compiled, trainer.model.modules())) for trainer in (first, second))


@pytest.mark.parametrize("arguments", [{"grad_cache_chunk": 2}, {"activation_checkpointing": True}, {"bf16": True}])
def test_with_other_arguments(make_trainer, arguments):
    plain = losses(make_trainer(**arguments))
    assert losses(make_trainer(torch_compile_backend="eager", **arguments)) == pytest.approx(plain, rel=1e-5)


def test_checkpoints_and_continuing(make_trainer, tmp_path):
    every = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3, "torch_compile_backend": "eager"}
    whole = make_trainer("whole", max_steps=2, **every)
    whole.train()
    names = load_file(tmp_path / "whole" / "checkpoint-1" / "model.safetensors").keys()
    assert names == whole.model.state_dict().keys() and not any("_orig_mod" in name for name in names)
    continued = make_trainer("continued", max_steps=2, **every)
    continued.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(continued.model.state_dict()[name], weight, rtol=1e-5, atol=1e-5)


def test_as_the_launcher_of_accelerate_asks(make_trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_FULLGRAPH", "true")
    trainer = make_trainer()
    trainer.train()
    assert any(map(is_compiled, trainer.model.vision_model.modules()))
    assert type(trainer.model_wrapped) is type(trainer.model)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--torch_compile_backend inductr", "torch_compile_backend inductr does not exist here: choose .*inductor"),
        ("--torch_compile_backend no", "torch_compile_backend no does not exist here"),
        ("--torch_compile_mode fastest", "torch_compile_mode fastest does not exist here: choose .*, max-autotune"),
        (
            "--torch_compile_backend eager --torch_compile_mode max-autotune",
            "torch_compile_mode max-autotune belongs to the back end inductor, not to eager",
        ),
        (
            "--torch_compile true --freeze_vision true --cache_vision_features true",
            "torch_compile compiles the vision encoder as a whole, which steps with cache_vision_features do not run",
        ),
    ],
)
def test_refused(words, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(["--output_dir", str(tmp_path / "run"), "--use_cpu", "true", *words.split()])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_without_a_compiler(tmp_path):
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(ValueError, match="torch_compile needs a C\\+\\+ compiler on a CPU, .* install g\\+\\+"):
            RiceTrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, torch_compile=True)
