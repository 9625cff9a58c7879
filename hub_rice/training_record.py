"""Reads the training records in a run's folder, for the model card."""

import csv
import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard
from transformers import TrainingArguments

from data_rice.commands import one_line
from data_rice.parsing import is_number, read_json_object
from data_rice.views import MINI_LPR4M_MANIFEST

from .privacy import is_local, last_part, portable, without_paths

ARGUMENTS_FILE, RESULTS_FILE, EMISSIONS_FILE = "train_arguments.json", "train_results.json", "emissions.csv"

# Arguments about the machine and the output of a run, not about what was trained.
_MACHINE = ("dir", "disable_tqdm", "report_to", "run_name", "dataloader_num_workers", "use_cpu", "local_rank")
_MACHINE_PREFIXES = ("push_to_hub", "hub_", "logging_", "log_", "do_", "resume_", "trackio", "_")
# Always shown, even at their default, since readers look for them.
_SHOWN = ("per_device_train_batch_size", "learning_rate", "seed")
_MACHINE_NAMES = ("dataset", "model", "num_processes", "ddp_backend", "project")

_DATA_LICENSES = {"mini_lpr4m": "apache-2.0", "moving_fashion": "cc-by-nc-sa-4.0"}

# The fields that are read, and their kinds.
_KINDS = {
    **dict.fromkeys(("dataset", "data_dir", "model_name_or_path", "init_vision_from"), (str, "a string")),
    "num_processes": (int, "an integer"),
    "model": (dict, "an object"),
    "vision_config": (dict, "an object"),
    "train_runtime": (float, "a number"),
}


def read_training_record(run_dir: str | os.PathLike | None) -> dict[str, Any]:
    """
    Recipe, cost and origin of a checkpoint, from the files that training writes into its folder.

    Args:
        run_dir: Folder of a run, or a `checkpoint-*` within it. Missing files leave their entries empty.

    Returns:
        `recipe` (YAML or ""), `training_data`, `datasets` (ids of the Hub), `license` (of the data, or `None`),
        `base_model` (an id of the Hub or `None`), `num_processes` in words, `cost` in words, `emissions` (metadata or
        `None`), `parts` in words, `has_decoder`, `has_alignment`.

    Raises:
        ValueError: if a file is damaged, or a field has the wrong kind.
    """
    folder = Path(run_dir) if run_dir is not None and os.path.isdir(run_dir) else None
    arguments, results, config, emissions = {}, {}, {}, None
    if folder is not None:
        run = _run_folder(folder)
        arguments, config = _read(run / ARGUMENTS_FILE), _read(folder / "config.json")
        results, emissions = _read(run / RESULTS_FILE), _emissions(run / EMISSIONS_FILE)
    origins = [arguments.get(name) for name in ("model_name_or_path", "init_vision_from")]
    data = arguments.get("dataset") or ""
    data = last_part(data) if is_local(data) else data
    processes = arguments.get("num_processes") or 1
    return {
        "recipe": recipe(arguments),
        "training_data": data,
        "datasets": [data] if data.count("/") == 1 else [],
        "license": data_license(arguments.get("dataset"), arguments.get("data_dir")),
        "base_model": next((origin for origin in origins if origin and not is_local(origin)), None),
        "num_processes": "one process" if processes == 1 else f"{processes} processes",
        "cost": _cost(results, emissions),
        "emissions": emissions,
        "parts": _parts(config, bool(arguments)),
        "has_decoder": bool(config.get("use_decoder", config != {})),
        "has_alignment": config.get("alignment_weight") is not None,
    }


def license_of(run_dir: str | os.PathLike) -> str | None:
    """Licence of the training data of a checkpoint; `None` if unknown."""
    data = trained_on(run_dir)
    return None if data is None else data_license(*data)


def data_license(dataset: str | None, data_dir: str | None) -> str | None:
    """Licence identifier of a data set, if it is known or stated in the README.md of its folder; else `None`."""
    if dataset in _DATA_LICENSES:
        return _DATA_LICENSES[dataset]
    for folder in [Path(name) for name in (data_dir, dataset) if name and os.path.isdir(name)]:
        if (folder / MINI_LPR4M_MANIFEST).is_file():
            return _DATA_LICENSES["mini_lpr4m"]
        if (folder / "README.md").is_file():
            try:
                stated = DatasetCard.load(folder / "README.md", ignore_metadata_errors=True).data.license
            except (ValueError, yaml.YAMLError):
                continue
            if isinstance(stated, str):
                return stated
    return None


