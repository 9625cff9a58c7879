"""The vision part of [`RiceModel`]: one run of the encoder, and the tokens and features made of its output."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .configuration_rice import PATCH_MASK_ENCODERS, RiceConfig
from .decoder_rice import additive_mask
from .encoders_rice import EncoderLayout, encoder_inputs, last_states, parts_to_compile
from .features_rice import require_tensor
from .last_stage_rice import LastStage, find_last_stage
from .patches_rice import check_patch_mask, resize_patch_mask
from .pooling_rice import weighted_mean


class EncoderStates(NamedTuple):
    """
    Everything that the model takes from the encoder. A frozen encoder need not run again for images whose states are
    stored.

    Attributes:
        features (`(n, W)`): Global feature, before its projection.
        patches (`(n, P, C)`): Patches of the layer chosen by `vision_feature_layer`, without prefix tokens.
        last_patches (`(n, P', W')`, *optional*): Patches of the encoder's output; the same as `patches` if no other
            layer is chosen. Needed for a learnt saliency, and for `last_hidden_state` of a model without decoder.
    """

    features: Tensor
    patches: Tensor
    last_patches: Tensor | None


class RicePatchProjection(nn.Module):
    """Projects patches of an inner layer, which have not been normalised yet: a LayerNorm and a linear layer."""

    def __init__(self, config: RiceConfig):
        super().__init__()
        width = config.patch_layout.width
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, config.decoder_hidden_size, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Patches `(n, P, C)` -> `(n, P, d)`."""
        return self.linear(self.norm(patches))


