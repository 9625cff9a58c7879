"""
Orders of an epoch: what shares a batch, what comes how often, and that several processes and a resumed run agree.

Run as a script this file is one of several processes: `python test_samplers.py FOLDER` leaves what its loader yields.
"""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from data_rice.samplers import (
    BlockOrder,
    ClassBalancedSampler,
    GlobalBatchSampler,
    SameLiveSampler,
    build_sampler,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def batches_of(sampler: GlobalBatchSampler, epoch: int = 0) -> np.ndarray:
    sampler.set_epoch(epoch)
    rows = list(sampler)
    assert len(rows) == len(sampler)
    return np.array(rows).reshape(-1, sampler.batch_size)


def repeats(sampler: SameLiveSampler, batches: np.ndarray) -> int:
    return sum(batches.shape[1] - len(set(sampler.product_ids[batch].tolist())) for batch in batches)


def shop(products_per_live: list[int], clips_per_product: int) -> tuple[np.ndarray, np.ndarray]:
    """Livestreams and products of clips that lie livestream by livestream."""
    lives, products = [], []
    for live, count in enumerate(products_per_live):
        for product in range(count):
            lives += [live] * clips_per_product
            products += [100 * live + product] * clips_per_product
    return np.array(lives), np.array(products)


class TestSameLive:
    def test_livestreams_with_enough_products_fill_batches_alone(self):
        sampler = SameLiveSampler(*shop([8, 8, 8], 3), batch_size=8)
        batches = batches_of(sampler)
        assert sorted(batches.ravel().tolist()) == list(range(72))
        for batch in batches:
            assert len(set(sampler.live_ids[batch])) == 1
            assert len(set(sampler.product_ids[batch])) == 8

    def test_many_products_leave_few_rows_over(self):
        """Of 10 products with 3 clips, batches of 6 take the most frequent first: 5 whole batches."""
        sampler = SameLiveSampler(*shop([10], 3), batch_size=6)
        batches = batches_of(sampler)
        assert sorted(batches.ravel().tolist()) == list(range(30))
        assert repeats(sampler, batches) == 0

    def test_small_livestreams_are_joined_whole(self):
        """Six livestreams of 4 products with one clip each: three batches of two livestreams."""
        sampler = SameLiveSampler(*shop([4] * 6, 1), batch_size=8)
        for epoch in range(3):
            for batch in batches_of(sampler, epoch):
                assert sorted(Counter(sampler.live_ids[batch].tolist()).values()) == [4, 4]

    def test_a_product_repeats_only_if_unavoidable(self):
        sampler = SameLiveSampler(*shop([5, 7, 3, 9, 6, 2, 8], 4), batch_size=8)
        for epoch in range(5):
            assert repeats(sampler, batches_of(sampler, epoch)) == 0

    def test_a_product_sold_in_every_livestream_is_one_product(self):
        lives = np.repeat(np.arange(6), 4)
        products = np.tile([0, 1, 2, 3], 6)
        sampler = SameLiveSampler(lives, products, batch_size=4)
        assert repeats(sampler, batches_of(sampler)) == 0

    def test_with_unavoidable_repeats_every_row_still_comes_once(self):
        sampler = SameLiveSampler(np.zeros(20, int), np.array([0] * 18 + [1, 2]), batch_size=5)
        batches = batches_of(sampler)
        assert sorted(batches.ravel().tolist()) == list(range(20))
        assert repeats(sampler, batches) == 20 - 4 - 2

    def test_more_negatives_of_the_same_shop_than_by_chance(self):
        sampler = SameLiveSampler(*shop([12] * 20, 5), batch_size=32)

        def neighbours(batches):
            return np.mean([(c * (c - 1)).sum() for c in (np.bincount(sampler.live_ids[b]) for b in batches)]) / 32

        chance = np.random.default_rng(0).permutation(1200)[: 37 * 32].reshape(-1, 32)
        assert neighbours(batches_of(sampler)) > 5 * neighbours(chance)

    def test_the_remainder_is_printed_and_changes_per_epoch(self):
        sampler = SameLiveSampler(*shop([5, 6, 7], 2), batch_size=8)
        assert len(sampler) == 32
        left_out = [set(range(36)) - set(batches_of(sampler, epoch).ravel().tolist()) for epoch in range(6)]
        assert all(len(rows) == 4 for rows in left_out)
        assert len(set(map(frozenset, left_out))) > 1
        assert "4 of 36 rows left out" in sampler.describe()

    def test_description_counts(self):
        text = SameLiveSampler(*shop([4] * 6, 1), batch_size=8).describe()
        assert "3 global batches of 8" in text
        assert "2.0 livestreams each; 3.0 other rows of its own livestream" in text
        assert "0 repeated products" in text

    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=80),
        batch_size=st.integers(1, 12),
        epoch=st.integers(0, 3),
    )
    def test_any_data(self, rows, batch_size, epoch):
        lives, products = (np.array(column) for column in zip(*rows))
        if len(rows) < batch_size:
            with pytest.raises(ValueError, match="fewer than one global batch"):
                SameLiveSampler(lives, products, batch_size)
            return
        sampler = SameLiveSampler(lives, products, batch_size)
        batches = batches_of(sampler, epoch)
        assert len(batches) == len(rows) // batch_size
        assert len(set(batches.ravel().tolist())) == batches.size