def recipe(arguments: dict[str, Any]) -> str:
    """
    The recipe of a run as YAML: the settings of train_arguments.json that differ from transformers' defaults, without
    local folders and machine settings. Other paths are cut to their last part.
    """
    if not arguments:
        return ""
    defaults = {
        field.name: field.default for field in dataclasses.fields(TrainingArguments) if field.name not in _SHOWN
    }
    kept = {"dataset": last_part(arguments["dataset"])} if arguments.get("dataset") else {}
    for name, value in arguments.items():
        of_machine = name.endswith(_MACHINE) or name.startswith(_MACHINE_PREFIXES) or name in _MACHINE_NAMES
        of_machine = of_machine or (name.endswith(("_path", "_from")) and is_local(str(value)))
        # Lists and dictionaries hold plug-in settings of transformers, which do not belong in a recipe.
        plain = not isinstance(value, (dict, list)) or (value and isinstance(value, list) and name not in defaults)
        if not of_machine and plain and value is not None and _differs(value, defaults.get(name, dataclasses.MISSING)):
            kept[name] = value
    if model := _cleaned(arguments.get("model") or {}):
        kept["model"] = model
    return yaml.safe_dump(portable(kept), sort_keys=False, allow_unicode=True).rstrip()


def _differs(value: Any, default: Any) -> bool:
    default = getattr(default, "value", default)
    return value != default and not (value is False and default is None)


def _cleaned(section: dict) -> dict:
    kept = {name: _cleaned(value) if isinstance(value, dict) else value for name, value in section.items()}
    return {name: value for name, value in kept.items() if not (isinstance(value, str) and is_local(value))}


def trained_on(run_dir: str | os.PathLike | None) -> tuple[str, str | None] | None:
    """`dataset` and `data_dir` of a checkpoint's training run; `None` if its folder has no record."""
    arguments = {} if run_dir is None else _read(_run_folder(Path(run_dir)) / ARGUMENTS_FILE)
    return (arguments["dataset"], arguments.get("data_dir")) if arguments.get("dataset") else None


def _run_folder(checkpoint: Path) -> Path:
    return checkpoint.parent if checkpoint.name.startswith("checkpoint-") else checkpoint


def _read(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = read_json_object(path)
    except ValueError as error:
        reason = one_line(error).rstrip(".")
        raise ValueError(f"{path} is not a complete JSON file: train again, or remove it ({reason}).") from error
    for name, (kind, words) in _KINDS.items():
        value = content.get(name)
        fits = is_number(value) if kind is float else isinstance(value, kind) and value is not True
        if value is not None and not fits:
            raise ValueError(f"{path}: {name} is not {words}: train again, or remove it.")
    return content


def _parts(config: dict, has_record: bool) -> str:
    if config.get("model_type") != "rice":
        return ""
    aligns, has_decoder = config.get("alignment_weight") is not None, config.get("use_decoder", True)
    # A model of `rice init` was not trained and has no training record.
    is_trained = has_record or has_decoder or not aligns
    parts = ["contrastive learning (ICL)"] if is_trained else ["embeddings of a pretrained encoder, centred per view"]
    if has_decoder:
        parts.append("the pairwise matching decoder (PMD)")
        parts += ["patch feature reconstruction (PFR)"] * bool(config.get("use_reconstruction", True))
    parts += ["parameter-free cross-view alignment of patches"] * aligns
    encoder = (config.get("vision_config") or {}).get("model_type", "")
    return ", ".join(parts) + (f", on a {encoder} encoder" if encoder else "")


def _emissions(path: Path) -> dict | None:
    """The last row of codecarbon's file as metadata of the Hub, in grams."""
    if not path.is_file():
        return None
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        last = rows[-1]
        gpu = last.get("gpu_model")
        found = {"emissions": round(1000 * float(last["emissions"]), 3), "source": "codecarbon"}
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not an emissions file of codecarbon: remove it, or let codecarbon write it."
        ) from error
    return found | {"training_type": "training"} | ({"hardware_used": without_paths(gpu)} if gpu else {})


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
