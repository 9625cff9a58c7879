"""Setup of train_rice.py before the first step: data, processor, model, and checks of the output folder."""

import dataclasses
import json
import logging
import math
import os
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase

from data_rice import LazyRows, gallery_scope, load_dataset_view, open_dataset_view
from data_rice.asr_noise import with_noisy_asr
from data_rice.augmentation import ClipAugmentation
from data_rice.collator import RiceCollator
from data_rice.files import write_atomically
from hub_rice.loading import checkpoint_folder, load_processor
from hub_rice.pictures import follow_encoder, resize_to
from hub_rice.repository import hub_errors
from hub_rice.settings import read_config
from modeling_rice import RiceConfig, RiceModel
from processing_rice import RiceProcessor, build_processor

from .arguments import DataArguments, ModelArguments, RiceTrainingArguments
from .checkpoints import (
    RESULTS_FILE,
    holds_checkpoints,
    holds_finished_run,
    newest_whole,
    num_processes,
    why_broken,
)
from .pretrained import start_from
from .text import build_tokenizer, complete_text_settings, load_text_encoder

logger = logging.getLogger(__name__)

ARGUMENTS_FILE = "train_arguments.json"
# Values of resume_from_checkpoint that mean the default.
_NEWEST = (True, "true", "True")
# Values that mean a new run.
_NEVER = (False, "false", "False")
# Arguments that may differ between a run and its continuation.
_FREE_ARGUMENTS = ("resume_from_checkpoint", "output_dir", "logging_steps", "disable_tqdm", "report_to", "run_name")
_FREE_ARGUMENTS += ("save_total_limit", "max_nonfinite_steps", "save_on_signal", "ddp_timeout")
_FREE_ARGUMENTS += ("dataloader_num_workers",)
_FREE_ARGUMENTS += ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_pin_memory")
# Defaults of the trainer.
_CHOSEN_ARGUMENTS = ("metric_for_best_model", "greater_is_better")

# Parts that a run may add to, replace in or leave out of its starting checkpoint, as a whole.
_PARTS = ("decoder", "reconstruction_head", "patch_saliency", "temporal_pooling", "text_model", "text_projection")
_PARTS += ("text_logit_scale", "decoder.title_projection", "decoder.asr_projection", "patch_projection")
_PARTS += ("alignment",)

Validation = tuple[Dataset, Dataset, str]


def check_processes(arguments: RiceTrainingArguments) -> None:
    """Raises `ValueError` if processes are not connected, or if one process has several GPUs."""
    asked = int(os.environ.get("WORLD_SIZE", 1))
    if asked != arguments.world_size:
        raise ValueError(
            f"{asked} processes were started, but this one sees {arguments.world_size}; on CPU start them with "
            f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {asked}."
        )
    if arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "fsdp: the model's temperature is a scalar, which PyTorch's FSDP cannot split, and accelerate cannot "
            "shard on CPU; leave it out and train data parallel, with grad_cache_chunk or "
            "activation_checkpointing if memory is short (docs/scale.md)."
        )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"one process sees {arguments.n_gpu} GPUs, and would split its batch between them; start one "
            f"process per GPU with accelerate launch --num_processes {arguments.n_gpu}, or set CUDA_VISIBLE_DEVICES=0."
        )


def check_frozen(model: ModelArguments, training: RiceTrainingArguments) -> None:
    """Raises `ValueError` if an untrained encoder would be frozen."""
    if training.freeze_vision and model.model_name_or_path is None and model.init_vision_from is None:
        raise ValueError(
            "freeze_vision would keep an encoder with random weights: name a pretrained one with --init_vision_from, "
            "as `rice encoder efficientnet_lite0 --output FOLDER` writes, or a checkpoint with --model_name_or_path."
        )


