"""A training run of a few dozen clips and its output files, for the tests of the training command."""

import json
import socket
from pathlib import Path

import torch
from safetensors.torch import load_file

import train_rice

REPOSITORY = Path(train_rice.__file__).parent
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8}
TEXT_CONFIG = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
BASE_RECIPE = f"""
dataset: mini_lpr4m
validation_fraction: 0.3
num_frames: 3
train_num_frames: 2
vocab_size: 400
model:
  vision_config: {json.dumps(VISION)}
  projection_dim: 16
  decoder_num_heads: 4
  logit_scale_init_value: 10.0
  matching_scale: 10.0
per_device_train_batch_size: 8
max_steps: 4
learning_rate: 1e-2
logging_steps: 1
save_strategy: steps
save_steps: 2
report_to: none
disable_tqdm: true
use_cpu: true
"""
RECIPE = BASE_RECIPE + "eval_strategy: steps\neval_steps: 2\nload_best_model_at_end: true\n"


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(one, other) -> None:
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def results(folder) -> dict:
    return json.loads((Path(folder) / "train_results.json").read_text())


def history(folder) -> list[dict]:
    """What was logged at each step, from the newest checkpoint."""
    newest = max(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    return [
        entry for entry in json.loads((newest / "trainer_state.json").read_text())["log_history"] if "loss" in entry
    ]


def interrupt(monkeypatch, step: int) -> None:
    """Makes the next run break off in the middle of a step, counted from 1."""
    original, steps = train_rice.RiceTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        steps.append(None)
        if len(steps) == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(train_rice.RiceTrainer, "training_step", training_step)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
