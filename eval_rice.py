"""R@k of a checkpoint under one protocol.

    python eval_rice.py --model runs/demo --dataset mini_lpr4m --data_dir data/mini_lpr4m --output_dir runs/demo/eval

This writes results.json, rankings.jsonl, matches.png, breakdown.png and a model card (README.md) to --output_dir, and
prints the recall of the model, of a colour histogram and of chance. --report also writes report.html, one page that
needs no network. --baseline NAME instead of --model evaluates a baseline without training (docs/baselines.md).
docs/protocol.md defines what is measured.
"""

import argparse
import os
import shlex
import sys
import time
from functools import partial
from pathlib import Path

from data_rice.commands import mistakes_end


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, whose `error` exits with one sentence and status 2, and the options."""
    from data_rice.asr_noise import ASR_MODES
    from data_rice.views import DATASET_NAMES
    from evaluation_rice.baselines import BASELINE_NAMES, BASELINES
    from evaluation_rice.options import fusion_weight, not_negative, positive
    from evaluation_rice.pretrained_baselines import FAMILIES
    from hub_rice.precision import add_precision
    from modeling_rice.scoring_rice import KINDS

    parser = argparse.ArgumentParser(description="R@k of a RICE checkpoint under one protocol (docs/protocol.md).")
    add = parser.add_argument
    method = parser.add_mutually_exclusive_group(required=True)
    method.add_argument("--model", help="checkpoint folder, or the id of a published model")
    names = ", ".join([*BASELINES, *FAMILIES])
    method.add_argument("--baseline", help=f"{names}, or the id or folder of a vision model of transformers")
    add("--baseline_model", help="id or folder for the family named by --baseline; default: its published model")
    add("--trust_remote_code", action="store_true", help="run the Python files of the model of --baseline")
    add("--dataset", required=True, help=f"{DATASET_NAMES}, a folder in one of their layouts, or a published data "
        "set: its folder, or its id on the Hub")  # fmt: skip
    add("--data_dir", help="folder of the data set's files")
    add("--split", default="test", choices=("validation", "test"), help="split to measure (default: %(default)s)")
    add("--output_dir", required=True, help="folder for results.json, rankings.jsonl, matches.png and README.md")
    add("--rank_by", choices=KINDS, help="score of rankings.jsonl; default: config.ranking of the checkpoint")
    add("--batch_size", type=positive, default=32, help="clips or images per batch (default: %(default)s)")
    add("--num_workers", type=not_negative, default=min(2, os.cpu_count() or 1), help="processes that decode images")
    add("--device", help="such as cpu or cuda; default: cuda if there is one")
    add_precision(parser, default="fp32")
    add("--boxes", default="none", choices=("none", "ground_truth", "detector"), help="boxes of the intended product "
        "at test time; detector needs --detector or --boxes_file (default: %(default)s)")  # fmt: skip
    add("--detector", help="product detector (folder or id) that makes the boxes; they are written to --output_dir")
    add("--text", default=True, action=argparse.BooleanOptionalAction, help="give titles and ASR to a model with a "
        "text encoder (default)")  # fmt: skip
    add("--asr", default="own", choices=ASR_MODES, help="ASR that the model reads: the clip's own (default), none, "
        "the clip's own words shuffled, or the ASR of a wrong clip")  # fmt: skip
    add("--boxes_file", help="box file of a product detector, written by python -m retrieval_rice.detector run")
    add("--num_frames", type=positive, help="frames per clip; default: that of the checkpoint's processor")
    add("--fusion_weight", type=fusion_weight, default="auto", help="weight of matching in the fused score: a number "
        "above 0; auto (default): the checkpoint's weight, else fitted on the validation split, else 1; fit: always "
        "fitted on the validation split. Fitting it also fits the weights of alignment and text")  # fmt: skip
    add("--fit_data_dir", help="with --fusion_weight fit: folder with the validation split, if not --data_dir")
    add("--baselines", nargs="*", default=["color_histogram", "chance"], choices=BASELINE_NAMES, help="baselines that "
        "are also measured (default: color_histogram chance)")  # fmt: skip
    add("--gallery_images", choices=("main", "all"), help="LPR4M: one image per product (default), or every image")
    add("--cache_dir", help="cache folder for the data set's tables")
    add("--report", action="store_true", help="also write report.html: plots, best and worst clips, heat maps, speed")
    return parser, parser.parse_args(arguments)


def build_retriever(options: argparse.Namespace):
    """Loads the model or baseline as a `Retriever`; also returns the baseline's entry in results.json, or `None`."""
    from data_rice.collator import RiceCollator
    from evaluation_rice.options import check_asr
    from evaluation_rice.pretrained_baselines import load_baseline
    from evaluation_rice.retrieval import ModelRetriever
    from hub_rice.loading import load_model, to_device
    from hub_rice.precision import choose_precision, in_precision

    use_boxes = options.boxes != "none"
    if options.baseline is not None:
        check_asr(options, reads_text=False)
        if options.precision != "fp32":
            raise ValueError(f"--precision {options.precision}: baselines compute in fp32; leave it out.")
        settings = {"num_frames": options.num_frames, "use_boxes": use_boxes, "batch_size": options.batch_size}
        settings["trust_remote_code"] = options.trust_remote_code
        place = partial(to_device, device=options.device)
        return load_baseline(options.baseline, options.baseline_model, **settings, to_device=place)
    model, processor = load_model(options.model, options.device)
    options.precision = choose_precision(options.precision, model.device)
    model = in_precision(model, options.precision)
    if options.num_frames is not None:
        processor.video_processor.num_frames = options.num_frames
    if use_boxes and not getattr(model.config, "accepts_patch_mask", True):
        raise ValueError(
            f"--boxes {options.boxes}: the encoder of {options.model} does not support patch masks; evaluate with "
            f"--boxes none, or train with --model.patch_mask_pooling true."
        )
    use_text = options.text and getattr(model.config, "text_config", None) is not None
    check_asr(options, use_text)
    return ModelRetriever(model, RiceCollator(processor, use_boxes=use_boxes, use_text=use_text)), None


