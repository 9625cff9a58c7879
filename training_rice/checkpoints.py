"""Atomic checkpoints: written to a staging folder, then renamed, and verified before use."""

import json
import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from hub_rice.checkpoint import check_checkpoint

logger = logging.getLogger(__name__)

# Written last, so a folder with this file holds a finished run.
RESULTS_FILE = "train_results.json"
# Below the output folder. Its content is unfinished and is never read.
STAGING = ".unfinished"
# In a checkpoint: size and CRC-32 of each other file.
CHECKSUMS_FILE = "checksums.json"
_STATE_FILE = "trainer_state.json"
# Model and optimiser of a sharded (FSDP) run, as folders of shards or as one file.
_SHARDED = {"model": ("pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"), "optimizer": ("optimizer_0", "optimizer.bin")}


def numbered_checkpoints(folder: str | os.PathLike) -> Iterator[Path]:
    """The folders `checkpoint-<step>` of a run, newest step first; other folders are ignored."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir() and _step_of(path).isdecimal()]
    yield from sorted(found, key=lambda path: int(_step_of(path)), reverse=True)


def holds_checkpoints(folder: str | os.PathLike) -> bool:
    """Whether a folder holds checkpoints of a run, intact or not."""
    return next(numbered_checkpoints(folder), None) is not None


def num_processes(checkpoint: str | os.PathLike) -> int:
    """Number of processes that wrote a checkpoint, by their random states."""
    ranks = [path.stem.removeprefix("rng_state_") for path in Path(checkpoint).glob("rng_state_*.pth")]
    return 1 + max((int(rank) for rank in ranks if rank.isdecimal()), default=0)


def _step_of(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("checkpoint-")


def why_broken(checkpoint: str | os.PathLike, world_size: int | None = None, model_only: bool = False) -> str | None:
    """
    The problem of a training checkpoint with each bad file, or `None` if it is intact. All files are read and compared
    with their checksums.

    Args:
        checkpoint: Folder of the checkpoint.
        world_size: Number of processes whose random states are required; by default those that wrote the checkpoint.
        model_only: Check only the model, not the files for resuming training.
    """
    folder = Path(checkpoint)
    bad = _differing_files(folder)
    sharded = {part: any((folder / name).exists() for name in names) for part, names in _SHARDED.items()}
    archives = [] if model_only else _archives(folder, world_size, sharded["optimizer"])
    for name in [_STATE_FILE, *archives]:
        fault = bad.get(name) or (_state_fault if name == _STATE_FILE else _archive_fault)(folder / name)
        if fault is not None:
            bad[name] = fault
    reasons = [f"{name} {fault}" for name, fault in sorted(bad.items())]
    if not sharded["model"] and not any(name == "config.json" or name.endswith(".safetensors") for name in bad):
        try:
            check_checkpoint(folder)
        except (ValueError, OSError) as error:
            reasons.insert(0, str(error))
    return "; ".join(reasons) or None


def _archives(folder: Path, world_size: int | None, sharded: bool) -> list[str]:
    """Files of torch that are needed to resume training."""
    rng_states = sorted(path.name for path in folder.glob("rng_state*.pth")) or ["rng_state.pth"]
    if world_size is not None and world_size > 1:
        rng_states = [f"rng_state_{rank}.pth" for rank in range(world_size)]
    optional = [path.name for name in ("rice_state.pt", "scaler.pt") for path in folder.glob(name)]
    return [*rng_states, "scheduler.pt", *optional, *([] if sharded else ["optimizer.pt"])]


def _state_fault(path: Path) -> str | None:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(state[name], int) for name in ("global_step", "max_steps")):
            return None
    except FileNotFoundError:
        return "is missing"
    except (ValueError, OSError, KeyError, TypeError):
        pass
    return "is damaged"


def _archive_fault(path: Path) -> str | None:
    """The fault of a file written by torch, a zip archive with its directory at the end; or `None`."""
    if not path.is_file():
        return "is missing"
    try:
        with zipfile.ZipFile(path) as archive:
            return None if archive.testzip() is None else "is damaged"
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return "is cut short or damaged"


def _differing_files(folder: Path) -> dict[str, str]:
    """Files that differ from their checksums, with the problem; empty for a checkpoint without checksums."""
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return {}
    try:
        expected = [(name, entry["bytes"], entry["crc32"]) for name, entry in json.loads(path.read_bytes()).items()]
    except (ValueError, OSError, KeyError, TypeError, AttributeError):
        return {CHECKSUMS_FILE: "is damaged"}
    bad = {}
    for name, size, checksum in expected:
        file = folder / name
        try:
            if not file.is_file():
                bad[name] = "is missing"
            elif file.stat().st_size < size:
                bad[name] = "is cut short"
            elif _crc32(file) != checksum:
                bad[name] = "is damaged"
        except OSError as error:
            bad[name] = f"cannot be read ({error})"
    return bad


def _crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def newest_whole(folder: str | os.PathLike, world_size: int | None = None) -> str | None:
    """The newest intact checkpoint of a run's folder; skipped checkpoints are logged with their bad files."""
    for checkpoint in numbered_checkpoints(folder):
        if (reason := why_broken(checkpoint, world_size)) is None:
            return str(checkpoint)
        logger.warning("Skipping %s: it is incomplete or damaged (%s).", checkpoint, reason)
    return None


