"""The pairwise matching decoder (PMD) and the patch feature reconstruction head (PFR).

A pair's score reads only the class-token row of the last block. The image's states do not depend on the clip, and the
clip's keys and values do not depend on the image. The decoder therefore has three functions: `encode_images` runs once
per image, `encode_clips` once per clip, and `score_pairs` needs one query row per pair and reads cached keys and
values. It treats images as query positions, so that all pairs of a clip are one attention call. Without active dropout
this equals the full computation exactly.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_rice import RiceConfig
from .loss_rice import at_least_single, l2_normalize


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Query `(B, H, L, h)`, key and value `(B, H, S, h)` -> context `(B, L, H, h)`, weights `(B, H, L, S)`."""
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = _softmax(weights)
    context = nn.functional.dropout(weights, p=dropout, training=module.training) @ value
    return context.transpose(1, 2).contiguous(), weights


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension, in at least single precision."""
    precision = torch.promote_types(scores.dtype, torch.float32)
    return nn.functional.softmax(scores, dim=-1, dtype=precision).to(scores.dtype)


def additive_mask(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """`(B, S)` bool, `True` = attend -> `(B, 1, 1, S)` additive mask."""
    bias = torch.zeros(keep.shape, dtype=dtype, device=keep.device)
    return bias.masked_fill(~keep, torch.finfo(dtype).min)[:, None, None, :]


class RiceDecoderAttention(nn.Module):
    """Multi-head attention with separate projections, so that keys and values can be computed once and cached."""

    def __init__(self, config: RiceConfig, output_projection: bool, dropout: float):
        super().__init__()
        width = config.decoder_hidden_size
        self.config = config
        self.num_heads = config.decoder_num_heads
        self.head_dim = width // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width) if output_projection else nn.Identity()

    def split_heads(self, states: Tensor) -> Tensor:
        """`(B, L, d)` -> `(B, H, L, d / H)`."""
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Attention of split heads; returns the context `(B, L, d)` before the output projection."""
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        context, _ = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            is_causal=False,
        )
        return context.flatten(-2)


