"""Encode a shop's pictures into an index, which `rice recognise` and `GalleryIndex.load` search.

SHOP is a shop_clips folder (gallery.jsonl), an LPR4M folder, a MovingFashion folder, mini_lpr4m, or any folder of
pictures; the index is a LanceDB table in a folder, or at a URI such as s3://bucket/shop. The same command again goes
on where it was interrupted, and in a shop that changed it encodes the pictures that changed, and deletes those that
are gone. Where the shop has validation clips, or --calibrate names a data set that has, confidences and the "no
product" answer are fitted on them. A confidence is the probability that the answer is right where --presence_prior of
the clips show a product of the shop; below 0.5 the answer is "no product", or below what --false_accept_rate asks for.
Under `accelerate launch` every process encodes its share. Each change is a version: --versions lists those of the last
seven days, and --restore goes back to one; both need --output alone.
"""

import argparse
import json
import os

from hub_rice.precision import AUTO, PRECISIONS

from .options import add_precision_and_towers, load_encoder

_LISTED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("shop", nargs="?", help="folder of the shop's pictures, or mini_lpr4m")
    add("--model", help="checkpoint folder, or the id of a published model")
    add("--output", required=True, metavar="INDEX", help="folder or URI of the index")
    add("--dry_run", action="store_true", help="tell how many images there are and what they will take, and end")
    add("--versions", action="store_true", help="list the versions of the index, and end")
    add("--restore", type=int, metavar="N", help="go back to version N of the index, and end")
    add("--split", default="test", choices=("train", "validation", "test"), help="gallery of a data set to take")
    add("--gallery_images", choices=("main", "all"), help="LPR4M: one image per product (default), or every image")
    add("--data_dir", help="folder of mini_lpr4m, where it is not data/mini_lpr4m")
    add("--cache_dir", help="where the data set's tables are cached")
    add("--dtype", default="float16", choices=("float16", "float32"), help="of the encodings (default: %(default)s)")
    add("--batch_size", type=int, default=64, help="pictures per batch (default: %(default)s)")
    add("--num_workers", type=int, default=min(2, os.cpu_count() or 1), help="processes that decode pictures")
    add("--commit_every", type=int, default=2048, help="pictures per commit: memory, and what an interruption costs")
    add_precision_and_towers(parser)
    add("--device", help="such as cpu or cuda; default: cuda where there is one")
    add("--approximate", choices=("hnsw", "ivfpq", "none"), help="also build an approximate index, for hundreds of "
        "thousands of pictures that are searched as one; none: drop it")  # fmt: skip
    add("--calibrate", metavar="DATASET", default="auto", help="data set whose validation clips to fit confidences "
        "on; auto: the shop's own, none: do not (default: %(default)s)")  # fmt: skip
    add("--boxes_file", help="box file of those validation clips (docs/data.md), for an index that will be searched "
        "with the boxes of a detector; default: without boxes")  # fmt: skip
    add("--presence_prior", type=float, help="share of clips in use that show a product of the shop (default: 0.9)")
    add("--false_accept_rate", type=float, help="be strict: share of clips without their product that may be "
        "answered with one, such as 0.05; default: answer what is likelier right than wrong")  # fmt: skip
    add(
        "--rerank",
        type=int,
        default=100,
        help="pictures per clip that are scored in pairs with it (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace an index of another shop or model, or a damaged one")


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        FileNotFoundError: no such shop or checkpoint.
        ValueError: a damaged checkpoint, a malformed shop, not one readable picture, or a prior or rate outside its
            range.
        FileExistsError: the output is an index of something else.
        OSError: it cannot be written.
    """
    from .index.table import ShopTable

    if options.versions or options.restore is not None:
        _show_versions(ShopTable(options.output), options)
        return
    if options.shop is None or options.model is None:
        raise ValueError("name the shop to index, and the model with --model.")
    _check(options)
    _build(options, *shop_rows(options))


def _check(options: argparse.Namespace) -> None:
    """What can be wrong with the options alone, before anything is read."""
    from .index.calibration import check_decision, check_depth

    check_decision(options.presence_prior, options.false_accept_rate)
    check_depth("--rerank", options.rerank)
    if options.calibrate == "none" and _decision(options):
        raise ValueError(
            "--presence_prior and --false_accept_rate belong to a calibration; leave out --calibrate none."
        )
    if options.calibrate == "none" and options.boxes_file is not None:
        raise ValueError("--boxes_file belongs to a calibration; leave out --calibrate none.")


def _show_versions(table, options: argparse.Namespace) -> None:
    if options.restore is not None:
        table.restore(options.restore)
        print(f"{options.output}: version {options.restore} is restored, as version {table.version}")
    if options.versions:
        for version in table.versions():
            print(f"version {version.number}  {version.time:%Y-%m-%d %H:%M:%S}  {version.rows:,} pictures")


def _build(options: argparse.Namespace, rows, left_out: str | None) -> None:
    from .index import GalleryIndex
    from .index.build import ShopEncoder, process_group
    from .index.job import estimate
    from .index.table import ShopTable

    model, processor = load_encoder(options, auto=_precision_there(options.output))
    if options.boxes_file is not None and not model.config.accepts_patch_mask:
        raise ValueError(f"--boxes_file: the encoder of {options.model} takes no patch mask; leave it out.")
    is_first = process_group()[0] == 0
    if is_first:
        encoder = ShopEncoder(model, processor, options.batch_size, dtype=options.dtype)
        print(f"{options.shop}: {estimate(ShopTable(options.output), encoder, rows)}", flush=True)
    if options.dry_run:
        return
    index = GalleryIndex.build(
        model,
        processor,
        rows,
        batch_size=options.batch_size,
        output_dir=options.output,
        num_workers=options.num_workers,
        dtype=options.dtype,
        commit_every=options.commit_every,
        overwrite=options.overwrite,
    )
    if not is_first:
        return
    if options.calibrate != "none" and not (options.calibrate == "auto" and _is_calibrated(index, options)):
        _calibrate(index, options, is_data_set=left_out is None)
    if options.approximate == "none":
        index.approximate(None)
    elif options.approximate and index.approximate_kind != options.approximate:
        share = index.approximate(options.approximate)
        print(f"{options.approximate}: {share:.3f} of the 10 nearest are found, for pictures of the shop itself")
    _report(index, options.output)
    if left_out:
        print(left_out)


def _precision_there(folder: str) -> str:
    """That of the index that is there, which what is added should share; "auto" where there is none."""
    from .index.table import ShopTable

    table = ShopTable(folder)
    try:
        stored = table.snapshot().state.settings.get("precision") if table.exists() else None
    except ValueError:
        # What is damaged is told when it is to be used.
        stored = None
    return next((name for name, dtype in PRECISIONS.items() if dtype == stored), AUTO)


def shop_rows(options: argparse.Namespace):
    """
    Gallery rows of a data set, and `None`; or of a folder of pictures, and a note on what was left out of it, "" for
    nothing.
    """
    from data_rice.folders import picture_rows
    from data_rice.views import DATASETS, builder_of

    if options.shop not in DATASETS:
        if not os.path.isdir(options.shop):
            raise FileNotFoundError(f"there is no folder {options.shop}; name the one that holds the shop's pictures.")
        try:
            builder_of(options.shop, None)
        except ValueError:
            return picture_rows(options.shop)
    return gallery_rows(options.shop, options.split, _source(options)), None


def gallery_rows(dataset: str, split: str, source: dict):
    """A data set's gallery, with the product of each picture where its ids tell."""
    from data_rice import Lpr4m, load_dataset_view
    from data_rice.lpr4m.layout import product_id_of
    from data_rice.views import builder_of

    rows = load_dataset_view(dataset, "gallery", split, **source)
    data_dir = source.get("data_dir")
    if builder_of(dataset, data_dir) is Lpr4m:
        return rows.add_column("product_id", [product_id_of(image_id) for image_id in rows["image_id"]])
    return rows


