"""Trains RICE.

    python train_rice.py configs/mini_lpr4m.yaml --output_dir runs/mini
    accelerate launch train_rice.py configs/lpr4m_750k.yaml --data_dir PATH --output_dir runs/lpr4m

A recipe is a flat YAML mapping of the arguments in training_rice/arguments.py, plus a `model:` section with fields of
RiceConfig. `--name value` and `--model.name value` override it. To continue from the last complete checkpoint, run the
same command again. The output folder receives the model, its processor and the arguments.
"""

import logging
import os
import sys
from contextlib import ExitStack
from functools import partial

# Threads that spin while waiting slow each other down severely if loader workers share the cores (measured in
# docs/LOG.md). The OpenMP runtime reads this variable when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import transformers

from data_rice.collator import count_failures, read_failure_log
from data_rice.commands import log_plainly, print_anywhere
from training_rice.arguments import (
    DataArguments,
    ModelArguments,
    RiceTrainingArguments,
    parse_arguments,
    program_name,
)
from training_rice.checkpoints import holds_checkpoints, is_trained, newest_whole, writing
from training_rice.feature_cache_encoding import cache_features
from training_rice.monitor import run_figures, summary_table
from training_rice.processes import failing_together, is_told, on_first_process
from training_rice.profiling import profile_steps
from training_rice.run_lock import run_lock
from training_rice.setup import (
    build_collators,
    build_model,
    build_rice_processor,
    check_frozen,
    check_processes,
    check_recomputation,
    choose_attention,
    find_checkpoint,
    is_finished,
    load_views,
    read_texts,
    record_arguments,
    set_token_ids,
)
from training_rice.stopping import Stopped, signals_call, stop
from training_rice.text import check_text
from training_rice.trainer import RiceTrainer

logger = logging.getLogger("train_rice")


def main(argv: list[str] | None = None) -> None:
    """
    Trains a model.

    Args:
        argv: Command line arguments; `sys.argv[1:]` by default.

    Raises:
        SystemExit: with status 2 and one sentence for a user error, 130 after Ctrl-C, 143 after SIGTERM.
    """
    print_anywhere()
    training_arguments = None
    with signals_call(stop):
        try:
            model_arguments, data_arguments, training_arguments = parse_arguments(argv)
            is_main = training_arguments.process_index == 0
            log_plainly(logging.INFO if is_main else logging.ERROR)
            transformers.logging.set_verbosity_warning()
            train(model_arguments, data_arguments, training_arguments)
        except Stopped as stopped:
            _tell_stopped(stopped, training_arguments)
            raise
        except (ValueError, OSError, FloatingPointError) as error:
            if not is_told(error):
                print(f"{program_name()}: error: {_sentence(error)}", file=sys.stderr)
            sys.exit(2)


def _tell_stopped(stopped: Stopped, arguments: RiceTrainingArguments | None) -> None:
    if arguments is None or arguments.process_index > 0:
        return
    checkpoint = newest_whole(arguments.output_dir, arguments.world_size)
    # The signal ended another process too, before this one could write a checkpoint.
    lost = "" if stopped.__cause__ is None else f" without another checkpoint ({_sentence(stopped.__cause__)})"
    print(
        f"{program_name()}: stopped by {stopped.name}{lost}; run the same command again to "
        + ("start again." if checkpoint is None else f"continue from {checkpoint}."),
        file=sys.stderr,
    )


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    if "Original Traceback (most recent call last):" in lines:
        # An error of a loader worker ends with the original message.
        return lines[-1].partition(": ")[2]
    return " ".join(lines)


def train(
    model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments: RiceTrainingArguments
) -> None:
    """Starts or continues a run, or reports that it is finished. Raises user errors."""
    check_processes(training_arguments)
    check_frozen(model_arguments, training_arguments)
    arguments = model_arguments, data_arguments, training_arguments
    if training_arguments.profile:
        logger.info(profile_steps(build_trainer(*arguments)))
        return
    with ExitStack() as while_running:
        checkpoint, finished = on_first_process(partial(_claim, training_arguments, while_running))
        # Also if no checkpoint is usable: other arguments must not start over in the folder of a run.
        resuming = finished or checkpoint is not None or holds_checkpoints(training_arguments.output_dir)
        record = partial(record_arguments, *arguments, resuming=resuming)
        with failing_together(), writing("the arguments", training_arguments.output_dir):
            record()
        if finished:
            logger.info("The run in %s is finished; there is nothing to do.", training_arguments.output_dir)
            return
        trainer = build_trainer(*arguments)
        # Recorded again, with the values that the trainer has chosen.
        with failing_together(), writing("the arguments", training_arguments.output_dir):
            record()
        report(trainer, run(trainer, checkpoint))


