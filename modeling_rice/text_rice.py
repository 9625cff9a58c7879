"""Titles and ASR: the text encoder for both, and the contrastive loss that trains their cosine.

A missing text is a row whose attention mask is all zero, or a precomputed vector that is all zero. It adds no token to
the decoder. Its embedding is the zero vector, so its cosine with any text is 0.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_rice import RiceConfig
from .encoders_rice import encoder_class, use_what_it_has
from .features_rice import refuse_unknown, require_tensor
from .loss_rice import Targets, cosines, l2_normalize, pair_masks
from .pooling_rice import weighted_mean


@dataclass
class EncodedText:
    """
    Encoded titles or ASR.

    Attributes:
        features (`(n, W)`): For the decoder's token.
        present (`(n,)` bool): `False` for missing texts.
        embeds (`(n, E)`, *optional*): L2-normalised embeddings for the score-level term, zero for missing texts;
            `None` if the model has no such term.
    """

    features: Tensor
    present: Tensor
    embeds: Tensor | None = None


class RiceTextEncoder(nn.Module):
    """Any text encoder of transformers with pooling: ids `(n, L)` -> features `(n, W)`."""

    def __init__(self, config: RiceConfig):
        super().__init__()
        self.config = config
        use_what_it_has(config.text_config, encoder_class(config.text_config))
        self.model = AutoModel.from_config(config.text_config)
        if getattr(self.model, "pooler", None) is not None:
            # It would get no gradient, since the last hidden states are pooled here.
            self.model.pooler = None
        self.max_length = _max_length(self.model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:
            input_ids (`(n, L)` int64): From the tokenizer that the encoder was trained with.
            attention_mask (`(n, L)`, *optional*): 1 = token; a row of zeros is a missing text.

        Returns:
            Features `(n, W)`, and `(n,)` bool, `False` for missing texts.

        Raises:
            ValueError: for values other than ids, a mask of another shape, or texts longer than the encoder supports.
        """
        ids = require_tensor("input_ids", input_ids)
        if ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
            raise ValueError(f"`input_ids` must be (n, L) integers, got shape {tuple(ids.shape)} of {ids.dtype}.")
        if attention_mask is not None and require_tensor("attention_mask", attention_mask).shape != ids.shape:
            raise ValueError(
                f"`attention_mask` must have the shape of the ids, {tuple(ids.shape)}, got shape "
                f"{tuple(attention_mask.shape)}."
            )
        if self.max_length is not None and ids.shape[1] > self.max_length:
            raise ValueError(
                f"The texts have {ids.shape[1]} tokens, but the text encoder {self.max_length} positions; set the "
                f"tokenizer's `model_max_length` to at most {self.max_length}."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(ids)
        present = attention_mask.any(dim=1)
        # Softmax is not defined for a row without tokens; its output is not used.
        keep = attention_mask.bool() | ~present[:, None]
        states = self.model(input_ids=ids, attention_mask=keep.to(ids.dtype)).last_hidden_state
        features = states[:, 0] if self.config.text_pooling == "cls" else weighted_mean(states, keep)
        return features.masked_fill(~present[:, None], 0.0), present


def _max_length(model: nn.Module) -> int | None:
    """Maximum number of tokens of a text encoder's input, `None` if it has no limit."""
    for name, module in model.named_modules():
        # RoBERTa and its relatives count positions from the padding index.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1
    return getattr(model.config, "max_position_embeddings", None)


class RiceTextSide:
    """The methods of [`RiceModel`] for texts; `text_model` and `text_projection` are `None` if the model has none."""

    # Attributes of the model.
    config: Any
    gather: Any
    text_model: Any
    text_projection: Any
    text_logit_scale: Any
    visual_projection: Any

    def encode_text(
        self, kind: str, vectors: Tensor | None, input_ids: Tensor | None, attention_mask: Tensor | None
    ) -> EncodedText | None:
        """
        Args:
            kind: `"title"` or `"asr"`, for messages.
            vectors (`(n, text_width)`, *optional*): Precomputed features; they take precedence over ids.
            input_ids, attention_mask (`(n, L)`, *optional*): As in [`RiceTextEncoder`]; a model without text encoder
                ignores them.

        Returns:
            The encoded texts, or `None` if there are no texts or no text encoder.

        Raises:
            ValueError: for vectors given to a model without text, and for vectors that are not `(n, text_width)`.
        """
        width = self.config.text_width
        if vectors is not None:
            if width is None:
                raise ValueError(
                    f"`{kind}_embeds` was given, but the model has no `text_embed_dim`; set it in the config."
                )
            if require_tensor(f"{kind}_embeds", vectors).dim() != 2 or vectors.shape[1] != width:
                raise ValueError(
                    f"`{kind}_embeds` must be (n, {width}), the width that the model takes, got shape "
                    f"{tuple(vectors.shape)}."
                )
            features, present = vectors, present_texts(vectors)
        elif input_ids is not None and self.text_model is not None:
            features, present = self.text_model(input_ids, attention_mask)
        else:
            return None
        embeds = None
        if self.config.text_score_weight is not None:
            embeds = features
            if self.text_projection is not None:
                embeds = self.text_projection(features.to(self.text_projection.weight.dtype))
            # Also from a higher precision, so that titles and ASR have the same.
            embeds = embeds.to(torch.promote_types(self.visual_projection.weight.dtype, torch.float32))
            embeds = l2_normalize(embeds).masked_fill(~present[:, None], 0.0)
        return EncodedText(features, present, embeds)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        title_input_ids: Tensor | None = None,
        title_attention_mask: Tensor | None = None,
        asr_input_ids: Tensor | None = None,
        asr_attention_mask: Tensor | None = None,
        title_embeds: Tensor | None = None,
        asr_embeds: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Embeddings of texts. Give one kind per call: titles, ASR, or either under the name `input_ids`.

        Args:
            input_ids, title_input_ids, asr_input_ids (`(n, L)` int64), and their `_attention_mask`: As the processor
                returns them.
            title_embeds, asr_embeds (`(n, text_width)`): Precomputed features instead of ids.

        Returns:
            `pooler_output` `(n, E)`, L2-normalised, zero for missing texts. These are the embeddings of the
            score-level text term if the model has one, otherwise the encoder's pooled states.

        Raises:
            TypeError: for an argument that is not a key of a batch.
            ValueError: if nothing is given, or more than one kind, or if the model has no text encoder.
        """
        refuse_unknown("get_text_features", kwargs)
        texts = {
            "text": (None, input_ids, attention_mask),
            "title": (title_embeds, title_input_ids, title_attention_mask),
            "asr": (asr_embeds, asr_input_ids, asr_attention_mask),
        }
        given = {kind: text for kind, text in texts.items() if text[0] is not None or text[1] is not None}
        if not given:
            raise ValueError("There is nothing to encode; give images, clips, or the ids of texts.")
        if len(given) > 1:
            raise ValueError(f"Texts are encoded one kind at a time, got {' and '.join(given)}; give one of them.")
        ((kind, text),) = given.items()
        encoded = self.encode_text(kind, *text)
        if encoded is None:
            raise ValueError(
                "The model has no text encoder (`text_config` is None), so it encodes no texts; leave them out."
            )
        embeds = l2_normalize(encoded.features) if encoded.embeds is None else encoded.embeds
        return BaseModelOutputWithPooling(pooler_output=embeds)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """
        Resizes the token embeddings of the text encoder, as in transformers, for a tokenizer with more tokens.

        Raises:
            ValueError: for a model without a text encoder.
        """
        if self.text_model is None:
            raise ValueError("The model has no text encoder (`text_config` is None), so it has no token embeddings.")
        embeddings = self.text_model.model.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.config.text_config.vocab_size = embeddings.num_embeddings
        return embeddings

    def gather_texts(self, images, clips) -> tuple[Tensor, Tensor] | None:
        """Title and ASR embeddings `(B, E)` of the pairs of all processes; `None` without a score-level text term."""
        texts = (images.text, clips.text)
        if any(text is None or text.embeds is None for text in texts):
            return None
        return self.gather(texts[0].embeds), self.gather(texts[1].embeds)

    def text_loss(
        self,
        texts: tuple[Tensor, Tensor],
        product_ids: Tensor | None,
        rows: slice,
        asr_is_noise: Tensor | None = None,
    ) -> Tensor | None:
        """
        Text loss of some rows of the global batch, unweighted; `None` if the model has no trainable text term. ASR of
        pairs that are `True` in `asr_is_noise` `(B,)` belongs to another product and counts as missing.
        """
        if self.text_logit_scale is None:
            return None
        titles, asr = texts
        if asr_is_noise is not None:
            asr = asr.masked_fill(asr_is_noise[:, None], 0.0)
        scale, targets = self.text_logit_scale.exp(), self.config.contrastive_targets
        return text_contrastive_loss(titles, asr, scale, product_ids, rows, targets)


def present_texts(vectors: Tensor) -> Tensor:
    """Vectors `(n, E)` -> `(n,)` bool, `False` for missing texts, whose vectors are zero."""
    return (vectors != 0).any(dim=-1)


def text_contrastive_loss(
    title_embeds: Tensor,
    asr_embeds: Tensor,
    scale: Tensor | float,
    product_ids: Tensor | None = None,
    rows: slice | None = None,
    targets: Targets = "masked",
) -> Tensor:
    """
    Symmetric InfoNCE between the titles and the ASR of some rows of the global batch. Pairs with a missing text are
    left out of the rows, and missing texts are left out of the columns.

    Args:
        title_embeds, asr_embeds (`(B, E)`): Normalised, zero where there is no text.
        scale: Logits are `scale * cosine`.
        product_ids (`(B,)` int64, *optional*), targets: See `loss_rice.pair_masks`.
        rows: Rows to average over; all by default. The mean over equal blocks of rows is the loss of the batch.

    Returns:
        Scalar, the mean over pairs that have both texts; 0, with a gradient of 0, when none has.
    """
    rows = rows or slice(0, len(title_embeds))
    has_title, has_asr = present_texts(title_embeds), present_texts(asr_embeds)
    usable = has_title & has_asr
    own = None if product_ids is None else product_ids[rows]
    positives, ignore = pair_masks(targets, own, product_ids, rows.start)

    def one_way(texts: Tensor, others: Tensor, has_other: Tensor) -> Tensor:
        logits = scale * cosines(texts[rows], others)
        unfit = ~has_other[None] if ignore is None else ~has_other[None] | ignore
        probabilities = logits.masked_fill(unfit, torch.finfo(logits.dtype).min).log_softmax(dim=1)
        wanted = torch.zeros_like(probabilities, dtype=torch.bool) if positives is None else positives & ~unfit
        place = torch.arange(len(logits), device=logits.device)
        wanted = wanted.scatter(1, (place + rows.start)[:, None], True)
        losses = -probabilities.masked_fill(~wanted, 0.0).sum(dim=1) / wanted.sum(dim=1)
        return losses.masked_fill(~usable[rows], 0.0).sum()

    total = one_way(title_embeds, asr_embeds, has_asr) + one_way(asr_embeds, title_embeds, has_title)
    # Scaled so that the mean over blocks is the mean over all usable pairs, even if blocks have unequal numbers.
    blocks = len(title_embeds) / len(title_embeds[rows])
    return total / 2 * blocks / usable.sum().clamp(min=1)
