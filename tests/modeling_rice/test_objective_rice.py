"""What the configuration's options do to the losses of a model."""

import math

import pytest
import torch

from modeling_rice import RiceModel
from modeling_rice.loss_rice import EMPTY, contrastive_loss, symmetric_loss

DOUBLE = torch.float64
PRODUCTS = [1, 2, 1, 3, 2]


class Memory:
    """One past pair, of a product that no batch here has; keeps what is pushed."""

    def __init__(self, width: int = 16):
        self.image_embeds, self.video_embeds = torch.nn.functional.normalize(torch.randn(2, 2, width), dim=-1)
        self.product_ids = torch.tensor([9, EMPTY])
        self.pushed = []

    def push(self, *batch):
        self.pushed.append(batch)


@pytest.mark.parametrize("targets", ["diagonal", "masked", "multi_positive"])
@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_options_reach_the_contrastive_loss(make_model, make_batch, targets, kind):
    model = make_model(
        dtype=DOUBLE, use_decoder=False, contrastive_targets=targets, contrastive_loss=kind, logit_scale_init_value=7.0
    )
    batch = make_batch(dtype=DOUBLE, product_ids=PRODUCTS)
    output = model(**batch)
    bias = model.logit_bias.item() if kind == "sigmoid" else 0.0
    expected = contrastive_loss(
        output.image_embeds, output.video_embeds, 7.0, batch["product_ids"], bias=bias, targets=targets, kind=kind
    )
    torch.testing.assert_close(output.contrastive_loss, expected, rtol=1e-6, atol=0)
    logits = 7.0 * output.image_embeds @ output.video_embeds.T + bias
    torch.testing.assert_close(output.logits_per_image, logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("targets", ["diagonal", "masked", "multi_positive"])
def test_options_reach_the_matching_loss(make_model, make_batch, targets):
    model = make_model(dtype=DOUBLE, matching_negatives="all", matching_targets=targets)
    output = model(**make_batch(dtype=DOUBLE, product_ids=PRODUCTS))
    products = torch.tensor(PRODUCTS)
    logits = output.matching_logits
    expected = symmetric_loss(logits, logits.T, products, products, targets=targets)
    torch.testing.assert_close(output.matching_loss, expected)
    others = {"diagonal", "masked", "multi_positive"} - {targets}
    for other in others:
        assert abs(symmetric_loss(logits, logits.T, products, products, targets=other) - expected) > 1e-4


def test_mining_may_choose_the_same_product_under_diagonal_targets_only(make_model, make_batch):
    batch = make_batch(dtype=DOUBLE, product_ids=[1, 1, 1, 1, 2])
    chosen = {}
    for targets in ("diagonal", "masked"):
        model = make_model(dtype=DOUBLE, matching_targets=targets, num_hard_negatives=3)
        output = model(**batch)
        exists = output.matching_logits[0] > torch.finfo(DOUBLE).min
        chosen[targets] = set(output.matching_indices[0][exists].tolist())
    assert len(chosen["diagonal"]) == 4
    assert chosen["masked"] == {0, 4}


def test_the_bias_exists_only_with_the_sigmoid_loss_and_is_learnt_and_saved(make_model, make_batch, tmp_path):
    model = make_model(use_decoder=False, contrastive_loss="sigmoid", logit_bias_init_value=-4.0)
    with torch.no_grad():
        model.logit_bias.fill_(-4.5)
    model(**make_batch()).loss.backward()
    assert model.logit_bias.grad.abs() > 0
    model.save_pretrained(tmp_path)
    assert RiceModel.from_pretrained(tmp_path).logit_bias.item() == -4.5
    assert make_model().logit_bias is None and "logit_bias" not in make_model().state_dict()


def test_a_learnt_temperature_is_clamped_and_keeps_its_gradient(make_model, make_batch):
    model = make_model(use_decoder=False, learn_logit_scale=True, logit_scale_init_value=10.0, logit_scale_max=20.0)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(30.0))
    model.bound_logit_scale()
    assert model.logit_scale.exp().item() == pytest.approx(20.0)
    model(**make_batch()).loss.backward()
    assert model.logit_scale.grad.abs() > 0
    with torch.no_grad():
        model.logit_scale.fill_(math.log(0.5))
    model.bound_logit_scale()
    assert model.logit_scale.exp().item() == pytest.approx(0.5)


@pytest.mark.parametrize("settings", [{"learn_logit_scale": True, "logit_scale_max": None}, {}])
def test_without_a_bound_or_a_learnt_temperature_nothing_is_clamped(make_model, settings):
    model = make_model(logit_scale_init_value=300.0, **settings)
    model.bound_logit_scale()
    assert model.logit_scale.exp().item() == pytest.approx(300.0)


def test_a_memory_counts_in_training_mode_only(make_model, make_batch):
    model, batch = make_model(logit_scale_init_value=5.0, decoder_dropout=0.0), make_batch(product_ids=PRODUCTS)
    without = model(**batch).contrastive_loss
    memory = Memory()
    model.set_memory(memory)
    assert model(**batch).contrastive_loss == without and not memory.pushed
    output = model.train()(**batch)
    assert output.contrastive_loss > without
    ((images, clips, products),) = memory.pushed
    assert torch.equal(images, output.image_embeds.detach()) and torch.equal(clips, output.video_embeds.detach())
    assert not images.requires_grad and products.tolist() == PRODUCTS
    assert not [name for name in model.state_dict() if "memory" in name]
