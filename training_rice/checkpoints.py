"""Checkpoints that are whole or not there: written beside their place and renamed into it, looked at before use."""

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from hub_rice.checkpoint import check_checkpoint

# Written last, so a folder that has it holds a finished run.
RESULTS_FILE = "train_results.json"
# Below the output folder; what is in there was not finished and is never read.
STAGING = ".unfinished"
# Model and optimiser of a sharded (FSDP) run, as folders of shards or as one file.
_SHARDED = {"model": ("pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"), "optimizer": ("optimizer_0", "optimizer.bin")}


def numbered_checkpoints(folder: str | os.PathLike) -> Iterator[Path]:
    """The folders `checkpoint-<step>` of a run, newest step first. Other names were put there by somebody else."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir() and _step_of(path).isdecimal()]
    yield from sorted(found, key=lambda path: int(_step_of(path)), reverse=True)


def _step_of(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("checkpoint-")


def why_broken(checkpoint: str | os.PathLike, world_size: int | None = None) -> str | None:
    """
    What is wrong with a training checkpoint, or `None` when it is whole.

    Args:
        checkpoint: Its folder.
        world_size: Processes whose random states must be there; by default those of whoever wrote it.
    """
    folder = Path(checkpoint)
    sharded = {part: any((folder / name).exists() for name in names) for part, names in _SHARDED.items()}
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        if not sharded["model"]:
            check_checkpoint(folder)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing" if error.filename else str(error)
    except (ValueError, OSError) as error:
        return str(error)
    rng_states = sorted(path.name for path in folder.glob("rng_state*.pth"))
    if world_size is not None and world_size > 1:
        rng_states = [f"rng_state_{rank}.pth" for rank in range(world_size)]
    names = [*(rng_states or ["rng_state.pth"]), "scheduler.pt", *([] if sharded["optimizer"] else ["optimizer.pt"])]
    names += [path.name for path in folder.glob("rice_state.pt")]
    for name in names:
        if not (folder / name).is_file():
            return f"{name} is missing"
        # torch writes zip archives, whose directory stands at the end.
        if not zipfile.is_zipfile(folder / name):
            return f"{name} is cut short"
    return None


def is_trained(checkpoint: str | os.PathLike) -> bool:
    """Whether a whole checkpoint was written after the last step of its run."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"] >= state["max_steps"] > 0


def holds_finished_run(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a run's final model and its results, both whole."""
    try:
        json.loads((Path(folder) / RESULTS_FILE).read_text(encoding="utf-8"))
        check_checkpoint(folder)
    except (ValueError, OSError):
        return False
    return True


def clear_staging(folder: str | os.PathLike) -> Path:
    """Empties the place where the next checkpoint is written, of what an interruption has left there."""
    staging = Path(folder) / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def publish(checkpoint: Path, folder: str | os.PathLike) -> Path:
    """
    Moves a written checkpoint from the staging folder to its place, once everything of it is on the disk; a checkpoint
    of that step which is there already is replaced.
    """
    for path in [*checkpoint.rglob("*"), checkpoint]:
        _sync(path)
    target = Path(folder) / checkpoint.name
    if target.exists():
        target.rename(checkpoint.with_name(f"replaced-{checkpoint.name}"))
    checkpoint.rename(target)
    _sync(Path(folder))
    return target


def _sync(path: Path) -> None:
    # A folder is opened and synchronised as a file is; not every file system lets us.
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def rotate(folder: str | os.PathLike, limit: int | None, best: str | None) -> None:
    """
    Removes the oldest checkpoints beyond `limit`, but neither the newest nor the best one. A folder is renamed before
    it is emptied, so that an interruption leaves no half of it under its name.
    """
    if limit is None or limit <= 0:
        return
    # By age and not by step: a run that went back to an earlier checkpoint writes smaller steps than it finds.
    checkpoints = sorted(numbered_checkpoints(folder), key=lambda path: (path.stat().st_mtime, int(_step_of(path))))
    keep = {path.name for path in checkpoints[-1:]}
    if best is not None:
        keep.add(Path(best).name)
    removable = [path for path in checkpoints if path.name not in keep]
    for path in removable[: max(0, len(checkpoints) - max(limit, len(keep)))]:
        doomed = Path(folder) / STAGING / f"old-{path.name}"
        doomed.parent.mkdir(exist_ok=True)
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
