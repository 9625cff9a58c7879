"""R@k of a checkpoint under one protocol.

    python eval_rice.py --model runs/demo --dataset mini_lpr4m --data_dir data/mini_lpr4m --output_dir runs/demo/eval

writes results.json, rankings.jsonl, matches.png, breakdown.png and a model card (README.md) into --output_dir, and
prints the recall beside a colour histogram and chance; with --report also report.html, one page that needs no network.
With --baseline NAME in the place of --model it measures what needs no training in the same way (docs/baselines.md).
docs/protocol.md says what is measured and how.
"""

import argparse
import os
import shlex
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from evaluation_rice.protocol import RetrievalTask, breakdown
from hub_rice.checkpoint import weights_fingerprint
from modeling_rice.scoring_rice import KINDS, FusionWeights, default_ranking, pair_kinds


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, whose `error` ends with one sentence and status 2, and the options."""
    from data_rice.asr_noise import ASR_MODES
    from evaluation_rice.baselines import BASELINE_NAMES, BASELINES
    from evaluation_rice.pretrained_baselines import FAMILIES

    parser = argparse.ArgumentParser(description="R@k of a RICE checkpoint under one protocol (docs/protocol.md).")
    add = parser.add_argument
    method = parser.add_mutually_exclusive_group(required=True)
    method.add_argument("--model", help="checkpoint folder, or the id of a published model")
    names = ", ".join([*BASELINES, *FAMILIES])
    method.add_argument("--baseline", help=f"{names}, or the id or folder of a vision model of transformers, as it is")
    add("--baseline_model", help="id or folder for a family named by --baseline; default: its published model")
    add("--dataset", required=True, help="mini_lpr4m, lpr4m, shop_clips, or a folder in one of their layouts")
    add("--data_dir", help="folder of the data set's files")
    add("--split", default="test", choices=("validation", "test"))
    add("--output_dir", required=True, help="folder for results.json, rankings.jsonl, matches.png and README.md")
    add(
        "--rank_by",
        choices=KINDS,
        help="score of rankings.jsonl; default: as the checkpoint's config.ranking says",
    )
    add("--batch_size", type=_positive, default=32, help="clips or images per batch")
    add("--num_workers", type=_not_negative, default=min(2, os.cpu_count() or 1), help="processes that decode images")
    add("--device", help="such as cpu or cuda; default: cuda where there is one")
    add("--boxes", default="none", choices=("none", "ground_truth", "detector"), help="boxes of the intended product "
        "at test time; detector goes with --detector or --boxes_file")  # fmt: skip
    add("--detector", help="product detector (folder or id) to make the boxes with, into --output_dir")
    add("--text", default=True, action=argparse.BooleanOptionalAction, help="give titles and ASR to a model that has "
        "a text encoder (default), or evaluate it without them")  # fmt: skip
    add("--asr", default="own", choices=ASR_MODES, help="what the model reads as a clip's ASR: its own (default), "
        "none, its own words in disorder, or another clip's")  # fmt: skip
    add("--boxes_file", help="boxes that a product detector made: python -m retrieval_rice.detector run")
    add("--num_frames", type=_positive, help="frames per clip; default: as the checkpoint's processor says")
    add("--fusion_weight", type=_weight, default="auto", help="of matching in the fused score: number above 0; auto "
        "(default): the checkpoint's own weight, else fitted on the validation split, else 1; or fit: fitted on the "
        "validation split whatever the checkpoint has. Where it is fitted, the text's weight is too")  # fmt: skip
    add("--fit_data_dir", help="with --fusion_weight fit: folder with the validation split, if not --data_dir")
    add("--baselines", nargs="*", default=["color_histogram", "chance"], choices=BASELINE_NAMES)
    add("--gallery_images", choices=("main", "all"), help="LPR4M: one image per product (default), or every image")
    add("--cache_dir", help="where the data set's tables are cached")
    add("--report", action="store_true", help="also write report.html: plots, best and worst clips, heat maps, speed")
    return parser, parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0")
    return number


def _weight(text: str) -> float | str:
    if text in ("auto", "fit"):
        return text
    try:
        return FusionWeights(float(text)).fusion_weight
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor fit nor a number above 0") from error


def build_retriever(options: argparse.Namespace):
    """The model or baseline as a `Retriever`, and the baseline's entry in results.json (`None` for a model)."""
    from data_rice.collator import RiceCollator
    from evaluation_rice.pretrained_baselines import load_baseline
    from evaluation_rice.retrieval import ModelRetriever
    from hub_rice.loading import load_model, to_device

    check_boxes(options)
    use_boxes = options.boxes != "none"
    if options.baseline is not None:
        check_asr(options, reads_text=False)
        return load_baseline(
            options.baseline,
            options.baseline_model,
            num_frames=options.num_frames,
            use_boxes=use_boxes,
            batch_size=options.batch_size,
            to_device=partial(to_device, device=options.device),
        )
    if options.baseline_model is not None:
        raise ValueError("--baseline_model goes with --baseline, not with --model: give one of them.")
    model, processor = load_model(options.model, options.device)
    if options.num_frames is not None:
        processor.video_processor.num_frames = options.num_frames
    if use_boxes and not getattr(model.config, "accepts_patch_mask", True):
        raise ValueError(
            f"--boxes {options.boxes}: the encoder of {options.model} takes no patch mask; evaluate with --boxes "
            f"none, or train with --model.patch_mask_pooling true."
        )
    use_text = options.text and getattr(model.config, "text_config", None) is not None
    check_asr(options, use_text)
    return ModelRetriever(model, RiceCollator(processor, use_boxes=use_boxes, use_text=use_text)), None


