"""Arguments of train_rice.py: three dataclasses, read from a YAML recipe and the command line."""

import dataclasses
import math
import os
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import is_tensorboard_available, is_wandb_available

from data_rice.commands import mistakes_end
from data_rice.views import DATASET_NAMES

from .compilation import compile_settings
from .recipe import check_model_fields, read_recipe, suggest, take_model_overrides, to_argv

_DATA_COUNTS = ("num_frames", "train_num_frames", "image_size", "text_length", "vocab_size", "tokenizer_texts")
_AUGMENTATIONS = ("augment_flip", "augment_jitter", "augment_background", "augment_frame_drop")


@dataclass
class ModelArguments:
    """Arguments of the model."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "RICE checkpoint (folder or Hub id) to start from; the model section changes its config."},
    )
    init_vision_from: str | None = field(
        default=None,
        metadata={
            "help": "Vision model, CLIP or SigLIP (folder or Hub id) for the encoder, and for projection and decoder "
            "blocks if they fit; its config replaces model.vision_config."
        },
    )
    init_text_from: str | None = field(
        default=None,
        metadata={
            "help": "Text encoder (folder or Hub id) for titles and ASR, with its weights and its tokenizer, instead "
            "of a new text encoder from model.text_config."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "eager, sdpa or another one of transformers; default: sdpa, but eager for bf16 on a CPU."},
    )
    model: dict | str | None = field(
        default=None,
        metadata={"help": "Fields of RiceConfig, as a YAML mapping in the recipe; one field: --model.NAME VALUE."},
    )


@dataclass
class DataArguments:
    """Arguments of the data."""

    dataset: str = field(
        default="mini_lpr4m",
        metadata={
            "help": f"{DATASET_NAMES}, a folder in one of their layouts, or a data set of "
            "rice publish-dataset: its folder, or its id on the Hub."
        },
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the data set."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder of Arrow tables and cached features."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read training rows on demand, in constant memory, instead of from one table."},
    )
    validation_fraction: float | None = field(
        default=None, metadata={"help": "Share of training livestreams held out for validation (LPR4M layout)."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the resized pictures; default: the encoder's own, else 224."}
    )
    stretch_pictures: bool = field(
        default=False,
        metadata={
            "help": "Stretch pictures to the encoder's square, as published, instead of resizing and cropping them as "
            "for the training of init_vision_from."
        },
    )
    num_frames: int = field(
        default=10, metadata={"help": "Frames per clip at evaluation, and in the saved processor."}
    )
    train_num_frames: int | None = field(
        default=None, metadata={"help": "Frames per clip in training; default: num_frames."}
    )
    frame_sampling: Literal["train", "random", "visible", "train_random_drop", "train_random_drop_full"] = field(
        default="train",
        metadata={
            "help": "Training frames: 'train' is evenly spaced, 'random' draws new ones each time, 'visible' prefers "
            "frames with a box, 'train_random_drop' (older official code) and 'train_random_drop_full' (newer) are "
            "evenly spaced and drop a random part of the end."
        },
    )
    augment_crop: float = field(
        default=1.0, metadata={"help": "Smallest area of the random crop of a clip or image; 1 crops nothing."}
    )
    augment_flip: float = field(default=0.0, metadata={"help": "Probability of mirroring a whole clip or image."})
    augment_jitter: float = field(
        default=0.0, metadata={"help": "Brightness, contrast and saturation change by up to +- this, once per clip."}
    )
    augment_background: float = field(
        default=0.0,
        metadata={"help": "Probability that one colour replaces everything outside the boxes of a training clip."},
    )
    augment_frame_drop: float = field(
        default=0.0, metadata={"help": "Probability that a sampled training frame is dropped; one is always kept."}
    )
    decode: Literal["exact", "fast"] = field(
        default="fast",
        metadata={
            "help": "Decoding of training pictures: 'fast' reads large JPEGs at reduced scale and normalises on the "
            "device, with a mean error of one or two of 255 grey levels; 'exact' is the decoding of evaluation."
        },
    )
    use_boxes: bool = field(
        default=False, metadata={"help": "Intended product detection: mask patches outside the rows' boxes."}
    )
    frames_without_box: Literal["keep", "drop"] | None = field(
        default=None,
        metadata={
            "help": "With use_boxes: frames without a box, in clips that have boxes, are used whole ('keep', as "
            "published) or not at all ('drop'). The processor stores this for evaluation; default: its own setting, "
            "which is 'keep' for a new processor."
        },
    )
    boxes_file: str | None = field(
        default=None,
        metadata={"help": "Box file of a detector (docs/data.md), whose boxes replace those of the data set."},
    )
    validation_boxes_file: str | None = field(
        default=None,
        metadata={
            "help": "With use_boxes: box file for the validation clips only. With a detector's boxes, the best "
            "checkpoint and the weights of the fused score are chosen for that detector."
        },
    )
    use_text: bool = field(
        default=False, metadata={"help": "Give titles and ASR to the model, which needs a text encoder."}
    )
    asr_noise: float = field(
        default=0.0,
        metadata={
            "help": "With use_text: probability that the ASR of a training pair is removed or replaced by another "
            "product's, half of the time each. Validation clips get the same noise, so fitted weights allow for it."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Tokenizer (folder or Hub id) of titles and ASR, instead of one trained on the data set."},
    )
    text_length: int = field(
        default=64,
        metadata={"help": "Tokens per title or ASR; longer titles are cut at the end, longer ASR keeps its middle."},
    )
    vocab_size: int = field(default=2000, metadata={"help": "Vocabulary of the tokenizer trained on the data set."})
    tokenizer_texts: int = field(
        default=20000, metadata={"help": "Number of training rows for training the tokenizer."}
    )

    def __post_init__(self):
        if self.boxes_file is not None and self.streaming:
            raise ValueError("boxes_file needs the data set's table, which streaming does not have; leave one out.")
        if self.validation_boxes_file is not None and not self.use_boxes:
            raise ValueError("validation_boxes_file goes with use_boxes; set both, or leave it out.")
        _check_counts(self, _DATA_COUNTS)
        ranges = {"augment_crop": (0.05, 1.0), "augment_jitter": (0.0, 0.99)}
        for name in ("augment_crop", *_AUGMENTATIONS, "asr_noise"):
            low, high = ranges.get(name, (0.0, 1.0))
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie in {low}..{high}, got {getattr(self, name)}.")

    @property
    def augments(self) -> bool:
        """Whether training pictures are augmented."""
        return self.augment_crop < 1 or any(getattr(self, name) > 0 for name in _AUGMENTATIONS)


@dataclass
class RiceTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments, with RICE's defaults and additional settings."""

    output_dir: str = field(default="runs/rice", metadata={"help": "Folder for checkpoints and the final model."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator reads the rows."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Must stay on: the loss needs equal batches on all processes."}
    )
    hub_private_repo: bool | None = field(
        default=True, metadata={"help": "Whether a repository that push_to_hub creates is private."}
    )
    hub_license: str | None = field(
        default=None,
        metadata={"help": "With push_to_hub: licence of the model; required if that of the training data is unknown."},
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep, including the best."})
    report_to: None | str | list[str] = field(
        default="auto",
        metadata={
            "help": "Loggers besides the screen: 'auto' uses TensorBoard if installed, and wandb if installed with a "
            "key; 'none', or names of transformers."
        },
    )
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "Default: eval_fused_R@1, or eval_embedding_R@1 without a decoder."}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision encoder; default: learning_rate."}
    )
    published_optimizer: bool = field(
        default=False,
        metadata={"help": "BertAdam, with schedule and groups of the older official recipe, instead of optim."},
    )
    layer_decay: float | None = field(
        default=None,
        metadata={"help": "Factor of each encoder layer's learning rate relative to the next layer, e.g. 0.75."},
    )
    freeze_vision: bool = field(default=False, metadata={"help": "Train everything except the vision encoder."})
    unfreeze_last_stage: bool = field(
        default=False,
        metadata={
            "help": "With freeze_vision: still train the encoder's last stage (the last block of a vision "
            "transformer). With cache_vision_features the cache holds the inputs of that stage."
        },
    )
    cache_vision_features: bool = field(
        default=False,
        metadata={
            "help": "With freeze_vision: encode all pictures once before training, and train on the encodings on disk "
            "(below cache_dir); runs with the same encoder and pictures share them."
        },
    )
    cached_views: int = field(
        default=1,
        metadata={
            "help": "With cache_vision_features and augmentations of pictures: number of cached versions of each clip "
            "and image, drawn by the seed; each step draws one of them."
        },
    )
    cached_frames: int = field(
        default=32,
        metadata={
            "help": "With cache_vision_features: maximum number of cached frames of a training clip, evenly spaced; "
            "frame_sampling chooses among them."
        },
    )
    cached_precision: Literal["fp16", "fp32"] = field(
        default="fp16", metadata={"help": "With cache_vision_features: number type in the cache."}
    )
    freeze: list[str] = field(
        default_factory=list,
        metadata={"help": "Names or name prefixes of modules and weights that are not trained."},
    )
    ema_decay: float = field(
        default=0.0,
        metadata={"help": "Evaluate and save the exponential moving average of the weights, e.g. 0.999; 0 is off."},
    )
    profile: bool = field(
        default=False,
        metadata={"help": "Print the time of the parts of a training step after some steps, and save nothing."},
    )
    max_nonfinite_steps: int = field(
        default=10,
        metadata={"help": "Stop after this many steps in a row without a finite loss and gradient; 0 never stops."},
    )
    save_on_signal: bool = field(
        default=False,
        metadata={
            "help": "On Ctrl-C or SIGTERM finish the step and its validation, and write a checkpoint before the run "
            "ends; a second signal ends the run at once."
        },
    )
    batch_sampler: Literal["random", "same_live", "class_balanced"] = field(
        default="random",
        metadata={
            "help": "Rows of a batch: 'random'; 'same_live', of few livestreams with each product once; "
            "'class_balanced', which oversamples rare categories."
        },
    )
    class_balance_alpha: float = field(
        default=0.5,
        metadata={
            "help": "class_balanced: weight of a row is (rows of its category) ** -alpha; 0 changes nothing, with 1 "
            "all categories are equally frequent."
        },
    )
    grad_cache_chunk: int = field(
        default=0,
        metadata={
            "help": "Process each process's batch in chunks of this many pairs, with loss and gradient of the whole "
            "batch in the memory of a chunk (GradCache); 0 is off."
        },
    )
    memory_queue_size: int = field(
        default=0,
        metadata={
            "help": "Number of pairs of past batches that are additional negatives of the contrastive loss, without "
            "gradient; 0 is off."
        },
    )
    eval_max_queries: int | None = field(
        default=None, metadata={"help": "Number of validation queries during training, evenly spaced; default: all."}
    )

    def __post_init__(self):
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay false: the collator reads the rows' own columns.")
        if not self.dataloader_drop_last:
            raise ValueError("dataloader_drop_last must stay true: the loss needs equal batches on all processes.")
        _check_counts(self, ("per_device_train_batch_size", "per_device_eval_batch_size"))
        _check_counts(self, ("cached_views", "cached_frames"))
        if self.cache_vision_features and not self.freeze_vision:
            raise ValueError("cache_vision_features needs an encoder that stays as it is; set freeze_vision too.")
        if self.unfreeze_last_stage and not self.freeze_vision:
            raise ValueError("unfreeze_last_stage goes with freeze_vision; set both, or leave it out.")
        for name in ("cached_views", "cached_frames", "cached_precision"):
            if not self.cache_vision_features and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name} goes with cache_vision_features; set both, or leave it out.")
        for name in ("learning_rate", "vision_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {rate}.")
        if self.output_dir and os.path.isfile(self.output_dir):
            raise ValueError(f"output_dir {self.output_dir} is a file; name a folder.")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in 0..1 (0 excluded), got {self.layer_decay}.")
        if self.layer_decay is not None and self.published_optimizer:
            raise ValueError("layer_decay and published_optimizer both set parameter groups; leave one of them out.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in 0..1 (1 excluded), got {self.ema_decay}.")
        for name in ("grad_cache_chunk", "memory_queue_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        if self.max_nonfinite_steps < 0:
            raise ValueError(f"max_nonfinite_steps must be 0 or more, got {self.max_nonfinite_steps}.")
        if not 0 <= self.class_balance_alpha <= 1:
            raise ValueError(f"class_balance_alpha must lie in 0..1, got {self.class_balance_alpha}.")
        if self.hub_token is not None:
            raise ValueError("hub_token would be written to files of the run: set HF_TOKEN, or run `hf auth login`.")
        if self.hub_strategy not in ("end", "every_save"):
            raise ValueError(
                "hub_strategy must be end or every_save: checkpoints hold pickles, which are not uploaded."
            )
        if self.report_to in (None, "auto", ["auto"]):
            self.report_to = _reporters() or "none"
        if self.profile:
            self.report_to = "none"
        chosen = self.metric_for_best_model, self.greater_is_better
        super().__post_init__()
        if chosen[0] is None:
            # A placeholder for the trainer's choice; TrainingArguments would name a loss, which validation lacks.
            self.metric_for_best_model, self.greater_is_better = chosen
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"
        if compile_settings(self) is not None and self.cache_vision_features:
            raise ValueError(
                "torch_compile compiles the vision encoder as a whole, which steps with cache_vision_features do not "
                "run; leave one of them out."
            )


def _check_counts(arguments: DataArguments | RiceTrainingArguments, names: Sequence[str]) -> None:
    """Refuses numbers below 1; None means the default."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def _reporters() -> list[str]:
    """Loggers that work without asking the user."""
    found = ["tensorboard"] if is_tensorboard_available() else []
    # Without a key it would ask for one, or stop the run if there is no terminal.
    key = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    knows = "WANDB_API_KEY" in os.environ or "WANDB_MODE" in os.environ
    knows = knows or (key.is_file() and "api.wandb.ai" in key.read_text(encoding="utf-8", errors="replace"))
    return found + (["wandb"] if is_wandb_available() and knows else [])


_CLASSES = (ModelArguments, DataArguments, RiceTrainingArguments)


def program_name() -> str:
    """The name of the called program, with which messages start."""
    return sys.argv[0] if sys.argv[0].startswith("rice ") else "train_rice.py"


def parse_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, RiceTrainingArguments]:
    """
    Parses `[recipe.yaml] [--name value ...] [--model.name value ...]`; the command line overrides the recipe.

    Exits with status 2 and one sentence for an unknown key, an unreadable recipe or a value of the wrong kind.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        _CLASSES,
        prog=program_name(),
        usage="%(prog)s [recipe.yaml] [--name value ...] [--model.name value ...]",
        allow_abbrev=False,
    )
    with mistakes_end(parser):
        recipe, source = {}, ""
        if argv and not argv[0].startswith("-"):
            source = argv.pop(0)
            recipe = read_recipe(source, _field_names())
        model = dict(recipe.pop("model", None) or {})
        check_model_fields(model, source)
        argv = take_model_overrides(model, argv)
        check_model_fields(model)
        kinds = {name: hint for cls in _CLASSES for name, hint in typing.get_type_hints(cls).items()}
        model_arguments, data_arguments, training_arguments, unknown = parser.parse_args_into_dataclasses(
            to_argv(recipe, parser, kinds, source) + argv, return_remaining_strings=True
        )
        if unknown:
            name = unknown[0].lstrip("-").partition("=")[0]
            raise ValueError(f"unknown argument {unknown[0]}{suggest(name, _field_names())}")
    model_arguments.model = model
    return model_arguments, data_arguments, training_arguments


def _field_names() -> set[str]:
    return {f.name for cls in _CLASSES for f in dataclasses.fields(cls) if f.init}
