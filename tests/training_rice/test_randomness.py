"""Random numbers of the data: the same for the same seed, epoch and batch, whatever happened before."""

import random
from types import SimpleNamespace

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from training_rice.randomness import EpochCallback, SeededCollator, seeded


def draw() -> tuple:
    return random.random(), np.random.rand(), torch.rand(()).item()


def rows(*numbers: int) -> list[dict]:
    return [{"clip_id": f"clip{number}", "image_id": f"image{number}"} for number in numbers]


def test_seeded_restores_the_generators():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), torch.initial_seed()
    with seeded(5):
        first = draw()
    with seeded(5):
        assert draw() == first
    with seeded(6):
        assert all(a != b for a, b in zip(draw(), first, strict=True))
    assert states[0] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())
    assert states[3] == torch.initial_seed()


def test_depends_on_seed_epoch_and_rows():
    collator = SeededCollator(lambda rows: draw(), seed=1)
    first = collator(rows(1, 2))
    draw()
    assert collator(rows(1, 2)) == first
    others = [collator(rows(2, 1)), collator(rows(1, 3)), SeededCollator(collator.collator, seed=2)(rows(1, 2))]
    collator.set_epoch(1)
    others.append(collator(rows(1, 2)))
    assert len({first, *others}) == 5
    collator.set_epoch(0)
    assert collator(rows(1, 2)) == first


def _draw(rows):
    return draw()


def test_workers_get_the_epoch():
    """Also those that live on from epoch to epoch."""
    collator = SeededCollator(_draw, seed=1)
    data = rows(1, 2, 3, 4)
    loader = DataLoader(data, batch_size=2, collate_fn=collator, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 0):
        collator.set_epoch(epoch)
        assert list(loader) == [collator(data[:2]), collator(data[2:])]


class Sampler(SequentialSampler):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_epochs_are_counted():
    heard = []
    callback = EpochCallback(SimpleNamespace(set_epoch=heard.append))
    callback.on_train_begin(None, None, None)
    for epoch in (2.4, 2.4, 2.4):
        callback.on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
    callback.on_train_begin(None, None, None)
    callback.on_epoch_begin(None, SimpleNamespace(epoch=None), None)
    assert heard == [2, 3, 4, 0]


def test_the_inner_sampler_gets_the_epoch():
    sampler = Sampler(range(8))
    dealt = BatchSamplerShard(BatchSampler(sampler, 2, drop_last=True), num_processes=2, process_index=1)
    for loader in (
        DataLoader(range(8), batch_sampler=SkipBatchSampler(dealt, 1)),
        DataLoader(range(8), batch_size=2, sampler=sampler),
    ):
        sampler.epoch = 0
        callback = EpochCallback(SeededCollator(list, 0))
        callback.on_epoch_begin(None, SimpleNamespace(epoch=3.5), None, train_dataloader=loader)
        assert sampler.epoch == 3
