"""Trains a detector with transformers' Trainer; the same command resumes from the last checkpoint."""

import json
import logging
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import Trainer, TrainingArguments
from transformers.integrations import is_tensorboard_available

from data_rice.files import write_atomically
from hub_rice.loading import to_device

from .evaluation import evaluate, import_pycocotools
from .frames import DetectionCollator, load_frames
from .product_detector import LABELS, ProductDetector, build_detector, load_detector

logger = logging.getLogger(__name__)

RECORD = "detector.json"


class _DetectionTrainer(Trainer):
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # RF-DETR's files use its authors' names of weights. from_pretrained converts them. Trainer's own method does
        # not, and would resume from random weights with only a warning.
        model = model or self.model
        model.load_state_dict(type(model).from_pretrained(resume_from_checkpoint).state_dict())


@dataclass(frozen=True)
class DetectorSettings:
    """Settings of a training run.

    Attributes:
        dataset, data_dir, validation_fraction: As `data_rice.load_dataset_view`.
        model: Folder or id of a pretrained detector; a small new one by default.
        image_size: Image size of a new detector, see `build_detector`.
        max_steps, batch_size, learning_rate, weight_decay, warmup_ratio, seed: As usual.

    Raises:
        ValueError: a value is out of its range.
    """

    dataset: str
    data_dir: str | None = None
    validation_fraction: float | None = None
    model: str | None = None
    image_size: int = 64
    max_steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    warmup_ratio: float = 0.05
    seed: int = 0

    def __post_init__(self):
        for name in ("max_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}.")


def train(
    settings: DetectorSettings,
    output_dir: str | os.PathLike,
    *,
    cache_dir: str | None = None,
    num_workers: int = 0,
    save_steps: int = 500,
    device: str | None = None,
) -> dict:
    """
    Trains on the frames of the training split. Then it chooses the threshold and measures the result on the validation
    split, if there is one. An interrupted run resumes with the same weights, optimiser and order of frames, but with
    other augmentations.

    Args:
        settings: Settings of the run.
        output_dir: Folder for checkpoints and the detector, which `ProductDetector.from_pretrained` loads;
            `detector.json` in it holds settings and figures.
        cache_dir: Folder for the cached tables of the data set.
        num_workers: Number of processes that decode.
        save_steps: Steps between checkpoints.
        device: "cpu" uses no GPU; by default CUDA if available.

    Returns:
        The content of `detector.json`.

    Raises:
        FileNotFoundError, ValueError: the data or the detector cannot be loaded, the folder holds another run, the
            device cannot be used, or scipy or pycocotools is missing.
    """
    output_dir = Path(output_dir)
    record = {"settings": asdict(settings), "finished": False}
    former = _read_record(output_dir)
    if former is not None and former["settings"] != record["settings"]:
        name = next(key for key, value in record["settings"].items() if former["settings"].get(key) != value)
        raise ValueError(
            f"{output_dir} holds a detector trained with {name}={former['settings'].get(name)!r}, not "
            f"{record['settings'][name]!r}; choose another output_dir."
        )
    if former is not None and former["finished"]:
        logger.info("The detector in %s is finished, there is nothing to do.", output_dir)
        return former
    _check_packages()
    arguments = _training_arguments(settings, output_dir, num_workers, save_steps, device)
    transformers.set_seed(settings.seed)
    options = {"data_dir": settings.data_dir, "cache_dir": cache_dir}
    options["validation_fraction"] = settings.validation_fraction
    rows = load_frames(settings.dataset, "train", **options)
    model, processor = _start(settings)
    _write_record(output_dir, record)
    trainer = _make_trainer(model, processor, rows, arguments)
    result = trainer.train(resume_from_checkpoint=_last_checkpoint(output_dir))
    record["train_loss"] = result.training_loss
    # Saved first, so that an error in validation does not lose the training.
    trainer.save_model()
    detector = ProductDetector(trainer.accelerator.unwrap_model(model).eval(), processor)
    try:
        validation = load_frames(settings.dataset, "validation", **options)
    except ValueError as error:
        logger.warning("The threshold stays at %g: %s", detector.threshold, error)
    else:
        record["validation"] = evaluate(detector, validation, fit_threshold=True, num_workers=num_workers)
        model.config.score_threshold = record["validation"]["threshold"]
        model.config.save_pretrained(output_dir)
    _write_record(output_dir, record | {"finished": True})
    return record | {"finished": True}


def _start(settings: DetectorSettings):
    if settings.model is None:
        return build_detector(settings.image_size)
    labels = {"id2label": LABELS, "label2id": {name: number for number, name in LABELS.items()}}
    return load_detector(settings.model, **labels, ignore_mismatched_sizes=True)


def _check_packages() -> None:
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        # The losses of transformers use it to match boxes to objects.
        raise ValueError(
            "Training a detector needs scipy; install it: pip install scipy, or -e '.[detector]'."
        ) from None
    import_pycocotools()


def _training_arguments(settings, output_dir, num_workers, save_steps, device) -> TrainingArguments:
    if device is not None:
        to_device(torch.empty(0), device)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=round(settings.warmup_ratio * settings.max_steps),
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        logging_steps=25,
        save_steps=save_steps,
        save_total_limit=1,
        seed=settings.seed,
        dataloader_num_workers=num_workers,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=["tensorboard"] if is_tensorboard_available() else "none",
        use_cpu=device is not None and torch.device(device).type == "cpu",
    )
    if device is not None:
        wanted, used = torch.device(device), arguments.device
        other = wanted.index is not None and (arguments.n_gpu > 1 or wanted.index != (used.index or 0))
        if wanted.type != used.type or other:
            raise ValueError(
                f"--device {device} cannot be used: training runs on {used}; leave it out, or choose GPUs by "
                f"CUDA_VISIBLE_DEVICES."
            )
    return arguments


def _make_trainer(model, processor, rows, arguments: TrainingArguments) -> Trainer:
    # Otherwise Trainer rescales the loss by a label count that detectors do not use.
    model.accepts_loss_kwargs = False
    collator = DetectionCollator(processor, os.path.join(arguments.output_dir, "unreadable_frames.jsonl"))
    return _DetectionTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collator, processing_class=processor
    )


def _last_checkpoint(output_dir: Path) -> str | None:
    """The newest checkpoint with its trainer state, which Trainer writes after the weights."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    whole = [path for path in found if (path / "trainer_state.json").is_file()]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _read_record(output_dir: Path) -> dict | None:
    path = output_dir / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": dict(record["settings"]), "finished": bool(record["finished"]), **record}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove the folder, or choose another output_dir.") from error


def _write_record(output_dir: Path, record: dict) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(output_dir / RECORD, json.dumps(record, indent=2, allow_nan=False) + "\n")