def _source(options: argparse.Namespace) -> dict:
    return {
        "data_dir": options.data_dir,
        "cache_dir": options.cache_dir,
        "gallery_images": options.gallery_images,
    }


def _decision(options: argparse.Namespace) -> dict:
    """What was asked for of the confidences and the "no product" answer."""
    asked = {name: getattr(options, name) for name in ("presence_prior", "false_accept_rate")}
    return {name: value for name, value in asked.items() if value is not None}


def _is_calibrated(index, options: argparse.Namespace) -> bool:
    """Whether the index was calibrated before, as it is asked for now; with which boxes is not kept."""
    asked = _decision(options)
    return (
        index.calibration is not None
        and options.boxes_file is None
        and asked == {name: getattr(index.calibration, name) for name in asked}
    )


def _calibrate(index, options: argparse.Namespace, is_data_set: bool) -> None:
    """Fits the index's confidences on validation clips, in a shop of their own where they have one."""
    from data_rice import load_dataset_view

    from .index import GalleryIndex

    dataset, source = options.calibrate, {"cache_dir": options.cache_dir}
    again = "" if index.calibration is None else " again"
    if dataset == "auto":
        if not is_data_set:
            print(f"confidences are not calibrated{again}: a folder of pictures has no clips; see --calibrate.")
            return
        dataset, source = options.shop, _source(options)
    try:
        boxes = {} if options.boxes_file is None else {"boxes_file": options.boxes_file}
        queries = load_dataset_view(dataset, "query", "validation", **source, **boxes)
        gallery = load_dataset_view(dataset, "gallery", "validation", **source)
        reading = {"batch_size": options.batch_size, "num_workers": options.num_workers}
        shop = GalleryIndex.build(index.model, index.processor, gallery, dtype=options.dtype, **reading)
        report = shop.calibrate(
            queries,
            **_decision(options),
            rerank=options.rerank,
            use_boxes=bool(boxes),
            num_workers=options.num_workers,
        )
    except (ValueError, FileNotFoundError) as error:
        if options.calibrate != "auto" or options.boxes_file is not None:
            raise
        print(f"confidences are not calibrated{again}: {error}")
        return
    index.calibration = shop.calibration
    unreadable = report.pop("unreadable")
    if unreadable:
        print(f"{len(unreadable)} validation clips could not be read, such as {unreadable[0]['id']}.")
    print(f"calibrated on {dataset}: {json.dumps(report, allow_nan=False)}")


def _report(index, folder: str) -> None:
    lives = len(index.live_ids())
    where = f" of {lives} livestreams" if lives else ""
    skipped = index.skipped
    print(f"{folder}: {len(index)} pictures{where}; {len(skipped)} could not be read; version {index.version}")
    for failure in skipped[:_LISTED]:
        print(f"not read: {failure['id']} {failure['file']} ({failure['reason']})")
    if len(skipped) > _LISTED:
        print(f"... {len(skipped)} in all; GalleryIndex.load(...).skipped lists them")
