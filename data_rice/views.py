"""Loads one view of a data set by its name or folder."""

import os

import datasets

from .box_files import with_boxes_of
from .builder import ViewBuilder
from .detection import frames_with_boxes
from .features import VIEWS, view_name
from .lpr4m import Lpr4m
from .moving_fashion import MovingFashion
from .prepare import is_prepared, load_prepared, read_manifest
from .published import is_published, load_published, published_scope
from .shop_clips import ShopClips, carries_live_ids

DATASETS = ("mini_lpr4m", "lpr4m", "moving_fashion", "shop_clips")
DATASET_NAMES = ", ".join(DATASETS)
"""For messages and help texts."""
_BUILDERS = {"lpr4m": Lpr4m, "moving_fashion": MovingFashion, "shop_clips": ShopClips}
MINI_LPR4M_DIR = os.path.join("data", "mini_lpr4m")
MINI_LPR4M_MANIFEST = "mini_lpr4m.json"

# Three of the 27 training rooms of the renderer's default settings.
_MINI_VALIDATION_FRACTION = 1 / 9


def resolve(dataset: str, data_dir: str | os.PathLike | None) -> tuple[type[ViewBuilder], str, dict]:
    """Return the builder class, the data folder and the default options for ``dataset``."""
    dataset = os.fspath(dataset)
    if dataset == "mini_lpr4m":
        folder = os.fspath(data_dir or MINI_LPR4M_DIR)
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"{folder} does not exist; render it with: python -m data_rice.mini_lpr4m --output_dir {folder}"
            )
        return Lpr4m, folder, {"validation_fraction": _MINI_VALIDATION_FRACTION}
    if dataset in _BUILDERS:
        if data_dir is None:
            raise ValueError(f"The data set {dataset} needs data_dir; pass the folder that holds it.")
        return _BUILDERS[dataset], os.fspath(data_dir), {}
    if not os.path.isdir(dataset):
        raise FileNotFoundError(
            f"{dataset!r} is neither a data set ({DATASET_NAMES}), nor a folder, nor an id on the Hub such as "
            "someone/mini-lpr4m; check the spelling."
        )
    if data_dir is not None and os.path.realpath(data_dir) != os.path.realpath(dataset):
        raise ValueError(f"The data set {dataset!r} is a folder, but data_dir names {data_dir!r}; pass one of them.")
    if os.path.isfile(os.path.join(dataset, "gallery.jsonl")):
        return ShopClips, dataset, {}
    if os.path.isfile(os.path.join(dataset, MINI_LPR4M_MANIFEST)):
        return Lpr4m, dataset, {"validation_fraction": _MINI_VALIDATION_FRACTION}
    if os.path.isdir(os.path.join(dataset, "annotations")):
        return Lpr4m, dataset, {}
    if all(os.path.exists(os.path.join(dataset, name)) for name in ("train.json", "test.json", "imgs")):
        return MovingFashion, dataset, {}
    raise ValueError(
        f"{dataset} holds neither gallery.jsonl (shop_clips), annotations/ (lpr4m) nor train.json, test.json and "
        "imgs/ (moving_fashion); docs/data.md shows all three."
    )


def prepared_folder(dataset: str | os.PathLike, data_dir: str | os.PathLike | None) -> str | None:
    """Return the folder if `prepare_views` wrote it, else None."""
    folder = os.fspath(dataset if data_dir is None else data_dir)
    return folder if is_prepared(folder) else None


def builder_of(dataset: str | os.PathLike, data_dir: str | os.PathLike | None) -> type[ViewBuilder] | None:
    """Return the builder class of a data set; None for prepared and published data sets, whose rows are stored.

    Raises:
        FileNotFoundError, ValueError: as `resolve`.
    """
    if prepared_folder(dataset, data_dir) is not None or is_published(dataset, data_dir):
        return None
    return resolve(dataset, data_dir)[0]


