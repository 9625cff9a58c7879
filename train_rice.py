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
from data_rice.collator import RiceCollator, count_failures, read_failure_log
from data_rice.commands import print_anywhere
from training_rice.arguments import parse_arguments
from training_rice.checkpoints import is_trained
from training_rice.monitor import run_figures, summary_table
from training_rice.profiling import profile_steps
from training_rice.setup import (
    build_model,
    build_rice_processor,
    check_processes,
    choose_attention,
    find_checkpoint,
    is_finished,
    load_views,
    read_texts,
    record_arguments,
)
from training_rice.text import check_text
from training_rice.trainer import RiceTrainer

logger = logging.getLogger("train_rice")


def main(argv: list[str] | None = None) -> None:
    print_anywhere()
    model_arguments, data_arguments, training_arguments = parse_arguments(argv)
    is_main = training_arguments.process_index == 0
    logging.basicConfig(format="%(message)s", level=logging.INFO if is_main else logging.ERROR)
    transformers.logging.set_verbosity_warning()
    try:
        train(model_arguments, data_arguments, training_arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train_rice.py: error: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    if "Original Traceback (most recent call last):" in lines:
        # From a loader's worker, with its message last.
        return lines[-1].partition(": ")[2]
    return " ".join(lines)


def train(model_arguments, data_arguments, training_arguments) -> None:
    check_processes(training_arguments)
    profile = training_arguments.profile
    checkpoint = None if profile else find_checkpoint(training_arguments)
    finished = not profile and is_finished(training_arguments)
    exists = finished or checkpoint is not None
    if not profile:
        record_arguments(model_arguments, data_arguments, training_arguments, resuming=exists)
    if finished:
        logger.info("The run in %s is finished, there is nothing to do.", training_arguments.output_dir)
        return
    transformers.set_seed(training_arguments.seed)

    with training_arguments.main_process_first(desc="building the data tables"):
        pairs, validation = load_views(data_arguments, training_arguments)
    model = build_model(model_arguments, data_arguments)
    choose_attention(model, model_arguments, training_arguments)
    processor = build_rice_processor(model_arguments, data_arguments, model.config, read_texts(pairs, data_arguments))
    check_text(data_arguments, model.config, processor.tokenizer)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.config, name, getattr(processor.tokenizer, name))
    failure_log = f"{training_arguments.output_dir}/unreadable_media.jsonl"
    augmentation = None
    if data_arguments.augments:
        crops = data_arguments.augment_crop < 1
        augmentation = ClipAugmentation(
            crop_scale=(data_arguments.augment_crop, 1.0),
            crop_ratio=ClipAugmentation.crop_ratio if crops else (1.0, 1.0),
            flip=data_arguments.augment_flip,
            jitter=data_arguments.augment_jitter,
            background=data_arguments.augment_background,
            frame_drop=data_arguments.augment_frame_drop,
        )
    collator = RiceCollator(
        processor,
        augmentation=augmentation,
        use_boxes=data_arguments.use_boxes,
        num_frames=data_arguments.train_num_frames or data_arguments.num_frames,
        sampling=data_arguments.frame_sampling,
        use_text=data_arguments.use_text,
        asr_noise=data_arguments.asr_noise,
        failure_log=failure_log,
        decode=data_arguments.decode,
        pixels="uint8" if data_arguments.decode == "fast" else "float",
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
    if profile:
        logger.info(profile_steps(trainer))
        return
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
    unreadable = count_failures(read_failure_log(failure_log))
    if unreadable["unreadable_media"]:
        logger.warning(
            "%d unreadable files were left out of training (%d frames were replaced by others, %d pairs skipped); "
            "%s lists them.",
            *(unreadable[name] for name in ("unreadable_media", "replaced_frames", "skipped_pairs")),
            failure_log,
        )
    metrics |= run_figures(trainer.state.log_history) | unreadable
    # Published below, when the record of its training is there too.
    trainer.save_model(_internal_call=True)
    trainer.save_metrics("train", metrics)
    logger.info("%s\nSaved the model to %s.", summary_table(metrics), training_arguments.output_dir)
    if training_arguments.push_to_hub:
        publish(trainer)


def publish(trainer: RiceTrainer) -> None:
    """Publishes a finished run; a failure says how to do it again without training again."""
    folder, repository = trainer.args.output_dir, trainer.hub_model_id
    try:
        commit = trainer.push_to_hub(revision=trainer.args.hub_revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the finished run in {folder} could not be published: {error} Then: rice publish {folder} {repository} "
            f"--without_results."
        ) from error
    if commit is not None:
        logger.info("Published %s.", commit.commit_url)


if __name__ == "__main__":
    main()
