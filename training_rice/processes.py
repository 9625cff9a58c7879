"""What the processes of one run decide together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")
_exchanged: dict[torch.device, Tensor] = {}
_TOLD = "Another process raises this too, and tells the user."


def are_several() -> bool:
    """Whether this run has other processes, and they are connected."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def maximum(value: Tensor | float, device: torch.device) -> float:
    """The largest of the processes' numbers; to be called by all of them."""
    if not are_several():
        return float(value)
    # Kept: the thread that exchanges it would else be the one to free it, and take Python's lock for that, and a
    # loader worker that is forked at that moment never starts.
    shared = _exchanged.setdefault(device, torch.zeros((), device=device))
    shared.copy_(torch.as_tensor(value))
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.item()


def on_first_process(decide: Callable[[], Result]) -> Result:
    """
    What the first process decides, on every process; to be called by all of them.

    Args:
        decide: Called on the first process alone; what it returns can be pickled.

    Raises:
        ValueError, OSError: those of `decide`, on every process; none is left waiting.
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
    What one process raises inside, all raise at the end, so that none is left waiting; to be entered by all of them,
    with nothing inside that waits for others.

    Raises:
        ValueError, OSError: that of the first process that has one, which tells the user.
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
    """Whether an error is one that another process tells the user."""
    return _TOLD in getattr(error, "__notes__", ())
