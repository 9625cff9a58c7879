"""The losses against values worked out by hand, and their shards against one process."""

import math

import pytest
import torch

from modeling_rice.loss_rice import (
    EMPTY,
    contrastive_loss,
    diagonal_cross_entropy,
    false_negative_mask,
    mine_hard_negatives,
    pair_masks,
    pairwise_sigmoid_loss,
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


def test_false_negative_mask_excludes_only_the_own_column():
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


PRODUCTS = torch.tensor([7, 8, 7])
LOGITS = torch.log(torch.tensor([[1.0, 2.0, 5.0], [3.0, 1.0, 4.0], [1.0, 1.0, 2.0]]))


class TestTargets:
    def test_diagonal_counts_the_same_product_as_negative(self):
        plain = symmetric_loss(LOGITS, LOGITS.T)
        torch.testing.assert_close(symmetric_loss(LOGITS, LOGITS.T, PRODUCTS, PRODUCTS, targets="diagonal"), plain)

    def test_multi_positive_by_hand(self):
        by_row = (math.log(8 / 1) + math.log(8 / 5)) / 2 + math.log(8 / 1) + (math.log(4 / 1) + math.log(4 / 2)) / 2
        by_column = (math.log(5 / 1) + math.log(5 / 1)) / 2 + math.log(4 / 1)
        by_column += (math.log(11 / 5) + math.log(11 / 2)) / 2
        loss = symmetric_loss(LOGITS, LOGITS.T, PRODUCTS, PRODUCTS, targets="multi_positive")
        torch.testing.assert_close(loss, torch.tensor((by_row + by_column) / 6))

    def test_without_repeated_products_all_are_the_same(self):
        products = torch.tensor([1, 2, 3])
        for targets in ("diagonal", "masked", "multi_positive"):
            loss = symmetric_loss(LOGITS, LOGITS.T, products, products, targets=targets)
            torch.testing.assert_close(loss, symmetric_loss(LOGITS, LOGITS.T))

    def test_multi_positive_draws_to_the_other_pair_of_the_product(self):
        gradients = {}
        for targets in ("diagonal", "masked", "multi_positive"):
            logits = LOGITS.clone().requires_grad_()
            symmetric_loss(logits, logits.T, PRODUCTS, PRODUCTS, targets=targets).backward()
            gradients[targets] = logits.grad[2, 0]
        assert gradients["diagonal"] > 0 and gradients["masked"] == 0 and gradients["multi_positive"] < 0


class TestSigmoid:
    def test_by_hand(self):
        logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
        terms = [math.log(1 + math.exp(x)) for x in (-2.0, -1.0, 0.5, -3.0)]
        torch.testing.assert_close(symmetric_loss(logits, logits.T, kind="sigmoid"), torch.tensor(sum(terms) / 2))

    @pytest.mark.parametrize(
        ("targets", "signs"), [("diagonal", (-1, 1, 1)), ("masked", (-1, None, 1)), ("multi_positive", (-1, -1, 1))]
    )
    def test_targets(self, targets, signs):
        """Of the first row: its own clip, the other of its product, another product."""
        logits = torch.randn(3, 3)
        row = logits[0, [0, 2, 1]]
        expected = sum(torch.nn.functional.softplus(sign * x) for sign, x in zip(signs, row, strict=True) if sign)
        positives, ignore = pair_masks(targets, PRODUCTS[:1], PRODUCTS)
        torch.testing.assert_close(pairwise_sigmoid_loss(logits[:1], 0, ignore, positives), expected)

    def test_bias_and_scale_enter(self):
        images, clips = torch.nn.functional.normalize(torch.randn(2, 4, 6), dim=-1)
        loss = contrastive_loss(images, clips, 5.0, bias=-3.0, kind="sigmoid")
        logits = 5 * images @ clips.T - 3
        torch.testing.assert_close(loss, symmetric_loss(logits, logits.T, kind="sigmoid"))


class Memory:
    def __init__(self, images, clips, products):
        self.image_embeds, self.video_embeds, self.product_ids = images, clips, torch.tensor(products)


class TestMemory:
    def embeds(self):
        return torch.nn.functional.normalize(torch.randn(4, 3, 6, dtype=torch.float64), dim=-1)

    def test_empty_memory_changes_nothing(self):
        images, clips, *past = self.embeds()
        memory = Memory(*past, [EMPTY] * 3)
        for kind in ("infonce", "sigmoid"):
            for targets in ("diagonal", "masked", "multi_positive"):
                options = {"product_ids": PRODUCTS, "targets": targets, "kind": kind}
                expected = contrastive_loss(images, clips, 5.0, **options)
                assert contrastive_loss(images, clips, 5.0, memory=memory, **options) == pytest.approx(expected.item())

    @pytest.mark.parametrize(("targets", "allowed"), [("diagonal", [0, 1]), ("masked", [1]), ("multi_positive", [1])])
    def test_past_pairs_are_negatives(self, targets, allowed):
        """The first is of the rows' product, the second is not, the third is not there."""
        images, clips, *past = self.embeds()
        products = torch.tensor([7, 7, 7])
        rows = slice(1, 2)
        loss = contrastive_loss(
            images, clips, 5.0, products, rows, targets=targets, memory=Memory(*past, [7, 9, EMPTY])
        )
        expected = 0.0
        for own, others, bank in ((images, clips, past[1]), (clips, images, past[0])):
            logits = 5 * own[1] @ torch.cat([others, bank[allowed]]).T
            if targets == "masked":
                logits = logits[[1, *range(3, len(logits))]]
                expected = expected - logits.log_softmax(0)[0] / 2
            elif targets == "diagonal":
                expected = expected - logits.log_softmax(0)[1] / 2
            else:
                expected = expected - logits.log_softmax(0)[:3].mean() / 2
        torch.testing.assert_close(loss, expected)

    def test_past_pairs_get_no_gradient(self):
        images, clips, *past = self.embeds()
        leaves = [tensor.clone().requires_grad_() for tensor in (images, clips)]
        contrastive_loss(*leaves, 5.0, PRODUCTS, memory=Memory(*past, [1, 2, 3])).backward()
        assert all(leaf.grad.norm() > 0 for leaf in leaves)
        assert not any(tensor.requires_grad for tensor in past)

    def test_needs_product_ids(self):
        images, clips, *past = self.embeds()
        with pytest.raises(ValueError, match="needs `product_ids`"):
            contrastive_loss(images, clips, 5.0, memory=Memory(*past, [1, 2, 3]))


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("targets", ["diagonal", "masked", "multi_positive"])
def test_blocks_of_rows_average_to_the_whole(targets, kind):
    images, clips = torch.randn(2, 6, 4, dtype=torch.float64)
    products = torch.tensor([0, 1, 0, 2, 1, 3])
    whole = contrastive_loss(images, clips, 2.0, products, targets=targets, kind=kind)
    rows = [slice(0, 2), slice(2, 4), slice(4, 6)]
    parts = [contrastive_loss(images, clips, 2.0, products, block, targets=targets, kind=kind) for block in rows]
    torch.testing.assert_close(sum(parts) / 3, whole)


def test_mining_for_some_rows():
    similarity, products = torch.randn(5, 5), torch.tensor([0, 1, 0, 2, 1])
    ignore = false_negative_mask(products, products)
    index, valid = mine_hard_negatives(similarity, 3, ignore)
    rows = slice(2, 4)
    part = mine_hard_negatives(similarity[rows], 3, ignore[rows], row_offset=2)
    assert torch.equal(part[0], index[rows]) and torch.equal(part[1], valid[rows])