def load_views(data: DataArguments, training: RiceTrainingArguments) -> tuple[Dataset | LazyRows, Validation | None]:
    """
    The training pairs, and the queries, gallery and scope of validation (`None` if evaluation is off).

    Raises:
        ValueError: there are fewer pairs than a batch, or evaluation is on without a validation split.
    """
    options = {"data_dir": data.data_dir, "cache_dir": data.cache_dir}
    if data.boxes_file is not None:
        options["boxes_file"] = data.boxes_file
    if data.validation_fraction is not None:
        options["validation_fraction"] = data.validation_fraction
    load_pairs = open_dataset_view if data.streaming else load_dataset_view
    pairs = load_pairs(data.dataset, "pairs", "train", **options)
    batch = training.per_device_train_batch_size * training.world_size
    if len(pairs) < batch:
        raise ValueError(
            f"{data.dataset} has {len(pairs)} training pairs, fewer than one batch of {batch}; "
            f"lower per_device_train_batch_size."
        )
    if training.eval_strategy == "no":
        return pairs, None
    if data.validation_boxes_file is not None:
        options["boxes_file"] = data.validation_boxes_file
    try:
        queries = load_dataset_view(data.dataset, "query", "validation", **options)
        gallery = load_dataset_view(data.dataset, "gallery", "validation", **options)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{error} Set eval_strategy to 'no' to train without validation.") from error
    if data.use_text and data.asr_noise > 0:
        queries = with_noisy_asr(queries, data.asr_noise)
    return pairs, (queries, gallery, gallery_scope(data.dataset, data.data_dir))


