"""The queue of past embeddings."""

import pytest
import torch

from modeling_rice.loss_rice import EMPTY
from training_rice.memory_queue import MemoryQueue


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, 3).clone()


def test_oldest_is_replaced_first():
    queue = MemoryQueue(5, 3)
    assert len(queue) == 0
    queue.push(rows(1, 2), rows(-1, -2), torch.tensor([10, 20]))
    assert queue.product_ids.tolist() == [10, 20, EMPTY, EMPTY, EMPTY] and len(queue) == 2
    queue.push(rows(3, 4), rows(-3, -4), torch.tensor([30, 40]))
    queue.push(rows(5, 6), rows(-5, -6), torch.tensor([50, 60]))
    assert queue.product_ids.tolist() == [60, 20, 30, 40, 50]
    assert queue.image_embeds[:, 0].tolist() == [6, 2, 3, 4, 5]
    assert queue.video_embeds[:, 0].tolist() == [-6, -2, -3, -4, -5]


def test_the_last_pairs_of_a_larger_batch_are_kept():
    queue = MemoryQueue(3, 3)
    queue.push(rows(1, 2, 3, 4, 5), rows(1, 2, 3, 4, 5), torch.arange(5))
    assert sorted(queue.product_ids.tolist()) == [2, 3, 4]
    assert queue.image_embeds[:, 0].tolist() == [3, 4, 5]


def test_pairs_that_are_not_finite_are_left_out():
    queue = MemoryQueue(4, 3)
    images = rows(1, 2, 3)
    images[1, 2] = torch.nan
    queue.push(images, rows(1, 2, torch.inf), torch.tensor([1, 2, 3]))
    assert queue.product_ids.tolist() == [1, EMPTY, EMPTY, EMPTY]
    assert queue.image_embeds.isfinite().all() and queue.video_embeds.isfinite().all()


def test_pushed_tensors_are_copied():
    queue, images = MemoryQueue(2, 3), rows(1, 2)
    queue.push(images, images, torch.tensor([1, 2]))
    images.zero_()
    assert queue.image_embeds[:, 0].tolist() == [1, 2]


def test_state_survives(tmp_path):
    queue, other = MemoryQueue(5, 3), MemoryQueue(5, 3)
    for step in range(4):
        queue.push(torch.randn(2, 3), torch.randn(2, 3), torch.tensor([step, step + 10]))
    torch.save(queue.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for q in (queue, other):
        q.push(rows(1), rows(2), torch.tensor([99]))
    assert torch.equal(queue.image_embeds, other.image_embeds)
    assert torch.equal(queue.video_embeds, other.video_embeds)
    assert torch.equal(queue.product_ids, other.product_ids)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="memory_queue_size must be at least 1, got 0"):
        MemoryQueue(0, 3)
    with pytest.raises(ValueError, match=r"memory queue is \(4, 3\), the run's \(5, 3\)"):
        MemoryQueue(5, 3).load_state_dict(MemoryQueue(4, 3).state_dict())
