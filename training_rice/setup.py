"""What train_rice.py needs before the first step: data, processor, model, and a look at what is already there."""

import dataclasses
import json
import logging
import os
from pathlib import Path

from datasets import Dataset
from transformers import AutoModel, PreTrainedTokenizerBase

from data_rice import gallery_scope, load_dataset_view
from evaluation_rice.checkpoint import check_checkpoint
from modeling_rice import RiceConfig, RiceModel
from processing_rice import RiceProcessor, build_processor, train_tokenizer

from .arguments import DataArguments, ModelArguments, RiceTrainingArguments

logger = logging.getLogger(__name__)

ARGUMENTS_FILE = "train_arguments.json"
# What may differ between a run and its continuation.
_FREE_ARGUMENTS = ("resume_from_checkpoint", "logging_steps", "disable_tqdm", "report_to", "run_name", "logging_dir")

Validation = tuple[Dataset, Dataset, str]


def check_processes(arguments: RiceTrainingArguments) -> None:
    """Raises `ValueError` when several processes were started but do not work together."""
    asked = int(os.environ.get("WORLD_SIZE", 1))
    if asked != arguments.world_size:
        raise ValueError(
            f"{asked} processes were started, but this one sees {arguments.world_size}; on CPU start them with "
            f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {asked}."
        )


def load_views(data: DataArguments, training: RiceTrainingArguments) -> tuple[Dataset, Validation | None]:
    """
    The pairs to train on, and queries, gallery and scope to validate on (`None` where evaluation is off).

    Raises:
        ValueError: when there are fewer pairs than a batch, or evaluation is asked for without a validation split.
    """
    options = {"data_dir": data.data_dir, "cache_dir": data.cache_dir}
    if data.validation_fraction is not None:
        options["validation_fraction"] = data.validation_fraction
    pairs = load_dataset_view(data.dataset, "pairs", "train", **options)
    batch = training.per_device_train_batch_size * training.world_size
    if len(pairs) < batch:
        raise ValueError(
            f"{data.dataset} has {len(pairs)} training pairs, fewer than one batch of {batch}; "
            f"lower per_device_train_batch_size."
        )
    if training.eval_strategy == "no":
        return pairs, None
    try:
        queries = load_dataset_view(data.dataset, "queries", "validation", **options)
        gallery = load_dataset_view(data.dataset, "gallery", "validation", **options)
    except ValueError as error:
        raise ValueError(f"{error} Set eval_strategy to 'no' to train without validation.") from error
    return pairs, (queries, gallery, gallery_scope(data.dataset, data.data_dir))


def read_texts(pairs: Dataset, data: DataArguments) -> list[str]:
    """Titles and ASR of evenly spread training rows, for the tokenizer."""
    step = max(1, len(pairs) // data.tokenizer_texts)
    columns = pairs.select_columns(["title", "asr"])[::step]
    return [text for text in dict.fromkeys([*columns["title"], *columns["asr"]]) if text]


def build_model(arguments: ModelArguments) -> RiceModel:
    """
    A model from a RICE checkpoint, or new from the recipe's `model` section, its encoder pretrained where asked for.

    Raises:
        ValueError: for a field of the model section that cannot be changed on a checkpoint.
    """
    settings = dict(arguments.model)
    if arguments.model_name_or_path is not None:
        check_checkpoint(arguments.model_name_or_path)
        return RiceModel.from_pretrained(arguments.model_name_or_path, **settings)
    if arguments.init_vision_from is None:
        return RiceModel(RiceConfig(**settings))
    vision_model = AutoModel.from_pretrained(arguments.init_vision_from)
    vision_model = getattr(vision_model, "vision_model", vision_model)
    settings["vision_config"] = vision_model.config
    model = RiceModel(RiceConfig(**settings))
    model.vision_model.load_state_dict(vision_model.state_dict())
    return model


def build_rice_processor(
    model: ModelArguments, data: DataArguments, config: RiceConfig, texts: list[str]
) -> RiceProcessor:
    """The checkpoint's processor, or a new one that fits the encoder, with a tokenizer trained on the data's texts."""
    if model.model_name_or_path is not None:
        processor = RiceProcessor.from_pretrained(model.model_name_or_path)
        processor.video_processor.num_frames = data.num_frames
        return processor
    vision = config.vision_config
    image_size = data.image_size or getattr(vision, "image_size", None) or 224
    patch_size = getattr(vision, "patch_size", None) or 32
    tokenizer: PreTrainedTokenizerBase = train_tokenizer(texts or ["rice"], vocab_size=data.vocab_size)
    return build_processor(tokenizer, image_size=image_size, patch_size=patch_size, num_frames=data.num_frames)


def find_checkpoint(arguments: RiceTrainingArguments) -> str | None:
    """
    The checkpoint to go on from: the one asked for, else the newest whole one of the output folder.

    Raises:
        FileNotFoundError, ValueError: when the one asked for is missing or half-written.
    """
    asked = arguments.resume_from_checkpoint
    if asked and asked not in (True, "true", "True"):
        if not os.path.isdir(asked):
            raise FileNotFoundError(f"resume_from_checkpoint: there is no folder {asked}.")
        if reason := why_broken(asked):
            raise ValueError(f"resume_from_checkpoint: {asked} is half-written ({reason}); choose an earlier one.")
        return asked
    folder = Path(arguments.output_dir)
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]), reverse=True)
    for checkpoint in checkpoints:
        if reason := why_broken(checkpoint):
            logger.warning("Passing over %s: it is half-written (%s).", checkpoint, reason)
            continue
        return str(checkpoint)
    return None


def why_broken(checkpoint: str | os.PathLike) -> str | None:
    """What is wrong with a training checkpoint, or `None` when it is whole."""
    folder = Path(checkpoint)
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        check_checkpoint(folder)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing" if error.filename else str(error)
    except (ValueError, OSError) as error:
        return str(error)
    missing = [name for name in ("optimizer.pt", "scheduler.pt") if not (folder / name).is_file()]
    return f"{missing[0]} is missing" if missing else None


def record_arguments(
    model: ModelArguments, data: DataArguments, training: RiceTrainingArguments, resuming: bool
) -> None:
    """
    Writes the arguments beside the run, and refuses to go on with a run that was started with others.

    Raises:
        ValueError: naming the first argument that differs.
    """
    current = dataclasses.asdict(model) | dataclasses.asdict(data) | training.to_dict()
    current = json.loads(json.dumps(current, default=str))
    path = Path(training.output_dir) / ARGUMENTS_FILE
    if resuming and path.is_file():
        former = json.loads(path.read_text(encoding="utf-8"))
        for name, value in current.items():
            if name not in _FREE_ARGUMENTS and name in former and former[name] != value:
                raise ValueError(
                    f"{training.output_dir} holds a run with {name}={former[name]!r}, not {value!r}; choose another "
                    f"output_dir, or remove that folder to start anew."
                )
    if training.process_index == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(current, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
