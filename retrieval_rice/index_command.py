"""Encode a shop's pictures into an index, which `rice recognise` and `GalleryIndex.load` search.

SHOP is a shop_clips folder (gallery.jsonl), an LPR4M folder, a MovingFashion folder, mini_lpr4m, or any folder of
pictures. The same command again goes on where it was interrupted. Where the shop has validation clips, or --calibrate
names a data set that has, confidences and the "no product" answer are fitted on them. A confidence is the probability
that the answer is right where --presence_prior of the clips show a product of the shop; below 0.5 the answer is "no
product", or below what --false_accept_rate asks for. Under `accelerate launch` every process encodes its share.
"""

import argparse
import json
import os
from pathlib import Path

_LISTED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("shop", help="folder of the shop's pictures, or mini_lpr4m")
    add("--model", required=True, help="checkpoint folder, or the id of a published model")
    add("--output", required=True, type=Path, help="folder of the index")
    add("--split", default="test", choices=("train", "validation", "test"), help="gallery of a data set to take")
    add("--gallery_images", choices=("main", "all"), help="LPR4M: one image per product (default), or every image")
    add("--data_dir", help="folder of mini_lpr4m, where it is not data/mini_lpr4m")
    add("--cache_dir", help="where the data set's tables are cached")
    add("--dtype", default="float16", choices=("float16", "float32"), help="of the encodings (default: %(default)s)")
    add("--batch_size", type=int, default=64, help="pictures per batch (default: %(default)s)")
    add("--num_workers", type=int, default=min(2, os.cpu_count() or 1), help="processes that decode pictures")
    add("--shard_size", type=int, default=8192, help="pictures per file, which bounds the memory")
    add("--device", help="such as cpu or cuda; default: cuda where there is one")
    add("--approximate", choices=("hnsw", "ivfpq"), help="also build a FAISS index, for hundreds of thousands")
    add("--calibrate", metavar="DATASET", default="auto", help="data set whose validation clips to fit confidences "
        "on; auto: the shop's own, none: do not (default: %(default)s)")  # fmt: skip
    add("--boxes_file", help="box file of those validation clips (docs/data.md), for an index that will be searched "
        "with the boxes of a detector; default: without boxes")  # fmt: skip
    add("--presence_prior", type=float, help="share of clips in use that show a product of the shop (default: 0.9)")
    add("--false_accept_rate", type=float, help="be strict: share of clips without their product that may be "
        "answered with one, such as 0.05; default: answer what is likelier right than wrong")  # fmt: skip
    add("--rerank", type=int, default=100, help="pictures per clip that the decoder scores (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace an index of another shop or model")
    add("--qdrant", metavar="URL", help="also upload the index to a Qdrant server, or a folder of its embedded engine")
    add("--collection", default="rice", help="name of the collection there (default: %(default)s)")
    add("--quantization", choices=("int8", "product"), help="of a new collection on a server")


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        FileNotFoundError: no such shop or checkpoint.
        ValueError: a damaged checkpoint, a malformed shop, not one readable picture, or a prior or rate outside its
            range.
        FileExistsError: the output is an index of something else.
        OSError: it cannot be written.
    """
    from hub_rice.loading import load_model

    from .calibration import check_decision
    from .index import GalleryIndex
    from .index_build import process_group

    check_decision(options.presence_prior, options.false_accept_rate)
    if options.calibrate == "none" and _decision(options):
        raise ValueError(
            "--presence_prior and --false_accept_rate belong to a calibration; leave out --calibrate none."
        )
    if options.calibrate == "none" and options.boxes_file is not None:
        raise ValueError("--boxes_file belongs to a calibration; leave out --calibrate none.")
    rows, left_out = shop_rows(options)
    model, processor = load_model(options.model, options.device)
    if options.boxes_file is not None and not model.config.accepts_patch_mask:
        raise ValueError(f"--boxes_file: the encoder of {options.model} takes no patch mask; leave it out.")
    index = GalleryIndex.build(
        model,
        processor,
        rows,
        batch_size=options.batch_size,
        output_dir=options.output,
        num_workers=options.num_workers,
        dtype=options.dtype,
        shard_size=options.shard_size,
        overwrite=options.overwrite,
    )
    if process_group()[0] > 0:
        return
    changed = False
    if options.calibrate != "none" and not (options.calibrate == "auto" and _is_calibrated(index, options)):
        changed = _calibrate(index, options, is_data_set=left_out is None)
    if options.approximate:
        index.approximate(options.approximate)
        changed = True
    if changed:
        index.save(options.output)
    _report(index, options.output)
    if left_out:
        print(left_out)
    if options.qdrant:
        _upload(index, options)


def shop_rows(options: argparse.Namespace):
    """
    Gallery rows of a data set, and `None`; or of a folder of pictures, and a note on what was left out of it, "" for
    nothing.
    """
    from data_rice.views import DATASETS, prepared_folder, resolve

    if options.shop not in DATASETS:
        if not os.path.isdir(options.shop):
            raise FileNotFoundError(f"there is no folder {options.shop}; name the one that holds the shop's pictures.")
        try:
            known = prepared_folder(options.shop, None) or resolve(options.shop, None)
        except ValueError:
            known = None
        if known is None:
            return folder_rows(Path(options.shop))
    return gallery_rows(options.shop, options.split, _source(options)), None


def gallery_rows(dataset: str, split: str, source: dict):
    """A data set's gallery, with the product of each picture where its ids tell."""
    from data_rice import Lpr4m, load_dataset_view
    from data_rice.lpr4m.layout import product_id_of
    from data_rice.views import prepared_folder, resolve

    rows = load_dataset_view(dataset, "gallery", split, **source)
    data_dir = source.get("data_dir")
    if prepared_folder(dataset, data_dir) is None and resolve(dataset, data_dir)[0] is Lpr4m:
        return rows.add_column("product_id", [product_id_of(image_id) for image_id in rows["image_id"]])
    return rows


