"""Random numbers of the data: a function of seed, epoch and batch, so that interruptions change nothing."""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_dataloader_sampler


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which Python's, NumPy's and torch's CPU generators are seeded; afterwards they are restored."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class SeededCollator:
    """
    A collator whose draws (frames, crops, mirroring) depend only on the seed, the epoch and the rows of the batch. The
    number of loader workers, their read-ahead and interruptions have no effect.

    Args:
        collator: Turns rows into a batch.
        seed: Seed of the run.
    """

    def __init__(self, collator: Callable[[list[dict]], Any], seed: int):
        self.collator = collator
        self.seed = seed
        # In shared memory, because persistent loader workers hold a copy of this object.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch for this process's loader workers; call it before requesting the epoch's first batch."""
        self._epoch.fill_(epoch)

    def __call__(self, rows: list[dict]) -> Any:
        names = [f"{row.get('clip_id')}\0{row.get('image_id')}" for row in rows]
        text = "\0".join([str(self.seed), str(self._epoch.item()), *names])
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        with seeded(int.from_bytes(digest, "big") >> 1):
            return self.collator(rows)


class EpochCallback(TrainerCallback):
    """
    Sets the epoch of a [`SeededCollator`] and of the sampler. accelerate sets the epoch of samplers too, but not of a
    sampler below the wrappers that skip batches after an interruption and distribute them to processes.
    """

    def __init__(self, collator: SeededCollator):
        self.collator = collator
        self._epoch: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._epoch = None

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        # Counted here, because the state counts epochs only if their length is known.
        self._epoch = int(state.epoch or 0) if self._epoch is None else self._epoch + 1
        self.collator.set_epoch(self._epoch)
        sampler = None if train_dataloader is None else get_dataloader_sampler(train_dataloader)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self._epoch)
