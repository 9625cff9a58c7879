"""RICE: recognises which product a livestream clip presents, by retrieval against the shop's images (ICCV 2023)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .configuration_rice import PATCH_MASK_ENCODERS, RiceConfig
from .decoder_rice import RiceDecoder, RiceHeadMixing, RiceReconstructionHead, additive_mask
from .features_rice import RiceClips, RiceGallery
from .loss_rice import false_negative_mask, mine_hard_negatives, reconstruction_loss, symmetric_loss

# Encoders that leave their last hidden state without the final norm, which the published model applies to every token.
_UNNORMALISED_ENCODERS = ("clip_vision_model", "chinese_clip_vision_model", "metaclip_2_vision_model")


@dataclass
class RiceOutput(ModelOutput):
    """
    Output of [`RiceModel`]. B is the number of pairs in the batch; every field is `None` where it does not apply.

    Attributes:
        loss (scalar): Weighted sum of the terms below, with `return_loss=True`.
        contrastive_loss, matching_loss, reconstruction_loss (scalar): The terms (ICL, PMD, PFR), unweighted.
        logits_per_video, logits_per_image (`(B, B)`): Cosines times `logit_scale`.
        matching_logits: Decoder scores times `matching_scale`, rows are images. With mined negatives
            `(B, 1 + num_hard_negatives)`, the positive first; otherwise `(B, B)`.
        matching_indices (`(B, 1 + num_hard_negatives)`): Clips of those columns.
        image_embeds, video_embeds (`(B, D)`): L2-normalised.
    """

    loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    matching_loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    logits_per_video: Tensor | None = None
    logits_per_image: Tensor | None = None
    matching_logits: Tensor | None = None
    matching_indices: Tensor | None = None
    image_embeds: Tensor | None = None
    video_embeds: Tensor | None = None


class OneProcess:
    """The gather of a single process: everything is here already. [`RiceModel.set_gather`] says what others do."""

    rank = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass
class _EncodedImages:
    tokens: Tensor
    embeds: Tensor


@dataclass
class _EncodedClips:
    tokens: Tensor
    embeds: Tensor
    mask: Tensor


class RicePreTrainedModel(PreTrainedModel):
    config_class = RiceConfig
    base_model_prefix = "rice"
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["RiceDecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, RiceHeadMixing):
            # Random signs under two ReLUs can leave the head at zero for ever, so it starts as the mean over heads.
            init.constant_(module.weight, 1 / module.in_channels)
            init.zeros_(module.bias)
        elif isinstance(module, RiceModel):
            init.constant_(module.logit_scale, math.log(self.config.logit_scale_init_value))
        else:
            super()._init_weights(module)


class RiceModel(RicePreTrainedModel):
    """
    Cross-view semantic alignment: one vision encoder for clips and images (ICL), a pairwise matching decoder (PMD) and
    patch feature reconstruction (PFR).

    Examples:

    ```python
    gallery = model.encode_gallery(**processor(images=shop_images, return_tensors="pt"))
    clips = model.encode_clips(**processor(videos=[frames], return_tensors="pt"))
    best = model.similarity(clips, gallery).argmax(dim=1)
    ```
    """

    def __init__(self, config: RiceConfig):
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(
            torch.tensor(math.log(config.logit_scale_init_value)), requires_grad=config.learn_logit_scale
        )
        self.decoder = RiceDecoder(config) if config.use_decoder else None
        has_head = config.use_decoder and config.use_reconstruction
        self.reconstruction_head = RiceReconstructionHead(config) if has_head else None
        self._gather = OneProcess()
        self.post_init()

    # Trainer would otherwise rescale the loss, since `forward` takes keyword arguments it does not name.
    accepts_loss_kwargs = False

    def set_gather(self, gather: Callable[[Tensor], Tensor]) -> None:
        """
        Sets how rows of other processes are fetched in the loss: a callable that concatenates the tensors of all
        processes along the first dimension, with a gradient that sums over processes, and has the attribute `rank`.
        """
        self._gather = gather

    def _encode_pixels(self, pixel_values: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """Images `(n, 3, H, W)`, mask `(n, P)` -> last hidden states `(n, 1 + P, W)`, global feature first."""
        # Encoders that interpolate positions would take another size, and patches would be miscounted unnoticed.
        size = (self.config.vision_config.image_size,) * 2 if self.config.num_patches is not None else None
        if size is not None and tuple(pixel_values.shape[-2:]) != size:
            raise ValueError(
                f"The pictures are {tuple(pixel_values.shape[-2:])} pixels, but the encoder takes {size}; let the "
                f"processor's size follow the model."
            )
        kwargs = {}
        if patch_mask is not None:
            kwargs["attention_mask"] = self._encoder_mask(patch_mask, pixel_values)
        # Inputs follow the weights, so that a model in half precision takes what the processor gives.
        output = self.vision_model(pixel_values.to(self.visual_projection.weight.dtype), **kwargs)
        states = output.last_hidden_state
        if states.dim() == 4:
            states = states.flatten(2).transpose(1, 2)
        patches = states[:, self._num_prefix_tokens(states.shape[1]) :]
        pooled = self._pool(states, patches, output, patch_mask)
        return torch.cat([pooled[:, None], patches], dim=1)

    def _num_prefix_tokens(self, num_tokens: int) -> int:
        num_patches = self.config.num_patches
        return 0 if num_patches is None else max(num_tokens - num_patches, 0)

    def _encoder_mask(self, patch_mask: Tensor, pixel_values: Tensor) -> Tensor:
        config = self.config
        if not config.accepts_patch_mask:
            raise ValueError(
                f"`patch_mask` was given, but no attention mask reaches the layers of "
                f"{config.vision_config.model_type!r}; use one of {', '.join(PATCH_MASK_ENCODERS)}, "
                f"or leave the boxes out."
            )
        if patch_mask.shape[-1] != config.num_patches:
            raise ValueError(
                f"`patch_mask` has {patch_mask.shape[-1]} patches per frame, but the encoder has {config.num_patches}"
                f"; let the processor's video size and patch size follow the model."
            )
        registers = getattr(config.vision_config, "num_register_tokens", 0) or 0
        keep = nn.functional.pad(patch_mask.bool(), (config.has_class_token + registers, 0), value=True)
        dtype = self.visual_projection.weight.dtype
        if torch.is_autocast_enabled(pixel_values.device.type):
            dtype = torch.get_autocast_dtype(pixel_values.device.type)
        return additive_mask(keep, dtype)

    def _pool(self, states: Tensor, patches: Tensor, output: ModelOutput, patch_mask: Tensor | None) -> Tensor:
        pooling = self.config.vision_pooling or "cls"
        if pooling == "cls":
            if states.shape[1] == patches.shape[1]:
                raise ValueError(
                    f"The vision model {self.config.vision_config.model_type!r} has no class token; declare "
                    f'`vision_pooling="mean"` or `"pooler"` in the config.'
                )
            return states[:, 0]
        if pooling == "pooler":
            return output.pooler_output.flatten(1)
        if patch_mask is None:
            return patches.mean(dim=1)
        weights = patch_mask[..., None].to(patches.dtype)
        return (patches * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

    def _project(self, states: Tensor) -> Tensor:
        if self.config.vision_config.model_type in _UNNORMALISED_ENCODERS and self.config.vision_pooling != "pooler":
            states = self.vision_model.post_layernorm(states)
        return self.visual_projection(states)

    def _features(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states -> the tokens the decoder sees, and the projected global feature."""
        if self.config.decoder_token_source == "projected" and self.decoder is not None:
            tokens = self._project(states)
            return tokens, tokens[..., 0, :]
        return states, self._project(states[..., 0, :])

    def _encode_images(self, pixel_values: Tensor) -> _EncodedImages:
        tokens, features = self._features(self._encode_pixels(pixel_values))
        return _EncodedImages(tokens, nn.functional.normalize(_at_least_single(features), dim=-1))

    def _encode_clips(
        self, pixel_values_videos: Tensor, frame_mask: Tensor | None, patch_mask: Tensor | None
    ) -> _EncodedClips:
        frame_mask = self._check_clips(pixel_values_videos, frame_mask, patch_mask)
        encode_padding = patch_mask is not None and not self.config.mask_padded_frames
        encoded = torch.ones_like(frame_mask) if encode_padding else frame_mask
        packed_mask = patch_mask.bool()[encoded] if patch_mask is not None else None
        packed_tokens, packed_features = self._features(self._encode_pixels(pixel_values_videos[encoded], packed_mask))

        tokens = packed_tokens.new_zeros(*frame_mask.shape, *packed_tokens.shape[1:])
        tokens[encoded] = packed_tokens
        features = packed_features.new_zeros(*frame_mask.shape, packed_features.shape[-1])
        features[encoded] = packed_features
        features = _at_least_single(features)
        if self.config.normalize_frames:
            features = nn.functional.normalize(features, dim=-1)
        weights = frame_mask[..., None].to(features.dtype)
        clip_features = (features * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

        mask = encoded[:, :, None].expand(-1, -1, tokens.shape[2])
        if patch_mask is not None:
            mask = mask & nn.functional.pad(patch_mask.bool(), (1, 0), value=True)
        return _EncodedClips(tokens, nn.functional.normalize(clip_features, dim=-1), mask)

    @staticmethod
    def _check_clips(videos: Tensor, frame_mask: Tensor | None, patch_mask: Tensor | None) -> Tensor:
        if videos.dim() != 5:
            raise ValueError(f"`pixel_values_videos` must be (B, T, 3, H, W), got shape {tuple(videos.shape)}.")
        if frame_mask is None:
            frame_mask = torch.ones(videos.shape[:2], dtype=torch.bool, device=videos.device)
        if frame_mask.shape != videos.shape[:2]:
            raise ValueError(
                f"`frame_mask` must be (B, T) = {tuple(videos.shape[:2])}, got shape {tuple(frame_mask.shape)}."
            )
        if patch_mask is not None and patch_mask.shape[:2] != videos.shape[:2]:
            raise ValueError(
                f"`patch_mask` must start with (B, T) = {tuple(videos.shape[:2])}, "
                f"got shape {tuple(patch_mask.shape)}."
            )
        frame_mask = frame_mask.bool()
        empty = (~frame_mask.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"Clip {empty[0]} of the batch has no real frame in `frame_mask`; leave it out.")
        return frame_mask

    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`(n, 3, H, W)`): Preprocessed images.

        Returns:
            `pooler_output` `(n, D)`, L2-normalised; `last_hidden_state` `(n, 1 + P, d)`, global token first.
        """
        encoded = self._encode_images(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=encoded.tokens, pooler_output=encoded.embeds)

    def get_video_features(
        self, pixel_values_videos: Tensor, frame_mask: Tensor | None = None, patch_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values_videos (`(B, T, 3, H, W)`): Preprocessed frames.
            frame_mask (`(B, T)` bool, *optional*): `True` = real frame. Others are neither encoded nor counted.
            patch_mask (`(B, T, P)` bool, *optional*): `True` = patch of the intended product.

        Returns:
            `pooler_output` `(B, D)`, L2-normalised; `last_hidden_state` `(B, T, 1 + P, d)`, zero at padded frames.
        """
        encoded = self._encode_clips(pixel_values_videos, frame_mask, patch_mask)
        return BaseModelOutputWithPooling(last_hidden_state=encoded.tokens, pooler_output=encoded.embeds)

    @torch.no_grad()
    def encode_gallery(
        self, pixel_values: Tensor, title_embeds: Tensor | None = None, batch_size: int = 64, **kwargs
    ) -> RiceGallery:
        """
        Encodes shop images once, for any number of comparisons. Call in eval mode.

        Args:
            pixel_values (`(n, 3, H, W)`): Preprocessed images; moved to the model's device batch by batch.
            title_embeds (`(n, text_embed_dim)`, *optional*): Precomputed title vectors.
            batch_size: Images encoded at a time.
            kwargs: Other entries of the processor's output (title ids), which a model without text encoder ignores.
        """
        self._require_eval_mode("encode_gallery")
        parts = []
        for pixels, titles in self._batches(batch_size, pixel_values, title_embeds):
            encoded = self._encode_images(pixels)
            states = None if self.decoder is None else self.decoder.encode_images(encoded.tokens, titles)[:, 0]
            parts.append(RiceGallery(embeds=encoded.embeds, states=states))
        return RiceGallery.cat(parts)

    @torch.no_grad()
    def encode_clips(
        self,
        pixel_values_videos: Tensor,
        frame_mask: Tensor | None = None,
        patch_mask: Tensor | None = None,
        asr_embeds: Tensor | None = None,
        batch_size: int = 16,
        **kwargs,
    ) -> RiceClips:
        """
        Encodes clips once, for any number of comparisons. Call in eval mode. Arguments as `get_video_features`;
        `asr_embeds` `(B, text_embed_dim)` are precomputed ASR vectors, `batch_size` counts clips.
        """
        self._require_eval_mode("encode_clips")
        parts = []
        for videos, frames, patches, asr in self._batches(
            batch_size, pixel_values_videos, frame_mask, patch_mask, asr_embeds
        ):
            encoded = self._encode_clips(videos, frames, patches)
            keys = values = mask = None
            if self.decoder is not None:
                keys, values, mask = self._decoder_clips(encoded, asr)
            parts.append(RiceClips(embeds=encoded.embeds, keys=keys, values=values, mask=mask))
        return RiceClips.cat(parts)

    def _require_eval_mode(self, method: str) -> None:
        if self.training and self.decoder is not None and self.config.decoder_dropout > 0:
            raise ValueError(f"`{method}` is exact in eval mode only; call `model.eval()` first.")

    def _batches(self, batch_size: int, *tensors: Tensor | None):
        if len(tensors[0]) == 0:
            raise ValueError("There is nothing to encode: the batch is empty.")
        for start in range(0, len(tensors[0]), batch_size):
            rows = slice(start, start + batch_size)
            yield [None if tensor is None else tensor[rows].to(self.device) for tensor in tensors]

    def similarity(self, clips: RiceClips, gallery: RiceGallery) -> Tensor:
        """Cosine of every clip with every image, `(num_clips, num_images)`, in -1..1."""
        return _cosines(clips.embeds.float(), gallery.embeds.float())

    @torch.no_grad()
    def match(self, clips: RiceClips, gallery: RiceGallery, max_memory: int = 512 * 2**20) -> Tensor:
        """
        Decoder score of every clip with every image, exact: one query row per pair against the clip's cached keys
        and values. Call in eval mode.

        Args:
            clips, gallery: From `encode_clips` and `encode_gallery` of this model.
            max_memory: Bytes the intermediate results may take; larger requests are worked off in chunks.

        Returns:
            `(num_clips, num_images)` float32, the head's raw output without temperature.

        Raises:
            ValueError: when the model or the one that encoded has no decoder, or in training mode with active dropout.
        """
        if self.decoder is None:
            raise ValueError("This model has no matching decoder (`use_decoder=False`); rank by `similarity` instead.")
        self._require_eval_mode("match")
        if gallery.states is None or clips.keys is None:
            raise ValueError("The features come from a model without a matching decoder; encode them with this one.")
        device, dtype = self.device, self.visual_projection.weight.dtype
        clips_at_once, images_at_once = self._match_chunks(clips.keys.shape[1], len(clips), len(gallery), max_memory)
        scores = torch.empty(len(clips), len(gallery), device=device)
        for first in range(0, len(clips), clips_at_once):
            rows = slice(first, first + clips_at_once)
            keys, values = clips.keys[rows].to(device, dtype), clips.values[rows].to(device, dtype)
            mask = clips.mask[rows].to(device)
            for start in range(0, len(gallery), images_at_once):
                columns = slice(start, start + images_at_once)
                states = gallery.states[columns].to(device, dtype)
                scores[rows, columns] = self.decoder.score_pairs(states, keys, values, mask).float()
        return scores

    def _match_chunks(self, num_tokens: int, num_clips: int, num_images: int, max_memory: int) -> tuple[int, int]:
        width, heads = self.config.decoder_hidden_size, self.config.decoder_num_heads
        hidden = self.config.decoder_intermediate_size or 4 * width
        bytes_per_pair = 4 * (2 * hidden + 5 * width + 2 * heads * num_tokens)
        bytes_per_clip = 4 * 4 * num_tokens * width
        images = max(1, min(num_images, max_memory // (2 * bytes_per_pair)))
        clips = max(1, min(num_clips, max_memory // (images * bytes_per_pair + bytes_per_clip)))
        return clips, images

    def _decoder_clips(self, clips: _EncodedClips, asr_embeds: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return self.decoder.encode_clips(clips.tokens.flatten(1, 2), clips.mask.flatten(1), asr_embeds)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_values_videos: Tensor,
        frame_mask: Tensor | None = None,
        patch_mask: Tensor | None = None,
        product_ids: Tensor | None = None,
        title_embeds: Tensor | None = None,
        asr_embeds: Tensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> RiceOutput:
        """
        Args:
            pixel_values (`(B, 3, H, W)`): Shop image of each pair.
            pixel_values_videos (`(B, T, 3, H, W)`), frame_mask (`(B, T)`), patch_mask (`(B, T, P)`):
                Clip of each pair, as `get_video_features`.
            product_ids (`(B,)` int64, *optional*): Pairs of one product are not each other's negatives.
            title_embeds, asr_embeds (`(B, text_embed_dim)`, *optional*): Precomputed text vectors.
            return_loss: `False` skips the losses and scores all pairs of the batch.
            kwargs: Title and ASR ids of the processor, which a model without text encoder ignores.

        Raises:
            ValueError: for shapes that do not fit, or a batch too small to mine negatives from.
        """
        images = self._encode_images(pixel_values)
        clips = self._encode_clips(pixel_values_videos, frame_mask, patch_mask)
        scale = self.logit_scale.exp()
        output = RiceOutput(
            logits_per_image=scale * _cosines(images.embeds, clips.embeds),
            image_embeds=images.embeds,
            video_embeds=clips.embeds,
        )
        output.logits_per_video = output.logits_per_image.T
        if self.decoder is not None:
            source = self._detached(images, clips) if self.config.detach_matching_features else (images, clips)
            states = self.decoder.encode_images(source[0].tokens, title_embeds)
            keys, values, mask = self._decoder_clips(source[1], asr_embeds)
            if not return_loss:
                scores = self.decoder.score_pairs(states[:, 0], keys, values, mask)
                output.matching_logits = self.config.matching_scale * scores.T
        if not return_loss:
            return output

        if len(images.embeds) != len(clips.embeds):
            raise ValueError(f"The losses need pairs, got {len(images.embeds)} images and {len(clips.embeds)} clips.")
        offset = self._gather.rank * len(images.embeds)
        all_images, all_clips = self._gather(images.embeds), self._gather(clips.embeds)
        all_products = None if product_ids is None else self._gather(product_ids)
        output.contrastive_loss = symmetric_loss(
            scale * _cosines(images.embeds, all_clips),
            scale * _cosines(clips.embeds, all_images),
            product_ids,
            all_products,
            offset,
        )
        output.loss = self.config.contrastive_loss_weight * output.contrastive_loss
        if self.decoder is not None:
            similarity = _cosines(all_images.detach(), all_clips.detach())
            self._add_matching(output, similarity, states[:, 0], keys, values, mask, product_ids, all_products, offset)
            output.loss = output.loss + self.config.matching_loss_weight * output.matching_loss
        if self.reconstruction_head is not None:
            output.reconstruction_loss = self._reconstruction(images, clips, states, keys, mask)
            output.loss = output.loss + self.config.reconstruction_loss_weight * output.reconstruction_loss
        return output

    @staticmethod
    def _detached(images: _EncodedImages, clips: _EncodedClips) -> tuple[_EncodedImages, _EncodedClips]:
        return (
            _EncodedImages(images.tokens.detach(), images.embeds),
            _EncodedClips(clips.tokens.detach(), clips.embeds, clips.mask),
        )

    def _add_matching(
        self,
        output: RiceOutput,
        similarity: Tensor,
        class_states: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor,
        product_ids: Tensor | None,
        all_products: Tensor | None,
        offset: int,
    ) -> None:
        """
        Fills in the matching loss. Each process scores its own clips against the images of all: an image costs one
        row of width d to exchange, a clip hundreds.
        """
        rows = slice(offset, offset + len(keys))
        all_states = self._gather(class_states)
        contexts = self.decoder.pair_contexts(all_states, keys, values, mask)
        if self.config.matching_negatives == "all":
            scores = self.decoder.finish_pairs(all_states, contexts)
            by_clip = self.config.matching_scale * self._gather(scores)
            by_image = by_clip.T
            output.matching_logits = by_image[rows, rows]
            output.matching_loss = symmetric_loss(by_image[rows], by_clip[rows], product_ids, all_products, offset)
            return

        ignore = None if all_products is None else false_negative_mask(all_products, all_products)
        index, valid = mine_hard_negatives(similarity, self.config.num_hard_negatives, ignore)
        chosen = torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, index, True).T[rows]
        scores = contexts.new_zeros(chosen.shape)
        scores[chosen] = self.decoder.finish_pairs(all_states.expand(len(keys), -1, -1)[chosen], contexts[chosen])
        logits = self.config.matching_scale * self._gather(scores).T.gather(1, index)[rows]
        logits = logits.masked_fill(~valid[rows], torch.finfo(logits.dtype).min)
        output.matching_logits, output.matching_indices = logits, index[rows]
        target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        output.matching_loss = nn.functional.cross_entropy(logits, target)

    def reconstruction_weights(self, states: Tensor, keys: Tensor, mask: Tensor, tokens_per_frame: int) -> Tensor:
        """
        How much of each clip token goes into each image token's reconstruction, for image i with clip i.

        Args:
            states (`(B, L, d)`): From the decoder's `encode_images`.
            keys (`(B, S, d)`), mask (`(B, S)` bool): From the decoder's `encode_clips`.
            tokens_per_frame: 1 + P.

        Returns:
            `(B, P, T * P)`, or `(B, 1 + P, T * (1 + P))` with `reconstruction_include_cls`.
        """
        attention = self.decoder.positive_attention(states, keys, mask)
        # Text tokens stand last and have no patch to reconstruct or to be reconstructed from.
        num_keys = keys.shape[1] // tokens_per_frame * tokens_per_frame
        attention, mask = attention[:, :, :tokens_per_frame, :num_keys], mask[:, :num_keys]
        if not self.config.reconstruction_include_cls:
            attention = _drop_class_keys(attention[:, :, 1:], tokens_per_frame)
            mask = _drop_class_keys(mask, tokens_per_frame)
        return self.reconstruction_head(attention, mask)

    def _reconstruction(
        self, images: _EncodedImages, clips: _EncodedClips, states: Tensor, keys: Tensor, mask: Tensor
    ) -> Tensor:
        weights = self.reconstruction_weights(states, keys, mask, images.tokens.shape[1])
        first = 0 if self.config.reconstruction_include_cls else 1
        clip_tokens = (clips.tokens * clips.mask[..., None])[:, :, first:].flatten(1, 2)
        return reconstruction_loss(weights, clip_tokens, images.tokens[:, first:])


def _at_least_single(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """Products of normalised rows, kept in single precision: under a temperature of 100 half precision makes ties."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ columns.T


def _drop_class_keys(tensor: Tensor, tokens_per_frame: int) -> Tensor:
    """Removes each frame's class token from the last dimension, which holds the tokens frame by frame."""
    return tensor.unflatten(-1, (-1, tokens_per_frame))[..., 1:].flatten(-2)


RiceModel.register_for_auto_class("AutoModel")

__all__ = ["RiceModel", "RiceOutput", "RicePreTrainedModel"]