def read_texts(pairs: Dataset | LazyRows, data: DataArguments) -> list[str]:
    """Titles and ASR of evenly spaced training rows, for the tokenizer."""
    step = max(1, len(pairs) // data.tokenizer_texts)
    if isinstance(pairs, LazyRows):
        rows = pairs.__getitems__(range(0, len(pairs), step))
        texts = [row["title"] for row in rows] + [row["asr"] for row in rows]
    else:
        columns = pairs.select_columns(["title", "asr"])[::step]
        texts = [*columns["title"], *columns["asr"]]
    return [text for text in dict.fromkeys(texts) if text]


def build_model(arguments: ModelArguments, data: DataArguments | None = None) -> RiceModel:
    """
    A model from a RICE checkpoint, or a new model from the recipe's `model` section with optional pretrained encoders.
    Its weights are float32, whatever their saved type. A new text encoder has the data's vocabulary.

    Raises:
        FileNotFoundError: the checkpoint folder does not exist.
        ValueError: a field of the model section is wrong, or cannot be changed for this checkpoint.
    """
    if arguments.model_name_or_path is not None and arguments.init_vision_from is not None:
        raise ValueError("model_name_or_path and init_vision_from both name weights to start from; pass one of them.")
    try:
        model = _build(arguments, complete_text_settings(dict(arguments.model), arguments, data or DataArguments()))
    except StrictDataclassError as error:
        raise ValueError(f"the model section: {' '.join(str(error).split())}") from error
    if arguments.init_text_from is not None:
        load_text_encoder(model, arguments.init_text_from)
    return model


def _build(arguments: ModelArguments, settings: dict) -> RiceModel:
    if arguments.model_name_or_path is not None:
        with hub_errors(arguments.model_name_or_path):
            return _continue_from(arguments.model_name_or_path, settings)
    if arguments.init_vision_from is None:
        return RiceModel(RiceConfig(**settings))
    with hub_errors(arguments.init_vision_from):
        return start_from(arguments.init_vision_from, settings)


def _continue_from(path: str, settings: dict) -> RiceModel:
    """A checkpoint with changed config fields. The decoder or its head may be new, or left out."""
    folder = checkpoint_folder(path)
    former = read_config(folder, path)
    vision = settings.get("vision_config")
    model_type = vision.get("model_type", "clip_vision_model") if isinstance(vision, dict) else None
    if model_type not in (None, former.vision_config.model_type):
        raise ValueError(
            f"the model section's vision_config is a {model_type}, but the encoder of {path} is a "
            f"{former.vision_config.model_type}; leave vision_config out to continue from that checkpoint."
        )
    model, info = RiceModel.from_pretrained(
        folder,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        # The ranking was chosen for the old scores, and is chosen again.
        **{"ranking": None, **settings},
    )
    weights, missing, unexpected = model.state_dict(), set(info["missing_keys"]), set(info["unexpected_keys"])
    unfit = missing | unexpected | {key for key, *_ in info["mismatched_keys"]}
    for part in _PARTS:
        ours, theirs = ({key for key in keys if f"{key}.".startswith(f"{part}.")} for keys in (weights, unexpected))
        # Only a completely missing part is new: a part that lacks a few weights is damaged.
        if ours and ours <= missing:
            logger.info("The %s of %s is new.", part, path)
        elif theirs and not ours:
            logger.info("The %s of %s is left out.", part, path)
        else:
            continue
        unfit -= ours | theirs
    if unfit:
        raise ValueError(
            f"the model section does not fit the weights of {path} (first: {min(unfit)}); leave out its fields that "
            f"change shapes: {', '.join(settings) or 'the checkpoint itself is incomplete'}."
        )
    return model


def choose_attention(model: RiceModel, arguments: ModelArguments, training: RiceTrainingArguments) -> None:
    """
    Sets the attention back end: the requested one, else eager for bf16 on a CPU, where the backward pass of sdpa is
    slow (benchmarks/bench_train_step.py).

    Raises:
        ValueError: the model has no such back end.
    """
    name = arguments.attn_implementation
    if name is None and training.bf16 and training.device.type == "cpu":
        name = "eager"
    if name is None:
        return
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise ValueError(f"attn_implementation {name!r} cannot be used: {' '.join(str(error).split())}") from error


def recomputes(training: RiceTrainingArguments) -> bool:
    """Whether activations are to be recomputed."""
    # transformers has two names for it; older versions have only the second.
    return bool(getattr(training, "activation_checkpointing", None) or training.gradient_checkpointing)


def check_recomputation(model: RiceModel, training: RiceTrainingArguments) -> None:
    """Raises `ValueError` if activations are to be recomputed, but the encoder cannot do it."""
    if recomputes(training) and not model.supports_gradient_checkpointing:
        raise ValueError(
            f"activation_checkpointing: the encoder {model.config.vision_config.model_type!r} cannot recompute its "
            f"activations; leave it out, or set grad_cache_chunk."
        )


def build_rice_processor(
    model: ModelArguments, data: DataArguments, config: RiceConfig, texts: list[str]
) -> RiceProcessor:
    """The checkpoint's processor, or a new one for the encoder, with a tokenizer trained on the data's texts."""
    processor = _start_processor(model, data, config, texts)
    if data.frames_without_box is not None:
        processor.video_processor.frames_without_box = data.frames_without_box
    return processor


def _start_processor(
    model: ModelArguments, data: DataArguments, config: RiceConfig, texts: list[str]
) -> RiceProcessor:
    if model.model_name_or_path is not None:
        with hub_errors(model.model_name_or_path):
            processor = load_processor(checkpoint_folder(model.model_name_or_path), model.model_name_or_path)
        processor.video_processor.num_frames = data.num_frames
        if data.image_size is not None:
            resize_to(processor, config, data.image_size)
        return processor
    layout = config.layout
    image_size = data.image_size or layout.image_size[0]
    tokenizer = build_tokenizer(model, data, config, texts)
    processor = build_processor(
        tokenizer, image_size, config.mask_patch_size_at(image_size), num_frames=data.num_frames
    )
    parts = processor.image_processor, processor.video_processor
    stretched = [part.size for part in parts]
    if model.init_vision_from is not None:
        with hub_errors(model.init_vision_from):
            assumed = follow_encoder(processor, model.init_vision_from, config, data.image_size)
        if assumed:
            logger.warning(assumed)
    elif layout.image_mean is not None:
        for part in parts:
            part.image_mean, part.image_std = layout.image_mean, layout.image_std
    if data.stretch_pictures:
        for part, size in zip(parts, stretched, strict=True):
            part.size, part.do_center_crop, part.default_to_square = size, False, True
        processor.video_processor.patch_size = config.mask_patch_size_at(image_size)
    return processor


def set_token_ids(config: RiceConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Copies the token ids of the tokenizer to the config and its text encoder's config. Trainer sets the latter during
    training, which a run that was interrupted after its last step does not repeat.
    """
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(tokenizer, name)
        setattr(config, name, value)
        if config.text_config is not None and value is not None:
            setattr(config.text_config, name, value)


def build_collators(
    data: DataArguments, processor: RiceProcessor, failure_log: str
) -> tuple[RiceCollator, RiceCollator]:
    """
    The collators for training pairs, and for the queries and gallery of validation.

    Args:
        data: Arguments for sampling, decoding and augmentation, and for boxes and text.
        processor: Processor of the run.
        failure_log: File that lists unreadable training media.
    """
    augmentation = None
    if data.augments:
        augmentation = ClipAugmentation(
            crop_scale=(data.augment_crop, 1.0),
            crop_ratio=ClipAugmentation.crop_ratio if data.augment_crop < 1 else (1.0, 1.0),
            flip=data.augment_flip,
            jitter=data.augment_jitter,
            background=data.augment_background,
            frame_drop=data.augment_frame_drop,
        )
    pairs = RiceCollator(
        processor,
        augmentation=augmentation,
        use_boxes=data.use_boxes,
        num_frames=data.train_num_frames or data.num_frames,
        sampling=data.frame_sampling,
        use_text=data.use_text,
        asr_noise=data.asr_noise,
        failure_log=failure_log,
        decode=data.decode,
        pixels="uint8" if data.decode == "fast" else "float",
    )
    return pairs, RiceCollator(processor, use_boxes=data.use_boxes, use_text=data.use_text)


def find_checkpoint(arguments: RiceTrainingArguments) -> str | None:
    """
    The checkpoint to resume from: the requested one, else the newest intact one of the output folder. With
    `resume_from_checkpoint` false a new run starts, and the folder must not hold a run.

    Raises:
        FileNotFoundError, ValueError: the requested checkpoint is missing, incomplete, damaged or of another number of
            processes, or the folder holds a run.
    """
    asked, folder = arguments.resume_from_checkpoint, arguments.output_dir
    if asked in _NEVER:
        if holds_checkpoints(folder) or (Path(folder) / RESULTS_FILE).is_file():
            raise ValueError(
                f"resume_from_checkpoint is false, but {folder} holds a run; choose another output_dir, or remove "
                f"that folder."
            )
        return None
    if asked not in (None, *_NEWEST):
        if not os.path.isdir(asked):
            raise FileNotFoundError(f"resume_from_checkpoint: there is no folder {asked}.")
        if (former := num_processes(asked)) != arguments.world_size:
            raise ValueError(
                f"resume_from_checkpoint: {asked} was written by {former} process(es), but {arguments.world_size} "
                f"were started, so the run could not continue exactly; start {former}, or begin a new run from its "
                f"weights with model_name_or_path."
            )
        if reason := why_broken(asked, arguments.world_size):
            raise ValueError(
                f"resume_from_checkpoint: {asked} is incomplete or damaged ({reason}); choose an earlier one."
            )
        return asked
    return newest_whole(folder, arguments.world_size)


def is_finished(arguments: RiceTrainingArguments) -> bool:
    """Whether the output folder holds a run's final model and results, and no checkpoint is requested by name."""
    asked = arguments.resume_from_checkpoint
    return asked in (None, *_NEWEST) and holds_finished_run(arguments.output_dir)


def record_arguments(
    model: ModelArguments, data: DataArguments, training: RiceTrainingArguments, resuming: bool
) -> None:
    """
    Writes the arguments into the run's folder, and refuses to resume a run with other arguments.

    Raises:
        ValueError: an argument differs, or is not a number; the message names the first one.
    """
    current = dataclasses.asdict(model) | dataclasses.asdict(data) | training.to_dict()
    current["num_processes"] = training.world_size
    for name, value in current.items():
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{name} must be a number, got nan.")
    # JSON has no infinity, so it is stored as text.
    current = json.loads(json.dumps(current, default=str), parse_constant=str)
    path = Path(training.output_dir) / ARGUMENTS_FILE
    if resuming and path.is_file():
        former = json.loads(path.read_text(encoding="utf-8"))
        for name, value in current.items():
            if name in _FREE_ARGUMENTS or (name in _CHOSEN_ARGUMENTS and value is None):
                continue
            if name in former and former[name] != value:
                raise ValueError(
                    f"{training.output_dir} holds a run with {name}={former[name]!r}, not {value!r}; choose another "
                    f"output_dir, or remove that folder to start again."
                )
    elif training.process_index == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(RESULTS_FILE).unlink(missing_ok=True)
        write_atomically(path, json.dumps(current, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
