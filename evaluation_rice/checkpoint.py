"""Whether a checkpoint folder is whole, told before anything tries to load it."""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open


def check_checkpoint(path: str | os.PathLike) -> None:
    """Refuses a folder that is no whole checkpoint; a name that is no folder is left to the Hub.

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
            raise FileNotFoundError(f"there is no checkpoint folder {path}: train one with train_rice.py.")
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
