"""Train, measure and apply a detector of the intended product.

For example, from nothing to a box file:

    python -m retrieval_rice.detector train --dataset mini_lpr4m --output_dir runs/detector
    python -m retrieval_rice.detector eval --detector runs/detector --dataset mini_lpr4m --split test
    python -m retrieval_rice.detector run --detector runs/detector --dataset mini_lpr4m --output runs/boxes.jsonl

`run` writes a box file. A data set takes its boxes from it with `load_dataset_view(..., boxes_file=FILE)`,
`train_rice.py --use_boxes --boxes_file FILE`, `eval_rice.py --boxes detector --boxes_file FILE`.
"""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the three steps; `options.step` is the chosen one."""
    steps = parser.add_subparsers(title="steps", dest="step", required=True, metavar="train|eval|run")
    train = steps.add_parser("train", help="train on the frames of the training split")
    _add_data(train)
    add = train.add_argument
    add("--output_dir", required=True, help="folder for the detector; the same command resumes")
    add("--model", help="folder or id of a pretrained detector to fine-tune; default: a small RT-DETR from scratch")
    add("--image_size", type=int, default=64, help="picture side of the small detector, default 64, a multiple of 32")
    add("--max_steps", type=int, default=1500)
    add("--batch_size", type=int, default=32)
    add("--learning_rate", type=float, default=2e-3)
    add("--weight_decay", type=float, default=1e-4)
    add("--seed", type=int, default=0)
    add("--save_steps", type=int, default=200, help="steps between checkpoints")

    evaluate = steps.add_parser("eval", help="average precision and hit rate on a split's frames")
    _add_data(evaluate)
    _add_detector(evaluate)
    evaluate.add_argument("--split", default="test", choices=("train", "validation", "test"))
    evaluate.add_argument("--output", help="JSON file for the figures, which are also printed")

    run_step = steps.add_parser("run", help="write a box file of all clips")
    _add_data(run_step)
    _add_detector(run_step)
    add = run_step.add_argument
    add("--output", required=True, help="the box file; the same command adds missing clips")
    add("--splits", nargs="+", default=["test"], choices=("train", "validation", "test"))
    add("--num_frames", type=int, default=0, help="frames per clip, sampled as in evaluation; default 0: all")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="mini_lpr4m, lpr4m, moving_fashion, shop_clips, or a folder")
    parser.add_argument("--data_dir", help="folder of the data set's files")
    parser.add_argument("--validation_fraction", type=float, help="LPR4M: share of training livestreams held out")
    parser.add_argument("--cache_dir", help="folder for the cached tables of the data set")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode pictures")
    parser.add_argument("--device", help="such as cpu or cuda; default: cuda if available")


def _add_detector(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--detector", required=True, help="folder that `train` wrote, or id of a published detector")
    parser.add_argument("--threshold", type=float, help="minimum score of a box, 0 to 1; default: the detector's own")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="classes that are products, if there are several")


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        FileNotFoundError, ValueError: as the step's own function.
    """
    from data_rice.commands import log_plainly

    log_plainly()
    {"train": _train, "eval": _evaluate, "run": _run}[options.step](options)


def _train(options: argparse.Namespace) -> None:
    from .training import DetectorSettings, train

    names = ("dataset", "data_dir", "model", "image_size", "max_steps", "batch_size", "learning_rate")
    names += ("weight_decay", "seed", "validation_fraction")
    settings = DetectorSettings(**{name: getattr(options, name) for name in names})
    record = train(
        settings,
        options.output_dir,
        cache_dir=options.cache_dir,
        num_workers=options.num_workers,
        save_steps=options.save_steps,
        device=options.device,
    )
    if "validation" in record:
        _print_figures(record["validation"], "validation")
    print(f"The detector is in {options.output_dir}.")


def _evaluate(options: argparse.Namespace) -> None:
    from .evaluation import evaluate
    from .frames import load_frames
    from .product_detector import ProductDetector

    detector = ProductDetector.from_pretrained(options.detector, options.device, options.threshold, options.labels)
    rows = load_frames(
        options.dataset,
        options.split,
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
        validation_fraction=options.validation_fraction,
    )
    figures = evaluate(detector, rows, num_workers=options.num_workers)
    figures |= {"detector": options.detector, "labels": detector.labels}
    figures |= {"dataset": options.dataset, "split": options.split}
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2, allow_nan=False)
            file.write("\n")
    _print_figures(figures, options.split)


def _print_figures(figures: dict, split: str) -> None:
    shown = figures["num_frames"] - figures["num_frames_without_product"]
    print(f"{figures['num_frames']} frames ({split}), {shown} with the product; threshold {figures['threshold']:.3f}")
    print(f"AP {100 * figures['AP']:.1f}, AP50 {100 * figures['AP50']:.1f}")
    print(
        f"best box correct (IoU 0.5): {100 * figures['hit_rate']:.1f} % of the frames with the product, "
        f"{100 * figures['hit_rate_without_threshold']:.1f} % without the threshold; the mean box would be correct in "
        f"{100 * figures['mean_box_hit_rate']:.1f} %"
    )
    if figures["false_alarm_rate"] is not None:
        print(f"false alarms: a box in {100 * figures['false_alarm_rate']:.1f} % of the frames without the product")
    if figures["unreadable"]:
        print(f"{len(figures['unreadable'])} frames could not be read, such as {figures['unreadable'][0]}")


def _run(options: argparse.Namespace) -> None:
    from .box_writing import write_boxes
    from .product_detector import ProductDetector

    detector = ProductDetector.from_pretrained(options.detector, options.device, options.threshold, options.labels)
    counts = write_boxes(
        detector,
        options.output,
        dataset=options.dataset,
        splits=options.splits,
        detector_name=options.detector,
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
        num_frames=options.num_frames,
        num_workers=options.num_workers,
        validation_fraction=options.validation_fraction,
    )
    print(
        f"{options.output}: {counts['clips']} clips ({counts['earlier']} existed already), {counts['frames']} "
        f"frames, {counts['boxes']} with a box, {counts['unreadable']} unreadable."
    )
