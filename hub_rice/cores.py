"""Runs a model on several batches at once on a CPU."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any

import torch

PICTURES_PER_CORE = 16
"""Number of pictures that a thread encodes at once on a CPU: few, so that intermediate results stay in its caches."""


def _use_one_thread() -> None:
    # The first use of torch in a thread sets its number of threads to the default, also after an earlier setting.
    torch.get_num_threads()
    torch.set_num_threads(1)


def map_on_cores(work: Callable[[Any], Any], items: Iterable, device: torch.device | str = "cpu") -> Iterator:
    """
    Yields `work(item)` for each item, in order. On a CPU, as many items are worked on at once as torch has threads,
    each by one thread. That is faster than one item in all threads, because small operations do not gain from more
    threads, and because the caller reads the next items meanwhile. On another device, and for a single item, which has
    all threads, it is `map`.

    Args:
        work: Safe to call from several threads, such as encoding by a model in eval mode. It runs with the caller's
            gradient mode and autocast.
        items: Read in the calling thread, at most one item per thread ahead.
        device: Device of the model.
    """
    threads = torch.get_num_threads()
    if torch.device(device).type != "cpu" or threads == 1:
        yield from map(work, items)
        return
    has_gradients = torch.is_grad_enabled()
    is_cast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def run(item: Any) -> Any:
        # Each thread has its own gradient mode and autocast.
        with torch.set_grad_enabled(has_gradients), torch.autocast("cpu", dtype, enabled=is_cast):
            return work(item)

    items = iter(items)
    pool = ThreadPoolExecutor(threads, "encoding", initializer=_use_one_thread)
    waiting: deque = deque()
    try:
        torch.set_num_threads(1)
        first = list(islice(items, 2))
        if len(first) == 1:
            torch.set_num_threads(threads)
            yield work(first[0])
            return
        for item in chain(first, items):
            waiting.append(pool.submit(run, item))
            if len(waiting) > threads:
                # The caller has all threads for what it does with a result.
                torch.set_num_threads(threads)
                yield waiting.popleft().result()
                torch.set_num_threads(1)
        torch.set_num_threads(threads)
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
