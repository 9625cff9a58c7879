"""One call from a data set's name, or its folder, to one view of it."""

import os

import datasets

from .builder import ViewBuilder
from .features import VIEWS
from .lpr4m import Lpr4m
from .shop_clips import ShopClips, carries_live_ids

DATASETS = ("mini_lpr4m", "lpr4m", "shop_clips")
MINI_LPR4M_DIR = os.path.join("data", "mini_lpr4m")
MINI_LPR4M_MANIFEST = "mini_lpr4m.json"

# Three of the 27 rooms that the renderer's default settings put into the training list.
_MINI_VALIDATION_FRACTION = 1 / 9


def _resolve(dataset: str, data_dir: str | os.PathLike | None) -> tuple[type[ViewBuilder], str, dict]:
    """Return the builder class, the data folder and the options that ``dataset`` implies."""
    dataset = os.fspath(dataset)
    if dataset == "mini_lpr4m":
        folder = os.fspath(data_dir or MINI_LPR4M_DIR)
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"{folder} does not exist; render it with: python -m data_rice.mini_lpr4m --output_dir {folder}"
            )
        return Lpr4m, folder, {"validation_fraction": _MINI_VALIDATION_FRACTION}
    if dataset in ("lpr4m", "shop_clips"):
        if data_dir is None:
            raise ValueError(f"The data set {dataset} needs data_dir; pass the folder that holds it.")
        return (Lpr4m if dataset == "lpr4m" else ShopClips), os.fspath(data_dir), {}
    if not os.path.isdir(dataset):
        raise FileNotFoundError(
            f"{dataset!r} is neither a data set ({', '.join(DATASETS)}) nor a folder; check the spelling."
        )
    if data_dir is not None and os.path.realpath(data_dir) != os.path.realpath(dataset):
        raise ValueError(f"The data set {dataset!r} is a folder and data_dir names {data_dir!r}; pass one of them.")
    if os.path.isfile(os.path.join(dataset, "gallery.jsonl")):
        return ShopClips, dataset, {}
    if os.path.isfile(os.path.join(dataset, MINI_LPR4M_MANIFEST)):
        return Lpr4m, dataset, {"validation_fraction": _MINI_VALIDATION_FRACTION}
    if os.path.isdir(os.path.join(dataset, "annotations")):
        return Lpr4m, dataset, {}
    raise ValueError(
        f"{dataset} holds neither gallery.jsonl (shop_clips) nor annotations/ (lpr4m); docs/data.md shows both."
    )


def load_dataset_view(
    dataset: str | os.PathLike,
    view: str,
    split: str,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    **builder_options,
) -> datasets.Dataset:
    """Build, or reuse from the cache, one view of a data set.

    Args:
        dataset: "mini_lpr4m", "lpr4m", "shop_clips", or a folder in one of their layouts.
        view: "pairs" (training), "queries" or "gallery".
        split: "train", "validation" or "test".
        data_dir: the folder that holds the data; "data/mini_lpr4m" when None and ``dataset`` is "mini_lpr4m".
        cache_dir: where the Arrow files go; the default of `datasets` when None.
        builder_options: see `Lpr4mConfig`, such as ``validation_fraction``; None means the default.

    Raises:
        FileNotFoundError: the folder or an annotation file is missing.
        ValueError: an argument is unknown, the data set has no such split or no usable row in it, or a row
            is malformed.
    """
    if view not in VIEWS:
        raise ValueError(f"There is no view {view!r}; choose one of {', '.join(VIEWS)}.")
    if split not in ("train", "validation", "test"):
        raise ValueError(f"There is no split {split!r}; choose one of train, validation, test.")
    builder_class, folder, options = _resolve(dataset, data_dir)
    options.update({name: value for name, value in builder_options.items() if value is not None})
    builder = builder_class(view, cache_dir=cache_dir, data_dir=folder, **options)
    builder.download_and_prepare()
    if split not in builder.info.splits:
        raise ValueError(builder.missing_split_reason(split))
    if builder.info.splits[split].num_examples == 0:
        log = builder.problems.get(split)
        reasons = "; ".join(f"{count} rows {reason}" for reason, count in log.counts.items()) if log else "no row"
        raise ValueError(f"{folder} has no usable row in the {split} split of {view} ({reasons}); add some.")
    return builder.as_dataset(split=split)


def gallery_scope(dataset: str | os.PathLike, data_dir: str | os.PathLike | None = None) -> str:
    """Return where a query is searched: "live" (its livestream's images) or "all" (the whole gallery).

    LPR4M is searched by livestream; shop_clips in the whole gallery unless its gallery rows carry a ``live_id``, which
    is only seen when the folder is given.

    Raises:
        FileNotFoundError, ValueError: as `load_dataset_view`.
    """
    if os.fspath(dataset) in ("mini_lpr4m", "lpr4m"):
        return "live"
    if os.fspath(dataset) == "shop_clips" and data_dir is None:
        return "all"
    builder_class, folder, _ = _resolve(dataset, data_dir)
    if builder_class is Lpr4m:
        return "live"
    return "live" if carries_live_ids(folder) else "all"
