"""A mini LPR4M of a few dozen clips, and the training command on it."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import train_rice
from data_rice.mini_lpr4m import render_mini_lpr4m
from tests.train_rice.runs import RECIPE, REPOSITORY


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """Three livestreams with thirty pairs to train on, one with ten queries to validate on, one to test on."""
    folder = tmp_path_factory.mktemp("data") / "mini"
    sizes = {"num_train_lives": 4, "num_test_lives": 1, "products_per_live": 5, "clips_per_product": 2}
    return render_mini_lpr4m(folder, **sizes, num_frames=3, image_size=32, num_workers=1, progress=False)


@pytest.fixture(scope="module")
def command(mini, tmp_path_factory):
    """A function that gives the words of a training command."""
    folder = tmp_path_factory.mktemp("work")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)

    def command(output_dir, *words: str, data_dir=mini) -> list[str]:
        folders = ["--data_dir", str(data_dir), "--cache_dir", str(folder / "cache"), "--output_dir", str(output_dir)]
        return [str(recipe), *folders, *words]

    return command


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """The folder of a run that was not disturbed. Tests copy it before they change anything."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    torch.set_num_threads(1)
    train_rice.main(command(folder))
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copied")


@pytest.fixture
def refusal(command, tmp_path, capsys):
    """A function that returns the one sentence with which a training command ends."""

    def refusal(*words: str, output_dir=None, **options) -> str:
        with pytest.raises(SystemExit) as error:
            train_rice.main(command(output_dir or tmp_path / "refused", *words, **options))
        assert error.value.code == 2
        message = capsys.readouterr().err.rstrip("\n")
        message = message[message.rindex("train_rice.py: error: ") :]
        assert "\n" not in message
        return message

    return refusal


@pytest.fixture(scope="module")
def environment():
    """What a shell has, on a machine whose GPUs are left alone."""
    ours = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return {name: value for name, value in kept.items() if name not in launcher} | ours


@pytest.fixture(scope="module")
def launch(command, environment):
    """A function that runs `accelerate launch train_rice.py` and returns what was printed."""

    def launch(options: list[str], *words, **extra: str) -> str:
        start = [sys.executable, "-m", "accelerate.commands.launch", *options, str(REPOSITORY / "train_rice.py")]
        finished = subprocess.run(
            start + command(*words), env=environment | extra, capture_output=True, text=True, timeout=300
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout + finished.stderr

    return launch