class TestClassBalanced:
    categories = np.array([0] * 600 + [1] * 60 + [2] * 6)

    def times(self, alpha: float, epoch: int = 0) -> np.ndarray:
        sampler = ClassBalancedSampler(self.categories, batch_size=6, alpha=alpha)
        return np.bincount(batches_of(sampler, epoch).ravel(), minlength=666)

    def test_alpha_0_changes_nothing(self):
        assert (self.times(0.0) == 1).all()

    def test_alpha_1_shows_categories_equally_often(self):
        """666 rows in three categories: 222 draws each, 37 of each of the six rare rows."""
        times = self.times(1.0)
        assert [times[self.categories == c].sum() for c in range(3)] == pytest.approx([222, 222, 222], abs=1)
        assert (times[self.categories == 2] == 37).all()
        assert set(times[self.categories == 1]) == {3, 4}
        assert set(times[self.categories == 0]) == {0, 1}

    def test_square_root(self):
        """Weights of categories n ** 0.5: 24.49, 7.75, 2.45 of 34.69 parts."""
        times = self.times(0.5)
        shares = [times[self.categories == c].sum() / 666 for c in range(3)]
        assert shares == pytest.approx([0.706, 0.2233, 0.0706], abs=0.004)

    def test_head_rows_take_turns(self):
        """Over epochs a row comes as often as its weight says: 222 / 600 times an epoch."""
        times = sum(self.times(1.0, epoch) for epoch in range(200))[self.categories == 0]
        assert times.mean() == pytest.approx(200 * 0.37, abs=0.5)
        assert times.min() > 40

    def test_copies_are_spread(self):
        sampler = ClassBalancedSampler(self.categories, batch_size=6, alpha=1.0)
        batches = batches_of(sampler)
        for row in np.flatnonzero(self.categories == 2):
            places = np.flatnonzero((batches == row).any(axis=1))
            # Once in each 37th of the 111 batches, so never further apart than two of those parts.
            assert np.diff(places).max() <= 7
        assert all(len(set(batch)) >= 5 for batch in batches.tolist())

    def test_alpha_out_of_range(self):
        with pytest.raises(ValueError, match=r"alpha must lie in 0\.\.1, not 2"):
            ClassBalancedSampler(self.categories, 6, alpha=2)

    def test_description(self):
        text = ClassBalancedSampler(self.categories, batch_size=6, alpha=1.0).describe()
        assert "111 global batches of 6" in text
        assert "rarest category 37.00 times, of the most frequent one 0.37 times" in text


