"""RICE (ICCV 2023): recognises which product a livestream clip presents, by retrieval from the shop's images."""

import itertools
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .alignment_rice import RiceAlignment, RiceAlignmentSide
from .comparison_rice import RiceComparison
from .configuration_rice import RiceConfig
from .decoder_rice import RiceDecoder, RiceHeadMixing, RiceReconstructionHead
from .encoders_rice import build_encoder
from .encoding_rice import RiceEncoding
from .features_rice import PLAIN_TEXT_KEYS, refuse_unknown
from .fingerprint_rice import RiceIdentity
from .layout_rice import write_card, write_layout
from .loss_rice import cosines
from .objective_rice import RiceObjective
from .patches_rice import RicePatchSaliency, RiceSaliencyScore
from .pooling_rice import POOLINGS, RiceZeroLinear
from .text_rice import RiceTextEncoder, RiceTextSide
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
    RiceEncoding,
    RiceIdentity,
    RiceComparison,
    RiceObjective,
    RiceTextSide,
    RiceVisionSide,
    RiceAlignmentSide,
    RicePreTrainedModel,
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

    @property
    def device(self) -> torch.device:
        """The device that inputs are moved to. Offloaded weights are on the meta device until they are used."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next((tensor.device for tensor in tensors if not tensor.is_meta), super().device)

    def get_input_embeddings(self) -> nn.Module:
        """The input embeddings of the vision encoder, which adapter libraries ask for."""
        return self.vision_model.get_input_embeddings()

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
            embeds = self.get_image_features(images, return_dict=True, **text).pooler_output
            return RiceOutput(image_embeds=embeds, pooler_output=embeds)
        if videos is not None:
            embeds = self.get_video_features(videos, frame_mask, patch_mask, return_dict=True, **text).pooler_output
            return RiceOutput(video_embeds=embeds, pooler_output=embeds)
        embeds = self.get_text_features(return_dict=True, **text).pooler_output
        return RiceOutput(text_embeds=embeds, pooler_output=embeds)


RiceModel.register_for_auto_class("AutoModel")

__all__ = ["RiceModel", "RiceOutput", "RicePreTrainedModel"]
