"""The methods of [`RiceModel`] that encode images, frames and clips: for losses, for users, and for comparisons."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .features_rice import RiceClips, RiceFrames, RiceGallery, refuse_unknown, require_tensor
from .fingerprint_rice import require_encodings
from .loss_rice import at_least_single, l2_normalize
from .objective_rice import ClipTokens, ImageTokens
from .patches_rice import check_patch_mask, resize_patch_mask
from .scoring_rice import check_count
from .text_rice import EncodedText


class RiceEncoding:
    """The methods of [`RiceModel`] that turn pixels and texts into encodings."""

    # Attributes of the model.
    config: Any
    decoder: Any
    device: Any
    training: bool
    temporal_pooling: Any
    encode_text: Any
    fingerprint: Any
    refuse_foreign: Any
    require_eval_mode: Any
    _aligned: Any
    _centred: Any
    _encoder_output: Any
    _from_states: Any

    def _embed_images(self, pixel_values: Tensor) -> ImageTokens:
        states = self._encoder_output(pixel_values)
        tokens, features = self._from_states(states)
        embeds = l2_normalize(self._centred(at_least_single(features), is_clip=False))
        return ImageTokens(tokens, embeds, patches=self._aligned(states.patches))

    def encode_frames(self, pixel_values: Tensor, patch_mask: Tensor | None = None) -> RiceFrames:
        """
        Encodes frames one by one, so that several clips can share a frame. `encode_frames` followed by `pool_frames`
        equals `encode_clips`, but keeps gradients.

        Args:
            pixel_values (`(n, 3, H, W)`): Preprocessed frames.
            patch_mask (`(n, P)` bool, *optional*): `True` = patch of the intended product.

        Raises:
            ValueError: for wrong shapes, or a mask that the encoder does not support.
        """
        patch_mask = check_patch_mask(pixel_values, patch_mask)
        states = self._encoder_output(pixel_values, patch_mask)
        tokens, features = self._from_states(states, patch_mask, is_clip=True)
        token_mask, aligned = None, self._aligned(states.patches)
        if patch_mask is not None and tokens.shape[1] > 1:
            kept = resize_patch_mask(patch_mask, tokens.shape[1] - 1) > 0
            token_mask = nn.functional.pad(kept, (1, 0), value=True)
        if patch_mask is not None and aligned is not None:
            patch_mask = resize_patch_mask(patch_mask, aligned.shape[1]) > 0
        # Training does not compare fingerprints, and a graph that is being compiled has no weights to read.
        name = None if self.training or torch.compiler.is_compiling() else self.fingerprint()
        shown = None if aligned is None else patch_mask
        return RiceFrames(tokens, at_least_single(features), token_mask, aligned, shown, model_fingerprint=name)

    def pool_frames(
        self,
        frames: RiceFrames,
        frame_mask: Tensor | None = None,
        asr_embeds: Tensor | None = None,
        asr_input_ids: Tensor | None = None,
        asr_attention_mask: Tensor | None = None,
    ) -> RiceClips:
        """
        Pools encoded frames into clips. A frame may be part of several clips: `frames[[0, 1, 1, 2]]` with a mask of
        shape (2, 2) are two clips that share one frame.

        Args:
            frames: Frames of all clips, clip by clip: either the real frames only, or all `c * T` with padding.
            frame_mask (`(c, T)` bool, *optional*): `True` = real frame; by default all frames belong to one clip.
            asr_embeds, asr_input_ids, asr_attention_mask: ASR of the clips, as in `encode_clips`.

        Raises:
            ValueError: for a mask of the wrong size, a clip without a real frame, or frames of another model.
        """
        require_encodings(frames=frames)
        if frame_mask is None:
            frame_mask = torch.ones(1, len(frames), dtype=torch.bool, device=frames.features.device)
        frame_mask = require_tensor("frame_mask", frame_mask).bool()
        _refuse_empty(frame_mask)
        if len(frames) not in (frame_mask.numel(), int(frame_mask.sum())):
            raise ValueError(
                f"`frame_mask` has {int(frame_mask.sum())} real frames of {frame_mask.numel()}, but there are "
                f"{len(frames)} frames; give the real frames, or all of them."
            )
        if not self.training:
            self.refuse_foreign(frames=frames)
        clips = self._lay_out(frames, frame_mask)
        self._add_asr(clips, asr_embeds, asr_input_ids, asr_attention_mask)
        return clips.kept(frames.model_fingerprint)

    def pool_features(self, features: Tensor, frame_mask: Tensor) -> Tensor:
        """Frame features `(c, T, D)` and mask `(c, T)`, as in `pool_frames` -> L2-normalised embeddings `(c, D)`."""
        features = self._centred(features, is_clip=True)
        if self.config.normalize_frames:
            features = l2_normalize(features)
        return l2_normalize(self.temporal_pooling(features, frame_mask))

    def _lay_out(self, frames: RiceFrames, frame_mask: Tensor) -> ClipTokens:
        """Arranges frames as `(c, T)`; see `pool_frames`."""
        is_whole = len(frames) == frame_mask.numel()
        # Masked padded frames are not attended to either.
        counts_padding = is_whole and frames.token_mask is not None and not self.config.mask_padded_frames

        def place(rows: Tensor) -> Tensor:
            if is_whole:
                return rows.unflatten(0, frame_mask.shape)
            placed = rows.new_zeros(*frame_mask.shape, *rows.shape[1:])
            placed[frame_mask] = rows
            return placed

        tokens = place(frames.tokens)
        shown = torch.ones_like(frame_mask) if counts_padding else frame_mask
        token_mask = shown[:, :, None].expand(-1, -1, tokens.shape[2])
        if frames.token_mask is not None:
            token_mask = token_mask & place(frames.token_mask)
        clips = ClipTokens(tokens, token_mask, self.pool_features(place(frames.features), frame_mask))
        if frames.patches is not None:
            clips.patches = place(frames.patches)
            clips.patch_mask = frame_mask[:, :, None].expand(-1, -1, clips.patches.shape[2])
            if frames.patch_mask is not None:
                clips.patch_mask = clips.patch_mask & place(frames.patch_mask)
        return clips

    def _embed_videos(self, videos: Tensor, frame_mask: Tensor | None, patch_mask: Tensor | None) -> ClipTokens:
        frame_mask = self._check_clips(videos, frame_mask, patch_mask)
        # Padded frames are encoded only if they are attended to.
        counts_padding = patch_mask is not None and not self.config.mask_padded_frames
        encoded = torch.ones_like(frame_mask) if counts_padding else frame_mask
        frames = self.encode_frames(videos[encoded], None if patch_mask is None else patch_mask[encoded])
        return self._lay_out(frames, frame_mask)

    @staticmethod
    def _check_clips(videos: Tensor, frame_mask: Tensor | None, patch_mask: Tensor | None) -> Tensor:
        if require_tensor("pixel_values_videos", videos).dim() not in (3, 5) or videos.shape[0] == 0:
            raise ValueError(
                f"`pixel_values_videos` must be (B, T, 3, H, W), or (B, T, F) from `encode_pictures`, got shape "
                f"{tuple(videos.shape)}."
            )
        if frame_mask is None:
            frame_mask = torch.ones(videos.shape[:2], dtype=torch.bool, device=videos.device)
        if require_tensor("frame_mask", frame_mask).shape != videos.shape[:2]:
            raise ValueError(
                f"`frame_mask` must be (B, T) = {tuple(videos.shape[:2])}, got shape {tuple(frame_mask.shape)}."
            )
        if patch_mask is not None and (
            require_tensor("patch_mask", patch_mask).dim() != 3 or patch_mask.shape[:2] != videos.shape[:2]
        ):
            raise ValueError(
                f"`patch_mask` must be (B, T, P) with (B, T) = {tuple(videos.shape[:2])}, got shape "
                f"{tuple(patch_mask.shape)}."
            )
        frame_mask = frame_mask.bool()
        _refuse_empty(frame_mask)
        return frame_mask

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`(n, 3, H, W)`): Preprocessed images.

        Returns:
            `pooler_output` `(n, D)`, L2-normalised; `last_hidden_state` `(n, 1 + P, d)`, global token first.

        Raises:
            TypeError: for an argument that is not a key of a batch.
        """
        refuse_unknown("get_image_features", kwargs)
        encoded = self._embed_images(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=encoded.tokens, pooler_output=encoded.embeds)

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: Tensor, frame_mask: Tensor | None = None, patch_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values_videos (`(B, T, 3, H, W)`): Preprocessed frames.
            frame_mask (`(B, T)` bool, *optional*): `True` = real frame. Other frames are not encoded and not pooled.
            patch_mask (`(B, T, P)` bool, *optional*): `True` = patch of the intended product.

        Returns:
            `pooler_output` `(B, D)`, L2-normalised; `last_hidden_state` `(B, T, 1 + P, d)`, zero at padded frames.

        Raises:
            TypeError: for an argument that is not a key of a batch.
            ValueError: for wrong shapes.
        """
        refuse_unknown("get_video_features", kwargs)
        encoded = self._embed_videos(pixel_values_videos, frame_mask, patch_mask)
        return BaseModelOutputWithPooling(last_hidden_state=encoded.tokens, pooler_output=encoded.embeds)

    @torch.no_grad()
    def encode_gallery(
        self,
        pixel_values: Tensor,
        title_embeds: Tensor | None = None,
        batch_size: int | None = 64,
        title_input_ids: Tensor | None = None,
        title_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> RiceGallery:
        """
        Encodes shop images once, for any number of comparisons. Call in eval mode.

        Args:
            pixel_values (`(n, 3, H, W)`): Preprocessed images; moved to the model's device batch by batch.
            title_embeds (`(n, text_embed_dim)`, *optional*): Precomputed title vectors, zero where there is no title.
            batch_size: Images encoded at a time; `None` for all.
            title_input_ids, title_attention_mask (`(n, L)`, *optional*): Titles for the text encoder; a model without
                text encoder ignores them.
            kwargs: Other entries of a batch (of clips), which are ignored.

        Raises:
            TypeError: for an argument that is not a key of a batch.
            ValueError: for an empty batch, or in training mode if that changes encodings.
        """
        refuse_unknown("encode_gallery", kwargs)
        self.require_eval_mode("encode_gallery")
        model = self.fingerprint()
        image = {
            "pixel_values": pixel_values,
            "title_embeds": title_embeds,
            "title_input_ids": title_input_ids,
            "title_attention_mask": title_attention_mask,
        }
        parts = [self.image_tokens(**batch).kept(model) for batch in self._batches(batch_size, image)]
        return RiceGallery.cat(parts)

    @torch.no_grad()
    def encode_clips(
        self,
        pixel_values_videos: Tensor,
        frame_mask: Tensor | None = None,
        patch_mask: Tensor | None = None,
        asr_embeds: Tensor | None = None,
        batch_size: int | None = 16,
        asr_input_ids: Tensor | None = None,
        asr_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> RiceClips:
        """
        Encodes clips once, for any number of comparisons. Call in eval mode. Arguments are those of
        `get_video_features`; ASR is given as titles are in `encode_gallery`; `batch_size` counts clips. Raises the
        errors of `encode_gallery`.
        """
        refuse_unknown("encode_clips", kwargs)
        self.require_eval_mode("encode_clips")
        model = self.fingerprint()
        clip = {
            "pixel_values_videos": pixel_values_videos,
            "frame_mask": frame_mask,
            "patch_mask": patch_mask,
            "asr_embeds": asr_embeds,
            "asr_input_ids": asr_input_ids,
            "asr_attention_mask": asr_attention_mask,
        }
        parts = [self.clip_tokens(**batch).kept(model) for batch in self._batches(batch_size, clip)]
        return RiceClips.cat(parts)

    def _batches(self, batch_size: int | None, inputs: dict[str, Tensor | None]):
        """Batches of inputs that belong together, the pixels first, on the model's device."""
        pixels, *others = inputs
        count = len(require_tensor(pixels, inputs[pixels]))
        if count == 0:
            raise ValueError("There is nothing to encode: the batch is empty.")
        for name in others:
            if inputs[name] is not None and len(require_tensor(name, inputs[name])) != count:
                raise ValueError(
                    f"`{name}` has {len(inputs[name])} rows, but `{pixels}` has {count}; give one row for each."
                )
        check_count("batch_size", batch_size)
        batch_size = batch_size or count
        for start in range(0, count, batch_size):
            rows = slice(start, start + batch_size)
            yield {name: None if tensor is None else tensor[rows].to(self.device) for name, tensor in inputs.items()}

    def _text_token(self, text: EncodedText | None) -> tuple[Tensor | None, Tensor | None]:
        """The text features for the decoder's token, and which texts exist."""
        if text is None or not self.config.has_text_tokens:
            return None, None
        return text.features, text.present

    def image_tokens(
        self,
        pixel_values: Tensor,
        title_embeds: Tensor | None = None,
        title_input_ids: Tensor | None = None,
        title_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> ImageTokens:
        """Encodes images for the losses, with gradient; arguments as in `encode_gallery`."""
        images = self._embed_images(pixel_values)
        images.text = self.encode_text("title", title_embeds, title_input_ids, title_attention_mask)
        _refuse_other_count("title", images)
        if self.decoder is not None:
            tokens = images.tokens.detach() if self.config.detach_matching_features else images.tokens
            images.states = self.decoder.encode_images(tokens, *self._text_token(images.text))
        return images

    def clip_tokens(
        self,
        pixel_values_videos: Tensor,
        frame_mask: Tensor | None = None,
        patch_mask: Tensor | None = None,
        asr_embeds: Tensor | None = None,
        asr_input_ids: Tensor | None = None,
        asr_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> ClipTokens:
        """Encodes clips for the losses, with gradient; arguments as in `encode_clips`."""
        clips = self._embed_videos(pixel_values_videos, frame_mask, patch_mask)
        self._add_asr(clips, asr_embeds, asr_input_ids, asr_attention_mask)
        return clips

    def _add_asr(self, clips: ClipTokens, vectors: Tensor | None, ids: Tensor | None, mask: Tensor | None) -> None:
        """Adds the ASR to clips, then the decoder's keys and values, which depend on it."""
        clips.text = self.encode_text("asr", vectors, ids, mask)
        _refuse_other_count("asr", clips)
        if self.decoder is not None:
            tokens = clips.tokens.detach() if self.config.detach_matching_features else clips.tokens
            clips.keys, clips.values, clips.mask = self.decoder.encode_clips(
                tokens.flatten(1, 2), clips.token_mask.flatten(1), *self._text_token(clips.text)
            )


def _refuse_empty(frame_mask: Tensor) -> None:
    empty = (~frame_mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"Clip {empty[0]} of the batch has no real frame in `frame_mask`; leave it out.")


def _refuse_other_count(kind: str, pictures: ImageTokens | ClipTokens) -> None:
    if pictures.text is not None and len(pictures.text.features) != len(pictures.embeds):
        raise ValueError(
            f"There are {len(pictures.text.features)} texts (`{kind}_embeds` or `{kind}_input_ids`) for "
            f"{len(pictures.embeds)} images or clips; give one text for each."
        )
