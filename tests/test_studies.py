"""The study files of configs/: every arm's command is one that the scripts take."""

from pathlib import Path

import pytest

import eval_rice
from evaluation_rice.study.cells import cells_of
from evaluation_rice.study.definition import read_study
from modeling_rice import RiceConfig
from training_rice.arguments import parse_arguments

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STUDIES = [path for path in sorted(CONFIGS.glob("*.yaml")) if "\narms:" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_command_of_a_study_is_understood(path, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    study = read_study(path)
    for cell in cells_of(study, tmp_path).values():
        for command in cell.commands:
            if command[0] == "eval_rice.py":
                eval_rice.parse_arguments(command[1:])
                continue
            model, _, training = parse_arguments([*command[1:], "--report_to", "none", "--use_cpu", "true"])
            # The default is 3 epochs, without a limit of steps.
            assert max(training.max_steps, training.num_train_epochs) > 3
            RiceConfig(**model.model)
