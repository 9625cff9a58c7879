"""Frames to a clip's vector: what padding, order and time may change, and that a new pooling starts as the mean."""

import pytest
import torch

from modeling_rice import RiceModel
from modeling_rice.pooling_rice import POOLINGS, consensus, time_positions, weighted_mean
from training_rice.arguments import ModelArguments
from training_rice.setup import build_model

NAMES = list(POOLINGS)
LEARNT = [name for name in NAMES if name != "mean"]
LENGTHS = [4, 1, 3]
MASK = torch.arange(4)[None] < torch.tensor(LENGTHS)[:, None]


@pytest.fixture
def make_pooling(make_config):
    """A function that builds a pooling whose parameters matter."""

    def make(name: str, **settings):
        torch.manual_seed(1)
        pooling = POOLINGS[name](make_config(temporal_pooling=name, **settings)).double().eval()
        with torch.no_grad():
            for parameter in pooling.parameters():
                parameter.add_(torch.randn_like(parameter))
        return pooling

    return make


@pytest.fixture
def features():
    return torch.randn(3, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("scale", [0.0, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_the_content_of_padding_has_no_influence(make_pooling, features, name, scale):
    pooling = make_pooling(name, frame_consensus_scale=scale)
    expected = pooling(features, MASK)
    for garbage in (0.0, 1e9, float("nan"), float("inf")):
        torch.testing.assert_close(pooling(features.masked_fill(~MASK[..., None], garbage), MASK), expected)
    # Nor does how much of it there is.
    for row, length in enumerate(LENGTHS):
        alone = pooling(features[row : row + 1, :length], MASK[row : row + 1, :length])
        torch.testing.assert_close(alone[0], expected[row])


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_reaches_padding_and_every_real_frame_has_one(make_pooling, features, name):
    features.requires_grad_()
    make_pooling(name)(features, MASK).square().sum().backward()
    touched = features.grad.abs().sum(dim=-1) > 0
    assert torch.equal(touched, MASK)


@pytest.mark.parametrize("name", NAMES)
def test_order_matters_only_to_lstm_and_transformer_pooling(make_pooling, features, name):
    pooling, mask = make_pooling(name, frame_consensus_scale=2.0), torch.ones(3, 4, dtype=torch.bool)
    difference = (pooling(features, mask) - pooling(features[:, [2, 0, 3, 1]], mask)).abs().max()
    assert (difference > 1e-3) if name in ("lstm", "transformer") else (difference < 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_padding_may_be_at_any_position(make_pooling, features, name):
    pooling = make_pooling(name)
    scattered = torch.tensor([[True, False, True, True]])
    kept = pooling(features[:1, [0, 2, 3]], torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(pooling(features[:1], scattered), kept)


def test_a_weighted_single_frame_is_unchanged(make_pooling, features):
    for name in ("mean", "attention"):
        pooled = make_pooling(name, frame_consensus_scale=3.0)(features, MASK)
        torch.testing.assert_close(pooled[1], features[1, 0])


def test_a_weighted_mean():
    states = torch.tensor([[[1.0], [2.0], [5.0]]])
    assert weighted_mean(states, torch.tensor([[0.5, 0.0, 0.25]])).item() == pytest.approx((0.5 + 1.25) / 0.75)
    assert weighted_mean(states, torch.zeros(1, 3)).item() == 0
    # 256 patches of a large activation: their sum is beyond half precision, their mean is not.
    large = torch.full((1, 256, 1), 1000.0, dtype=torch.float16)
    for weights in (torch.ones(1, 256), torch.full((1, 256), 1e-7)):
        mean = weighted_mean(large, weights)
        assert mean.dtype == torch.float16 and mean.item() == 1000


def test_the_mean_is_that_of_the_published_model(make_pooling, features):
    weights = MASK[..., None].double()
    published = (features * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    assert torch.equal(make_pooling("mean")(features, MASK), published)
    assert torch.equal(weighted_mean(features, MASK), published)
    assert not list(make_pooling("mean").parameters())


def test_saliency_weighs_frames(make_pooling, features):
    pooling = make_pooling("attention")
    with torch.no_grad():
        pooling.hidden.weight.zero_()[0, 0] = 1.0
        pooling.hidden.bias.zero_()
        pooling.saliency.weight.zero_()[0, 0] = 2.0
    scores = (2 * torch.tanh(features[..., 0])).masked_fill(~MASK, -torch.inf)
    expected = torch.einsum("bt,btd->bd", scores.softmax(dim=1), features)
    torch.testing.assert_close(pooling(features, MASK), expected)


def test_frames_that_disagree_with_the_others_count_less(make_pooling):
    frames = torch.tensor([[[1.0, 0.1], [1.0, -0.1], [1.0, 0.0], [-1.0, 0.3]]], dtype=torch.float64)
    frames = torch.nn.functional.pad(frames, (0, 14))
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert consensus(frames, mask)[0].argmin() == 3
    pooled = [make_pooling("mean", frame_consensus_scale=scale)(frames, mask)[0, 0] for scale in (0.0, 2.0, 50.0)]
    assert pooled[0] == 0.5 and pooled[0] < pooled[1] < pooled[2]
    torch.testing.assert_close(pooled[2], torch.tensor(1.0, dtype=torch.float64))


def test_times_differ_at_any_length():
    positions = time_positions(torch.arange(500), 15)
    assert positions.shape == (500, 15) and positions.abs().max() <= 1
    assert torch.cdist(positions, positions).add(torch.eye(500)).min() > 1e-3


@pytest.mark.parametrize("name", LEARNT)
def test_a_checkpoint_trained_with_the_mean_continues_with_another_pooling(make_model, make_batch, tmp_path, name):
    model, batch = make_model(), make_batch()
    model.save_pretrained(tmp_path)
    other = build_model(ModelArguments(model_name_or_path=str(tmp_path), model={"temporal_pooling": name})).eval()
    expected, found = model(**batch), other(**batch)
    # It starts as the mean.
    torch.testing.assert_close(found.video_embeds, expected.video_embeds)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-5)
    found.loss.backward()
    gradients = [p.grad for p in other.temporal_pooling.parameters() if p.grad is not None]
    assert any(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", LEARNT)
def test_a_saved_pooling_is_restored_and_may_be_replaced(make_model, make_batch, tmp_path, name):
    model, batch = make_model(temporal_pooling=name), make_batch()
    model.save_pretrained(tmp_path)
    loaded = RiceModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).video_embeds, model(**batch).video_embeds)
    mean = build_model(ModelArguments(model_name_or_path=str(tmp_path), model={"temporal_pooling": "mean"})).eval()
    assert not torch.allclose(mean(**batch).video_embeds, model(**batch).video_embeds, atol=1e-3)
    following = LEARNT[(LEARNT.index(name) + 1) % len(LEARNT)]
    other = build_model(ModelArguments(model_name_or_path=str(tmp_path), model={"temporal_pooling": following})).eval()
    torch.testing.assert_close(other(**batch).video_embeds, mean(**batch).video_embeds)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_padded_frames_do_not_spread_nan_in_half_precision(make_model, make_batch, dtype):
    batch = make_batch()
    settings = {"temporal_pooling": "attention", "frame_consensus_scale": 4.0}
    embeds = make_model(**settings, dtype=dtype)(**batch, return_loss=False).video_embeds
    expected = make_model(**settings)(**batch, return_loss=False).video_embeds
    assert ((embeds * expected).sum(dim=1) > 0.99).all()


def test_a_half_precision_model_pools_too(make_model, make_batch):
    for name in NAMES:
        model = make_model(temporal_pooling=name).to(torch.bfloat16)
        embeds = model.encode_clips(**make_batch()).embeds
        assert embeds.isfinite().all() and embeds.dtype == torch.float32


def test_settings_that_cannot_work(make_config):
    with pytest.raises(ValueError, match='`temporal_pooling="transformer"` needs `projection_dim=18`'):
        make_config(temporal_pooling="transformer", projection_dim=18, use_decoder=False)
    with pytest.raises(ValueError, match="`frame_consensus_scale` must be 0 or more, got -1"):
        make_config(frame_consensus_scale=-1.0)
