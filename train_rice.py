"""Trains RICE.

    python train_rice.py configs/mini_lpr4m.yaml --output_dir runs/mini
    accelerate launch train_rice.py configs/shop_clips.yaml --data_dir PATH --output_dir runs/shop

A recipe is a flat YAML mapping of the arguments in training_rice/arguments.py plus a `model:` section with fields of
RiceConfig; `--name value` and `--model.name value` override it. Run the same command again to go on from the last
whole checkpoint. The output folder ends up with the model, its processor and the arguments.
"""

import logging
import os
import sys

# Threads that spin while they wait slow each other down many times over as soon as loader workers share the cores
# (measured in docs/LOG.md); the OpenMP runtime reads this when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import transformers

from data_rice.augmentation import ClipAugmentation
from data_rice.collator import RiceCollator, read_failure_log
from training_rice.arguments import parse_arguments
from training_rice.setup import (
    build_model,
    build_rice_processor,
    check_processes,
    find_checkpoint,
    is_finished,
    is_trained,
    load_views,
    read_texts,
    record_arguments,
)
from training_rice.trainer import RiceTrainer

logger = logging.getLogger("train_rice")


def main(argv: list[str] | None = None) -> None:
    model_arguments, data_arguments, training_arguments = parse_arguments(argv)
    is_main = training_arguments.process_index == 0
    logging.basicConfig(format="%(message)s", level=logging.INFO if is_main else logging.ERROR)
    transformers.logging.set_verbosity_warning()
    try:
        train(model_arguments, data_arguments, training_arguments)
    except (ValueError, FileNotFoundError, OSError) as error:
        sys.exit(f"train_rice.py: error: {_sentence(error)}")


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    if "Original Traceback (most recent call last):" in lines:
        # From a loader's worker, with its message last.
        return lines[-1].partition(": ")[2]
    return " ".join(lines)


def train(model_arguments, data_arguments, training_arguments) -> None:
    check_processes(training_arguments)
    checkpoint = find_checkpoint(training_arguments)
    finished = is_finished(training_arguments)
    exists = finished or checkpoint is not None
    record_arguments(model_arguments, data_arguments, training_arguments, resuming=exists)
    if finished:
        logger.info("The run in %s is finished, there is nothing to do.", training_arguments.output_dir)
        return
    transformers.set_seed(training_arguments.seed)

    with training_arguments.main_process_first(desc="building the data tables"):
        pairs, validation = load_views(data_arguments, training_arguments)
    model = build_model(model_arguments)
    processor = build_rice_processor(model_arguments, data_arguments, model.config, read_texts(pairs, data_arguments))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.config, name, getattr(processor.tokenizer, name))
    failure_log = f"{training_arguments.output_dir}/unreadable_media.jsonl"
    augmentation = None
    if data_arguments.augments:
        augmentation = ClipAugmentation(
            crop_scale=(data_arguments.augment_crop, 1.0),
            flip=data_arguments.augment_flip,
            jitter=data_arguments.augment_jitter,
            background=data_arguments.augment_background,
        )
    collator = RiceCollator(
        processor,
        augmentation=augmentation,
        use_boxes=data_arguments.use_boxes,
        num_frames=data_arguments.train_num_frames or data_arguments.num_frames,
        sampling=data_arguments.frame_sampling,
        use_text=data_arguments.use_text,
        failure_log=failure_log,
    )
    trainer = RiceTrainer(
        model=model,
        args=training_arguments,
        train_dataset=pairs,
        eval_dataset=validation,
        data_collator=collator,
        eval_collator=RiceCollator(processor, use_boxes=data_arguments.use_boxes, use_text=data_arguments.use_text),
        processing_class=processor,
    )
    logger.info(trainer.describe())
    if checkpoint is not None:
        logger.info("Going on from %s.", checkpoint)
    metrics = {}
    if checkpoint is not None and is_trained(checkpoint):
        # Trainer would make a step beyond the last one.
        trainer.load_trained(checkpoint)
    else:
        metrics = dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    if validation is not None:
        metrics |= trainer.evaluate()
    # An image of several clips is listed with each of them.
    if unreadable := {failure["file"] or failure["id"] for failure in read_failure_log(failure_log)}:
        logger.warning("%d unreadable files were left out of training; %s lists them.", len(unreadable), failure_log)
    metrics["unreadable_media"] = len(unreadable)
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    logger.info("Saved the model to %s.", training_arguments.output_dir)


if __name__ == "__main__":
    main()
