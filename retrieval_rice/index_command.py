"""Encode a shop's pictures into an index, which `rice recognise` and `GalleryIndex.load` search.

SHOP is a shop_clips folder (gallery.jsonl), an LPR4M folder, a MovingFashion folder, mini_lpr4m, or any folder of
pictures. The index is a LanceDB table in a folder, or at a URI such as s3://bucket/shop. The same command resumes an
interrupted build. For a changed shop it encodes the changed pictures and deletes missing ones. If the shop, or the
data set of --calibrate, has validation clips, confidences and the "no product" answer are fitted on them. A confidence
is the probability that the answer is right, if the share --presence_prior of the clips show a product of the shop. The
answer is "no product" below a confidence of 0.5, or below the threshold for --false_accept_rate. Under `accelerate
launch` every process encodes its share. Each change is a version: --versions lists those of the last seven days, and
--restore goes back to one; both need only --output.
"""

import argparse
import json
import os

from hub_rice.precision import AUTO, PRECISIONS

from .options import add_precision_and_towers, open_model

_LISTED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("shop", nargs="?", help="folder of the shop's pictures, or mini_lpr4m")
    add("--model", help="checkpoint folder, or the id of a published model")
    add("--output", required=True, metavar="INDEX", help="folder or URI of the index")
    add("--dry_run", action="store_true", help="print the number of images and the estimated cost, and exit")
    add("--versions", action="store_true", help="list the versions of the index, and exit")
    add("--restore", type=int, metavar="N", help="go back to version N of the index, and exit")
    add("--split", default="test", choices=("train", "validation", "test"), help="gallery of a data set to index")
    add("--gallery_images", choices=("main", "all"), help="LPR4M: one image per product (default), or every image")
    add("--data_dir", help="folder of mini_lpr4m, if it is not data/mini_lpr4m")
    add("--cache_dir", help="folder for the cached tables of the data set")
    add("--dtype", default="float16", choices=("float16", "float32"), help="type of encodings (default: %(default)s)")
    add("--batch_size", type=int, help="pictures per batch (default: 16 on a CPU, else 64)")
    add("--num_workers", type=int, help="processes that decode pictures (default: one per four cores; with a GPU, 2)")
    add("--commit_every", type=int, default=2048, help="pictures per commit; limits memory and loss by interruption")
    add_precision_and_towers(parser)
    add("--device", help="such as cpu or cuda; default: cuda if available")
    add("--approximate", choices=("hnsw", "ivfpq", "none"), help="also build an approximate index, for hundreds of "
        "thousands of pictures without livestreams; none: delete it")  # fmt: skip
    add("--calibrate", metavar="DATASET", default="auto", help="data set with validation clips to fit confidences; "
        "auto: the shop's own, none: do not fit (default: %(default)s)")  # fmt: skip
    add("--boxes_file", help="box file of those validation clips (docs/data.md), for an index that is searched "
        "with the boxes of a detector; default: without boxes")  # fmt: skip
    add("--presence_prior", type=float, help="share of clips in use that show a product of the shop (default: 0.9)")
    add("--false_accept_rate", type=float, help="maximum share of clips without their product that get "
        "an answer, such as 0.05; default: answer if more likely right than wrong")  # fmt: skip
    add(
        "--rerank",
        type=int,
        default=100,
        help="pictures per clip that get pair scores (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace an index of another shop or model, or a damaged one")


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        FileNotFoundError: the shop or checkpoint does not exist.
        ValueError: a damaged checkpoint, a malformed shop, no readable picture, or a prior or rate out of its range.
        FileExistsError: the output holds another index.
        OSError: the index cannot be written.
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
    """Checks the options before anything is read."""
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

    model, processor = open_model(options, auto=_precision_there(options.output))
    if options.num_workers is None:
        # On a CPU the cores that encode are those that decode.
        cores = os.cpu_count() or 1
        options.num_workers = cores // 4 if model.device.type == "cpu" else min(2, cores)
    if options.boxes_file is not None and not model.config.accepts_patch_mask:
        raise ValueError(f"--boxes_file: the encoder of {options.model} supports no patch mask; leave it out.")
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
        print(f"{options.approximate}: finds {share:.3f} of the 10 nearest, measured with pictures of the shop")
    _report(index, options.output)
    if left_out:
        print(left_out)


def _precision_there(folder: str) -> str:
    """The precision of the existing index, which new encodings should share; "auto" if there is none."""
    from .index.table import ShopTable

    table = ShopTable(folder)
    try:
        stored = table.snapshot().state.settings.get("precision") if table.exists() else None
    except ValueError:
        # Damage is reported when the index is used.
        stored = None
    return next((name for name, dtype in PRECISIONS.items() if dtype == stored), AUTO)


def shop_rows(options: argparse.Namespace):
    """
    Gallery rows of a data set, and `None`; or gallery rows of a folder of pictures, and a note on the entries left out
    ("" for none).
    """
    from data_rice.folders import picture_rows
    from data_rice.views import DATASETS, builder_of

    if options.shop not in DATASETS:
        if not os.path.isdir(options.shop):
            raise FileNotFoundError(f"there is no folder {options.shop}; name the folder of the shop's pictures.")
        try:
            builder_of(options.shop, None)
        except ValueError:
            return picture_rows(options.shop)
    return gallery_rows(options.shop, options.split, _source(options)), None


def gallery_rows(dataset: str, split: str, source: dict):
    """A data set's gallery, with the product of each picture if its ids contain it."""
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
    """The options for confidences and the "no product" answer."""
    asked = {name: getattr(options, name) for name in ("presence_prior", "false_accept_rate")}
    return {name: value for name, value in asked.items() if value is not None}


def _is_calibrated(index, options: argparse.Namespace) -> bool:
    """Whether the index is calibrated with the same options; the boxes are not recorded."""
    asked = _decision(options)
    return (
        index.calibration is not None
        and options.boxes_file is None
        and asked == {name: getattr(index.calibration, name) for name in asked}
    )


def _calibrate(index, options: argparse.Namespace, is_data_set: bool) -> None:
    """Fits the index's confidences on validation clips, in their own shop if they have one."""
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
        print(f"... {len(skipped)} in total; GalleryIndex.load(...).skipped lists them")
