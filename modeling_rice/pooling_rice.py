"""Temporal pooling: frame features `(B, T, D)` and frame mask `(B, T)`, `True` = real, to clip features `(B, D)`.

Values at padded frames have no influence. Every learnt pooling starts as the published mean, so that training can
continue from a model with the mean.
"""

import torch
from torch import Tensor, nn

from .configuration_rice import RiceConfig
from .loss_rice import at_least_single, l2_normalize


def weighted_mean(states: Tensor, weights: Tensor) -> Tensor:
    """
    Mean `(B, W)` of states `(B, L, W)`, weighted by `(B, L)` bool or of at least 0; zero if all weights are 0.

    Sums are taken in at least single precision, since a sum over many patches overflows in half precision.
    """
    weights = at_least_single(weights)[..., None]
    total = weights.sum(dim=1).clamp(min=torch.finfo(weights.dtype).tiny)
    return ((states * weights).sum(dim=1) / total).to(states.dtype)


def consensus(features: Tensor, mask: Tensor) -> Tensor:
    """Cosine `(B, T)` of each frame with the mean direction of its clip's real frames."""
    directions = l2_normalize(features)
    common = l2_normalize(weighted_mean(directions, mask))
    return (directions @ common[..., None]).squeeze(-1).to(features.dtype)


class RiceZeroLinear(nn.Linear):
    """A linear layer without bias. It has its own class because its initial weights are zero."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)


class RiceTemporalPooling(nn.Module):
    """
    Weighted mean over real frames. Subclasses change what is averaged (`contextualise`) or the logits of the weights
    (`score`). `frame_consensus_scale` adds to these logits and needs no parameters.
    """

    def __init__(self, config: RiceConfig):
        super().__init__()
        self.consensus_scale = config.frame_consensus_scale

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Features `(B, T, D)`, mask `(B, T)` bool with a real frame in each row -> `(B, D)`."""
        precision = next(self.parameters(), features).dtype
        # Filled rather than multiplied by zero, since padding may hold NaN.
        return self._pool(features.masked_fill(~mask[..., None], 0.0).to(precision), mask).to(features.dtype)

    def _pool(self, features: Tensor, mask: Tensor) -> Tensor:
        scores = self.score(features)
        if self.consensus_scale:
            agreement = self.consensus_scale * consensus(features, mask)
            scores = agreement if scores is None else scores + agreement
        states = self.contextualise(features, mask)
        if scores is None:
            return weighted_mean(states, mask)
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=1)
        return (weights[..., None] * states).sum(dim=1)

    def score(self, features: Tensor) -> Tensor | None:
        """Logits `(B, T)` of the weights; `None` for equal weights."""
        return None

    def contextualise(self, features: Tensor, mask: Tensor) -> Tensor:
        """The features `(B, T, D)` that are averaged; values at padded frames are ignored."""
        return features


class RiceAttentionPooling(RiceTemporalPooling):
    """Mean weighted by a learnt saliency per frame, similar to the attention of SEAM Match-RCNN (WACV 2022)."""

    def __init__(self, config: RiceConfig):
        super().__init__(config)
        self.hidden = nn.Linear(config.projection_dim, config.projection_dim)
        self.saliency = RiceZeroLinear(config.projection_dim, 1)

    def score(self, features: Tensor) -> Tensor:
        return self.saliency(torch.tanh(self.hidden(features))).squeeze(-1)


class RiceLSTMPooling(RiceTemporalPooling):
    """Adds the states of an LSTM over the frames in order to the frame features, as in AsymNet (CVPR 2017)."""

    def __init__(self, config: RiceConfig):
        super().__init__(config)
        self.lstm = nn.LSTM(config.projection_dim, config.projection_dim, batch_first=True)
        self.lstm_output = RiceZeroLinear(config.projection_dim, config.projection_dim)

    def contextualise(self, features: Tensor, mask: Tensor) -> Tensor:
        # Real frames are moved to the front, so that no state depends on a padded frame.
        order = (~mask).int().argsort(dim=1, stable=True)[..., None].expand_as(features)
        states = self.lstm(features.gather(1, order))[0]
        return features + torch.zeros_like(states).scatter(1, order, self.lstm_output(states))


class RiceTransformerPooling(RiceTemporalPooling):
    """Adds the output of one transformer block over frames with time positions to the frame features."""

    def __init__(self, config: RiceConfig):
        super().__init__(config)
        width = config.projection_dim
        self.norm = nn.LayerNorm(width)
        self.block = nn.TransformerEncoderLayer(
            width, config.decoder_num_heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.block_output = RiceZeroLinear(width, width)

    def contextualise(self, features: Tensor, mask: Tensor) -> Tensor:
        times = (mask.cumsum(dim=1) - 1).clamp(min=0)
        states = self.norm(features) + time_positions(times, features.shape[-1]).to(features.dtype)
        return features + self.block_output(self.block(states, src_key_padding_mask=~mask))


def time_positions(times: Tensor, width: int) -> Tensor:
    """Sines and cosines `(..., width)` of any times `(...)` (Attention Is All You Need, 2017, section 3.5)."""
    rates = 10_000.0 ** (-torch.arange(0, width, 2, device=times.device) / width)
    angles = times[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width]


POOLINGS = {
    "mean": RiceTemporalPooling,
    "attention": RiceAttentionPooling,
    "lstm": RiceLSTMPooling,
    "transformer": RiceTransformerPooling,
}