class RiceDecoderMLP(nn.Module):
    """Feed-forward part of a block: `(..., d)` -> `(..., d)`."""

    def __init__(self, config: RiceConfig):
        super().__init__()
        width = config.decoder_hidden_size
        self.fc1 = nn.Linear(width, config.decoder_intermediate_size or 4 * width)
        self.activation = ACT2FN[config.decoder_hidden_act]
        self.fc2 = nn.Linear(self.fc1.out_features, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class RiceDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block. Self-attention blocks run all of it; the cross-attention block gets a computed context."""

    def __init__(self, config: RiceConfig, cross_attention: bool):
        super().__init__()
        width, eps = config.decoder_hidden_size, config.decoder_layer_norm_eps
        if not cross_attention and config.decoder_self_layer_norm_eps is not None:
            eps = config.decoder_self_layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = RiceDecoderAttention(
            config,
            output_projection=config.decoder_output_projection or not cross_attention,
            dropout=config.decoder_dropout if cross_attention else 0.0,
        )
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = RiceDecoderMLP(config)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            hidden_states (`(..., d)`): Input of the block.
            attention_mask: Additive mask of the self-attention.
            context (`(..., d)`, *optional*): Output of an attention that has already run. Without it the states
                `(B, L, d)` attend to each other.
        """
        if context is None:
            normed, attention = self.layer_norm1(hidden_states), self.attention
            query, key, value = (
                attention.split_heads(project(normed))
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            context = attention.attend(query, key, value, attention_mask)
        hidden_states = hidden_states + self.attention.out_proj(context)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class RiceMatchingScore(nn.Linear):
    """
    States `(..., d)` -> scores `(..., 1)` in at least single precision: a linear layer, or the cosine with its weight.

    Args:
        width: Width d of the states.
        is_cosine: Whether scores are cosines; these have no bias.
    """

    def __init__(self, width: int, is_cosine: bool):
        super().__init__(width, 1, bias=not is_cosine)
        self.is_cosine = is_cosine

    def forward(self, states: Tensor) -> Tensor:
        precise = l2_normalize if self.is_cosine else at_least_single
        bias = None if self.bias is None else at_least_single(self.bias)
        # Never autocast: at a scale of 100, half precision would create ties.
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(precise(states), precise(self.weight), bias)


class RiceMatchingHead(nn.Module):
    """Class-token state -> score: norm, linear layer, activation, then a linear or a cosine score."""

    def __init__(self, config: RiceConfig):
        super().__init__()
        width = config.decoder_hidden_size
        self.layer_norm = nn.LayerNorm(width, eps=config.decoder_layer_norm_eps)
        self.dense = nn.Linear(width, width, bias=config.pooler_bias)
        self.activation = ACT2FN[config.pooler_act]
        self.score = RiceMatchingScore(width, config.matching_score == "cosine")

    def forward(self, hidden_states: Tensor) -> Tensor:
        """States `(..., d)` -> scores `(...)`."""
        return self.score(self.activation(self.dense(self.layer_norm(hidden_states)))).squeeze(-1)


class RiceDecoder(nn.Module):
    """
    Pairwise matching decoder (paper section 4.2).

    Shapes below: n images, c clips, L image tokens (class token first, a title token last), S clip tokens (frame by
    frame, class token first in each, an ASR token last), d the decoder's width.
    """

    def __init__(self, config: RiceConfig):
        super().__init__()
        width = config.decoder_hidden_size
        self.config = config
        self.position_embedding = None
        if config.decoder_position_embeddings:
            self.position_embedding = nn.Embedding(self._num_positions(config), width)
        self.dropout = nn.Dropout(config.decoder_dropout)
        self.self_layers = nn.ModuleList(
            RiceDecoderLayer(config, cross_attention=False) for _ in range(config.decoder_num_self_layers)
        )
        self.cross_layer = RiceDecoderLayer(config, cross_attention=True)
        self.head = RiceMatchingHead(config)
        if config.has_text_tokens:
            self.title_projection = nn.Linear(config.text_width, width)
            self.asr_projection = nn.Linear(config.text_width, width)

    @staticmethod
    def _num_positions(config: RiceConfig) -> int:
        if config.decoder_max_position_embeddings is not None:
            return config.decoder_max_position_embeddings
        return config.num_patches + 1 + config.has_text_tokens

    @staticmethod
    def _join(tokens: Tensor, projection: nn.Linear, features: Tensor) -> Tensor:
        return torch.cat([tokens, projection(features.to(projection.weight.dtype))[:, None]], dim=1)

    def encode_images(
        self, tokens: Tensor, title_features: Tensor | None = None, has_title: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            tokens (`(n, 1 + P, d)`): Image tokens.
            title_features (`(n, text_width)`, *optional*), has_title (`(n,)` bool, *optional*): Features of the
                titles, and which titles exist (all by default). The token of a missing title is masked.

        Returns:
            States `(n, L, d)` before the cross-attention block.
        """
        attention_mask = None
        if title_features is not None:
            if has_title is not None:
                keep = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
                attention_mask = additive_mask(torch.cat([keep, has_title[:, None]], dim=1), tokens.dtype)
            tokens = self._join(tokens, self.title_projection, title_features)
        if self.position_embedding is not None:
            length = tokens.shape[1]
            if length > self.position_embedding.num_embeddings:
                raise ValueError(
                    f"An image has {length} tokens but the decoder {self.position_embedding.num_embeddings} positions"
                    f"; raise `decoder_max_position_embeddings`."
                )
            # As published, dropout belongs to the position embedding; without one there is none.
            # A call, since indexing the weight would not fetch offloaded weights.
            positions = self.position_embedding(torch.arange(length, device=tokens.device))
            tokens = self.dropout(tokens + positions)
        for layer in self.self_layers:
            tokens = layer(tokens, attention_mask)
        return tokens

    def encode_clips(
        self, tokens: Tensor, mask: Tensor, asr_features: Tensor | None = None, has_asr: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            tokens (`(c, S, d)`), mask (`(c, S)` bool): Clip tokens, and which of them are attended to.
            asr_features (`(c, text_width)`, *optional*), has_asr (`(c,)` bool, *optional*): As the titles in
                `encode_images`.

        Returns:
            Keys and values `(c, S', d)` and their mask `(c, S')`; S' is S, plus 1 with ASR.
        """
        if asr_features is not None:
            tokens = self._join(tokens, self.asr_projection, asr_features)
            mask = nn.functional.pad(mask, (0, 1), value=True)
            if has_asr is not None:
                mask = torch.cat([mask[:, :-1], has_asr[:, None]], dim=1)
        if self.config.decoder_normalize_key_value:
            tokens = self.cross_layer.layer_norm1(tokens)
        attention = self.cross_layer.attention
        return attention.k_proj(tokens), attention.v_proj(tokens), mask

    def _query(self, states: Tensor) -> Tensor:
        return self.cross_layer.attention.q_proj(self.cross_layer.layer_norm1(states))

    def pair_contexts(
        self, image_states: Tensor, keys: Tensor, values: Tensor, mask: Tensor, columns: Tensor | None = None
    ) -> Tensor:
        """
        Cross-attention context of pairs.

        Args:
            image_states (`(n, d)`): Class-token row of `encode_images`.
            keys, values (`(c, S, d)`), mask (`(c, S)` bool): From `encode_clips`.
            columns (`(c, m)` int64, *optional*): Indices of the images each clip is compared with; all n by default.

        Returns:
            `(c, n, d)` or `(c, m, d)`.
        """
        attention = self.cross_layer.attention
        query = self._query(image_states)
        # `len` would make the number of clips a constant of an exported graph.
        query = query.expand(keys.shape[0], -1, -1) if columns is None else query[columns]
        return attention.attend(
            attention.split_heads(query),
            attention.split_heads(keys),
            attention.split_heads(values),
            additive_mask(mask, query.dtype),
        )

    def finish_pairs(self, image_states: Tensor, contexts: Tensor) -> Tensor:
        """States `(..., d)` and contexts `(..., d)` of pairs -> scores `(...)`."""
        return self.head(self.cross_layer(image_states, None, contexts))

    def score_pairs(self, image_states: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Scores `(c, n)` of all pairs: raw output of the head, no temperature. Arguments as in `pair_contexts`."""
        return self.finish_pairs(image_states, self.pair_contexts(image_states, keys, values, mask))

    def score_chosen_pairs(
        self, image_states: Tensor, keys: Tensor, values: Tensor, mask: Tensor, chosen: Tensor
    ) -> Tensor:
        """
        Scores `(c, n)` of the pairs that are `True` in `chosen` `(c, n)`, zero for the others. Every clip attends to m
        images, where m is the largest number of chosen images of any clip. Other arguments as in `pair_contexts`.
        """
        counts = chosen.sum(dim=1)
        columns = chosen.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
        real = torch.arange(columns.shape[1], device=columns.device) < counts[:, None]
        contexts = self.pair_contexts(image_states, keys, values, mask, columns)
        # The stable sort keeps a clip's images in ascending order, as the boolean index does.
        finished = self.finish_pairs(image_states[columns[real]], contexts[real])
        scores = finished.new_zeros(chosen.shape)
        scores[chosen] = finished
        return scores

    def positive_attention(self, image_states: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """Cross-attention probabilities `(n, H, L, S)` of image i with clip i, before dropout, with gradient."""
        attention = self.cross_layer.attention
        query, key = attention.split_heads(self._query(image_states)), attention.split_heads(keys)
        scores = query @ key.transpose(-1, -2) * attention.scaling + additive_mask(mask, query.dtype)
        return _softmax(scores)


class RiceHeadMixing(nn.Conv2d):
    """A 1x1 convolution over heads. It has its own class because its initial weights are close to the mean."""

    def starting_weight(self) -> Tensor:
        """
        Initial weights: the mean over inputs, `1 / in_channels`, plus offsets that are evenly spaced over the outputs,
        in a random order per input. With a single output, the offsets are spaced over the inputs.

        Equal channels would get equal gradients and never differ, hence the offsets. All weights are positive (for up
        to 57 inputs), and so are the inputs of the ReLUs, since attention weights are not negative: no channel starts
        dead.
        """
        outputs, inputs = self.weight.shape[:2]
        count = outputs if outputs > 1 else inputs
        # Half the mean, but at least a spread whose standard deviation is 1e-2 for many values.
        width = max(0.5 / inputs, 0.0175) if count > 1 else 0.0
        orders = torch.rand(inputs if outputs > 1 else 1, count).argsort(dim=1)
        offsets = torch.linspace(-width, width, count)[orders]
        return (1 / inputs + (offsets.T if outputs > 1 else offsets))[:, :, None, None]


class RiceReconstructionHead(nn.Module):
    """
    Mixes attention heads into one map of reconstruction weights: by two 1x1 convolutions (paper section 4.3), or by
    the mean over heads.
    """

    def __init__(self, config: RiceConfig):
        super().__init__()
        heads = config.decoder_num_heads
        self.config = config
        self.attention_factor = (
            (config.decoder_hidden_size / heads) ** 0.5 if config.reconstruction_scale_attention else 1.0
        )
        self.conv1 = self.conv2 = None
        if config.reconstruction_mixing == "conv":
            self.conv1 = RiceHeadMixing(heads, heads // 2, kernel_size=1)
            self.conv2 = RiceHeadMixing(heads // 2, 1, kernel_size=1)

    def forward(self, attention: Tensor, mask: Tensor) -> Tensor:
        """Attention `(B, H, P, S)`, mask `(B, S)` bool -> weights `(B, P, S)`."""
        if self.conv1 is None:
            weights = attention.mean(dim=1) * self.attention_factor
        else:
            mixed = nn.functional.relu(self.conv1(attention * self.attention_factor))
            weights = nn.functional.relu(self.conv2(mixed)).squeeze(1)
        if self.config.reconstruction_softmax:
            if not self.config.reconstruction_softmax_over_padding:
                weights = weights.masked_fill(~mask[:, None, :], torch.finfo(weights.dtype).min)
            weights = nn.functional.softmax(weights, dim=-1)
        return weights
