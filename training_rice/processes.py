"""Common decisions of the processes of a run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")
_exchanged: dict[torch.device, Tensor] = {}
_TOLD = "Another process raises this error too and reports it."


def are_several() -> bool:
    """Whether this run has several connected processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def maximum(value: Tensor | float, device: torch.device) -> float:
    """The maximum of the processes' numbers; all processes must call it."""
    if not are_several():
        return float(value)
    # Keep a reference. Otherwise the communication thread frees the tensor, which takes Python's lock, and a loader
    # worker that is forked at that moment never starts.
    shared = _exchanged.setdefault(device, torch.zeros((), device=device))
    shared.copy_(torch.as_tensor(value))
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.item()


def on_first_process(decide: Callable[[], Result]) -> Result:
    """
    Returns the first process's decision on every process; all processes must call it.

    Args:
        decide: Called only on the first process. Its result must be picklable.

    Raises:
        ValueError, OSError: errors of `decide`, on every process, so that no process waits.
    """
    several = are_several()
    first = not several or dist.get_rank() == 0
    outcome: list = [None]
    if first:
        try:
            outcome = [decide()]
        except (ValueError, OSError) as error:
            outcome = [error]
    if several:
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        if not first:
            outcome[0].add_note(_TOLD)
        raise outcome[0]
    return outcome[0]


@contextmanager
def failing_together() -> Iterator[None]:
    """
    A context that raises the error of one process on all processes at its end, so that no process waits. All processes
    must enter it, and code inside must not wait for other processes.

    Raises:
        ValueError, OSError: the error of the first failed process, which reports it to the user.
    """
    failure = None
    try:
        yield
    except (ValueError, OSError) as error:
        failure = error
    failures = [failure]
    if are_several():
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
    rank = next((rank for rank, one in enumerate(failures) if one is not None), None)
    if rank is None:
        return
    if are_several() and rank != dist.get_rank():
        failures[rank].add_note(_TOLD)
        raise failures[rank]
    raise failure


def is_told(error: Exception) -> bool:
    """Whether another process reports this error to the user."""
    return _TOLD in getattr(error, "__notes__", ())
