"""Views of a data set as self-contained shards for fast training: few, small, encoded frames per clip.

`prepare_views` writes Parquet or tar (webdataset) shards. `load_prepared` reads them as the same rows, with the
pictures inside. A shard is written under a temporary name and renamed when it is complete. Its content depends only on
the rows and the settings, so an interrupted and resumed run writes the same bytes as one run.
"""

import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import datasets
from datasets.exceptions import DatasetGenerationError
from tqdm.auto import tqdm

from . import parsing
from .features import view_features
from .files import WRITING, replacing, write_atomically
from .prepare_rows import Sampling, prepare_row
from .prepare_shards import check_parquet, read_shard_rows, write_shard

logger = logging.getLogger(__name__)

MANIFEST = "prepared.json"
_STATE = ".preparing.json"
_SUFFIXES = {"parquet": "parquet", "tar": "tar"}
_FORMAT = 1


@dataclass(frozen=True)
class PrepareSettings:
    """Settings of the shards.

    Attributes:
        num_frames: frames per clip, at even intervals as in evaluation; 0 keeps all.
        short_side: maximum short side in pixels; 0 keeps all sizes. Larger pictures are reduced, others are copied
            byte for byte.
        quality: JPEG quality of the reduced pictures, 1 to 100.
        rows_per_shard: rows of the source per shard.
        file_format: "parquet", or "tar" for the layout of webdataset.

    Raises:
        ValueError: a value is out of its range.
    """

    num_frames: int = 10
    short_side: int = 256
    quality: int = 95
    rows_per_shard: int = 1000
    file_format: str = "parquet"

    def __post_init__(self):
        for name, low in (("num_frames", 0), ("short_side", 0), ("quality", 1), ("rows_per_shard", 1)):
            if type(getattr(self, name)) is not int or getattr(self, name) < low:
                raise ValueError(f"{name} must be a whole number of at least {low}, not {getattr(self, name)!r}.")
        if self.quality > 100:
            raise ValueError(f"quality must be at most 100, not {self.quality}.")
        if self.file_format not in _SUFFIXES:
            raise ValueError(f'file_format must be "parquet" or "tar", not {self.file_format!r}.')


@dataclass(frozen=True)
class _Job:
    view: str
    split: str
    start: int
    stop: int
    shard: str
    report: str


_worker: tuple[Mapping[tuple[str, str], datasets.Dataset], PrepareSettings] | None = None


def _start_worker(views, settings: PrepareSettings) -> None:
    global _worker
    _worker = (views, settings)


def _run_job(job: _Job) -> None:
    """Write one shard, and before it the list of its unreadable media."""
    views, settings = _worker
    source = views[job.view, job.split]
    sampling = Sampling(settings.num_frames, settings.short_side, settings.quality)
    lost: list[dict] = []
    rows = []
    for number in range(job.start, job.stop):
        row = prepare_row(source[number], job.view, sampling, lost)
        if row is not None:
            rows.append((number, row))
    for path, write in (
        (job.report, lambda target: _write_lines(target, lost)),
        (job.shard, lambda target: write_shard(target, rows, view_features(job.view))),
    ):
        with replacing(path) as temporary:
            write(os.fspath(temporary))


