"""The installed package: the list of packages is complete, and the wheel works without a checkout."""

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = ("--num_train_lives", "9", "--num_test_lives", "1", "--products_per_live", "5", "--clips_per_product", "2")
TWO_STEPS = ("--max_steps", "2", "--use_cpu", "--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none")
TWO_STEPS += ("--load_best_model_at_end", "false", "--per_device_train_batch_size", "8")

ROOMS = sorted(path.parent.name for path in REPOSITORY.glob("*_rice/__init__.py"))


@pytest.fixture(scope="module")
def settings():
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    return parser


def entries(text: str) -> dict[str, str]:
    """Lines of `name = value`, or of a name alone."""
    pairs = [line.partition("=") for line in text.split("\n") if line]
    return {name.strip(): value.strip() for name, _, value in pairs}


def folders(settings) -> dict[str, Path]:
    """Package of the wheel -> its folder here."""
    moved = entries(settings["options"]["package_dir"])

    def folder(name: str) -> Path:
        start = next((start for start in moved if f"{name}.".startswith(f"{start}.")), None)
        path = name if start is None else moved[start] + name.removeprefix(start)
        return REPOSITORY / path.replace(".", "/")

    return {name: folder(name) for name in entries(settings["options"]["packages"])}


def test_the_list_of_packages_is_complete(settings):
    here = set(find_namespace_packages(REPOSITORY, include=[*ROOMS, *(f"{room}.*" for room in ROOMS)]))
    others = {"model_cards", "training_rice.recipes", "evaluation_rice.metrics.livestream_recall"}
    assert set(folders(settings)) == here | others, "packages in setup.cfg"
    assert all(folder.is_dir() for folder in folders(settings).values())
    assert set(entries(settings["options"]["py_modules"])) == {path.stem for path in REPOSITORY.glob("*.py")}


def test_every_file_of_a_package_is_shipped(settings):
    patterns = {name: text.split() for name, text in settings["options.package_data"].items()}
    left_out = []
    for name, folder in folders(settings).items():
        wanted = ["*.py", *patterns["*"], *patterns.get(name, [])]
        files = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".pyc"]
        left_out += [path for path in files if not any(path.match(pattern) for pattern in wanted)]
    assert not left_out
    assert all((REPOSITORY / room / "py.typed").is_file() for room in ROOMS)


def test_metadata(settings):
    assert settings["metadata"]["author"] == "RICE contributors"
    assert entries(settings["metadata"]["project_urls"])["Paper"] == "https://arxiv.org/abs/2308.04912"
    extras = set(settings["options.extras_require"])
    everything = settings["options.extras_require"]["all"].strip().removeprefix("rice-retrieval[").rstrip("]")
    assert set(everything.split(",")) == extras - {"all", "test"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A function that runs a module of the installed wheel in an empty folder: `(status, output)`."""
    work = tmp_path_factory.mktemp("wheel")
    source, site, empty = work / "source", work / "site", work / "empty"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "runs", "data")
    shutil.copytree(REPOSITORY, source, ignore=ignored)
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", work]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(work.glob("rice_retrieval-*.whl"))
    subprocess.run([*pip, "install", "--target", site, "--no-deps", "--no-index", wheel], check=True)
    shutil.rmtree(source)

    def run(*words: str) -> tuple[int, str]:
        # Before what is installed beside the tests, so that none of the repository's own modules is found.
        environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    run.site, run.folder = site, empty
    return run


@pytest.mark.slow
def test_the_wheel_trains_and_evaluates_without_a_checkout(installed):
    where = "import rice_cli, train_rice, eval_rice, training_rice; print(rice_cli.__file__, training_rice.__file__)"
    status, said = installed("-c", where)
    assert status == 0 and said.count(str(installed.site)) == 2
    for words in (["--help"], ["train", "--help"], ["eval", "--help"]):
        assert installed("-m", "rice_cli", *words)[0] == 0
    status, said = installed("-m", "rice_cli", "train", "nothing.yaml")
    assert status == 2 and "one of lpr4m_750k.yaml" in said and "mini_lpr4m.yaml" in said
    status, said = installed("-m", "data_rice.mini_lpr4m", *SMALL, "--num_frames", "3", "--num_workers", "1")
    assert status == 0, said
    status, said = installed("-m", "rice_cli", "train", "configs/mini_lpr4m.yaml", *TWO_STEPS, "--output_dir", "run")
    assert status == 0 and (installed.folder / "run" / "model.safetensors").is_file(), said
    evaluation = ("--model", "run", "--dataset", "mini_lpr4m", "--output_dir", "run/eval", "--num_workers", "0")
    status, said = installed("-m", "rice_cli", "eval", *evaluation)
    assert status == 0 and (installed.folder / "run" / "eval" / "README.md").is_file(), said