def _claim(arguments: RiceTrainingArguments, while_running: ExitStack) -> tuple[str | None, bool]:
    """Locks the output folder; returns the checkpoint to continue from, and whether the run is finished."""
    # A finished run is not changed, so it needs no lock.
    if not is_finished(arguments):
        while_running.enter_context(run_lock(arguments.output_dir))
    if is_finished(arguments):
        return None, True
    return find_checkpoint(arguments), False


def build_trainer(
    model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments: RiceTrainingArguments
) -> RiceTrainer:
    """Builds data, model and processor, and returns the trainer."""
    transformers.set_seed(training_arguments.seed)
    with training_arguments.main_process_first(desc="building the data tables"):
        pairs, validation = load_views(data_arguments, training_arguments)
    model = build_model(model_arguments, data_arguments)
    choose_attention(model, model_arguments, training_arguments)
    check_recomputation(model, training_arguments)
    processor = build_rice_processor(model_arguments, data_arguments, model.config, read_texts(pairs, data_arguments))
    check_text(data_arguments, model.config, processor.tokenizer)
    set_token_ids(model.config, processor.tokenizer)
    collator, eval_collator = build_collators(data_arguments, processor, _failure_log(training_arguments))
    if training_arguments.cache_vision_features:
        pairs, validation, collator, eval_collator = cache_features(
            model, pairs, validation, (collator, eval_collator), data_arguments, training_arguments
        )
    trainer = RiceTrainer(
        model=model,
        args=training_arguments,
        train_dataset=pairs,
        eval_dataset=validation,
        data_collator=collator,
        eval_collator=eval_collator,
        processing_class=processor,
    )
    logger.info(trainer.describe())
    return trainer


def _failure_log(arguments: RiceTrainingArguments) -> str:
    return f"{arguments.output_dir}/unreadable_media.jsonl"


def run(trainer: RiceTrainer, checkpoint: str | None) -> dict[str, float]:
    """Trains to the end, from the start or from a checkpoint, and evaluates. Returns the metrics."""
    if checkpoint is not None:
        logger.info("Continuing from %s.", checkpoint)
    if checkpoint is not None and is_trained(checkpoint):
        # Trainer would take one more step after the last.
        metrics = trainer.load_trained(checkpoint)
    else:
        metrics = dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    if trainer.eval_views is not None:
        metrics |= trainer.evaluate()
    else:
        trainer.fit_alignment()
    return metrics


def report(trainer: RiceTrainer, metrics: dict[str, float]) -> None:
    """Saves the model and its training metrics to the output folder, and publishes them if `push_to_hub` is set."""
    folder, failure_log = trainer.args.output_dir, _failure_log(trainer.args)
    unreadable = count_failures(read_failure_log(failure_log))
    if unreadable["unreadable_media"]:
        logger.warning(
            "%d unreadable files were left out of training (%d frames replaced by others, %d pairs skipped); %s lists "
            "them.",
            *(unreadable[name] for name in ("unreadable_media", "replaced_frames", "skipped_pairs")),
            failure_log,
        )
    metrics |= run_figures(trainer.state.log_history) | unreadable
    # Published below, after the training record is written.
    trainer.save_final()
    with writing("the results", folder):
        trainer.save_metrics("train", metrics)
    logger.info("%s\nSaved the model to %s.", summary_table(metrics), folder)
    if trainer.args.push_to_hub:
        publish(trainer)


def publish(trainer: RiceTrainer) -> None:
    """Publishes a finished run. The error message says how to publish it later without training again."""
    folder, repository = trainer.args.output_dir, trainer.hub_model_id
    try:
        commit = trainer.push_to_hub(revision=trainer.args.hub_revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the finished run in {folder} could not be published: {error} Afterwards run: rice publish {folder} "
            f"{repository} --without_results."
        ) from error
    if commit is not None:
        logger.info("Published %s.", commit.commit_url)


if __name__ == "__main__":
    main()
