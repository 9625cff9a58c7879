"""Systems without the modules of Unix: everything can be imported, and functions that need file locks say so."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
WITHOUT = """
import builtins, os, sys

original = builtins.__import__

def import_on_another_system(name, globals=None, *args, **kwargs):
    # Libraries may: on such a system they do without.
    ours = os.path.relpath((globals or {}).get("__file__") or "..").partition(os.sep)[0] not in ("..", ".venv")
    if ours and name in ("fcntl", "resource"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return original(name, globals, *args, **kwargs)

builtins.__import__ = import_on_another_system

import eval_rice, rice_cli, train_rice
import torch
from retrieval_rice.index import GalleryIndex
from training_rice.monitor import peak_memory_gb
from training_rice.run_lock import run_lock
from pathlib import Path

print(peak_memory_gb(torch.device("cpu")))
try:
    with run_lock(Path(sys.argv[1])):
        print("locked")
except OSError as error:
    print(error)
"""


def test_without_the_modules_of_unix(tmp_path):
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "folder")]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    memory, run = ended.stdout.splitlines()[-2:]
    assert memory == "{}"
    assert run.startswith("training locks output_dir with ") and "Linux or macOS" in run
    assert not (tmp_path / "folder").exists()
