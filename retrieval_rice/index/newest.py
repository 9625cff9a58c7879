"""The searched version of an index, while others write newer ones."""

import logging
import threading
import time
from dataclasses import replace
from typing import Any

from modeling_rice.fingerprint_rice import same_state

from .build import state_of
from .job import features_class_of
from .search import Rooms
from .table import ShopTable, State

logger = logging.getLogger(__name__)


class Newest:
    """
    Follows the versions of a table. Thread-safe.

    Args:
        table: The table, which others may change.
        model: The model of its encodings.
        cache_bytes: Maximum bytes of encodings in memory.
        refresh_s: Seconds after which it checks for a newer version.
    """

    def __init__(self, table: ShopTable, model: Any, cache_bytes: int, refresh_s: float):
        self.table, self.model, self.cache_bytes, self.refresh_s = table, model, cache_bytes, refresh_s
        self.lock = threading.RLock()
        self._rooms: Rooms | None = None
        self._number = 0
        self._looked_at = 0.0

    def is_empty(self) -> bool:
        """Whether this is an index in memory without any images yet."""
        return self._rooms is None and self.table.uri is None and not self.table.exists()

    def rooms(self, at_once: bool = False) -> Rooms:
        """
        The version to search.

        Args:
            at_once: Check for a newer version now.

        Raises:
            FileNotFoundError, ValueError: there is no version, or it cannot be used. If a usable older version is
                open, it stays in use with a warning.
        """
        rooms = self._rooms
        if rooms is not None and not at_once and time.monotonic() - self._looked_at < self.refresh_s:
            return rooms
        with self.lock:
            try:
                number = self.table.version
                if self._rooms is None or number != self._number:
                    self._rooms = self._open(self._rooms)
                    self._number = number
            except (ValueError, OSError) as error:
                if at_once or self._rooms is None:
                    raise
                logger.warning("the older version of the %s stays in use: %s", self.table, error)
            self._looked_at = time.monotonic()
            return self._rooms

    def _open(self, before: Rooms | None) -> Rooms:
        snapshot = self.table.snapshot()
        if not snapshot.state.complete:
            if snapshot.state.before is None:
                raise ValueError(
                    f"the {self.table} is not complete: its build is running or was interrupted; run the same "
                    f"`rice index` again, which resumes it."
                )
            # During a replacement the previous index answers.
            snapshot = self.table.snapshot(snapshot.state.before)
        if before is not None and before.snapshot.version == snapshot.version:
            return before
        check_fingerprint(snapshot.state, self.model, str(self.table))
        return Rooms(snapshot, self.model, features_class_of(self.model), self.cache_bytes)

    def to_write(self) -> Rooms:
        """
        The newest version, for changes.

        Raises:
            ValueError: the index is being replaced, and an older version is searched.
        """
        with self.lock:
            rooms = self.rooms(at_once=True)
            if rooms.snapshot.version != self._number:
                raise ValueError(f"the {self.table} is being built again; change it after the build.")
            return rooms

    def write_state(self, **values) -> None:
        """Changes the state of the table, and switches to the new version."""
        with self.lock:
            self.table.write_state(replace(self.to_write().snapshot.state, **values))
            self.rooms(at_once=True)


def check_fingerprint(state: State, model: Any, name: str) -> None:
    """Raises `ValueError` if the encodings are known to be of another model."""
    own = state_of(model).model_fingerprint
    if not same_state(state.model_fingerprint, own):
        origin = f" ({state.model_name})" if state.model_name else ""
        raise ValueError(
            f"the {name} was encoded by another model{origin}, fingerprint {state.model_fingerprint}, not {own}; "
            f"open it with that model, or build it again with this one."
        )