def _write_lines(path: str, entries: list[dict]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n" for entry in entries)


def _plan(views, settings: PrepareSettings, output_dir: Path) -> list[_Job]:
    jobs = []
    for (view, split), rows in views.items():
        size = settings.rows_per_shard
        number = max(1, -(-len(rows) // size))
        for shard in range(number):
            name = f"{split}-{shard:05d}-of-{number:05d}"
            jobs.append(
                _Job(
                    view,
                    split,
                    shard * size,
                    min((shard + 1) * size, len(rows)),
                    str(output_dir / view / f"{name}.{_SUFFIXES[settings.file_format]}"),
                    str(output_dir / "reports" / f"{view}-{name}.jsonl"),
                )
            )
    return jobs


def prepare_views(
    views: Mapping[tuple[str, str], datasets.Dataset],
    output_dir: str | os.PathLike,
    *,
    dataset: str,
    gallery_scope: str,
    source: str = "",
    options: Mapping[str, object] | None = None,
    settings: PrepareSettings = PrepareSettings(),
    num_workers: int = 1,
) -> dict:
    """Write the shards of all views, or the missing ones after an interruption.

    Args:
        views: ``(view, split) -> rows`` as `data_rice.load_dataset_view` returns them.
        output_dir: the folder to write: ``VIEW/SPLIT-00000-of-00010.parquet``, ``reports/`` with the unreadable media
            per shard, ``dropped.jsonl`` with all of them, ``prepared.json`` and a data set card.
        dataset: the name of the source, for the card.
        gallery_scope: "live" or "all", see `data_rice.gallery_scope`.
        source: identifies the source, so that a run is not continued with other data.
        options: the builder's options for the rows, such as ``validation_fraction``; stored in the manifest.
        settings: settings of the shards.
        num_workers: number of processes.

    Returns:
        The content of ``prepared.json``: per view and split the ``rows`` of the source, the ``kept`` ones, and the
        number of losses by kind.

    Raises:
        ValueError: the folder holds something else, or was begun with other data or settings.
        ChildProcessError: a worker was killed.
    """
    output_dir = Path(output_dir)
    state = {
        "format": _FORMAT,
        "dataset": dataset,
        "gallery_scope": gallery_scope,
        "options": dict(options or {}),
        "settings": asdict(settings),
        "rows": {f"{view}/{split}": len(rows) for (view, split), rows in views.items()},
    }
    _claim(output_dir, {**state, "source": source})
    jobs = _plan(views, settings, output_dir)
    for folder in {os.path.dirname(path) for job in jobs for path in (job.shard, job.report)}:
        os.makedirs(folder, exist_ok=True)
        for stale in Path(folder).glob(f"{WRITING}*"):
            stale.unlink()
    todo = [job for job in jobs if not os.path.isfile(job.shard)]
    if len(todo) < len(jobs):
        logger.warning("%s: %d of %d shards exist already", output_dir, len(jobs) - len(todo), len(jobs))
    progress = tqdm(total=len(todo), desc=f"Shards of {output_dir}", unit="shard")
    if num_workers <= 1:
        _start_worker(views, settings)
        for job in todo:
            _run_job(job)
            progress.update()
    else:
        # Forking a process with threads of Arrow and torch can hang.
        context = get_context("spawn")
        with ProcessPoolExecutor(num_workers, context, _start_worker, (dict(views), settings)) as pool:
            try:
                for _ in pool.map(_run_job, todo):
                    progress.update()
            except BrokenProcessPool:
                raise ChildProcessError(
                    "A worker was killed, perhaps by lack of memory; run the same command again with fewer workers."
                ) from None
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    progress.close()
    return _finish(output_dir, state, jobs)


def _claim(output_dir: Path, state: dict) -> None:
    """Claim a new or empty folder, or one that an equal run began."""
    path = output_dir / _STATE
    if path.is_file():
        begun = parsing.read_json_object(path)
        different = sorted(key for key in state if begun.get(key) != state[key])
        if different:
            raise ValueError(
                f"{output_dir} was begun with another {' and '.join(different)}; repeat that or choose another folder."
            )
        return
    if output_dir.exists() and (not output_dir.is_dir() or not _is_empty(output_dir)):
        raise ValueError(f"{output_dir} holds something else; choose a folder that is empty or does not exist.")
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(state))


def _is_empty(folder: Path) -> bool:
    """Whether a folder is empty except for the unfinished first file of a killed run."""
    return all(path.name.startswith(WRITING) for path in folder.iterdir())


def _finish(output_dir: Path, state: dict, jobs: list[_Job]) -> dict:
    """Add up the reports and write the manifest and the card."""
    summary: dict[str, dict[str, dict]] = {}
    lost: list[dict] = []
    for job in jobs:
        entries = [entry for _, entry in parsing.read_json_lines(job.report)]
        view = summary.setdefault(job.view, {})
        counts = view.setdefault(job.split, {"rows": 0, "kept": 0, "shards": 0, "lost": {}})
        counts["rows"] += job.stop - job.start
        counts["kept"] += job.stop - job.start - sum(entry["row"] == "dropped" for entry in entries)
        counts["shards"] += 1
        for entry in entries:
            counts["lost"][entry["what"]] = counts["lost"].get(entry["what"], 0) + 1
        lost += [{"view": job.view, "split": job.split, **entry} for entry in entries]
    _write_lines(str(output_dir / "dropped.jsonl"), lost)
    manifest = {**{key: value for key, value in state.items() if key != "rows"}, "views": summary}
    write_atomically(output_dir / "README.md", _card(manifest))
    write_atomically(output_dir / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return manifest


def _card(manifest: dict) -> str:
    """The data set card: its header lets `datasets.load_dataset` find views and splits."""
    suffix = _SUFFIXES[manifest["settings"]["file_format"]]
    lines = ["---", "configs:"]
    for view, splits in manifest["views"].items():
        lines += [f"- config_name: {view}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {view}/{split}-*.{suffix}"]
    settings = ", ".join(f"{name} {value}" for name, value in manifest["settings"].items())
    lines += ["---", "", f"# {manifest['dataset']}, prepared for RICE", "", f"Settings: {settings}.", ""]
    lines += ["| view | split | rows | kept | shards |", "|---|---|---|---|---|"]
    lines += [
        f"| {view} | {split} | {counts['rows']} | {counts['kept']} | {counts['shards']} |"
        for view, splits in manifest["views"].items()
        for split, counts in splits.items()
    ]
    lines += [
        "",
        "`dropped.jsonl` lists the media that could not be read. To publish this folder you need the right",
    ]
    return "\n".join([*lines, "to publish the pictures.", ""])


def is_prepared(folder: str | os.PathLike) -> bool:
    """Return whether `prepare_views` finished writing ``folder``."""
    return os.path.isfile(os.path.join(folder, MANIFEST))


def read_manifest(folder: str | os.PathLike) -> dict:
    """Return the content of ``prepared.json``, see `prepare_views`.

    Raises:
        FileNotFoundError, ValueError: it is missing or damaged.
    """
    path = os.path.join(folder, MANIFEST)
    manifest = parsing.read_json_object(path)
    if manifest.get("format") != _FORMAT or not isinstance(manifest.get("views"), dict):
        raise ValueError(f"{path}: not a list of shards of this version; run prepare again.")
    return manifest


def shard_files(folder: str | os.PathLike, view: str, split: str) -> list[str]:
    """Return the paths of the shards of one view, in order.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: the folder has no such view or split.
    """
    manifest = read_manifest(folder)
    counts = manifest["views"].get(view, {}).get(split)
    if counts is None:
        there = ", ".join(f"{name} {part}" for name, parts in manifest["views"].items() for part in parts)
        raise ValueError(f"{folder} has no {split} {view}, only {there}; prepare the view, or choose one of these.")
    suffix, number = _SUFFIXES[manifest["settings"]["file_format"]], counts["shards"]
    files = [os.path.join(folder, view, f"{split}-{shard:05d}-of-{number:05d}.{suffix}") for shard in range(number)]
    for path in files:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} does not exist; run prepare again.")
    return files


def check_options(folder: str | os.PathLike, options: Mapping[str, object]) -> None:
    """Raise ValueError if a prepared folder was made with other builder options."""
    made_with = read_manifest(folder).get("options", {})
    for name, value in options.items():
        if made_with.get(name) != value:
            made = f"{name}={made_with[name]!r}" if name in made_with else f"no {name}"
            raise ValueError(f"{folder} was prepared with {made}, not {value!r}; prepare it again or drop the option.")


def load_prepared(
    folder: str | os.PathLike,
    view: str,
    split: str,
    cache_dir: str | os.PathLike | None = None,
    options: Mapping[str, object] | None = None,
) -> datasets.Dataset:
    """Read one view of a folder that `prepare_views` wrote.

    Args:
        options: builder options with which the rows must have been made.

    Raises:
        FileNotFoundError, ValueError: as `shard_files`; ValueError also if a shard is damaged or ``options`` differ.
    """
    check_options(folder, options or {})
    files = [os.path.abspath(path) for path in shard_files(folder, view, split)]
    cache_dir = None if cache_dir is None else str(cache_dir)
    if files[0].endswith(".parquet"):
        for path in files:
            check_parquet(path)
        return datasets.load_dataset("parquet", data_files={split: files}, split=split, cache_dir=cache_dir)
    try:
        return datasets.Dataset.from_generator(
            read_shard_rows,
            features=view_features(view),
            cache_dir=cache_dir,
            gen_kwargs={"files": files, "state": [parsing.fingerprint([path]) for path in files]},
            split=datasets.Split(split),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None
        raise
