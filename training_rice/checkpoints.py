"""Checkpoints that are whole or not there: written beside their place and renamed into it, looked at before use."""

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

# Written last, so a folder that has it holds a finished run.
RESULTS_FILE = "train_results.json"
# Below the output folder; what is in there was not finished and is never read.
STAGING = ".unfinished"
# In a checkpoint: size and CRC-32 of each other file of it.
CHECKSUMS_FILE = "checksums.json"
_STATE_FILE = "trainer_state.json"
# Model and optimiser of a sharded (FSDP) run, as folders of shards or as one file.
_SHARDED = {"model": ("pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"), "optimizer": ("optimizer_0", "optimizer.bin")}


def numbered_checkpoints(folder: str | os.PathLike) -> Iterator[Path]:
    """The folders `checkpoint-<step>` of a run, newest step first. Other names were put there by somebody else."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir() and _step_of(path).isdecimal()]
    yield from sorted(found, key=lambda path: int(_step_of(path)), reverse=True)


def _step_of(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("checkpoint-")


def why_broken(checkpoint: str | os.PathLike, world_size: int | None = None, model_only: bool = False) -> str | None:
    """
    What is wrong with a training checkpoint, naming each bad file, or `None` when it is whole. All of it is read, and
    compared with the checksums that were written with it.

    Args:
        checkpoint: Its folder.
        world_size: Processes whose random states must be there; by default those of whoever wrote it.
        model_only: Whether it need not be one that training can go on from.
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
    """Files of torch's that training goes on from."""
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
    """Of a file that torch has written: a zip archive, whose directory stands at the end."""
    if not path.is_file():
        return "is missing"
    try:
        with zipfile.ZipFile(path) as archive:
            return None if archive.testzip() is None else "is damaged"
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return "is cut short or damaged"


def _differing_files(folder: Path) -> dict[str, str]:
    """Files that are not as the checksums say, with what is wrong; none for a checkpoint that has no checksums."""
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
    """The newest whole checkpoint of a run's folder; those that are passed over are told, with their bad files."""
    for checkpoint in numbered_checkpoints(folder):
        if (reason := why_broken(checkpoint, world_size)) is None:
            return str(checkpoint)
        logger.warning("Passing over %s: it is half-written or damaged (%s).", checkpoint, reason)
    return None


def is_trained(checkpoint: str | os.PathLike) -> bool:
    """Whether a whole checkpoint was written after the last step of its run."""
    state = json.loads((Path(checkpoint) / _STATE_FILE).read_text(encoding="utf-8"))
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
    """Moves the files of a written model from the staging folder into `folder`, once all of them are on the disk."""
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
    Tells a failure to write, such as a full disk, in one sentence, and removes what was half written.

    Args:
        what: That is written inside, for the message.
        folder: Of the run.

    Raises:
        OSError: with the reason, the room that is left, and what to do.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # What torch's writer of archives raises on a full disk is told from other errors by its place in the code.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        reason = "the disk is full" if isinstance(error, RuntimeError) else " ".join(str(error).split())
        free = shutil.disk_usage(folder).free / 2**30
        shutil.rmtree(Path(folder) / STAGING, ignore_errors=True)
        raise OSError(
            f"{what} could not be written to {folder} ({reason}; {free:.2f} GB were free): make room and run the same "
            f"command again, which goes on from the last whole checkpoint."
        ) from error


def _sync(path: Path) -> None:
    """Brings a file to the disk, and a folder where its file system lets us: some do not open or synchronise one."""
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
