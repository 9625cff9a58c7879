"""What the processes of one run decide together."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def are_several() -> bool:
    """Whether this run has other processes, and they are connected."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    """Waits until every process of the run is here."""
    if are_several():
        dist.barrier()


def on_first_process(decide: Callable[[], Result]) -> Result:
    """
    What the first process decides, on every process; to be called by all of them.

    Args:
        decide: Called on the first process alone; what it returns can be pickled.

    Raises:
        ValueError, OSError: those of `decide`, on the first process, which tells the user.
        SystemExit: with status 2 on the others, when the first one was refused.
    """
    if not are_several():
        return decide()
    verdict, refusal = [None, True], None
    if dist.get_rank() == 0:
        try:
            verdict = [decide(), False]
        except (ValueError, OSError) as error:
            refusal = error
    dist.broadcast_object_list(verdict, src=0)
    if refusal is not None:
        raise refusal
    if verdict[1]:
        raise SystemExit(2)
    return verdict[0]
