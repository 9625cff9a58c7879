"""Test session set-up: no network, no files outside temporary folders, two cores, fixed seeds."""

import atexit
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def _isolate_session() -> None:
    """Set the environment that the libraries read on import, and that subprocesses of tests inherit."""
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_EVALUATE_CACHE", "HF_METRICS_CACHE"):
        os.environ.pop(name, None)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["HF_EVALUATE_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="rice-tests-")
        atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
    else:
        # A worker inherits the session's folder; one of its own in there keeps it from racing for the module cache.
        os.environ["HF_HOME"] = os.path.join(os.environ["HF_HOME"], worker)
    num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    os.environ["OMP_NUM_THREADS"] = str(max(1, 2 // num_workers))


_isolate_session()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python, NumPy and torch alike before each test, so that a failure repeats when its test runs alone."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def one_thread():
    """Operations this small are slower on several threads, a hundredfold where the cores are busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _reference_folder(*places: str, holding: str) -> Path:
    """The first of the places within RICE_REFERENCE_DIR that holds a file; tests skip where the variable is unset."""
    root = os.environ.get("RICE_REFERENCE_DIR")
    if not root:
        pytest.skip("needs RICE_REFERENCE_DIR, the folder of recorded reference values and real photographs")
    for place in places:
        if (Path(root) / place / holding).is_file():
            return Path(root) / place
    pytest.fail(
        f"RICE_REFERENCE_DIR={root} holds no {holding}; name the folder with reference/ and data/, or unset it"
    )


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Values recorded from both official code bases."""
    return _reference_folder("reference", ".", holding="golden_functions.json")


@pytest.fixture(scope="session")
def groceries_dir() -> Path:
    """Real photographs of groceries in the layout of shop_clips."""
    return _reference_folder("data/grocerystore", "../data/grocerystore", ".", holding="gallery.jsonl")
