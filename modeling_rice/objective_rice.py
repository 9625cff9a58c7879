"""The training objective of RICE: the losses of encoded pairs, on one process or many."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .features_rice import RiceClips, RiceGallery, refuse_unknown, require_pairs, require_tensor
from .loss_rice import (
    Memory,
    contrastive_loss,
    cosines,
    false_negative_mask,
    mine_hard_negatives,
    mined_logits,
    mined_loss,
    reconstruction_loss,
    symmetric_loss,
)
from .text_rice import EncodedText


class OneProcess:
    """The gather of a single process: it returns its input. See [`RiceModel.set_gather`] for several processes."""

    rank = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass
class ImageTokens:
    """
    Encoded images, as the losses need them.

    Attributes:
        tokens (`(n, 1 + P, d)`): Decoder tokens, global token first.
        embeds (`(n, D)`): L2-normalised embeddings.
        text: Encoded titles.
        states (`(n, L, d)`, *optional*): From the decoder's `encode_images`.
        patches (`(n, P, R)`, *optional*): Patches for `align`; not in training mode.
    """

    tokens: Tensor
    embeds: Tensor
    text: EncodedText | None = None
    states: Tensor | None = None
    patches: Tensor | None = None

    def kept(self, model_fingerprint: str | None) -> RiceGallery:
        """The part that comparisons need."""
        states = None if self.states is None else self.states[:, 0]
        texts = None if self.text is None else self.text.embeds
        patches = None if self.patches is None else self.patches.half()
        return RiceGallery(self.embeds, states, texts, patches, model_fingerprint=model_fingerprint)


@dataclass
class ClipTokens:
    """
    Encoded clips, as the losses need them.

    Attributes:
        tokens (`(c, T, 1 + P, d)`): Decoder tokens frame by frame, each frame's global token first.
        token_mask (`(c, T, 1 + P)` bool): `True` = token of a real frame that is not masked.
        embeds (`(c, D)`): L2-normalised embeddings.
        text: Encoded ASR.
        keys, values (`(c, S, d)`), mask (`(c, S)` bool): From the decoder's `encode_clips`; an ASR token is the last.
        patches (`(c, T, Q, R)`, *optional*), patch_mask (`(c, T, Q)` bool): Patches for `align`; not in training mode.
    """

    tokens: Tensor
    token_mask: Tensor
    embeds: Tensor
    text: EncodedText | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    mask: Tensor | None = None
    patches: Tensor | None = None
    patch_mask: Tensor | None = None

    def kept(self, model_fingerprint: str | None) -> RiceClips:
        """The part that comparisons need."""
        texts = None if self.text is None else self.text.embeds
        patches = None if self.patches is None else self.patches.half()
        return RiceClips(
            *(self.embeds, self.keys, self.values, self.mask, texts, patches, self.patch_mask),
            model_fingerprint=model_fingerprint,
        )


class RiceObjective:
    """
    The losses of [`RiceModel`], separate from `forward` so that a batch can also be computed in pieces. ICL and PMD
    take embeddings and scores of the global batch and a range of its rows; PFR takes pairs. The mean over equal blocks
    of rows is the loss of the batch.
    """

    # Attributes of the model.
    config: Any
    decoder: Any
    reconstruction_head: Any
    logit_scale: Tensor
    logit_bias: Any
    text_logit_scale: Any
    device: Any
    training: bool
    require_eval_mode: Any
    image_tokens: Any
    clip_tokens: Any
    gather_texts: Any
    text_loss: Any

    memory: Memory | None = None
    _gather: Any = OneProcess()

    def set_gather(self, gather: Callable[[Tensor], Tensor]) -> None:
        """
        Sets how the losses collect rows of all processes.

        Args:
            gather: Concatenates the tensors of all processes along the first dimension; its gradient sums over
                processes. It has the attribute `rank`, the index of this process.
        """
        self._gather = gather

    def add_losses(
        self,
        output: Any,
        images: ImageTokens,
        clips: ClipTokens,
        product_ids: Tensor | None = None,
        asr_is_noise: Tensor | None = None,
    ) -> None:
        """
        Adds the losses of this process's pairs, as part of the global batch, to a `RiceOutput`.

        Raises:
            ValueError: for unequal numbers of images and clips, for ids of the wrong shape, or for a batch too small
                to mine negatives from.
        """
        require_pairs(images.embeds, clips.embeds)
        for name, given in (("product_ids", product_ids), ("asr_is_noise", asr_is_noise)):
            if given is not None and require_tensor(name, given).shape != (len(clips.embeds),):
                raise ValueError(f"`{name}` must have one entry per pair, got shape {tuple(given.shape)}.")
        rows = slice(self._gather.rank * len(clips.embeds), (self._gather.rank + 1) * len(clips.embeds))
        all_images, all_clips = self._gather(images.embeds), self._gather(clips.embeds)
        products = None if product_ids is None else self._gather(product_ids)
        output.contrastive_loss = self.contrastive_loss(all_images, all_clips, products, rows)
        output.loss = self.config.contrastive_loss_weight * output.contrastive_loss
        texts = self.gather_texts(images, clips)
        if texts is not None:
            noise = None if asr_is_noise is None else self._gather(asr_is_noise)
            output.text_loss = self.text_loss(texts, products, rows, noise)
        if output.text_loss is not None:
            output.loss = output.loss + self.config.text_loss_weight * output.text_loss
        if self.decoder is not None:
            mined = self.mine_negatives(all_images, all_clips, products, texts=texts)
            scores = self._gather(self._score_clips(self._gather(images.states[:, 0]), clips, rows, mined))
            mined = None if mined is None else (mined[0][rows], mined[1][rows])
            output.matching_loss, output.matching_logits = self.matching_loss(
                scores.T[rows], scores[rows], products, rows, mined
            )
            output.matching_indices = None if mined is None else mined[0]
            output.loss = output.loss + self.config.matching_loss_weight * output.matching_loss
        if self.reconstruction_head is not None:
            output.reconstruction_loss = self.reconstruction_loss(images, clips)
            output.loss = output.loss + self.config.reconstruction_loss_weight * output.reconstruction_loss
        if self.memory is not None and self.training:
            self.memory.push(all_images.detach(), all_clips.detach(), products)

    @property
    def gather(self) -> Any:
        """See `set_gather`."""
        return self._gather

    def set_memory(self, memory: Memory | None) -> None:
        """Sets a store of past embeddings, used as additional negatives of the contrastive loss in training mode."""
        self.memory = memory

    @torch.no_grad()
    def bound_logit_scale(self) -> None:
        """Clamps a learnt temperature to at most `logit_scale_max`. Call it after each optimiser step."""
        bound = self.config.logit_scale_max
        if self.config.learn_logit_scale and bound is not None:
            self.logit_scale.clamp_(max=math.log(bound))
        if self.text_logit_scale is not None and bound is not None:
            self.text_logit_scale.clamp_(max=math.log(bound))

    def contrastive_loss(
        self, image_embeds: Tensor, video_embeds: Tensor, product_ids: Tensor | None, rows: slice
    ) -> Tensor:
        """ICL of some rows of the global batch, unweighted; arguments as in `loss_rice.contrastive_loss`."""
        return contrastive_loss(
            image_embeds,
            video_embeds,
            self.logit_scale.exp(),
            product_ids,
            rows,
            bias=0.0 if self.logit_bias is None else self.logit_bias,
            targets=self.config.contrastive_targets,
            kind=self.config.contrastive_loss,
            memory=self.memory if self.training else None,
        )

    def mine_negatives(
        self,
        image_embeds: Tensor,
        video_embeds: Tensor,
        product_ids: Tensor | None,
        rows: slice | None = None,
        texts: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """
        The clips that the images of the given rows (all by default) are matched with, and which of them exist; see
        `loss_rice.mine_hard_negatives`. `None` if every pair of the batch is matched. With `texts`, the title and ASR
        embeddings of the batch, the similarity is the visual cosine plus `text_score_weight` times the text cosine.
        """
        if self.config.matching_negatives == "all":
            return None
        rows = rows or slice(0, len(image_embeds))
        ignore = None
        if product_ids is not None and self.config.matching_targets == "masked":
            ignore = false_negative_mask(product_ids[rows], product_ids, rows.start)
        similarity = cosines(image_embeds[rows].detach(), video_embeds.detach())
        if texts is not None:
            said = cosines(texts[0][rows].detach(), texts[1].detach())
            similarity = similarity + self.config.text_score_weight * said
        return mine_hard_negatives(similarity, self.config.num_hard_negatives, ignore, rows.start)

    def _score_clips(
        self, class_states: Tensor, clips: ClipTokens, rows: slice, mined: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """
        Scores `(b, B)` of this process's clips with the images of all processes. Images are exchanged rather than
        clips, since an image is one row of width d and a clip hundreds. Pairs that no image has mined stay zero.
        """
        keys_values = clips.keys, clips.values, clips.mask
        if mined is None:
            return self.decoder.score_pairs(class_states, *keys_values)
        chosen = torch.zeros(len(class_states), len(class_states), dtype=torch.bool, device=class_states.device)
        chosen = chosen.scatter_(1, mined[0], True).T[rows]
        return self.decoder.score_chosen_pairs(class_states, *keys_values, chosen)

    def matching_loss(
        self,
        by_image: Tensor,
        by_clip: Tensor,
        product_ids: Tensor | None,
        rows: slice,
        mined: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """
        PMD of some rows of the global batch.

        Args:
            by_image, by_clip (`(r, B)`): Decoder scores of these rows' images with all clips, and of these rows' clips
                with all images.
            product_ids (`(B,)` int64, *optional*), rows: As in `contrastive_loss`.
            mined: The result of `mine_negatives` for these rows.

        Returns:
            The loss, unweighted, and its logits as in [`RiceOutput`]: those of these rows' clips with their images,
            `(r, r)`, or with mined negatives `(r, 1 + num_hard_negatives)`.
        """
        by_image, by_clip = self.config.matching_scale * by_image, self.config.matching_scale * by_clip
        if mined is not None:
            logits = mined_logits(by_image, *mined)
            return mined_loss(logits), logits
        loss = symmetric_loss(
            by_image,
            by_clip,
            None if product_ids is None else product_ids[rows],
            product_ids,
            rows.start,
            self.config.matching_targets,
        )
        return loss, by_clip[:, rows]

    def reconstruction_weights(self, states: Tensor, keys: Tensor, mask: Tensor, tokens_per_frame: int) -> Tensor:
        """
        Weight of each clip token in the reconstruction of each image token, for image i with clip i.

        Args:
            states (`(B, L, d)`): From the decoder's `encode_images`.
            keys (`(B, S, d)`), mask (`(B, S)` bool): From the decoder's `encode_clips`.
            tokens_per_frame: 1 + P.

        Returns:
            `(B, P, T * P)`, or `(B, 1 + P, T * (1 + P))` with `reconstruction_include_cls`.
        """
        attention = self.decoder.positive_attention(states, keys, mask)
        # Text tokens are last; they are not reconstructed and not reconstructed from.
        num_keys = keys.shape[1] // tokens_per_frame * tokens_per_frame
        attention, mask = attention[:, :, :tokens_per_frame, :num_keys], mask[:, :num_keys]
        if not self.config.reconstruction_include_cls:
            attention = _drop_class_keys(attention[:, :, 1:], tokens_per_frame)
            mask = _drop_class_keys(mask, tokens_per_frame)
        return self.reconstruction_head(attention, mask)

    @torch.no_grad()
    def reconstruction_maps(self, pixel_values: Tensor, pixel_values_videos: Tensor, **batch) -> Tensor:
        """
        Weights with which each image patch is reconstructed from the clip's patches, for image i with clip i (PFR;
        RICE (ICCV 2023), section 4.3). Call in eval mode.

        Args:
            pixel_values (`(B, 3, H, W)`), pixel_values_videos (`(B, T, 3, H, W)`): Preprocessed pairs.
            batch: Other keys of a batch, as in `forward`.

        Returns:
            `(B, P, T, P)`, at least 0, and 0 in padded frames and masked patches. The weights of an image patch sum to
            1 only with `reconstruction_softmax`.

        Raises:
            TypeError: for an argument that is not a key of a batch.
            ValueError: if the model has no reconstruction head, if images and clips differ in number, or in training
                mode if that changes the maps.
        """
        if self.reconstruction_head is None:
            raise ValueError(
                "This model has no reconstruction head, so it has no reconstruction maps; train one with "
                "`use_reconstruction=True`."
            )
        images, clips = self._pair_tokens("reconstruction_maps", pixel_values, pixel_values_videos, batch)
        tokens_per_frame, frames = images.tokens.shape[1], clips.tokens.shape[1]
        weights = self.reconstruction_weights(images.states, clips.keys, clips.mask, tokens_per_frame)
        if self.config.reconstruction_include_cls:
            weights = _drop_class_keys(weights[:, 1:], tokens_per_frame)
        # The bias of the head mixing gives weight even to tokens that were not attended to.
        weights = weights.unflatten(-1, (frames, -1)) * clips.token_mask[:, None, :, 1:]
        return weights.clamp(min=0)

    @torch.no_grad()
    def attention_maps(self, pixel_values: Tensor, pixel_values_videos: Tensor, **batch) -> Tensor:
        """
        Attention of each image token to the clip's patches in the matching decoder's cross-attention, mean over heads,
        for image i with clip i (PMD; RICE (ICCV 2023), section 4.2). Call in eval mode.

        Args:
            pixel_values (`(B, 3, H, W)`), pixel_values_videos (`(B, T, 3, H, W)`): Preprocessed pairs.
            batch: Other keys of a batch, as in `forward`.

        Returns:
            `(B, 1 + P, T, P)`. The first row is the class token, which alone makes the matching score; the others are
            the image's patches, which reconstruction uses. Values are probabilities, 0 in padded frames and masked
            patches. The rest up to a sum of 1 is attention to the class tokens of frames and to an ASR token.

        Raises:
            TypeError: for an argument that is not a key of a batch.
            ValueError: if the model has no decoder, if images and clips differ in number, or in training mode if that
                changes the maps.
        """
        if self.decoder is None:
            raise ValueError(
                "This model has no matching decoder, so it has no attention maps; train one with `use_decoder=True`."
            )
        images, clips = self._pair_tokens("attention_maps", pixel_values, pixel_values_videos, batch)
        tokens_per_frame, frames = images.tokens.shape[1], clips.tokens.shape[1]
        attention = self.decoder.positive_attention(images.states, clips.keys, clips.mask).mean(dim=1)
        # The title token is the last of the image, the ASR token the last of the clip.
        attention = attention[:, :tokens_per_frame, : frames * tokens_per_frame]
        return _drop_class_keys(attention, tokens_per_frame).unflatten(-1, (frames, -1))

    def _pair_tokens(
        self, method: str, pixel_values: Tensor, pixel_values_videos: Tensor, batch: dict
    ) -> tuple[ImageTokens, ClipTokens]:
        """Encodes pairs of images and clips on the model's device, for the named method."""
        refuse_unknown(method, batch)
        self.require_eval_mode(method)
        require_pairs(pixel_values, pixel_values_videos)
        batch = {"pixel_values": pixel_values, "pixel_values_videos": pixel_values_videos, **batch}
        batch = {name: value.to(self.device) if hasattr(value, "to") else value for name, value in batch.items()}
        return self.image_tokens(**batch), self.clip_tokens(**batch)

    def reconstruction_loss(self, images: ImageTokens, clips: ClipTokens) -> Tensor:
        """PFR loss, unweighted: the mean over the given pairs, which may be a part of a batch."""
        weights = self.reconstruction_weights(images.states, clips.keys, clips.mask, images.tokens.shape[1])
        first = 0 if self.config.reconstruction_include_cls else 1
        clip_tokens = (clips.tokens * clips.token_mask[..., None])[:, :, first:].flatten(1, 2)
        return reconstruction_loss(weights, clip_tokens, images.tokens[:, first:])


def _drop_class_keys(tensor: Tensor, tokens_per_frame: int) -> Tensor:
    """Removes each frame's class token from the last dimension, which holds the tokens frame by frame."""
    return tensor.unflatten(-1, (-1, tokens_per_frame))[..., 1:].flatten(-2)
