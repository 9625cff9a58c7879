"""The command line of LPR4M: fetch the pictures, prepare training shards, verify that nothing is missing."""

import argparse
import os
import sys

import datasets

from ..commands import print_anywhere
from ..prepare import PrepareSettings
from .fetch import fetch, fetch_command
from .lpr4m import VIEWS
from .prepare import prepare
from .verify import PUBLISHED_COUNTS, expected_counts, published_list, verify

_EPILOG = """exit status: 0 if everything is complete, 1 if something is missing or damaged (the output names the file
that lists it), 2 if the command cannot run."""
_MEDIA_HELP = "output folders of img2dataset; default: DATA_DIR/img2dataset/*"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _add_fetch(commands) -> None:
    defaults = fetch_command.__kwdefaults__
    parser = commands.add_parser("fetch", help="download the url lists with img2dataset; resumes")
    parser.add_argument("data_dir", help="the data folder; pictures go to DATA_DIR/img2dataset/<list>")
    parser.add_argument(
        "--url_lists", nargs="+", default=[], help="default: DATA_DIR/urls/*.txt, DATA_DIR/*_url_*.txt"
    )
    parser.add_argument("--output_format", choices=("webdataset", "files"), default=defaults["output_format"])
    parser.add_argument("--short_side", type=int, default=defaults["short_side"], help="pixels; 0 keeps the size")
    parser.add_argument("--shard_size", type=_positive, default=defaults["shard_size"], help="pictures per shard")
    for name in ("processes", "threads", "timeout"):
        parser.add_argument(f"--{name}", type=_positive, default=defaults[name], help="default: %(default)s")
    parser.add_argument("--retries", type=int, default=defaults["retries"], help="default: %(default)s")
    parser.add_argument("--img2dataset", help="the program to run; default: installed, or in .venv-img2dataset")
    parser.add_argument("--install_img2dataset", action="store_true", help="install it into .venv-img2dataset")
    parser.add_argument("--dry_run", action="store_true", help="print the commands only")


def _add_prepare(commands) -> None:
    defaults = PrepareSettings()
    parser = commands.add_parser("prepare", help="write shards with few, small frames; resumes")
    parser.add_argument("data_dir", help="the data folder")
    parser.add_argument("output_dir", help="the folder to write")
    parser.add_argument("--views", nargs="+", choices=VIEWS, default=["pairs", "query", "gallery"])
    parser.add_argument("--splits", nargs="+", default=["train", "validation", "test"])
    parser.add_argument("--num_frames", type=int, default=defaults.num_frames, help="per clip, 0 keeps all")
    parser.add_argument("--short_side", type=int, default=defaults.short_side, help="pixels, 0 keeps all sizes")
    parser.add_argument("--quality", type=int, default=defaults.quality, help="JPEG quality of reduced pictures")
    parser.add_argument("--rows_per_shard", type=int, default=defaults.rows_per_shard)
    parser.add_argument("--file_format", choices=("parquet", "tar"), default=defaults.file_format)
    parser.add_argument("--num_workers", type=_positive, default=1, help="processes")
    parser.add_argument("--train_files", help="file name pattern of the training list in annotations/")
    parser.add_argument("--subset", type=_positive, help="training rows to keep; thins the largest categories")
    parser.add_argument("--subset_seed", type=int)
    held = parser.add_mutually_exclusive_group()
    held.add_argument("--validation_fraction", type=float, help="share of the training livestreams to hold out")
    held.add_argument("--validation_lives", type=int, help="number of training livestreams to hold out")
    parser.add_argument("--gallery_images", choices=("main", "all"))
    parser.add_argument("--media_dirs", nargs="+", help=_MEDIA_HELP)
    parser.add_argument("--cache_dir", help="folder for Arrow files; default: that of datasets")


def _add_verify(commands) -> None:
    parser = commands.add_parser("verify", help="count, read, decode and hash everything")
    parser.add_argument("data_dir", help="the data folder")
    parser.add_argument("--output_dir", help="the folder for the reports (default: DATA_DIR/verify)")
    parser.add_argument(
        "--expect",
        help=f"expected counts: {', '.join(PUBLISHED_COUNTS)}, or a .json file with other counts; default: by the "
        "file names of the training list",
    )
    parser.add_argument("--no_decode", action="store_true", help="read and hash pictures without decoding them")
    parser.add_argument("--num_workers", type=_positive, default=4, help="threads")
    parser.add_argument("--train_files", default="training_videoinfo*.txt", help="the training list in annotations/")
    parser.add_argument("--media_dirs", nargs="+", help=_MEDIA_HELP)
    parser.add_argument("--cache_dir", help="folder for the index of shards; default: that of datasets")


def _run_fetch(options: dict) -> int:
    results = fetch(**options)
    failed = 0
    for url_list, counts in results.items():
        print(f"{url_list}: {counts['successes']} of {counts['count']} pictures fetched, {counts['failed']} failed")
        failed += counts["failed"]
    if failed:
        print("img2dataset does not retry failed urls; `verify` lists them for another fetch.")
    return int(failed > 0)


def _run_prepare(options: dict) -> int:
    names = ("num_frames", "short_side", "quality", "rows_per_shard", "file_format")
    settings = PrepareSettings(**{name: options.pop(name) for name in names})
    output_dir = options["output_dir"]
    builder = ("train_files", "subset", "subset_seed", "validation_fraction", "validation_lives", "gallery_images")
    for name in (*builder, "media_dirs"):
        if options[name] is None:
            del options[name]
    manifest = prepare(**options, settings=settings)
    lost = 0
    for view, splits in manifest["views"].items():
        for split, counts in splits.items():
            print(f"{view} {split}: {counts['kept']} of {counts['rows']} rows in {counts['shards']} shards")
            for what, number in counts["lost"].items():
                print(f"  unreadable: {number} {what}")
                lost += number
    if lost:
        print(f"{os.path.join(output_dir, 'dropped.jsonl')} lists the unreadable media.")
    return int(lost > 0)


def _run_verify(options: dict) -> int:
    expect, no_decode = options.pop("expect"), options.pop("no_decode")
    if expect is None:
        expect = published_list(options["data_dir"], options["train_files"])
        print(f"expected counts, chosen by the file names of the training list: {expect}")
    expected = expected_counts(expect)
    output_dir = options.pop("output_dir") or os.path.join(options["data_dir"], "verify")
    cache_dir = options.pop("cache_dir") or str(datasets.config.HF_DATASETS_CACHE)
    result = verify(output_dir=output_dir, expected=expected, cache_dir=cache_dir, decode=not no_decode, **options)
    for name, value in result.counts.items():
        note = f" (expected {result.expected[name]})" if name in result.differences else ""
        print(f"{name}: {value}{note}")
    for name in result.expected.keys() - result.counts.keys():
        print(f"{name}: none (expected {result.expected[name]})")
    for kind, number in result.bad.items():
        print(f"{number} {kind}")
    where = f"; see {os.path.join(output_dir, 'missing.jsonl')}" if result.bad else ""
    print("complete" if result.whole else f"not complete{where}")
    return 0 if result.whole else 1


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    print_anywhere()
    parser = argparse.ArgumentParser(
        prog="python -m data_rice.lpr4m", description=__doc__.splitlines()[0], epilog=_EPILOG
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_fetch, _add_prepare, _add_verify):
        add(commands)
    options = vars(parser.parse_args(arguments))
    run = {"fetch": _run_fetch, "prepare": _run_prepare, "verify": _run_verify}[options.pop("command")]
    try:
        return run(options)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; run the same command again to continue.", file=sys.stderr)
        return 130