class RiceVisionSide:
    """The methods of [`RiceModel`] that turn pixels into the tokens and features used by everything else."""

    # Attributes of the model.
    config: Any
    layout: EncoderLayout
    last_stage: LastStage | None
    feature_pooling: str
    vision_model: Any
    visual_projection: Any
    projection_dropout: Any
    patch_projection: Any
    patch_saliency: Any
    decoder: Any
    alignment: Any
    require_eval_mode: Any

    def split_last_stage(self) -> LastStage:
        """
        Splits off the encoder's last stage, for training that stage alone. Afterwards `encode_pictures` returns the
        inputs of the last stage. Other encodings do not change.

        Raises:
            ValueError: for an encoder whose last stage cannot run on its own.
        """
        if self.last_stage is None:
            self.last_stage = find_last_stage(self.vision_model, self.layout)
        return self.last_stage

    @property
    def kept_states(self) -> dict[str, tuple[int, ...]]:
        """
        Names of the encoder states that this model uses, and their shapes for an image of the native size. After
        `split_last_stage` these are the states of the frozen stages.
        """
        config, chosen, last = self.config, self.config.patch_layout, self.layout.patches
        uses_patches = self.decoder is not None or self.alignment is not None
        shapes: dict[str, tuple[int, ...]] = {}
        if self.last_stage is not None:
            entering = self.last_stage.entering
            shapes["entering"] = (entering.num_prefix_tokens + entering.num_patches, entering.width)
            if uses_patches and self._patch_layer < self.last_stage.layer:
                shapes["patches"] = (chosen.num_patches, chosen.width)
            return shapes
        shapes["features"] = (config.vision_hidden_size,)
        if uses_patches:
            shapes["patches"] = (chosen.num_patches, chosen.width)
        if self.patch_saliency is not None and ("patches" not in shapes or config.vision_feature_layer is not None):
            shapes["last_patches"] = (last.num_patches, last.width)
        return shapes

    @property
    def _patch_layer(self) -> int:
        """Index of the hidden state that patches are taken from; the number of hidden states for the output."""
        layer, count = self.config.vision_feature_layer, len(self.layout.hidden)
        return count if layer is None else layer % count

    def encode_pictures(self, pixel_values: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """
        The encoder states that this model uses, packed into one row per image. All methods accept such rows, `(n, F)`
        or `(B, T, F)`, instead of `pixel_values` `(n, 3, H, W)` or `pixel_values_videos` `(B, T, 3, H, W)`, so that a
        frozen encoder runs once per image. Call with the encoder in eval mode. After `split_last_stage`
        the rows are the inputs of the last stage, which then runs whenever they are used.

        Args:
            pixel_values (`(n, 3, H, W)`): Preprocessed images or frames.
            patch_mask (`(n, P)` bool, *optional*): `True` = patch of the intended product; use the rows with the same
                mask.

        Returns:
            `(n, F)`, in the precision of the weights: the states of `kept_states`, in that order.

        Raises:
            ValueError: for images or a mask that the encoder does not support; for an encoder in training mode if that
                changes its outputs.
        """
        patch_mask = check_patch_mask(pixel_values, patch_mask)
        self.require_eval_mode("encode_pictures", self.vision_model)
        if self.last_stage is None:
            kept = self._encoder_output(pixel_values, patch_mask)._asdict()
        else:
            with self.last_stage.recorded(self.vision_model) as entered:
                kept = self._encoder_output(pixel_values, patch_mask)._asdict()
            kept["entering"] = entered[0]
        return torch.cat([kept[name].flatten(1) for name in self.kept_states], dim=1)

    def _unpack(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows `(n, F)` of `encode_pictures` -> the states that they were packed from."""
        shapes = self.kept_states
        # Images of another size have more or fewer patches, by the same factor in all layers.
        fixed = sum(math.prod(shape) for shape in shapes.values() if len(shape) == 1)
        scale = (rows.shape[1] - fixed) / max(sum(map(math.prod, shapes.values())) - fixed, 1)
        sizes = [shape[0] if len(shape) == 1 else round(shape[0] * scale) * shape[1] for shape in shapes.values()]
        if sum(sizes) != rows.shape[1] or (fixed < sum(sizes) and scale <= 0):
            raise ValueError(
                f"The encoded images have {rows.shape[1]} numbers each, which do not match the states of this model "
                f"({', '.join(shapes)}); encode them with `encode_pictures` of this model."
            )
        parts = rows.to(self.visual_projection.weight.dtype).split(sizes, dim=1)
        kept = zip(shapes.items(), parts, strict=True)
        return {name: part if len(shape) == 1 else part.unflatten(1, (-1, shape[1])) for (name, shape), part in kept}

    def _encoder_output(self, pixel_values: Tensor, patch_mask: Tensor | None = None) -> EncoderStates:
        """
        Encoder states of images `(n, 3, H, W)` with a mask `(n, P)` bool, in the precision of the weights; or of rows
        `(n, F)` from `encode_pictures`.
        """
        layer = self.config.vision_feature_layer
        if require_tensor("pixel_values", pixel_values).dim() == 2:
            return self._encoded_before(self._unpack(pixel_values), patch_mask)
        self._check_pictures(pixel_values)
        kwargs = {} if layer is None else {"output_hidden_states": True}
        if patch_mask is not None and not self.config.patch_mask_pooling:
            kwargs["attention_mask"] = self._encoder_mask(patch_mask, pixel_values)
        # Cast to the dtype of the weights, so that a model in half precision takes the processor's output.
        pixel_values = pixel_values.to(self.visual_projection.weight.dtype)
        output = self.vision_model(**encoder_inputs(pixel_values, self.layout.cut_to), **kwargs)
        return self._states(output, patch_mask)

    def _check_pictures(self, pixel_values: Tensor) -> None:
        layout = self.layout
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"`pixel_values` must be (n, 3, H, W), got shape {tuple(pixel_values.shape)}.")
        # `len` would make the number of images a constant of an exported graph.
        if pixel_values.shape[0] == 0:
            raise ValueError("There is nothing to encode: the batch is empty.")
        # Encoders that interpolate positions would accept another size, but their patches would cover other areas.
        if layout.takes_one_size and tuple(pixel_values.shape[-2:]) != layout.image_size:
            raise ValueError(
                f"The images are {tuple(pixel_values.shape[-2:])} pixels, but the encoder takes "
                f"{layout.image_size}; set the processor's size to that of the model."
            )

    def _encoded_before(self, kept: dict[str, Tensor], patch_mask: Tensor | None) -> EncoderStates:
        """States of images that the encoder, or its frozen stages, have already processed."""
        stage, patches = self.last_stage, kept.get("patches")
        if stage is None:
            features = kept["features"]
            last = patches if self.config.vision_feature_layer is None else None
            empty = features.new_zeros(len(features), 0, 0)
            return EncoderStates(features, empty if patches is None else patches, kept.get("last_patches", last))
        if patch_mask is not None and not self.config.patch_mask_pooling:
            raise ValueError(
                "`patch_mask` is not supported for an encoder whose last stage runs on its own; set "
                "`patch_mask_pooling=True`, or leave the boxes out."
            )
        entering = kept["entering"]
        if patches is None and self._patch_layer == stage.layer:
            patches = entering[:, stage.entering.num_prefix_tokens :]
        needs_more = stage.layer < self._patch_layer < len(self.layout.hidden)
        options = {"output_hidden_states": True} if needs_more else {}
        return self._states(stage.run(self.vision_model, entering, self.layout, **options), patch_mask, patches)

    def _states(self, output: ModelOutput, patch_mask: Tensor | None, chosen: Tensor | None = None) -> EncoderStates:
        """States from the encoder's output; `chosen` are patches of the chosen layer if the output lacks them."""
        layout, layer = self.layout, self.config.vision_feature_layer
        states = layout.patches.tokens(last_states(output))
        last = patches = states[:, layout.patches.num_prefix_tokens :]
        if chosen is not None:
            patches = chosen
        elif layer is not None and output.get("hidden_states") is not None:
            at_layer = layout.at(layer)
            patches = at_layer.tokens(output.hidden_states[layer])[:, at_layer.num_prefix_tokens :]
        return EncoderStates(self._global_feature(states, last, output, patch_mask), patches, last)

    def _global_feature(
        self, states: Tensor, patches: Tensor, output: ModelOutput, patch_mask: Tensor | None
    ) -> Tensor:
        if self.feature_pooling == "cls":
            return states[:, 0]
        if self.feature_pooling == "pooler":
            return output.pooler_output.flatten(1)
        if patch_mask is None:
            return patches.mean(dim=1)
        return weighted_mean(patches, resize_patch_mask(patch_mask, patches.shape[1]))

    def _encoder_mask(self, patch_mask: Tensor, pixel_values: Tensor) -> Tensor:
        config, patches = self.config, self.layout.patches
        if not config.accepts_patch_mask:
            raise ValueError(
                f"`patch_mask` was given, but the layers of {config.vision_config.model_type!r} take no attention "
                f"mask; use one of {', '.join(PATCH_MASK_ENCODERS)}, or `patch_mask_pooling=True`, or leave the boxes "
                f"out."
            )
        if patch_mask.shape[-1] != patches.num_patches:
            raise ValueError(
                f"`patch_mask` has {patch_mask.shape[-1]} patches per frame, but the encoder has "
                f"{patches.num_patches}; set the video processor's size and patch size to those of the model."
            )
        keep = nn.functional.pad(patch_mask, (patches.num_prefix_tokens, 0), value=True)
        dtype = self.visual_projection.weight.dtype
        if torch.is_autocast_enabled(pixel_values.device.type):
            dtype = torch.get_autocast_dtype(pixel_values.device.type)
        return additive_mask(keep, dtype)

    def _from_states(
        self, states: EncoderStates, patch_mask: Tensor | None = None, is_clip: bool = False
    ) -> tuple[Tensor, Tensor]:
        """
        Decoder tokens and global features from encoder states, with gradient into all layers after the encoder.

        Args:
            states: From `_encoder_output` with the same mask.
            patch_mask (`(n, P)` bool, *optional*): `True` = patch of the intended product.
            is_clip: Whether the images are frames; a learnt saliency weights only patches of frames.

        Returns:
            Decoder tokens `(n, 1 + P, d)`, the global one first, and the projected global features `(n, D)`. Without a
            decoder the tokens are the encoder's output.
        """
        features, patches, last = states
        if self.patch_saliency is not None and is_clip:
            weights = self.patch_saliency(last)
            if patch_mask is not None:
                weights = resize_patch_mask(patch_mask, last.shape[1]) * weights
            features = weighted_mean(last, weights)
        if self.decoder is None:
            has_patches = last is not None and last.shape[-1] == features.shape[-1]
            tokens = torch.cat([features[:, None], last], dim=1) if has_patches else features[:, None]
            return tokens, self._project(features)
        if self.patch_projection is None and self.config.decoder_token_source == "projected":
            tokens = self._project(torch.cat([features[:, None], patches], dim=1))
            return tokens, tokens[:, 0]
        projected = self._project(features)
        first = projected if self.config.decoder_token_source == "projected" else features
        if self.patch_projection is not None:
            patches = self.patch_projection(patches)
        return torch.cat([first[:, None], patches], dim=1), projected

    def _project(self, states: Tensor) -> Tensor:
        if self.layout.skips_final_norm and self.feature_pooling != "pooler":
            states = self.vision_model.post_layernorm(states)
        return self.visual_projection(self.projection_dropout(states))

    def compile_encoder(self, **kwargs) -> None:
        """
        Compiles the vision encoder in place, for training and inference: its blocks as one graph for any number of
        images, or the whole encoder if its blocks differ. Weights and their names do not change. Compilation happens
        at the first use, and again without gradients, with a patch mask and for a single image. The rest of a training
        step is not compiled, because the real frames and the scored pairs depend on the data.

        Args:
            kwargs: Arguments of `torch.compile`, such as `backend`, `mode`, `dynamic` and `fullgraph`.
        """
        parts = parts_to_compile(self.vision_model)
        if len(parts) > 1:
            # Otherwise each mode would have one graph for the first number of images and another for all others.
            kwargs = {"dynamic": True, **kwargs}
        for part in parts:
            part.compile(**kwargs)
