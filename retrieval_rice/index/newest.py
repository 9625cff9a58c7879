"""The version of an index that is searched now, while others write the next ones."""

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
    Follows a table. Safe to use from several threads.

    Args:
        table: That others may write to.
        model: Whose encodings it must hold.
        cache_bytes: Of encodings kept in memory.
        refresh_s: Seconds after which a newer version is looked for.
    """

    def __init__(self, table: ShopTable, model: Any, cache_bytes: int, refresh_s: float):
        self.table, self.model, self.cache_bytes, self.refresh_s = table, model, cache_bytes, refresh_s
        self.lock = threading.RLock()
        self._rooms: Rooms | None = None
        self._number = 0
        self._looked_at = 0.0

    def is_empty(self) -> bool:
        """Nothing was put into an index in memory yet."""
        return self._rooms is None and self.table.uri is None and not self.table.exists()

    def rooms(self, at_once: bool = False) -> Rooms:
        """
        The version to search.

        Args:
            at_once: Look for a newer one now.

        Raises:
            FileNotFoundError, ValueError: there is none, or it cannot be used; where an older one was in use and is
                good enough, that goes on with a warning.
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
                logger.warning("the version of the %s that was read before is searched: %s", self.table, error)
            self._looked_at = time.monotonic()
            return self._rooms

    def _open(self, before: Rooms | None) -> Rooms:
        snapshot = self.table.snapshot()
        if not snapshot.state.complete:
            if snapshot.state.before is None:
                raise ValueError(
                    f"the {self.table} is not complete: it is being built, or that was interrupted; run the same "
                    f"`rice index` again, which goes on where it ended."
                )
            # While it is replaced, the index that was there answers.
            snapshot = self.table.snapshot(snapshot.state.before)
        if before is not None and before.snapshot.version == snapshot.version:
            return before
        check_fingerprint(snapshot.state, self.model, str(self.table))
        return Rooms(snapshot, self.model, features_class_of(self.model), self.cache_bytes)

    def to_write(self) -> Rooms:
        """
        The newest version, to which changes may be made.

        Raises:
            ValueError: it is being replaced, and an older one is searched.
        """
        with self.lock:
            rooms = self.rooms(at_once=True)
            if rooms.snapshot.version != self._number:
                raise ValueError(f"the {self.table} is being built anew; change it when that has ended.")
            return rooms

    def write_state(self, **values) -> None:
        """Changes what is true of the table as a whole, and searches the version that has it."""
        with self.lock:
            self.table.write_state(replace(self.to_write().snapshot.state, **values))
            self.rooms(at_once=True)


def check_fingerprint(state: State, model: Any, name: str) -> None:
    """Raises `ValueError` when encodings are known to be another model's."""
    own = state_of(model).model_fingerprint
    if not same_state(state.model_fingerprint, own):
        origin = f" ({state.model_name})" if state.model_name else ""
        raise ValueError(
            f"the {name} was encoded by another model{origin}, fingerprint {state.model_fingerprint} and not {own}; "
            f"open it with that model, or build it again with this one."
        )