def load_views(options: argparse.Namespace, split: str):
    """Queries and gallery of a split."""
    from data_rice import load_dataset_view

    settings = {"data_dir": options.data_dir, "cache_dir": options.cache_dir, "gallery_images": options.gallery_images}
    if options.boxes == "detector":
        settings["boxes_file"] = options.boxes_file or detect_boxes(options, split)
    return [load_dataset_view(options.dataset, view, split, **settings) for view in ("queries", "gallery")]


def check_boxes(options: argparse.Namespace) -> None:
    """Refuses a detector that is missing, or one too many."""
    given = [name for name in ("detector", "boxes_file") if getattr(options, name) is not None]
    if options.boxes == "detector" and len(given) != 1:
        raise ValueError("--boxes detector needs either --detector or --boxes_file: give one of them.")
    if options.boxes != "detector" and given:
        raise ValueError(f"--{given[0]} goes with --boxes detector, not with --boxes {options.boxes}.")


def check_asr(options: argparse.Namespace, reads_text: bool) -> None:
    """Refuses to change ASR that nobody reads."""
    if options.asr != "own" and not reads_text:
        name = options.model or options.baseline
        why = f"which {name} does not" if options.text else "and --no-text says that it shall not"
        raise ValueError(f"--asr {options.asr} needs a model that reads text, {why}: leave it out.")


def detect_boxes(options: argparse.Namespace, split: str) -> str:
    """The box file that --detector makes of a split; what is there already is not made again."""
    from retrieval_rice.detector.box_writing import write_boxes
    from retrieval_rice.detector.product_detector import ProductDetector

    path = str(Path(options.output_dir) / "boxes.jsonl")
    write_boxes(
        ProductDetector.from_pretrained(options.detector, options.device),
        path,
        dataset=options.dataset,
        splits=[split],
        detector_name=options.detector,
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
        num_frames=options.num_frames or 0,
        num_workers=options.num_workers,
    )
    return path


def describe_boxes(options: argparse.Namespace, queries) -> dict:
    """Where boxes come from and how many frames have one, for results.json."""
    from data_rice.box_files import BoxFile, count_boxes

    path = options.boxes_file or str(Path(options.output_dir) / "boxes.jsonl")
    header = BoxFile(path).header
    origin = {name: header.get(name) for name in ("detector", "detector_sha256", "threshold", "frames_per_clip")}
    return {"file": path, **origin, **count_boxes(queries)}


def check_fit(options: argparse.Namespace) -> None:
    """Refuses a weight of scores that a baseline does not have, and a folder to fit on where nothing is fitted."""
    if options.baseline is not None and options.fusion_weight != "auto":
        raise ValueError(f"--fusion_weight goes with --model: {options.baseline} has one score alone.")
    if options.fit_data_dir is not None and options.fusion_weight != "fit":
        raise ValueError("--fit_data_dir goes with --fusion_weight fit: give both, or neither.")


