"""LPR4M's pairs directly from the training lists: indexed once, then parsed row by row on demand."""

import logging
import os
from collections.abc import Mapping
from functools import partial

from .. import folders, parsing
from ..builder import ProblemLog
from ..features import pair_features
from ..lazy_rows import LineRows
from ..line_index import Select, build_line_index
from . import layout
from .index import MediaIndex
from .lpr4m import HELD_OUT, NO_FRAMES, Lpr4m, pair_row
from .media import Lpr4mMedia

logger = logging.getLogger(__name__)

GROUP_COLUMNS = ("live_id", "product_id", "category")
# A shorter text is an empty list of frames.
_SHORTEST_FRAMES = len(b"['a']")
_CODE_FILES = ("layout.py", "line_rows.py", "lpr4m.py", "subset.py", "../parsing.py")


def training_rows(builder: Lpr4m, split: str) -> LineRows:
    """Open the rows of a ``pairs`` builder without building its Arrow table.

    The rows and their order equal those of the table. Opening checks the number of columns and the ids of all rows.
    Reading a row checks its lists of frames and boxes.

    Args:
        builder: `Lpr4m` of the view ``pairs``.
        split: "train" or "validation".

    Raises:
        FileNotFoundError, ValueError: as the builder.
    """
    config = builder.config
    config.validate()
    files = tuple(layout.training_files(config.data_dir, config.train_files))
    if not files or split not in ("train", "validation") or (split == "validation" and not config.holds_out):
        raise ValueError(builder.missing_split_reason(split))
    options = (split, config.validation_fraction, config.validation_lives, config.subset, config.subset_seed)
    here = os.path.dirname(os.path.abspath(__file__))
    code = parsing.fingerprint(os.path.join(here, name) for name in _CODE_FILES)
    cache_dir = builder._cache_dir_root
    index = build_line_index(files, partial(_make_select, builder, files, split), cache_dir, f"{options}\0{code}")
    index.problems.warn(f"lpr4m pairs {split} of {config.data_dir}")
    return LineRows(index, _Parser(config.data_dir, cache_dir, config.media_dirs), GROUP_COLUMNS, pair_features())


def _make_select(builder: Lpr4m, files: tuple[str, ...], split: str) -> Select:
    """Return the function that finds the rows of a split; it parses only the columns that decide."""
    held_lives, held_products = builder._held_out(files)
    subset = builder._choose_subset(files, held_lives, held_products) if split == "train" else None
    lives: dict[str, str] = {}
    products: dict[bytes, str] = {}

    def select(file: str, line: int, raw: bytes, problems: ProblemLog):
        columns = parsing.check_columns(file, line, raw.split(b"\t"), 11)
        clip_id = parsing.decode_line(file, line, columns[0])
        image = columns[3]
        try:
            # The ids of one livestream's clips differ only in their times.
            prefix = clip_id.rpartition("-")[0].rpartition("-")[0]
            live_id = lives.get(prefix) or lives.setdefault(prefix, layout.live_id_of(clip_id))
            if (live_id in held_lives) != (split == "validation"):
                return None
            product_id = products.get(image)
            if product_id is None:
                image_id = parsing.check_name(parsing.decode_line(file, line, image), "image id")
                product_id = products[image] = layout.product_id_of(image_id)
            has_frames = len(columns[1]) >= _SHORTEST_FRAMES or parsing.parse_string_list(columns[1].decode())
        except ValueError as error:
            if str(error).startswith(f"{file}, line "):
                raise
            raise parsing.row_error(file, line, f"{error}; repair or remove the row.") from None
        if split == "train" and product_id in held_products:
            problems.add(clip_id, file, line, HELD_OUT)
            return None
        category = columns[6] or columns[5]
        if subset is not None and not subset.keeps(parsing.decode_line(file, line, category), clip_id):
            return None
        if not has_frames:
            problems.add(clip_id, file, line, NO_FRAMES)
            return None
        return columns[0], (live_id, product_id, category)

    return select


class _Parser:
    """Parses a line of a training list into a row; it can be pickled and is safe in forked loader workers."""

    def __init__(self, *where):
        self._where = where
        self.media = _ProbedMedia(*where)
        self.notes = _Notes()
        self._process = os.getpid()

    def __reduce__(self):
        return _Parser, self._where

    def __call__(self, file: str, line: int, text: str) -> dict:
        if self._process != os.getpid():
            # A SQLite connection must not be used after a fork.
            self._process = os.getpid()
            self.media.index = self.media.index and MediaIndex(self.media.index.path)
        try:
            row = layout.parse_training_row(parsing.check_columns(file, line, text.split("\t"), 11))
        except ValueError as error:
            if str(error).startswith(f"{file}, line "):
                raise
            raise parsing.row_error(file, line, f"{error}; repair or remove the row.") from None
        return pair_row(self.media, file, line, row, self.notes)


class _Notes(ProblemLog):
    """Logs the first problem of each kind and counts the others."""

    def __init__(self):
        super().__init__(None)

    def add(self, row_id: str, file: str | os.PathLike, line: int | None, reason: str) -> None:
        """See `ProblemLog.add`."""
        super().add(row_id, file, line, reason)
        if self.counts[reason] == 1:
            logger.warning("%s, line %s: a row %s (%s); others like it are not reported.", file, line, reason, row_id)


class _ProbedMedia(Lpr4mMedia):
    """`Lpr4mMedia` that looks up each clip in the file system; a list of all folders would need too much memory."""

    def _find_clips(self) -> Mapping[str, str]:
        return _ClipFolders(self.root, self.video_folders)


class _ClipFolders(Mapping):
    def __init__(self, root: str, folders: list[str]):
        self._root = root
        self._folders = folders

    def __getitem__(self, clip_id: str) -> str:
        for folder in self._folders:
            path = os.path.join(folder, clip_id)
            if os.path.isdir(path):
                if os.path.islink(path):
                    folders.check_link(path, folder, self._root)
                return folder
        raise KeyError(clip_id)

    def __iter__(self):
        raise TypeError("Clip folders can be looked up by clip id only, not listed.")

    def __len__(self) -> int:
        raise TypeError("Clip folders can be looked up by clip id only, not counted.")
