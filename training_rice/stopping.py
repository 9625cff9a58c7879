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
    SIGINT and SIGTERM call `function` with their number inside, and do what they did before afterwards. Processes that
    are forked inside end by them as ever. Only the main thread of a program can do this; in another nothing changes.
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
            # None stands for one that Python did not install and cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class StopRequest:
    """
    A signal that waits for the end of a training step; a second one does not wait.

    Attributes:
        number: Of the signal; 0 while there is none.
    """

    def __init__(self):
        self.number = 0

    def __call__(self, number: int) -> None:
        if self.number:
            stop(number)
        self.number = number
        logger.info("%s: a checkpoint is written after this step.", signal.Signals(number).name)

    def agreed(self, device: torch.device) -> int:
        """The signal that any process got, 0 while none has; to be called by all of them."""
        # Nothing but the signal itself sets `number`, which may come at any moment, this one included.
        return int(maximum(self.number, device))


def outlive_signals(initialise: Callable[[int], None] | None, worker: int) -> None:
    """
    What a loader worker starts with, besides its own `initialise`, where signals wait for the end of a step: one that
    was sent to the whole group of processes must not take the step's data away.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The second one is obeyed: it comes from the loader, to a worker that does not end by itself.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if initialise is not None:
        initialise(worker)