def load_dataset_view(
    dataset: str | os.PathLike,
    view: str,
    split: str,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    boxes_file: str | os.PathLike | None = None,
    **builder_options,
) -> datasets.Dataset:
    """Build, or reuse from the cache, one view of a data set.

    Args:
        dataset: "mini_lpr4m", "lpr4m", "moving_fashion" or "shop_clips"; a folder in one of their layouts; a folder
            that `prepare_views` wrote; or a published data set, by its id on the Hub or its folder.
        view: "pairs" (training), "query", "gallery", or "detection" (single frames with their boxes).
        split: "train", "validation" or "test".
        data_dir: the folder that holds the data; "data/mini_lpr4m" when None and ``dataset`` is "mini_lpr4m".
        cache_dir: folder of the Arrow files; the default of `datasets` when None.
        boxes_file: a box file, such as ``python -m retrieval_rice.detector run`` writes. Its boxes replace those of
            the rows; see `data_rice.box_files`. Gallery rows have no boxes and do not change.
        builder_options: options such as ``validation_fraction``, see `Lpr4mConfig` and `MovingFashionConfig`; None
            means the default.

    Raises:
        FileNotFoundError: the folder or an annotation file is missing.
        ValueError: an argument is unknown, the split is missing or has no usable row, or a row is malformed.
    """
    view = view_name(view)
    if view not in VIEWS:
        raise ValueError(f"There is no view {view!r}; choose one of {', '.join(VIEWS)}.")
    if split not in ("train", "validation", "test"):
        raise ValueError(f"There is no split {split!r}; choose one of train, validation, test.")
    given = {name: value for name, value in builder_options.items() if value is not None}
    if cache_dir is not None and os.path.exists(cache_dir) and not os.path.isdir(cache_dir):
        raise ValueError(f"cache_dir {cache_dir} is a file; name a folder.")
    prepared = prepared_folder(dataset, data_dir)
    if prepared is not None:
        rows = load_prepared(prepared, view, split, cache_dir, given)
        return _replace_boxes(rows, view, split, boxes_file)
    published = is_published(dataset, data_dir)
    builder_class, folder, options = (None, "", {}) if published else resolve(dataset, data_dir)
    options.update(given)
    # Only LPR4M has its own detection rows; for other data sets they come from the frames of the pairs.
    from_pairs = view == "detection" and (published or view not in [c.name for c in builder_class.BUILDER_CONFIGS])
    source_view = "pairs" if from_pairs else view
    if published:
        rows = load_published(dataset, data_dir, source_view, split, cache_dir, given)
    else:
        rows = _build(builder_class, folder, source_view, split, cache_dir, options)
    rows = _replace_boxes(rows, source_view, split, boxes_file)
    if from_pairs:
        rows = frames_with_boxes(rows, split)
        if len(rows) == 0:
            raise ValueError(f"{folder or dataset} has no frame with a box in the {split} split of pairs; add boxes.")
    return rows


def _build(builder_class, folder: str, view: str, split: str, cache_dir, options: dict) -> datasets.Dataset:
    builder = builder_class(view, cache_dir=cache_dir, data_dir=folder, **options)
    builder.download_and_prepare()
    if split not in builder.info.splits:
        raise ValueError(builder.missing_split_reason(split))
    if builder.info.splits[split].num_examples == 0:
        log = builder.problems.get(split)
        reasons = "; ".join(f"{count} rows {reason}" for reason, count in log.counts.items()) if log else "no row"
        raise ValueError(f"{folder} has no usable row in the {split} split of {view} ({reasons}); add some.")
    return builder.as_dataset(split=split)


def _replace_boxes(rows: datasets.Dataset, view: str, split: str, boxes_file) -> datasets.Dataset:
    if boxes_file is None or view == "gallery":
        return rows
    if view == "detection":
        raise ValueError("The detection rows of this data set have their own boxes; leave boxes_file out.")
    return with_boxes_of(rows, boxes_file, split)


def gallery_scope(dataset: str | os.PathLike, data_dir: str | os.PathLike | None = None) -> str:
    """Return the gallery of a query: "live" (the images of its livestream) or "all" (the whole gallery).

    It is "live" for LPR4M and "all" for MovingFashion. For shop_clips it is "all", unless the gallery rows have a
    ``live_id``; this needs the folder.

    Raises:
        FileNotFoundError, ValueError: as `load_dataset_view`.
    """
    prepared = prepared_folder(dataset, data_dir)
    if prepared is not None:
        return read_manifest(prepared)["gallery_scope"]
    if is_published(dataset, data_dir):
        return published_scope(dataset, data_dir)
    if os.fspath(dataset) in ("mini_lpr4m", "lpr4m"):
        return "live"
    if os.fspath(dataset) == "moving_fashion" or (os.fspath(dataset) == "shop_clips" and data_dir is None):
        return "all"
    builder_class, folder, _ = resolve(dataset, data_dir)
    if builder_class is not ShopClips:
        return "live" if builder_class is Lpr4m else "all"
    return "live" if carries_live_ids(folder) else "all"
