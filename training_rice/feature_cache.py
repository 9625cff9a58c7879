"""Encodings of a frozen encoder on disk, written in blocks atomically and memory-mapped for reading."""

import errno
import hashlib
import io
import json
import logging
import pickle
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_rice.files import replacing, write_atomically
from data_rice.parsing import read_json_object

logger = logging.getLogger(__name__)

ABOUT_FILE = "about.json"
# Rows per block, with one view each. A block is the maximum loss by an interruption, and a process's unit of work.
ROWS_PER_BLOCK = 128
_FORMAT = 1


class CachedRow(NamedTuple):
    """
    The encoded pictures of a row: the readable frames of a clip, or one shop image.

    Attributes:
        states (`(n, F)`): Encodings from `RiceModel.encode_pictures`.
        patch_mask (`(n, P)` bool, *optional*): Mask of the frames, `True` = patch of the intended product.
        failures: Unreadable media in the collator's form.
    """

    states: Tensor
    patch_mask: Tensor | None = None
    failures: Sequence[Mapping[str, str]] = ()


class FeatureCache:
    """
    The encoded pictures of numbered rows, with one or several views of each.

    Its folder is named after everything that affects the encodings, so that no run uses encodings of another encoder,
    of other pictures or of another preparation.

    Args:
        parent: Parent of the cache's own folder.
        kind: Kind of the rows, the first part of the folder's name.
        about: Everything that affects the encodings, by name: strings and numbers.
        num_rows, num_views: Number of rows and views.
    """

    def __init__(self, parent: str | Path, kind: str, about: Mapping[str, Any], num_rows: int, num_views: int = 1):
        self.about = {"format": _FORMAT, **about, "rows_per_block": ROWS_PER_BLOCK, "num_views": num_views}
        text = json.dumps(self.about, sort_keys=True)
        self.kind, self.folder = kind, Path(parent) / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.num_rows, self.num_views = num_rows, num_views
        self._blocks: dict[tuple[int, int], dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A loader worker maps the files itself.
        return self.__dict__ | {"_blocks": {}}

    @property
    def num_blocks(self) -> int:
        """Number of blocks per view."""
        return -(-self.num_rows // ROWS_PER_BLOCK)

    def rows_of(self, block: int) -> range:
        """The numbers of the rows in a block."""
        return range(block * ROWS_PER_BLOCK, min((block + 1) * ROWS_PER_BLOCK, self.num_rows))

    def missing(self, view: int) -> list[int]:
        """Blocks of a view that are missing or damaged."""
        return [block for block in range(self.num_blocks) if self._load(view, block) is None]

    def why_others_do_not_fit(self) -> str | None:
        """How the most similar other cache differs, if one has the same rows or the same encoder; else `None`."""
        reasons = []
        for path in sorted(self.folder.parent.glob(f"{self.kind}-*/{ABOUT_FILE}")):
            other: Mapping[str, Any] = {}
            # A damaged cache explains nothing.
            with suppress(ValueError, OSError):
                other = read_json_object(path)
            differing = [name for name in self.about if other.get(name) != self.about[name]]
            if path.parent != self.folder and not {"rows", "encoder"} <= set(differing):
                reasons.append((len(differing), f"{path.parent} was made with another {', another '.join(differing)}"))
        return min(reasons)[1] if reasons else None

    def begin(self) -> None:
        """
        Creates the folder.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / ABOUT_FILE, json.dumps(self.about, indent=2) + "\n")

    def write(self, view: int, block: int, rows: Sequence[CachedRow]) -> None:
        """
        Writes a block, which appears under its name when it is complete on the disk.

        Raises:
            OSError: the block cannot be written; the message gives the free space.
        """
        starts = torch.tensor([0, *(len(row.states) for row in rows)]).cumsum(0)
        content = {
            "starts": starts,
            "states": torch.cat([row.states for row in rows]),
            "failures": [[dict(failure) for failure in row.failures] for row in rows],
        }
        if any(row.patch_mask is not None for row in rows):
            content["patch_mask"] = torch.cat([row.patch_mask for row in rows if row.patch_mask is not None])
        buffer = io.BytesIO()
        torch.save(content, buffer)
        try:
            with replacing(self._path(view, block)) as temporary:
                temporary.write_bytes(buffer.getbuffer())
        except OSError as error:
            free = shutil.disk_usage(self.folder).free / 2**20
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
            raise OSError(
                f"cached features could not be written to {self.folder} ({reason}; {free:,.0f} MB are free): make "
                f"room, or name another folder with cache_dir, and run the same command again, which resumes."
            ) from error

    def read(self, view: int, row: int) -> CachedRow:
        """
        One view of a row; its tensors are in the memory-mapped file.

        Raises:
            ValueError: the block is missing or damaged.
        """
        block, place = divmod(row, ROWS_PER_BLOCK)
        content = self._load(view, block)
        if content is None:
            raise ValueError(f"{self._path(view, block)} is missing or damaged; start the run again to repair it.")
        part = slice(content["starts"][place], content["starts"][place + 1])
        mask = content.get("patch_mask")
        return CachedRow(content["states"][part], None if mask is None else mask[part], content["failures"][place])

    def _path(self, view: int, block: int) -> Path:
        return self.folder / f"view-{view}-block-{block:06d}.pt"

    def _load(self, view: int, block: int) -> dict[str, Any] | None:
        if (view, block) not in self._blocks:
            path = self._path(view, block)
            # The archive's directory is at its end, so an incomplete file has none.
            if not zipfile.is_zipfile(path):
                return None
            try:
                content = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
            except (RuntimeError, OSError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
                logger.warning("%s is damaged (%s).", path, " ".join(str(error).split()))
                return None
            if not _is_block(content, len(self.rows_of(block))):
                logger.warning("%s is damaged (it does not hold the rows of its block).", path)
                return None
            self._blocks[view, block] = content
        return self._blocks[view, block]


def _is_block(content: Any, num_rows: int) -> bool:
    """Whether the content has the form of `FeatureCache.write` for this many rows."""
    if not isinstance(content, dict) or not {"starts", "states", "failures"} <= content.keys():
        return False
    starts, states, mask = content["starts"], content["states"], content.get("patch_mask")
    if not (torch.is_tensor(starts) and torch.is_tensor(states) and starts.shape == (num_rows + 1,)):
        return False
    ends_there = starts[0] == 0 and starts[-1] == len(states) and bool((starts.diff() >= 0).all())
    return ends_there and len(content["failures"]) == num_rows and (mask is None or len(mask) == len(states))