class TestBlocks:
    def test_the_order_can_start_at_any_position(self):
        starts = np.array([0, 5, 5, 12, 13, 30, 41])
        whole = BlockOrder(starts, 2, seed=3, epoch=1).rows(0, 41).tolist()
        assert sorted(whole) == list(range(41))
        for start in range(41):
            for length in (1, 7, 60):
                part = BlockOrder(starts, 2, seed=3, epoch=1).rows(start, start + length).tolist()
                assert part == whole[start : start + length]

    def test_shards_of_a_block_stay_together(self):
        """Four shards of ten rows, mixed two by two: the first half of the order are the rows of two shards."""
        order = BlockOrder(np.arange(0, 41, 10), 2, seed=0).rows(0, 40)
        assert len({row // 10 for row in order[:20].tolist()}) == 2
        assert len({row // 10 for row in order[:10].tolist()}) == 2

    def test_without_shuffling(self):
        assert BlockOrder(np.array([0, 3, 9]), 1, shuffle=False).rows(2, 7).tolist() == [2, 3, 4, 5, 6]

    def test_an_epoch_of_the_sampler(self):
        rows = Dataset.from_dict({"live_id": [""] * 1000})
        sampler = build_sampler("random", rows, batch_size=32, seed=5)
        batches = batches_of(sampler, 2)
        assert batches.shape == (31, 32)
        assert len(set(batches.ravel().tolist())) == 992
        assert sampler.order(2).tolist() == batches.ravel().tolist()
        assert "8 of 1,000 rows left out" in sampler.describe()


def _samplers(seed: int = 0) -> list[GlobalBatchSampler]:
    lives, products = shop([5, 6, 7, 9], 2)
    dataset = Dataset.from_dict({"live_id": [str(live) for live in lives]})
    return [
        SameLiveSampler(lives, products, 8, seed),
        ClassBalancedSampler(lives, 8, seed),
        build_sampler("random", dataset, 8, seed),
    ]


@pytest.mark.parametrize("number", range(3))
class TestEach:
    def test_order_is_a_function_of_seed_and_epoch(self, number):
        first, again, other = _samplers()[number], _samplers()[number], _samplers(seed=1)[number]
        orders = [batches_of(first, epoch).tolist() for epoch in range(3)]
        assert [batches_of(again, epoch).tolist() for epoch in (2, 0, 1)] == [orders[i] for i in (2, 0, 1)]
        assert orders[0] != orders[1] != orders[2]
        assert batches_of(other, 0).tolist() != orders[0]

    def test_processes_share_each_global_batch(self, number):
        sampler = _samplers()[number]
        expected = batches_of(sampler, 1)
        shares = [
            list(BatchSamplerShard(BatchSampler(sampler, 4, drop_last=True), num_processes=2, process_index=process))
            for process in range(2)
        ]
        assert [len(share) for share in shares] == [len(expected)] * 2
        for first, second, whole in zip(*shares, expected.tolist()):
            assert first + second == whole


class TestBuild:
    def test_from_a_data_set(self):
        rows = Dataset.from_dict({"live_id": ["a", "b", "a", "b"], "product_id": ["p", "q", "r", "s"]})
        for batch in batches_of(build_sampler("same_live", rows, batch_size=2)).tolist():
            assert sorted(batch) in ([0, 2], [1, 3])

    def test_after_a_selection(self):
        rows = Dataset.from_dict({"live_id": list("xabab"), "product_id": list("xpqrs")}).select([1, 2, 3, 4])
        for batch in batches_of(build_sampler("same_live", rows, batch_size=2)).tolist():
            assert sorted(batch) in ([0, 2], [1, 3])

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("same_live", "The rows have no live_id, which the same_live sampler needs; use the random sampler."),
            ("class_balanced", "The rows have no category"),
            ("biggest_first", "There is no sampler 'biggest_first'; choose random, same_live or class_balanced."),
        ],
    )
    def test_refusals(self, kind, message):
        rows = Dataset.from_dict({"live_id": ["", ""], "product_id": ["p", "q"], "category": ["", ""]})
        with pytest.raises(ValueError, match=message):
            build_sampler(kind, rows, batch_size=2)

    def test_fewer_rows_than_a_batch(self):
        with pytest.raises(ValueError, match="2 rows are fewer than one global batch of 3; lower the batch size"):
            SameLiveSampler(np.zeros(2), np.arange(2), 3)


def _process(folder: str) -> None:
    """What one process sees of two epochs, and of the second one when it goes on after two batches."""
    from accelerate import Accelerator, skip_first_batches
    from torch.utils.data import DataLoader
    from transformers import TrainerState

    from training_rice.randomness import EpochCallback, SeededCollator

    accelerator = Accelerator()
    seen = []
    for sampler in _samplers():
        loader = DataLoader(range(10**6), sampler=sampler, batch_size=4, drop_last=True, collate_fn=list)
        loader = accelerator.prepare(loader)
        epochs = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            epochs.append(list(loader))
        sampler.set_epoch(0)
        callback = EpochCallback(SeededCollator(list, 0))
        callback.on_epoch_begin(None, TrainerState(epoch=1.25), None, train_dataloader=loader)
        rest = skip_first_batches(loader, 2)
        rest.set_epoch(1)
        seen.append({"epochs": epochs, "rest": list(rest)})
    Path(folder, f"{accelerator.process_index}.json").write_text(json.dumps(seen))


def test_two_processes_through_accelerate(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    shares = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for sampler, first, second in zip(_samplers(), *shares):
        for epoch in range(2):
            expected = batches_of(sampler, epoch).tolist()
            assert [a + b for a, b in zip(first["epochs"][epoch], second["epochs"][epoch], strict=True)] == expected
        for share in (first, second):
            assert share["rest"] == share["epochs"][1][2:]


if __name__ == "__main__":
    _process(sys.argv[1])