def load_views(options: argparse.Namespace, split: str, data_dir: str | None):
    """Loads queries and gallery of a split, with `--boxes detector` also the boxes of the box file."""
    from data_rice import load_dataset_view

    settings = {"data_dir": data_dir, "cache_dir": options.cache_dir, "gallery_images": options.gallery_images}
    if options.detector is not None:
        detect_boxes(options, split, data_dir)
    if options.boxes == "detector":
        settings["boxes_file"] = options.boxes_file
    return [load_dataset_view(options.dataset, view, split, **settings) for view in ("query", "gallery")]


def detect_boxes(options: argparse.Namespace, split: str, data_dir: str | None) -> None:
    """Writes the boxes of --detector for a split to the box file. Existing boxes are kept."""
    from retrieval_rice.detector.box_writing import write_boxes
    from retrieval_rice.detector.product_detector import ProductDetector

    write_boxes(
        ProductDetector.from_pretrained(options.detector, options.device),
        options.boxes_file,
        dataset=options.dataset,
        splits=[split],
        detector_name=options.detector,
        data_dir=data_dir,
        cache_dir=options.cache_dir,
        num_frames=options.num_frames or 0,
        num_workers=options.num_workers,
    )


def evaluate(options: argparse.Namespace, command: str) -> dict:
    """Evaluates and writes all outputs; returns the results. User errors are `ValueError` or `OSError`."""
    from evaluation_rice.options import check_options
    from evaluation_rice.report.output import print_report, write_files
    from evaluation_rice.run import measure

    started = time.perf_counter()
    check_options(options)
    output = Path(options.output_dir)
    if options.detector is not None:
        options.boxes_file = str(output / "boxes.jsonl")
    retriever, baseline = build_retriever(options)
    evaluation = measure(options, retriever, baseline, partial(load_views, options), started)
    evaluation.results["command"] = command
    write_files(output, evaluation, options.model, options.report)
    print_report(evaluation.results, output, options.report)
    return evaluation.results


def main(arguments: list[str] | None = None) -> None:
    """Evaluates by command line arguments. A user error exits with status 2 and one sentence."""
    parser, options = parse_arguments(arguments)
    from data_rice.commands import print_anywhere

    print_anywhere()
    command = shlex.join(["python", "eval_rice.py", *(sys.argv[1:] if arguments is None else arguments)])
    with mistakes_end(parser):
        evaluate(options, command)


if __name__ == "__main__":
    main()
