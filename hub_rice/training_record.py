"""What a run's folder says about its training, in the form that a model card shows."""

import csv
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

ARGUMENTS_FILE, RESULTS_FILE, EMISSIONS_FILE = "train_arguments.json", "train_results.json", "emissions.csv"

# Arguments that say where a run stood on its machine, or what it printed, and not what was trained.
_MACHINE = ("dir", "disable_tqdm", "report_to", "run_name", "dataloader_num_workers", "use_cpu", "local_rank")
_MACHINE_PREFIXES = ("push_to_hub", "hub_", "logging_", "log_", "do_", "resume_", "trackio", "_")
# Shown in any case, since a reader looks for them.
_SHOWN = ("per_device_train_batch_size", "learning_rate", "seed")
_MACHINE_NAMES = ("dataset", "model", "num_processes", "ddp_backend", "project")


def is_local(name: str) -> bool:
    """Whether the name of a model or data set is a path on this machine rather than a plain name or an id."""
    return bool(name) and (os.path.exists(name) or name.count("/") > 1 or name.startswith((".", "/", "~")))


def read_training_record(run_dir: str | os.PathLike | None) -> dict[str, Any]:
    """
    Recipe, cost and origin of a checkpoint, from the files that training leaves in its folder.

    Args:
        run_dir: Folder of a run, or a `checkpoint-*` within one; what it does not hold is not claimed.

    Returns:
        `recipe` (YAML or ""), `training_data`, `datasets`, `base_model` (an id of the Hub or `None`), `num_processes`
        in words, `cost` in words, `emissions` (metadata or `None`), `parts` in words, `has_decoder`.
    """
    folder = Path(run_dir) if run_dir is not None and os.path.isdir(run_dir) else None
    arguments, results, config, emissions = {}, {}, {}, None
    if folder is not None:
        run = _run_folder(folder)
        arguments, config = _read(run / ARGUMENTS_FILE), _read(folder / "config.json")
        results, emissions = _read(run / RESULTS_FILE), _emissions(run / EMISSIONS_FILE)
    origins = [arguments.get(name) for name in ("model_name_or_path", "init_vision_from")]
    data = str(arguments.get("dataset") or "")
    data = Path(data).name if is_local(data) else data
    processes = arguments.get("num_processes", 1)
    return {
        "recipe": recipe(arguments),
        "training_data": data,
        "datasets": [data] if data else [],
        "base_model": next((origin for origin in origins if origin and not is_local(origin)), None),
        "num_processes": "one process" if processes == 1 else f"{processes} processes",
        "cost": _cost(results, emissions),
        "emissions": emissions,
        "parts": _parts(config),
        "has_decoder": bool(config.get("use_decoder", config != {})),
    }


def recipe(arguments: dict[str, Any]) -> str:
    """
    The recipe that repeats a run, as YAML: what train_arguments.json holds and is not transformers' default, without
    the folders and the settings of its machine.
    """
    if not arguments:
        return ""
    defaults = {
        field.name: field.default for field in dataclasses.fields(TrainingArguments) if field.name not in _SHOWN
    }
    kept = {"dataset": Path(arguments["dataset"]).name} if arguments.get("dataset") else {}
    for name, value in arguments.items():
        of_machine = name.endswith(_MACHINE) or name.startswith(_MACHINE_PREFIXES) or name in _MACHINE_NAMES
        of_machine = of_machine or (name.endswith(("_path", "_from")) and is_local(str(value)))
        # transformers keeps settings of its plug-ins in lists and dictionaries, which no recipe names.
        plain = not isinstance(value, (dict, list)) or (value and isinstance(value, list) and name not in defaults)
        if not of_machine and plain and value is not None and _differs(value, defaults.get(name, dataclasses.MISSING)):
            kept[name] = value
    if model := _cleaned(arguments.get("model") or {}):
        kept["model"] = model
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).rstrip()


def _differs(value: Any, default: Any) -> bool:
    default = getattr(default, "value", default)
    return value != default and not (value is False and default is None)


def _cleaned(section: dict) -> dict:
    kept = {name: _cleaned(value) if isinstance(value, dict) else value for name, value in section.items()}
    return {name: value for name, value in kept.items() if not (isinstance(value, str) and is_local(value))}


def trained_on(run_dir: str | os.PathLike | None) -> tuple[str, str | None] | None:
    """Data set and `data_dir` that the run of a checkpoint was given; `None` where its folder does not say."""
    arguments = {} if run_dir is None else _read(_run_folder(Path(run_dir)) / ARGUMENTS_FILE)
    return (arguments["dataset"], arguments.get("data_dir")) if arguments.get("dataset") else None


def _run_folder(checkpoint: Path) -> Path:
    return checkpoint.parent if checkpoint.name.startswith("checkpoint-") else checkpoint


def _read(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no whole JSON file ({error}): train again, or remove it.") from error
    return content if isinstance(content, dict) else {}


def _parts(config: dict) -> str:
    if config.get("model_type") != "rice":
        return ""
    parts = ["contrastive learning (ICL)"]
    if config.get("use_decoder", True):
        parts.append("the pairwise matching decoder (PMD)")
        parts += ["patch feature reconstruction (PFR)"] * bool(config.get("use_reconstruction", True))
    encoder = config.get("vision_config", {}).get("model_type", "")
    return ", ".join(parts) + (f", on a {encoder} encoder" if encoder else "")


def _emissions(path: Path) -> dict | None:
    """The last run of codecarbon's file as the Hub's metadata, which counts grams."""
    if not path.is_file():
        return None
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        last = rows[-1]
        found = {"emissions": round(1000 * float(last["emissions"]), 3), "source": "codecarbon"}
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is no emissions file of codecarbon: remove it, or let codecarbon write it."
        ) from error
    return (
        found | {"training_type": "training"} | ({"hardware_used": last["gpu_model"]} if last.get("gpu_model") else {})
    )


def _cost(results: dict, emissions: dict | None) -> str:
    words = []
    if (seconds := results.get("train_runtime")) is not None:
        minutes = seconds / 60
        words.append(
            f"{minutes:.1f} minutes of training" if minutes < 600 else f"{minutes / 60:.1f} hours of training"
        )
    if emissions is not None:
        words.append(f"{emissions['emissions']:g} g of CO2 equivalent as estimated by codecarbon")
    return ", ".join(words)