def choose_fusion(options, retriever, scope: str, loading) -> tuple[FusionWeights, dict]:
    """The weights of the fused score, and for results.json the rule and where they come from."""
    config = retriever.model.config
    weights = FusionWeights.of(config)
    is_fitted = weights.fusion_weight is not None or "matching" not in pair_kinds(retriever.model)
    if options.fusion_weight == "fit" or (options.fusion_weight == "auto" and not is_fitted):
        weights, record = fit_weights(options, retriever, scope, loading, weights)
    elif options.fusion_weight == "auto":
        words = "the weight is the checkpoint's own, fitted when it was trained"
        record = {"source": "checkpoint", "source_words": words}
    else:
        weights = replace(weights, fusion_weight=options.fusion_weight)
        record = {"source": "argument", "source_words": "the weight was given by hand"}
    if not reads_text_score(options, config):
        weights = replace(weights, fused_text_weight=None)
    elif weights.fused_text_weight is None:
        record["source_words"] += "; there is none for text, which counts as part of the embedding score"
    return weights, {"rule": weights.rule(), "text_weight": weights.fused_text_weight, **record}


def reads_text_score(options: argparse.Namespace, config) -> bool:
    """Whether the cosine of ASR and title is part of the scores."""
    has_text = getattr(config, "text_config", None) is not None
    return options.text and has_text and config.text_score_weight is not None


def fit_weights(options, retriever, scope: str, loading, own: FusionWeights) -> tuple[FusionWeights, dict]:
    """As `choose_fusion`, from the validation split; where it cannot be had, 1 for matching and the others as are."""
    from evaluation_rice.retrieval import fit_fusion

    source = argparse.Namespace(**vars(options))
    source.data_dir = options.fit_data_dir or options.data_dir
    try:
        same = options.fit_data_dir is None or _same_folder(options.fit_data_dir, options.data_dir)
        if options.split == "validation" and same:
            raise ValueError("the split to evaluate is the validation split itself")
        queries, gallery = load_views(source, "validation")
        task = RetrievalTask.from_datasets(queries, gallery, scope)
    except (ValueError, OSError) as error:
        if options.fusion_weight == "fit":
            raise ValueError(f"--fusion_weight fit: the weight cannot be fitted ({_one_line(error)})") from error
        print(f"fusion weight 1: the checkpoint has none, and it cannot be fitted ({_one_line(error)})")
        words = "the weight is the default, not fitted"
        return replace(own, fusion_weight=1.0), {"source": "default", "source_words": words}
    fitted = fit_fusion(retriever, task, queries, gallery, loading=loading)
    where = f" of {source.data_dir}" if options.fit_data_dir else ""
    words = f"the weight was fitted on the validation split{where} ({len(queries)} clips)"
    record = {"source": "validation", "source_words": words, "curve": fitted.curve}
    if fitted.text_curve is not None:
        record["text_curve"] = fitted.text_curve
    return fitted.weights, record


def check_rank_by(options: argparse.Namespace, kinds: list[str]) -> None:
    """Refuses a score that the model, which has `kinds` besides that of its embeddings, does not have."""
    if options.rank_by not in (None, "embedding", *kinds, *["fused"][: len(kinds)]):
        needed = "an alignment" if options.rank_by == "alignment" else "a matching decoder"
        name = options.model or options.baseline
        raise ValueError(f"--rank_by {options.rank_by} needs {needed}, which {name} does not have.")


def describe_protocol(options, task: RetrievalTask, scope: str, rank_by: str, num_frames, depth: int) -> dict:
    """The `protocol` entry of results.json."""
    return {
        "split": options.split,
        "gallery_scope": scope,
        "gallery_images": options.gallery_images or "as the data set's default",
        "num_galleries": len(set(task.query_scopes)),
        "num_gallery_images": len({image for name in set(task.query_scopes) for image in task.scopes.get(name, [])}),
        "task_sha256": task.fingerprint(),
        "duplicate_gallery_rows": task.num_duplicate_rows,
        "queries_without_relevant_in_gallery": task.num_unreachable(),
        "hit": "any relevant image among the first k",
        "denominator": "every query; one that could not be read is a miss",
        "tie_order": "gallery order",
        "boxes": options.boxes,
        "num_frames": num_frames,
        "rank_by": rank_by,
        "ranking_depth": depth,
        "interval": "percentile bootstrap over queries, 10000 resamples, seed 0",
    }


def evaluate(options: argparse.Namespace, command: str) -> dict:
    """Loads, runs and reports; returns the results. Bad input raises `ValueError` or `OSError` with one sentence."""
    from hub_rice.model_card import gallery_words

    results, *rest = measure(options, command)
    write_files(options, results, *rest)
    print_report(results, gallery_words(results), Path(options.output_dir), options.report)
    return results


