"""Cost of a precision: R@k and agreement of rankings for fp32, bf16, fp16 and exported encoders, on one split.

    python benchmarks/bench_precision.py --model M --dataset D [--data_dir DIR] [--split test] [--towers DIR]

One JSON line per precision: recall by the model's own ranking, the share of clips whose first image is that of fp32,
the mean share of fp32's first ten images among the first ten, and seconds. All sides get the same pixels. With
`--decode fast` all but the first read large JPEGs at reduced scale, as `rice index` does in these precisions. With
`--towers`, what `rice export --int8` wrote, also "onnx" (fp32) and "int8".
"""

import argparse
import json
import time

import torch
from plain import measure

from data_rice import gallery_scope, load_dataset_view
from data_rice.collator import RiceCollator
from data_rice.views import DATASET_NAMES
from evaluation_rice.protocol import RetrievalTask
from evaluation_rice.retrieval import Loading, ModelRetriever, retrieve
from hub_rice.export.onnx_encoder import with_towers
from hub_rice.loading import load_model
from hub_rice.precision import PRECISIONS, choose_precision, in_precision
from modeling_rice.scoring_rice import FusionWeights, default_ranking

DEPTH = 10


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder")
    add("--dataset", required=True, help=f"{DATASET_NAMES}, or a folder in one of their layouts")
    add("--data_dir", help="folder of the data set's files")
    add("--split", default="test", choices=("validation", "test"))
    add("--towers", help="folder that `rice export MODEL DIR --int8` wrote")
    add("--precisions", nargs="+", choices=(*PRECISIONS, "onnx", "int8"), help="default: fp32, what auto means here, "
        "and of --towers onnx and int8")  # fmt: skip
    add("--decode", choices=("exact", "fast"), default="exact", help="of all sides but the first")
    add("--batch_size", type=int, default=16)
    add("--num_workers", type=int, default=0)
    add("--cache_dir", help="folder for the cached tables of the data set")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    auto = choose_precision("auto", torch.device(options.device))
    options.precisions = options.precisions or [
        *dict.fromkeys(["fp32", "bf16" if auto == "fp32" else auto]),
        *(["onnx", "int8"] if options.towers else []),
    ]
    if not options.towers and {"onnx", "int8"} & set(options.precisions):
        parser.error("onnx and int8 need --towers.")
    return options


def load(options: argparse.Namespace, precision: str):
    """Model and processor in a precision."""
    if precision in PRECISIONS:
        model, processor = load_model(options.model, options.device)
        return in_precision(model, precision), processor
    model, processor = load_model(options.model, "cpu")
    return with_towers(model, options.towers, int8=precision == "int8"), processor


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    where = {"data_dir": options.data_dir, "cache_dir": options.cache_dir}
    queries, gallery = (
        load_dataset_view(options.dataset, view, options.split, **where) for view in ("queries", "gallery")
    )
    scope = gallery_scope(options.dataset, options.data_dir)
    expected = None
    # What the others are compared with comes first.
    sides = [("fp32", "exact"), *((precision, options.decode) for precision in options.precisions)]
    for precision, decode in dict.fromkeys(sides):
        model, processor = load(options, precision)
        reads_text = getattr(model.config, "text_config", None) is not None
        retriever = ModelRetriever(model, RiceCollator(processor, use_text=reads_text, decode=decode))
        kind = default_ranking(model.config)
        start = time.perf_counter()
        rankings, _ = retrieve(
            retriever,
            RetrievalTask.from_datasets(queries, gallery, scope),
            queries,
            gallery,
            loading=Loading(options.batch_size, options.num_workers, quiet=True),
            weights=FusionWeights.of(model.config),
            depth=DEPTH,
        )
        seconds = time.perf_counter() - start
        found = rankings[kind].rankings
        expected = expected or found
        clips = [name for name in expected if expected[name] and found.get(name)]
        shares = [len(set(expected[name][:DEPTH]) & set(found[name][:DEPTH])) / len(expected[name]) for name in clips]
        row = {
            "benchmark": "precision",
            "precision": precision,
            "decode": decode,
            "ranking": kind,
            **{name: value for name, value in rankings[kind].recall().items() if name.startswith("R@")},
            "same_first_image": sum(expected[name][0] == found[name][0] for name in clips) / max(1, len(clips)),
            "same_first_ten": sum(shares) / max(1, len(clips)),
            "clips": len(expected),
            "seconds": round(seconds, 2),
            "split": options.split,
        }
        print(json.dumps(row | measure.machine(options.device)), flush=True)


if __name__ == "__main__":
    main()
