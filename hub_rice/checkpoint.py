"""Whether a checkpoint folder is whole and of a known version, told before anything tries to load it."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from packaging.version import InvalidVersion, Version
from safetensors import SafetensorError, safe_open

# What transformers, its Trainer or a training script adds to any model's config.
_GENERIC_SETTINGS = ("auto_map", "custom_pipelines", "quantization_config", "torch_dtype", "tie_word_embeddings")
_GENERIC_SETTINGS += ("use_cache", "loss_type", "num_labels", "gradient_checkpointing")


def check_checkpoint(path: str | os.PathLike, made_by: str = "train_rice.py") -> None:
    """Refuses a folder that is no whole checkpoint; a name that is no folder is left to the Hub.

    Args:
        path: Folder, or id of a published model.
        made_by: The program that trains such models, for the message.

    Raises:
        FileNotFoundError: config.json or the weights are not there.
        ValueError: a file is damaged or cut short.
    """
    path = os.fspath(path)
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{path} is a file: name the folder that holds config.json and the weights.")
        if path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise FileNotFoundError(f"there is no checkpoint folder {path}: train one with {made_by}.")
        return
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{path} is no checkpoint: it has no config.json.")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        index = folder / "model.safetensors.index.json"
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else None
    except (ValueError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is a half-written checkpoint: its JSON cannot be read ({error}).") from error
    for name in sorted(names or {"model.safetensors"}):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{path} is a half-written checkpoint: {name} is missing, so save it again.")
        try:
            with safe_open(str(folder / name), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name} is cut short or damaged ({error}): save it again.") from error


def saved_by_newer(path: str | os.PathLike) -> str | None:
    """The version of transformers that saved a checkpoint (folder or cached id), when it is newer than ours."""
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
    except (ValueError, TypeError, AttributeError, InvalidVersion):
        return None


def check_settings(path: str | os.PathLike, config_class: type) -> None:
    """
    Refuses a checkpoint whose config has settings that are not known here, which would be dropped without a word.

    Args:
        path: Checkpoint folder or id of a published model.
        config_class: A strict transformers configuration; a checkpoint of another model type passes.

    Raises:
        ValueError: naming the first such setting.
    """
    settings, _ = config_class.get_config_dict(path)
    if settings.get("model_type") != config_class.model_type:
        return
    known = {field.name for field in dataclasses.fields(config_class)}.union(
        config_class().to_dict(), _GENERIC_SETTINGS
    )
    unknown = sorted(name for name in settings if name not in known and not name.startswith("_"))
    unknown = [name for name in unknown if not name.endswith("_token_id")]
    if unknown:
        raise ValueError(
            f"{path} was saved by a newer version of this project: its config has the setting {unknown[0]!r}, which "
            f"this one does not know; install the newer version."
        )


def weights_fingerprint(path: str | os.PathLike) -> str | None:
    """SHA-256 over a folder's weight files in order of their names; `None` where `path` is no folder."""
    if not os.path.isdir(path):
        return None
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("*.safetensors")):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