def _source(options: argparse.Namespace) -> dict:
    return {
        "data_dir": options.data_dir,
        "cache_dir": options.cache_dir,
        "gallery_images": options.gallery_images,
    }


def folder_rows(folder: Path) -> tuple[list[dict], str]:
    """
    The pictures below a folder, named after their place in it, and a note on what was left out.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a link leads out of the folder.
    """
    from data_rice.folders import list_pictures
    from data_rice.paths import path_to_text

    listing, rows = list_pictures(folder, below=True), []
    for path in map(Path, listing.pictures):
        # No table holds bytes that are no UTF-8, and a title is for people.
        title = os.fsencode(path.stem).decode("utf-8", "replace").replace("_", " ")
        image_id = path_to_text(path.relative_to(folder).as_posix())
        rows.append({"image_id": image_id, "title": title, "image": str(path)})
    if not rows:
        left_out = f" ({listing.note()})" if listing.left_out else ""
        raise FileNotFoundError(
            f"{folder} has neither pictures nor the files of a data set{left_out}; docs/data.md shows what a shop "
            "looks like."
        )
    return rows, listing.note()


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


def _calibrate(index, options: argparse.Namespace, is_data_set: bool) -> bool:
    """Fits the index's confidences on validation clips, in a shop of their own where they have one."""
    from data_rice import load_dataset_view

    from .index import GalleryIndex

    dataset, source = options.calibrate, {"cache_dir": options.cache_dir}
    again = "" if index.calibration is None else " again"
    if dataset == "auto":
        if not is_data_set:
            print(f"confidences are not calibrated{again}: a folder of pictures has no clips; see --calibrate.")
            return False
        dataset, source = options.shop, _source(options)
    try:
        boxes = {} if options.boxes_file is None else {"boxes_file": options.boxes_file}
        queries = load_dataset_view(dataset, "queries", "validation", **source, **boxes)
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
        return False
    index.calibration = shop.calibration
    unreadable = report.pop("unreadable")
    if unreadable:
        print(f"{len(unreadable)} validation clips could not be read, such as {unreadable[0]['id']}.")
    print(f"calibrated on {dataset}: {json.dumps(report)}")
    return True


def _report(index, folder: Path) -> None:
    lives = len(index.live_ids())
    where = f" of {lives} livestreams" if lives else ""
    print(f"{folder}: {len(index)} pictures{where}; {len(index.skipped)} could not be read")
    for failure in index.skipped[:_LISTED]:
        print(f"not read: {failure['id']} {failure['file']} ({failure['reason']})")
    if len(index.skipped) > _LISTED:
        print(f"... {len(index.skipped)} in all; GalleryIndex.load(...).skipped lists them")


def _upload(index, options: argparse.Namespace) -> None:
    from .index_qdrant import QdrantStore

    store = QdrantStore(options.qdrant, options.collection, index.model, quantization=options.quantization)
    try:
        store.upload(index.store)
        print(f"{options.qdrant}: the collection {options.collection} has {len(store)} pictures")
    finally:
        store.close()
