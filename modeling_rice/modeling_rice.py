"""RICE (ICCV 2023): recognises which product a livestream clip presents, by retrieval from the shop's images."""

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .alignment_rice import RiceAlignment, RiceAlignmentSide
from .comparison_rice import RiceComparison
from .configuration_rice import RiceConfig
from .decoder_rice import RiceDecoder, RiceHeadMixing, RiceReconstructionHead
from .encoders_rice import build_encoder
from .features_rice import PLAIN_TEXT_KEYS, RiceClips, RiceFrames, RiceGallery, refuse_unknown, require_tensor
from .fingerprint_rice import RiceIdentity
from .layout_rice import write_card, write_layout
from .loss_rice import cosines
from .objective_rice import ClipTokens, ImageTokens, RiceObjective
from .patches_rice import RicePatchSaliency, RiceSaliencyScore, resize_patch_mask
from .pooling_rice import POOLINGS, RiceZeroLinear
from .scoring_rice import check_count
from .text_rice import EncodedText, RiceTextEncoder, RiceTextSide
from .vision_rice import RicePatchProjection, RiceVisionSide


@dataclass
class RiceOutput(ModelOutput):
    """
    Output of [`RiceModel`]. B is the number of pairs in the batch; every field is `None` where it does not apply.

    Attributes:
        loss (scalar): Weighted sum of the terms below, with `return_loss=True`.
        contrastive_loss, matching_loss, reconstruction_loss, text_loss (scalar):
            The terms (ICL, PMD, PFR, and ASR against titles), unweighted.
        logits_per_video, logits_per_image (`(B, B)`): Cosines times `logit_scale`, plus `logit_bias` if there is one.
        matching_logits: Decoder scores times `matching_scale`, `(B, B)`, clips in rows and images in columns, as in
            `match` and `logits_per_video`. For a loss on mined negatives `(B, 1 + num_hard_negatives)`: row i holds
            image i with its own clip first, then with the clips that were mined for it.
        matching_indices (`(B, 1 + num_hard_negatives)`): Indices of those clips.
        image_embeds, video_embeds (`(B, D)`), text_embeds (`(B, E)`): L2-normalised. `text_embeds` only for a call
            with texts alone.
        pooler_output: For a call with images, clips or texts alone: the same embeddings, under the name that generic
            code reads.
    """

    loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    matching_loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    text_loss: Tensor | None = None
    logits_per_video: Tensor | None = None
    logits_per_image: Tensor | None = None
    matching_logits: Tensor | None = None
    matching_indices: Tensor | None = None
    image_embeds: Tensor | None = None
    video_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    pooler_output: Tensor | None = None


class RicePreTrainedModel(PreTrainedModel):
    """Initialises the weights of RICE and declares what its models support in transformers."""

    config_class = RiceConfig
    base_model_prefix = "rice"
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")
    # `RiceModel` takes this from its encoder.
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _supports_sdpa = True
    _no_split_modules = ["RiceDecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, RiceHeadMixing):
            # With random signs the two ReLUs can keep the output at zero permanently, so weights start near the mean.
            init.copy_(module.weight, module.starting_weight())
            init.zeros_(module.bias)
        elif isinstance(module, RiceSaliencyScore):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RiceModel):
            init.constant_(module.logit_scale, math.log(self.config.logit_scale_init_value))
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, self.config.logit_bias_init_value)
            if module.text_logit_scale is not None:
                init.constant_(module.text_logit_scale, math.log(self.config.text_logit_scale_init_value))
        elif isinstance(module, RiceZeroLinear):
            init.zeros_(module.weight)
        elif isinstance(module, RiceAlignment):
            for name, value in module.starting_buffers().items():
                init.copy_(getattr(module, name), value)
        else:
            super()._init_weights(module)


