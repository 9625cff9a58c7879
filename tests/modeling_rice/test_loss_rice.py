"""The losses against values worked out by hand, and their shards against one process."""

import math

import pytest
import torch

from modeling_rice.loss_rice import (
    diagonal_cross_entropy,
    false_negative_mask,
    mine_hard_negatives,
    reconstruction_loss,
    symmetric_loss,
)


def test_symmetric_loss_of_two_pairs_by_hand():
    logits = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    rows = math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(-2.0))
    columns = math.log(1 + math.exp(-1.0)) + math.log(1 + math.exp(-3.0))
    torch.testing.assert_close(symmetric_loss(logits, logits.T), torch.tensor((rows + columns) / 4))


def test_one_direction_by_hand():
    logits = torch.log(torch.tensor([[1.0, 2.0, 5.0], [3.0, 1.0, 4.0]]))
    torch.testing.assert_close(
        diagonal_cross_entropy(logits, row_offset=1), torch.tensor((math.log(8 / 2) + math.log(8 / 4)) / 2)
    )


def test_false_negatives_leave_the_softmax():
    logits = torch.log(torch.tensor([[1.0, 2.0, 5.0], [3.0, 1.0, 4.0], [1.0, 1.0, 2.0]]))
    products = torch.tensor([7, 8, 7])
    by_row = (math.log((1 + 2) / 1) + math.log(8 / 1) + math.log((1 + 2) / 2)) / 3
    by_column = (math.log((1 + 3) / 1) + math.log((2 + 1 + 1) / 1) + math.log((4 + 2) / 2)) / 3
    loss = symmetric_loss(logits, logits.T, products, products)
    torch.testing.assert_close(loss, torch.tensor((by_row + by_column) / 2))


def test_ignored_pairs_get_no_gradient():
    logits = torch.randn(3, 3, requires_grad=True)
    products = torch.tensor([7, 8, 7])
    symmetric_loss(logits, logits.T, products, products).backward()
    assert logits.grad[0, 2] == 0 and logits.grad[2, 0] == 0
    assert (logits.grad[[0, 1, 1, 2], [1, 0, 2, 1]] > 0).all()


def test_false_negative_mask_spares_the_own_column_only():
    mask = false_negative_mask(torch.tensor([5, 6]), torch.tensor([5, 5, 5, 6]), row_offset=2)
    assert mask.tolist() == [[True, True, False, False], [False, False, False, False]]


@pytest.mark.parametrize("with_products", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_mean_over_shards_is_the_loss_of_one_process(processes, with_products):
    images, clips = torch.randn(2, 8, 6, dtype=torch.float64)
    products = torch.tensor([0, 1, 2, 0, 3, 1, 4, 5]) if with_products else None

    def gradients(num_shards: int):
        leaves = [images.clone().requires_grad_(), clips.clone().requires_grad_()]
        shard, total = 8 // num_shards, 0.0
        for rank in range(num_shards):
            rows = slice(rank * shard, (rank + 1) * shard)
            mine = None if products is None else products[rows]
            by_image, by_clip = 3 * leaves[0][rows] @ leaves[1].T, 3 * leaves[1][rows] @ leaves[0].T
            total = total + symmetric_loss(by_image, by_clip, mine, products, rank * shard) / num_shards
        total.backward()
        return total.detach(), *(leaf.grad for leaf in leaves)

    torch.testing.assert_close(gradients(processes), gradients(1), rtol=0, atol=1e-10)
    assert processes == 1 or gradients(processes)[0] > 0


def test_a_wrong_row_offset_is_another_loss():
    logits = torch.randn(4, 4)
    assert diagonal_cross_entropy(logits[2:], row_offset=2) != diagonal_cross_entropy(logits[2:], row_offset=0)


def test_hard_negatives_come_positive_first_then_by_similarity():
    similarity = torch.tensor(
        [[0.1, 0.9, 0.3, 0.5], [0.2, 0.0, 0.8, 0.4], [0.7, 0.6, 0.99, 0.65], [0.0, -0.1, -0.2, -0.9]]
    )
    index, valid = mine_hard_negatives(similarity, 2)
    assert index.tolist() == [[0, 1, 3], [1, 2, 3], [2, 0, 3], [3, 0, 1]]
    assert valid.all()


def test_equally_similar_clips_are_taken_in_batch_order():
    index, _ = mine_hard_negatives(torch.zeros(5, 5), 3)
    assert index.tolist() == [[0, 1, 2, 3], [1, 0, 2, 3], [2, 0, 1, 3], [3, 0, 1, 2], [4, 0, 1, 2]]


def test_clips_of_the_same_product_are_never_mined():
    similarity = torch.tensor([[0.0, 0.9, 0.5, 0.1]] * 4)
    products = torch.tensor([1, 1, 2, 3])
    index, valid = mine_hard_negatives(similarity, 2, false_negative_mask(products, products))
    assert index[0].tolist() == [0, 2, 3] and valid[0].tolist() == [True, True, True]
    index, valid = mine_hard_negatives(similarity, 3, false_negative_mask(products, products))
    assert index[0, :3].tolist() == [0, 2, 3] and valid[0].tolist() == [True, True, True, False]
    assert valid[2].all()


def test_mining_does_not_change_the_similarities():
    similarity = torch.randn(4, 4)
    before = similarity.clone()
    mine_hard_negatives(similarity, 2, torch.ones(4, 4, dtype=torch.bool))
    assert torch.equal(similarity, before)


@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_too_small_to_mine_from_is_refused(size):
    with pytest.raises(ValueError, match=rf"global batch of at least 4, got {size}"):
        mine_hard_negatives(torch.zeros(size, size), 3)


def test_reconstruction_loss_by_hand_trains_the_weights_only():
    weights = torch.tensor([[[1.0, 2.0]]], requires_grad=True)
    clip = torch.tensor([[[1.0, 0.0], [0.5, 1.0]]], requires_grad=True)
    image = torch.tensor([[[1.0, 1.0]]], requires_grad=True)
    loss = reconstruction_loss(weights, clip, image)
    torch.testing.assert_close(loss, torch.tensor((1.0**2 + 1.0**2) / 2))
    loss.backward()
    assert clip.grad is None and image.grad is None
    torch.testing.assert_close(weights.grad, torch.tensor([[[1.0, 1.5]]]))
