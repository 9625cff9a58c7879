"""The end of a run by Ctrl-C or SIGTERM: at once, or after a last checkpoint."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .processes import maximum

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """Ends the program with the status of a signal, 128 plus its number: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


def stop(number: int) -> None:
    """Raises [`Stopped`]."""
    raise Stopped(number)


@contextmanager
def signals_call(function: Callable[[int], None]) -> Iterator[None]:
    """
    A context in which SIGINT and SIGTERM call `function` with their number; the former handlers are restored
    afterwards. Child processes forked inside still end by these signals. Only the main thread can set handlers; in
    another thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(number, frame):
        if os.getpid() == owner:
            function(number)
            return
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.raise_signal(number)

    former = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            # None means a handler that Python did not install and cannot restore.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class StopRequest:
    """
    A signal that waits for the end of a training step; a second signal ends the run at once.

    Attributes:
        number: Number of the signal; 0 if there is none.
    """

    def __init__(self):
        self.number = 0

    def __call__(self, number: int) -> None:
        if self.number:
            stop(number)
        self.number = number
        logger.info("%s: a checkpoint is written after this step.", signal.Signals(number).name)

    def agreed(self, device: torch.device) -> int:
        """The signal that any process received, 0 if none; all processes must call it."""
        # Only the signal handler sets `number`, and a signal may arrive at any moment.
        return int(maximum(self.number, device))


def outlive_signals(initialise: Callable[[int], None] | None, worker: int) -> None:
    """
    Start function of a loader worker, besides its own `initialise`, if signals wait for the end of a step. A signal to
    the whole process group must not end the workers, because the step needs their data.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The second signal ends the worker: it comes from the loader if the worker does not end by itself.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if initialise is not None:
        initialise(worker)
