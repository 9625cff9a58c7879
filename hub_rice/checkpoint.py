"""Checks that a checkpoint folder is complete and undamaged, before anything loads it."""

import hashlib
import json
import os
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from packaging.version import InvalidVersion, Version
from safetensors import SafetensorError, safe_open

from data_rice.commands import one_line
from data_rice.parsing import file_sha256, read_json_object

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def may_be_hub_id(path: str) -> bool:
    """Whether a name has the form of a Hub id, such as "someone/rice", and not that of a path."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def check_checkpoint(path: str | os.PathLike, made_by: str = "train_rice.py") -> None:
    """Refuses a folder that is not a complete checkpoint. A Hub id that is not a local folder passes.

    Args:
        path: Folder, or id of a published model.
        made_by: The program that trains such models, for the message.

    Raises:
        FileNotFoundError: if the folder, config.json or the weights are missing.
        ValueError: if a file is damaged or truncated, or `path` is a file.
    """
    path = os.fspath(path)
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{path} is a file: name the folder that holds config.json and the weights.")
        if not may_be_hub_id(path):
            raise FileNotFoundError(f"there is no checkpoint folder {path}: train one with {made_by}.")
        return
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{path} is not a checkpoint, because it has no config.json: name another folder.")
    try:
        read_json_object(folder / "config.json")
        files = weight_files(folder)
    except ValueError as error:
        reason = one_line(error).rstrip(".")
        raise ValueError(f"{path} is an incomplete checkpoint: save it again ({reason}).") from error
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{path} is an incomplete checkpoint: {file.name} is missing, so save it again.")
        try:
            with safe_open(str(file), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is cut short or damaged ({error}): save it again.") from error


def weight_files(folder: str | os.PathLike) -> list[Path]:
    """
    The files from which transformers reads a model's weights, sorted by name: model.safetensors, else the shards in
    its index. Other `*.safetensors` files of the folder, such as an encoded gallery, are not included.

    Raises:
        ValueError: if the index is damaged.
    """
    folder = Path(folder)
    index = folder / _INDEX
    if (folder / _WEIGHTS).is_file() or not index.is_file():
        return [folder / _WEIGHTS]
    shards = read_json_object(index).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) and shards else {None}
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{index}: weight_map does not name the files of the weights: save the model again.")
    return [folder / name for name in sorted(names)]


def check_hashes(folder: str | os.PathLike) -> None:
    """
    Compares weights with the hashes that were saved beside them, as `sha256sum --check` does. A folder without
    hashes passes, and so do weight files that are not listed.

    Raises:
        ValueError: if a file differs from its saved hash.
    """
    from modeling_rice.layout_rice import HASHES

    file = Path(folder) / HASHES
    if not file.is_file():
        return
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    saved = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for path in weight_files(folder):
        if path.name in saved and file_sha256(path) != saved[path.name]:
            raise ValueError(
                f"{path} is not what was saved, since its hash differs from the one in {HASHES}: copy or download it "
                f"again, or remove {HASHES} if you changed the weights yourself."
            )


def saved_by_newer(path: str | os.PathLike) -> str | None:
    """The transformers version that saved a checkpoint (folder or cached id), if newer than the installed one."""
    from transformers import __version__

    path = os.fspath(path)
    config = os.path.join(path, "config.json")
    if not os.path.isdir(path):
        config = try_to_load_from_cache(path, "config.json") if path.count("/") == 1 else None
    if not isinstance(config, str) or not os.path.isfile(config):
        return None
    try:
        version = json.loads(Path(config).read_text(encoding="utf-8")).get("transformers_version")
        return version if version and Version(version) > Version(__version__) else None
    except (ValueError, TypeError, AttributeError, RecursionError, InvalidVersion):
        return None


def weights_fingerprint(path: str | os.PathLike) -> str | None:
    """SHA-256 over the hashes of a folder's `weight_files`; `None` if `path` is not a folder or has no weights."""
    files = weight_files(path) if os.path.isdir(path) else []
    if not files or not all(file.is_file() for file in files):
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(file_sha256(file)))
    return digest.hexdigest()