def measure(options: argparse.Namespace, command: str) -> tuple:
    """The content of results.json, and what it was made of: task, rankings, queries, gallery and retriever."""
    started = time.perf_counter()
    check_fit(options)
    retriever, baseline = build_retriever(options)
    queries, gallery = load_views(options, options.split)

    from data_rice import gallery_scope
    from data_rice.asr_noise import with_asr
    from evaluation_rice.baselines import run_baselines
    from evaluation_rice.report import results as report
    from evaluation_rice.retrieval import Loading, retrieve
    from evaluation_rice.speed import TimedRetriever

    # Weights are fitted on validation clips with their own ASR: nobody knows what it will be like.
    queries = with_asr(queries, options.asr)
    scope = gallery_scope(options.dataset, options.data_dir)
    task = RetrievalTask.from_datasets(queries, gallery, scope)
    model = None if baseline else retriever.model
    kinds = [] if baseline else pair_kinds(model)
    check_rank_by(options, kinds)
    rank_by = options.rank_by or ("embedding" if baseline else default_ranking(model.config))
    retriever = TimedRetriever(retriever)
    loading = Loading(options.batch_size, options.num_workers)
    weights, fusion = FusionWeights(), None
    if kinds:
        weights, fusion = choose_fusion(options, retriever, scope, loading)
    books, failures = retrieve(retriever, task, queries, gallery, loading=loading, weights=weights)
    num_frames = retriever.num_frames
    others = [name for name in options.baselines if baseline is None or name != baseline["name"]]
    baselines, failed = run_baselines(others, task, queries, gallery, loading=loading, num_frames=num_frames or 10)
    known = {(failure["kind"], failure["id"]) for failure in failures}
    failures = [{"method": baseline["name"] if baseline else "model", **failure} for failure in failures]
    failures += [failure for failure in failed if (failure["kind"], failure["id"]) not in known]
    train_rows, head_tail = count_training_rows(options, queries)
    results = {
        "protocol": describe_protocol(options, task, scope, rank_by, num_frames, books["embedding"].depth),
        "num_queries": len(task.query_ids),
        "gallery_size": task.gallery_size(),
        "scores": {kind: books[kind].summary() for kind in KINDS if kind in books},
        **asdict(weights),
        "baselines": baselines,
        "by": breakdown(queries, {kind: books[kind] for kind in KINDS if kind in books}, train_rows),
        "head_tail": head_tail,
        "model": options.model or baseline["model"] or baseline["name"],
        "model_sha256": weights_fingerprint(options.model or baseline["model"] or ""),
        "baseline": baseline,
        "parameters": retriever.num_parameters(),
        "dataset": options.dataset,
        "seconds": time.perf_counter() - started,
        "speed": retriever.summary(),
        "failures": failures,
        "ties": {kind: books[kind].tie_summary() for kind in KINDS if kind in books},
        "versions": report.library_versions(),
        "command": command,
    }
    if getattr(getattr(model, "config", None), "text_config", None) is not None:
        results["protocol"]["text"] = {"used": options.text, "score_weight": model.config.text_score_weight}
        results["protocol"]["asr"] = options.asr if options.text else "none"
    if options.boxes == "detector":
        results["protocol"]["detector"] = describe_boxes(options, queries)
    if fusion is not None:
        results["protocol"]["fusion"] = fusion
    return results, task, books, queries, gallery, retriever


def write_files(options, results: dict, task: RetrievalTask, books, queries, gallery, retriever) -> None:
    """Everything that an evaluation leaves in its folder, results.json last."""
    from evaluation_rice.breakdown import can_draw, draw_breakdown
    from evaluation_rice.report import results as report
    from evaluation_rice.report.matches import draw_matches
    from evaluation_rice.study.table import baseline_page
    from hub_rice.model_card import write_model_card

    output, rank_by = Path(options.output_dir), results["protocol"]["rank_by"]
    output.mkdir(parents=True, exist_ok=True)
    shown = books.get(rank_by) or books["embedding"]
    report.write_rankings(output, task, shown)
    report.write_query_ranks(output, {kind: books[kind] for kind in KINDS if kind in books})
    draw_matches(output / "matches.png", task, shown, queries, gallery, rank_by)
    if results["baseline"]:
        report.write_atomically(output / "README.md", baseline_page(results))
    else:
        write_model_card(output, results, run_dir=options.model)
    if options.report:
        write_page(output, results, task, books, queries, gallery, retriever)
    if results["by"] and can_draw():
        draw_breakdown(output / "breakdown.png", results["by"], f"R@1 of {results['model']} by attribute of the clips")
    report.write_results(output, results)