def is_trained(checkpoint: str | os.PathLike) -> bool:
    """Whether an intact checkpoint was written after the last step of its run."""
    state = json.loads((Path(checkpoint) / _STATE_FILE).read_text(encoding="utf-8"))
    return state["global_step"] >= state["max_steps"] > 0


def holds_finished_run(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a run's final model and its results, both intact."""
    try:
        json.loads((Path(folder) / RESULTS_FILE).read_text(encoding="utf-8"))
        check_checkpoint(folder)
    except (ValueError, OSError):
        return False
    return True


def clear_staging(folder: str | os.PathLike) -> Path:
    """Empties the staging folder, which may hold the rest of an interrupted checkpoint."""
    staging = Path(folder) / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def publish(checkpoint: Path, folder: str | os.PathLike) -> Path:
    """
    Moves a checkpoint from the staging folder to its final place, after all its files are on the disk. An existing
    checkpoint of that step is replaced.
    """
    checksums = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        name = path.relative_to(checkpoint).as_posix()
        checksums[name] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
    (checkpoint / CHECKSUMS_FILE).write_text(json.dumps(checksums, indent=2) + "\n", encoding="utf-8")
    for path in [*checkpoint.rglob("*"), checkpoint]:
        _sync(path)
    target = Path(folder) / checkpoint.name
    if target.exists():
        target.rename(checkpoint.with_name(f"replaced-{checkpoint.name}"))
    checkpoint.rename(target)
    _sync(Path(folder))
    return target


def publish_model(written: Path, folder: str | os.PathLike) -> None:
    """Moves the files of a model from the staging folder to `folder`, after all of them are on the disk."""
    files = [path for path in written.rglob("*") if path.is_file()]
    for path in files:
        _sync(path)
    for path in files:
        target = Path(folder) / path.relative_to(written)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    _sync(Path(folder))


@contextmanager
def writing(what: str, folder: str | os.PathLike) -> Iterator[None]:
    """
    A context that reports a failed write, such as a full disk, in one sentence, and removes the unfinished files.

    Args:
        what: Name of the written thing, for the message.
        folder: Folder of the run.

    Raises:
        OSError: with the reason, the free space, and the remedy.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # On a full disk torch's archive writer raises a RuntimeError, identified by its place in the code.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        reason = "the disk is full" if isinstance(error, RuntimeError) else " ".join(str(error).split())
        free = shutil.disk_usage(folder).free / 2**30
        shutil.rmtree(Path(folder) / STAGING, ignore_errors=True)
        raise OSError(
            f"{what} could not be written to {folder} ({reason}; {free:.2f} GB were free): make room and run the same "
            f"command again, which resumes from the last intact checkpoint."
        ) from error


def _sync(path: Path) -> None:
    """Syncs a file to the disk, or a folder if its file system supports that."""
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not folder:
            raise


def rotate(folder: str | os.PathLike, limit: int | None, best: str | None) -> None:
    """
    Removes the oldest checkpoints beyond `limit`, but keeps the newest and the best one. A folder is renamed before it
    is deleted, so that an interruption leaves no incomplete checkpoint.
    """
    if limit is None or limit <= 0:
        return
    # By age instead of step, because a run resumed from an earlier checkpoint writes smaller steps than exist.
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
