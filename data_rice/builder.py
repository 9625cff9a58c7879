"""Shared parts of the dataset builders: configs, a cache that follows its source, and a list of problems."""

import json
import logging
import os
from collections import Counter
from dataclasses import dataclass, fields

import datasets
from datasets.exceptions import DatasetGenerationError

from . import parsing
from .features import view_features
from .paths import path_to_text

logger = logging.getLogger(__name__)

_CODE_FILES = (
    "builder.py",
    "features.py",
    "detection.py",
    "folders.py",
    "lpr4m/lpr4m.py",
    "lpr4m/layout.py",
    "lpr4m/index.py",
    "lpr4m/media.py",
    "lpr4m/subset.py",
    "lpr4m/evaluation_rows.py",
    "moving_fashion/layout.py",
    "moving_fashion/moving_fashion.py",
    "moving_fashion/prepare.py",
    "parsing.py",
    "paths.py",
    "shop_clips/shop_clips.py",
)


@dataclass(eq=False)
class ViewConfig(datasets.BuilderConfig):
    """One view (``pairs``, ``query``, ``gallery``, ...) of the data below ``data_dir``.

    The id of a config names its cache folder. It changes with the names, sizes and modification times of the
    annotation files and with the builders' code, so an outdated cache is never used.
    """

    version: datasets.Version | str | None = datasets.Version("1.0.0")

    def source_paths(self) -> list[str]:
        """Return the files and folders on which the rows depend."""
        raise NotImplementedError

    def validate(self) -> None:
        """Check the options; raises ValueError or FileNotFoundError."""
        if not self.data_dir:
            raise ValueError("data_dir is missing; pass the folder that holds the data.")
        if not os.path.isdir(self.data_dir):
            raise FileNotFoundError(f"data_dir {self.data_dir} is not a folder; pass the folder that holds the data.")
        if parsing.SURROGATE.search(os.path.abspath(self.data_dir)):
            raise ValueError(
                f"data_dir {path_to_text(os.path.abspath(self.data_dir))}: the name is not UTF-8, which tables "
                "cannot store; rename the folder."
            )

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        """See `datasets.BuilderConfig.create_config_id`; adds the state of the source."""
        self.validate()
        here = os.path.dirname(os.path.abspath(__file__))
        code = [os.path.join(here, name) for name in _CODE_FILES]
        source = parsing.fingerprint([*self.source_paths(), *code])
        return super().create_config_id({**config_kwargs, "source": source}, custom_features)


class ProblemLog:
    """Counts and lists the rows that were left out, or kept despite a problem.

    Args:
        path: JSON-lines file for one object per problem, or None to count only.
    """

    def __init__(self, path: str | None):
        self.path = path
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self._file = None

    def add(self, row_id: str, file: str | os.PathLike, line: int | None, reason: str) -> None:
        """Record the problem ``reason`` of the row ``row_id`` of ``file``."""
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < 5:
            examples.append(row_id)
        if self.path is not None:
            if self._file is None:
                self._file = open(self.path, "w", encoding="utf-8")
            entry = {"id": row_id, "file": str(file), "line": line, "reason": reason}
            self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Finish the file."""
        if self._file is not None:
            self._file.close()

    @classmethod
    def read(cls, path: str) -> "ProblemLog":
        """Read the problems that an earlier run wrote to ``path``."""
        log = cls(None)
        for _, entry in parsing.read_json_lines(path):
            log.add(entry["id"], entry["file"], entry["line"], entry["reason"])
        log.path = path
        return log

    def warn(self, name: str) -> None:
        """Log one warning per kind of problem, in the first process only."""
        if os.environ.get("RANK", "0") != "0":
            return
        for reason, count in self.counts.items():
            listed = f"; all of them: {self.path}" if self.path else ""
            logger.warning("%s: %d rows %s (%s)%s", name, count, reason, ", ".join(self.examples[reason]), listed)


class ViewBuilder(datasets.GeneratorBasedBuilder):
    """Base of the builders.

    Create one with ``Builder("pairs", data_dir=..., cache_dir=...)``, then call `download_and_prepare` and
    `as_dataset`. After `download_and_prepare`, ``problems`` holds one `ProblemLog` per split: rows left out of
    training (no frames, no image) and queries that were kept but cannot be answered. Both are also logged as warnings.

    Args:
        config_name: one of the builder's views, such as ``pairs``, ``query``, ``gallery``.
        cache_dir: folder of the Arrow files; the default of `datasets` when None.
        data_dir: the folder that holds the data.
        options: fields of the builder's config.
    """

    BUILDER_CONFIG_CLASS = ViewConfig

    def __init__(self, config_name: str | None = None, cache_dir: str | None = None, *, data_dir=None, **options):
        if config_name is None and "name" not in options:
            config_name = "pairs"
        views = [config.name for config in self.BUILDER_CONFIGS]
        if config_name not in views:
            raise ValueError(f"There is no view {config_name!r}; choose one of {', '.join(views)}.")
        own = {field.name for field in fields(self.BUILDER_CONFIG_CLASS)} - {
            field.name for field in fields(datasets.BuilderConfig)
        }
        builder_arguments = {"dataset_name", "hash", "base_path", "features", "token", "repo_id", "storage_options"}
        unknown = set(options) - own - builder_arguments - {"writer_batch_size", "config_id", "info", "version"}
        if unknown:
            known, named = ", ".join(sorted(own)) or "none", ", ".join(sorted(map(repr, unknown)))
            raise ValueError(f"{type(self).__name__} has no option {named}; its options are: {known}.")
        if data_dir is not None:
            data_dir = os.path.abspath(os.path.expanduser(str(data_dir)))
        self.problems: dict[str, ProblemLog] = {}
        super().__init__(
            cache_dir=None if cache_dir is None else str(cache_dir),
            config_name=config_name,
            data_dir=data_dir,
            **options,
        )

    @property
    def view(self) -> str:
        """The view that this builder yields: ``pairs``, ``query``, ``gallery``, ..."""
        return self.config.name

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=view_features(self.view))

    def download_and_prepare(self, *args, **kwargs) -> None:
        """Build the Arrow cache, or reuse it; see `datasets.DatasetBuilder.download_and_prepare`.

        Raises:
            FileNotFoundError: an annotation file is missing.
            ValueError: a row is malformed; the message names the file and the line.
        """
        try:
            super().download_and_prepare(*args, **kwargs)
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, ValueError | OSError):
                raise error.__cause__ from None
            raise
        for split in self.info.splits or {}:
            path = self._problem_path(split)
            if os.path.isfile(path):
                self.problems[split] = ProblemLog.read(path)
                self.problems[split].warn(f"{self.dataset_name} {self.view} {split} of {self.config.data_dir}")

    def _problem_path(self, split: str) -> str:
        return os.path.join(self._output_dir, f"problems-{split}.jsonl")

    def _generate_examples(self, split: str, **source):
        building = os.path.isdir(self._output_dir) and self._output_dir.endswith(".incomplete")
        log = ProblemLog(self._problem_path(split) if building else None)
        try:
            yield from enumerate(self.generate_rows(split, log, **source))
        finally:
            log.close()
        if not building:
            log.warn(f"{self.dataset_name} {self.view} {split} of {self.config.data_dir}")

    def generate_rows(self, split: str, problems: ProblemLog, **source):
        """Yield the rows of ``split`` as plain dicts; ``source`` holds the split generator's arguments."""
        raise NotImplementedError

    def missing_split_reason(self, split: str) -> str:
        """Return one sentence on why this folder has no ``split`` and what to do."""
        raise NotImplementedError