def count_training_rows(options: argparse.Namespace, queries) -> tuple[dict[str, int] | None, dict]:
    """
    Category -> training rows for the breakdown by head and tail; and the rule, or what is missing. The rows are those
    that the model was trained on, or of the data set that is evaluated where no model says.
    """
    from evaluation_rice.breakdown import train_rows_by_category
    from evaluation_rice.protocol import HEAD_TAIL_RULE, head_categories
    from hub_rice.training_record import trained_on

    if "category" not in queries.column_names or not any(queries["category"]):
        return None, {"missing": "the clips know no category"}
    dataset, data_dir = trained_on(options.model) or (options.dataset, options.data_dir)
    source = {"dataset": dataset, "data_dir": data_dir}
    try:
        rows = train_rows_by_category(dataset, data_dir, options.cache_dir)
    except (ValueError, OSError) as error:
        print(f"the training rows of {data_dir or dataset} cannot be counted: {_one_line(error)}")
        return None, {"missing": "the training rows cannot be counted", **source}
    if not rows:
        return None, {"missing": "the training rows know no category", **source}
    record = {"head": sorted(head_categories(rows)), "num_categories": len(rows), "train_rows": sum(rows.values())}
    return rows, {"rule": HEAD_TAIL_RULE, **source, **record}


def write_page(output: Path, results: dict, task: RetrievalTask, books, queries, gallery, retriever) -> None:
    """report.html, with heat maps where the model reconstructs patches."""
    from evaluation_rice.report.heatmap import has_maps, heat_pictures
    from evaluation_rice.report.html_report import Evaluation, write_html_report

    model = getattr(retriever, "model", None)
    heat = partial(heat_pictures, model, retriever.collator) if has_maps(model) else None
    write_html_report(output, Evaluation(results, task, books, queries, gallery, heat))


def print_report(results: dict, gallery: str, output: Path, report: bool = False) -> None:
    """The table, and all that a reader must know to read it."""
    from evaluation_rice.breakdown import can_draw
    from hub_rice.tables import format_table, shown_scores

    print(f"\n{results['num_queries']} clips of {results['dataset']} ({results['protocol']['split']}); {gallery}")
    asr = f"ASR: {results['protocol']['asr']}; " if "asr" in results["protocol"] else ""
    print(f"boxes at test time: {results['protocol']['boxes']}; {asr}recall in percent\n")
    print(format_table(shown_scores(results)))
    if results["fusion_weight"] is not None:
        fusion = results["protocol"]["fusion"]
        print(f"\nfusion weight {results['fusion_weight']:g}: {fusion['source_words']}")
        if fusion["text_weight"] is not None:
            source = "fitted after it" if fusion["source"] == "validation" else "the checkpoint's own"
            print(f"text weight in the fused score {fusion['text_weight']:g}: {source}")
    for kind, tie in results["ties"].items():
        if tie["share"] > 0:
            random = 100 * tie["R@1_ties_at_random"]
            print(f"{100 * tie['share']:.1f} % of the clips are tied by {kind}; R@1 with ties at random: {random:.1f}")
    unreachable = results["protocol"]["queries_without_relevant_in_gallery"]
    if unreachable:
        print(f"{unreachable} clips have no relevant image in their gallery: misses for any method")
    for failure in results["failures"][:5]:
        print(f"not read: {failure['kind']} {failure['id']} {failure['file']} ({failure['reason']})")
    if len(results["failures"]) > 5:
        print(f"... {len(results['failures'])} failures in all, listed in results.json")
    drawn = bool(results["by"]) and can_draw()
    if "missing" in results["head_tail"] and results["by"]:
        print(f"no breakdown by head and tail: {results['head_tail']['missing']}")
    if results["by"] and not drawn:
        print("no breakdown.png: matplotlib, the extra `plot`, is not installed; the figures are in results.json")
    files = ["results.json", "rankings.jsonl", "query_ranks.jsonl", "matches.png", "README.md"]
    files += ["breakdown.png"] * drawn + ["report.html"] * report
    print(f"\nwritten to {output}: {', '.join(files)}")


def _same_folder(one: str, other: str | None) -> bool:
    return other is not None and os.path.realpath(one) == os.path.realpath(other)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def main(arguments: list[str] | None = None) -> None:
    parser, options = parse_arguments(arguments)
    command = shlex.join(["python", "eval_rice.py", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        evaluate(options, command)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {_one_line(error)}\n")


if __name__ == "__main__":
    main()
