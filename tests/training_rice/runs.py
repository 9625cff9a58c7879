"""Results of the tests' trainers."""

import torch

from training_rice.trainer import RiceTrainer


def run(trainer: RiceTrainer) -> tuple[list[float], dict[str, float], dict[str, torch.Tensor]]:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = {name: value for name, value in trainer.evaluate().items() if "R@" in name}
    return losses, metrics, trainer.model.state_dict()
