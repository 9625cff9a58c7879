"""Index of the usable rows of annotation files, so that any row can be read without reading the others.

The index of a data set is a memory-mapped file with one record per usable row. Beside it lie a small JSON file with
its sources and a list of the rows that were left out. They are in the cache folder, under a name that changes with the
annotation files and the options.
"""

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
from tqdm.auto import tqdm

from . import parsing
from .builder import ProblemLog

_RECORD = np.dtype([("file", "<u2"), ("line", "<u4"), ("offset", "<u8"), ("groups", "<u4", (3,))])
_CHUNK_ROWS = 65536
_PROGRESS_BYTES = 64 * 1024 * 1024

Select = Callable[[str, int, bytes, ProblemLog], tuple[bytes, Sequence[bytes]] | None]


class LineIndex:
    """An index of `build_line_index`. It is pickled as its path, so loader workers open it again.

    Args:
        path: the file of records.
    """

    def __init__(self, path: str):
        self.path = path
        about = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
        self.files: list[str] = about["files"]
        # Per kind of group, whether any value is not "".
        self.grouped: list[bool] = about["grouped"]
        self._left_out: dict[str, dict] = about["left_out"]
        self.records = np.memmap(path, dtype=_RECORD, mode="r")
        self._open_files: dict[int, object] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self):
        return {"path": self.path}

    def __setstate__(self, state):
        self.__init__(**state)

    @property
    def problems(self) -> ProblemLog:
        """The rows that were left out: counts, some ids, and the path of the full list."""
        log = ProblemLog(None)
        log.counts.update(self._left_out["counts"])
        log.examples.update(self._left_out["examples"])
        log.path = f"{self.path}.problems.jsonl" if log.counts else None
        return log

    def read(self, row: int) -> tuple[str, int, str]:
        """Return ``(file, line number, text)`` of a row.

        Raises:
            ValueError: the line is not UTF-8, or holds a NUL character.
        """
        if self._process != os.getpid():
            # A forked process shares the file positions of its parent, so it opens the files again.
            self._open_files, self._process = {}, os.getpid()
        record = self.records[row]
        number, line = int(record["file"]), int(record["line"])
        path = self.files[number]
        file = self._open_files.get(number)
        if file is None:
            file = self._open_files[number] = open(path, "rb")
        file.seek(int(record["offset"]))
        return path, line, parsing.decode_line(path, line, file.readline().rstrip(b"\r\n"))


def build_line_index(
    files: Sequence[str], make_select: Callable[[], Select], cache_dir: str | os.PathLike | None = None, key: str = ""
) -> LineIndex:
    """Open the index of ``files``; build it if the cache has none for their current state.

    Args:
        files: annotation files with one row per line.
        make_select: returns the function ``select(file, line number, bytes, problems)``, which is called once per row
            when an index is built. ``select`` returns ``(row id, groups)``, with up to three values by which rows are
            grouped, such as the livestream. For a row outside the view it returns None, after adding the row to
            ``problems`` if users should know.
        cache_dir: parent folder of the indices; the cache of `datasets` when None.
        key: any other values on which the selection depends.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: two rows have the same id, no row is left, or the selection raises it.
    """
    folder = Path(cache_dir if cache_dir is not None else datasets.config.HF_DATASETS_CACHE) / "line_index"
    state = f"{parsing.fingerprint([*files, __file__])}\0{key}"
    path = folder / f"{hashlib.sha256(state.encode()).hexdigest()[:32]}.bin"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _build([os.fspath(file) for file in files], make_select(), path)
    return LineIndex(str(path))


def _build(files: list[str], select: Select, path: Path) -> None:
    """Write the index to a temporary folder beside ``path``, then move it there, the records last."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as building:
        problems = ProblemLog(os.path.join(building, "problems"))
        records = os.path.join(building, "records")
        ids = array("q")
        groups: list[dict[bytes, int]] = [{}, {}, {}]
        try:
            with open(records, "wb") as out:
                for chunk in _chunks(_select_rows(files, select, problems, ids, groups)):
                    chunk.tofile(out)
        finally:
            problems.close()
        if not ids:
            reasons = "; ".join(f"{count} rows {reason}" for reason, count in problems.counts.items()) or "no row"
            raise ValueError(f"{', '.join(files)}: no usable row ({reasons}); add some.")
        _refuse_duplicates(np.frombuffer(ids, dtype=np.int64), records, files)
        grouped = [any(known) for known in groups]
        left_out = {"counts": problems.counts, "examples": problems.examples}
        about = {"files": files, "rows": len(ids), "grouped": grouped, "left_out": left_out}
        Path(building, "about").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if problems.counts:
            os.replace(problems.path, f"{path}.problems.jsonl")
        os.replace(os.path.join(building, "about"), f"{path}.json")
        os.replace(records, path)


def _chunks(rows: Iterator[tuple]) -> Iterator[np.ndarray]:
    chunk = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK_ROWS:
            yield np.array(chunk, dtype=_RECORD)
            chunk = []
    if chunk:
        yield np.array(chunk, dtype=_RECORD)


def _select_rows(files, select, problems, ids, groups) -> Iterator[tuple]:
    """Yield the records of the selected rows; their ids' hashes go to ``ids``, new values to ``groups``."""
    for number, line, offset, raw in _scan_lines(files):
        selected = select(files[number], line, raw, problems)
        if selected is None:
            continue
        row_id, values = selected
        ids.append(hash(row_id))
        codes = [known.setdefault(value, len(known)) for known, value in zip(groups, values)]
        yield number, line, offset, (*codes, *[0] * (3 - len(codes)))


def _scan_lines(files: Sequence[str]) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield ``(file number, line number, offset, bytes without line end)`` of all lines that are not blank."""
    lines = [parsing.scan_lines(path, by_offset=True) for path in files]
    total = sum(os.path.getsize(path) for path in files)
    progress = tqdm(
        total=total, unit="B", unit_scale=True, desc="Indexing annotation rows", disable=total < _PROGRESS_BYTES
    )
    with progress:
        before = 0
        for number, path in enumerate(files):
            for line, offset, text in lines[number]:
                yield number, line, offset, text
                if before + offset - progress.n > 1 << 22:
                    progress.update(before + offset - progress.n)
            before += os.path.getsize(path)
            progress.update(before - progress.n)


def _refuse_duplicates(hashes: np.ndarray, records: str, files: list[str]) -> None:
    """Raise ValueError for the first row whose id has been seen before."""
    order = np.argsort(hashes, kind="stable")
    later = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
    if len(later):
        record = np.fromfile(records, dtype=_RECORD)[later.min()]
        raise parsing.row_error(
            files[record["file"]],
            int(record["line"]),
            "the row's id appears a second time; remove the row, or name one list with train_files when the folder "
            "holds overlapping lists.",
        )