class RiceModel(
    RiceIdentity, RiceComparison, RiceObjective, RiceTextSide, RiceVisionSide, RiceAlignmentSide, RicePreTrainedModel
):
    """
    Cross-view semantic alignment: one vision encoder for clips and images (ICL), a pairwise matching decoder (PMD) and
    patch feature reconstruction (PFR).

    Attention is chosen as in transformers, by `attn_implementation` (`"sdpa"`, the default, or `"eager"`) in
    `from_pretrained` or by `set_attn_implementation`. Both give equal results. An encoder without sdpa uses eager
    attention. `{"vision_config": "flash_attention_2"}` selects flash attention for an encoder that supports it.
    Training in bfloat16 on a CPU is faster with `"eager"`, since the backward pass of sdpa is slow there.

    Examples:

    ```python
    gallery = model.encode_gallery(**processor(images=shop_images, return_tensors="pt"))
    clips = model.encode_clips(**processor(videos=[frames], return_tensors="pt"))
    best = model.similarity(clips, gallery).argmax(dim=1)
    ```
    """

    def __init__(self, config: RiceConfig):
        super().__init__(config)
        # Stored here, because the config computes them from its dictionary, which a compiled graph cannot do.
        self.layout, self.feature_pooling = config.layout, config.feature_pooling
        self.vision_model, self.last_stage = build_encoder(config.vision_config), None
        self.supports_gradient_checkpointing = self.vision_model.supports_gradient_checkpointing
        self.projection_dropout = nn.Dropout(config.projection_dropout)
        self.visual_projection = nn.Linear(config.vision_hidden_size, config.projection_dim, bias=False)
        self.patch_projection = RicePatchProjection(config) if config.projects_patches else None
        self.temporal_pooling = POOLINGS[config.temporal_pooling](config)
        self.text_model = self.text_projection = self.text_logit_scale = None
        if config.text_config is not None:
            self.text_model = RiceTextEncoder(config)
        if config.text_config is not None and config.text_score_weight is not None:
            self.text_projection = nn.Linear(config.text_width, config.projection_dim, bias=False)
            self.text_logit_scale = nn.Parameter(torch.tensor(math.log(config.text_logit_scale_init_value)))
        scale = torch.tensor(math.log(config.logit_scale_init_value))
        if config.learn_logit_scale:
            self.logit_scale = nn.Parameter(scale)
        else:
            # A buffer rather than a frozen parameter: loading a checkpoint would turn the gradient on.
            self.register_buffer("logit_scale", scale)
        self.logit_bias = None
        if config.contrastive_loss == "sigmoid":
            self.logit_bias = nn.Parameter(torch.tensor(float(config.logit_bias_init_value)))
        self.decoder = RiceDecoder(config) if config.use_decoder else None
        has_head = config.use_decoder and config.use_reconstruction
        self.reconstruction_head = RiceReconstructionHead(config) if has_head else None
        self.patch_saliency = RicePatchSaliency(config) if config.patch_saliency == "learned" else None
        self.alignment = None
        if config.alignment_weight is not None:
            self.alignment = RiceAlignment(config.patch_layout.width, config.alignment_rank, config.projection_dim)
        self.post_init()

    # Otherwise Trainer would rescale the loss, because `forward` takes `**kwargs`.
    accepts_loss_kwargs = False

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs):
        """As in transformers, with the files that `pipeline("product-retrieval")` and `SentenceTransformer` read."""
        # Imported in this file so that the pipeline's file is copied with it; imported late because it loads slowly.
        from .pipeline_rice import CUSTOM_PIPELINES

        self.config.custom_pipelines = CUSTOM_PIPELINES
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_layout(save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args, **kwargs):
        # The last step of `push_to_hub` and `save_pretrained(push_to_hub=True)`, which would omit these files.
        write_layout(working_dir)
        write_card(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs) -> None:
        """As in transformers, but with `"sdpa"` an encoder that does not support it uses `"eager"`."""
        if attn_implementation == "sdpa":
            text = None if self.text_model is None else self.text_model.model
            parts = {"vision_config": self.vision_model, "text_config": text}
            attn_implementation = {"": "sdpa"} | {
                name: "sdpa" if part._supports_sdpa else "eager" for name, part in parts.items() if part is not None
            }
        super().set_attn_implementation(attn_implementation, **kwargs)

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs) -> None:
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        # timm's networks have their own switch.
        if type(self.vision_model)._set_gradient_checkpointing is not PreTrainedModel._set_gradient_checkpointing:
            self.vision_model._set_gradient_checkpointing(enable, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The input embeddings of the vision encoder, which adapter libraries ask for."""
        return self.vision_model.get_input_embeddings()

    def _embed_images(self, pixel_values: Tensor) -> ImageTokens:
        states = self._encoder_output(pixel_values)
        tokens, features = self._from_states(states)
        embeds = nn.functional.normalize(self._centred(_at_least_single(features), is_clip=False), dim=-1)
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
        if patch_mask is not None:
            patch_mask = patch_mask.bool()
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
        return RiceFrames(tokens, _at_least_single(features), token_mask, aligned, shown, model_fingerprint=name)

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
        if not isinstance(frames, RiceFrames):
            raise ValueError(f"`frames` is a {type(frames).__name__}; give what `encode_frames` returns.")
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
            features = nn.functional.normalize(features, dim=-1)
        return nn.functional.normalize(self.temporal_pooling(features, frame_mask), dim=-1)

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
        if patch_mask is not None and require_tensor("patch_mask", patch_mask).shape[:2] != videos.shape[:2]:
            raise ValueError(
                f"`patch_mask` must start with (B, T) = {tuple(videos.shape[:2])}, "
                f"got shape {tuple(patch_mask.shape)}."
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
        batch_size: int = 64,
        title_input_ids: Tensor | None = None,
        title_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> RiceGallery:
        """
        Encodes shop images once, for any number of comparisons. Call in eval mode.

        Args:
            pixel_values (`(n, 3, H, W)`): Preprocessed images; moved to the model's device batch by batch.
            title_embeds (`(n, text_embed_dim)`, *optional*): Precomputed title vectors, zero where there is no title.
            batch_size: Images encoded at a time.
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
        batch_size: int = 16,
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

    def _batches(self, batch_size: int, inputs: dict[str, Tensor | None]):
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
        for start in range(0, count, batch_size):
            rows = slice(start, start + batch_size)
            yield {name: None if tensor is None else tensor[rows].to(self.device) for name, tensor in inputs.items()}

    def _text_token(self, text: EncodedText | None) -> tuple[Tensor | None, Tensor | None]:
        """The text features for the decoder's token, and which texts exist."""
        if text is None or not self.config.has_text_tokens:
            return None, None
        return text.features, text.present

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        frame_mask: Tensor | None = None,
        patch_mask: Tensor | None = None,
        product_ids: Tensor | None = None,
        title_embeds: Tensor | None = None,
        asr_embeds: Tensor | None = None,
        return_loss: bool = True,
        asr_is_noise: Tensor | None = None,
        **kwargs,
    ) -> RiceOutput:
        """
        Losses and scores of pairs. For images, clips or texts alone it returns their embeddings.

        Args:
            pixel_values (`(B, 3, H, W)`): Shop image of each pair.
            pixel_values_videos (`(B, T, 3, H, W)`), frame_mask (`(B, T)`), patch_mask (`(B, T, P)`):
                Clip of each pair, as in `get_video_features`. Images and clips may also be the output of
                `encode_pictures`.
            product_ids (`(B,)` int64, *optional*): Pairs of the same product are not negatives of each other.
            title_embeds, asr_embeds (`(B, text_embed_dim)`, *optional*): Precomputed text vectors, zero where there is
                no text.
            return_loss: `False` skips the losses and scores all pairs of the batch.
            asr_is_noise (`(B,)` bool, *optional*): Pairs whose ASR was replaced by another product's. The text loss
                treats it as missing; the rest of the model uses it.
            kwargs: `title_input_ids`, `asr_input_ids` and their `_attention_mask`, `(B, L)`, as the processor returns
                them; a model without text encoder ignores them if there are images or clips. `return_dict=False`
                returns a tuple.

        Raises:
            TypeError: for an argument that is not a key of a batch.
            ValueError: for wrong shapes, a batch too small to mine negatives from, a request for hidden states or
                attentions (which are not returned), or if there is nothing to encode.
        """
        if pixel_values is None or pixel_values_videos is None:
            # Texts alone may also have the argument names of other models.
            refuse_unknown("forward", {name: kwargs[name] for name in kwargs if name not in PLAIN_TEXT_KEYS})
            text = {"title_embeds": title_embeds, "asr_embeds": asr_embeds, **kwargs}
            return self._forward_alone(pixel_values, pixel_values_videos, frame_mask, patch_mask, text)
        refuse_unknown("forward", kwargs)
        images = self.image_tokens(pixel_values, title_embeds, **kwargs)
        clips = self.clip_tokens(pixel_values_videos, frame_mask, patch_mask, asr_embeds, **kwargs)
        logits = self.logit_scale.exp() * cosines(images.embeds, clips.embeds)
        output = RiceOutput(
            logits_per_image=logits if self.logit_bias is None else logits + self.logit_bias,
            image_embeds=images.embeds,
            video_embeds=clips.embeds,
        )
        output.logits_per_video = output.logits_per_image.T
        if return_loss:
            self.add_losses(output, images, clips, product_ids, asr_is_noise)
        elif self.decoder is not None:
            scores = self.decoder.score_pairs(images.states[:, 0], clips.keys, clips.values, clips.mask)
            output.matching_logits = self.config.matching_scale * scores
        return output

    def _forward_alone(
        self, images: Tensor | None, videos: Tensor | None, frame_mask: Tensor | None, patch_mask: Tensor | None, text
    ) -> RiceOutput:
        if videos is None and (frame_mask is not None or patch_mask is not None):
            raise ValueError("`frame_mask` and `patch_mask` belong to `pixel_values_videos`, which was not given.")
        if images is not None:
            embeds = self.get_image_features(images, **text).pooler_output
            return RiceOutput(image_embeds=embeds, pooler_output=embeds)
        if videos is not None:
            embeds = self.get_video_features(videos, frame_mask, patch_mask, **text).pooler_output
            return RiceOutput(video_embeds=embeds, pooler_output=embeds)
        embeds = self.get_text_features(**text).pooler_output
        return RiceOutput(text_embeds=embeds, pooler_output=embeds)

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


def _at_least_single(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


RiceModel.register_for_auto_class("AutoModel")

__all__ = ["RiceModel", "RiceOutput", "RicePreTrainedModel"]
