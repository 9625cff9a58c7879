"""Published data sets on the Hub: Parquet files with the pictures inside, ``PART/SPLIT-00000-of-00001.parquet``.

The parts are the project's views ``pairs``, ``query`` and ``gallery``. A data set is named by its id on the Hub or by
its local folder. From the Hub, only the files of the requested part and split are fetched, into the Hub's cache.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import datasets
import pyarrow.parquet
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from .features import view_features
from .prepare_shards import check_parquet

# Columns of ids, and the beginnings of their types. As text, 7.0 would be another id than 7.
_IDS = {"clip_id", "live_id", "product_id", "image_id", "frame_id", "relevant"}
_ID_TYPES = ("string", "large_string", "int", "uint", "null")
_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def is_published(dataset: str | os.PathLike, data_dir: str | os.PathLike | None = None) -> bool:
    """Return whether ``dataset`` is an id on the Hub, or a folder with the Parquet files of a published gallery."""
    folder = os.fspath(dataset if data_dir is None else data_dir)
    if os.path.isdir(folder):
        return any(Path(folder, "gallery").glob("*-of-*.parquet"))
    return data_dir is None and not os.path.exists(folder) and _REPO_ID.fullmatch(folder) is not None


def published_files(
    dataset: str | os.PathLike, data_dir: str | os.PathLike | None, view: str, split: str
) -> list[str]:
    """Return the Parquet files of one view and split; fetch them from the Hub if they are not local.

    Raises:
        FileNotFoundError: the data set does not exist, or cannot be fetched.
        ValueError: it has no such part or split.
    """
    folder = os.fspath(dataset if data_dir is None else data_dir)
    pattern = f"{view}/{split}-*-of-*.parquet"
    root = folder if os.path.isdir(folder) else _fetch(folder, pattern)
    files = sorted(str(path) for path in Path(root).glob(pattern))
    if not files:
        raise ValueError(f"{folder} has no {split} split of {view}; choose another split.")
    return files


def _fetch(repo_id: str, pattern: str) -> str:
    try:
        return snapshot_download(repo_id, repo_type="dataset", allow_patterns=pattern)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise FileNotFoundError(
            f"{repo_id!r} is not a local folder, and as a data set of the Hub it cannot be fetched "
            f"({type(error).__name__}); check the name, the connection and the token."
        ) from error


def load_published(
    dataset: str | os.PathLike,
    data_dir: str | os.PathLike | None,
    view: str,
    split: str,
    cache_dir: str | os.PathLike | None = None,
    options: Mapping[str, object] | None = None,
) -> datasets.Dataset:
    """Read one view of a published data set as the rows of a builder.

    Args:
        options: builder options, which are refused because the rows are fixed.

    Raises:
        FileNotFoundError, ValueError: as `published_files`; ValueError also if a file is damaged, lacks a column or
            has ids that are neither strings nor integers, or if there are ``options``.
    """
    refuse_options(dataset if data_dir is None else data_dir, options or {})
    files = published_files(dataset, data_dir, view, split)
    for path in files:
        check_parquet(path)
    cache_dir = None if cache_dir is None else str(cache_dir)
    rows = datasets.load_dataset("parquet", data_files={split: files}, split=split, cache_dir=cache_dir)
    features = view_features(view)
    missing = [name for name in features if name not in rows.column_names]
    if missing:
        raise ValueError(f"{files[0]}: the column {missing[0]!r} is missing; publish the data set again.")
    for name in _IDS.intersection(features):
        kind = rows.features[name]
        dtype = str(getattr(getattr(kind, "feature", kind), "dtype", "other"))
        if not dtype.startswith(_ID_TYPES):
            raise ValueError(
                f"{files[0]}: the column {name!r} holds {dtype} values, but an id is a string or an integer; "
                f"publish the data set again."
            )
    return rows.select_columns(list(features)).cast(features)


def refuse_options(dataset: str | os.PathLike, options: Mapping[str, object]) -> None:
    """Raise ValueError if builder ``options`` are given for a published data set."""
    if options:
        raise ValueError(f"{os.fspath(dataset)} was published with fixed rows; leave out {', '.join(options)}.")


def published_scope(dataset: str | os.PathLike, data_dir: str | os.PathLike | None = None) -> str:
    """Return "live" if the gallery rows name livestreams, else "all"."""
    for split in ("test", "validation", "train"):
        try:
            files = published_files(dataset, data_dir, "gallery", split)
        except ValueError:
            continue
        columns = (pyarrow.parquet.read_table(path, columns=["live_id"]) for path in files)
        return "live" if any(any(column["live_id"].to_pylist()) for column in columns) else "all"
    raise ValueError(f"{os.fspath(dataset if data_dir is None else data_dir)} has no gallery; publish it again.")
