"""Configuration of RICE: a vision encoder shared by clips and images, a matching decoder, a reconstruction head."""

import math
from collections.abc import Callable
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.activations import ACT2FN

from .encoders_rice import EncoderLayout, PatchLayout, find_layout

# Encoders whose layers apply a 4-D `attention_mask` keyword; tests/modeling_rice checks each of them.
PATCH_MASK_ENCODERS = ("clip_vision_model", "siglip_vision_model", "vit", "dinov2", "dinov3_vit")
if tuple(map(int, transformers_version.split(".")[:2])) < (5, 18):
    # Older versions ignore the mask silently.
    PATCH_MASK_ENCODERS = tuple(name for name in PATCH_MASK_ENCODERS if name != "dinov2")

_VIT_B_32 = {"patch_size": 32, "image_size": 224}

_AT_LEAST_ONE = ("projection_dim", "decoder_num_heads", "decoder_intermediate_size", "decoder_max_position_embeddings")
_AT_LEAST_ONE += ("num_hard_negatives", "text_embed_dim", "alignment_rank")
_ABOVE_ZERO = ("logit_scale_init_value", "logit_scale_max", "matching_scale", "text_logit_scale_init_value")
_ABOVE_ZERO += ("fusion_weight",)
_AT_LEAST_ZERO = ("decoder_num_self_layers", "decoder_layer_norm_eps", "decoder_self_layer_norm_eps")
_AT_LEAST_ZERO += ("contrastive_loss_weight", "matching_loss_weight", "reconstruction_loss_weight", "text_loss_weight")
_AT_LEAST_ZERO += ("text_score_weight", "fused_text_weight", "alignment_weight", "frame_consensus_scale")
_AT_LEAST_ZERO += ("initializer_range",)
# Ranges of the numbers; `None` is always in range where a field allows it.
_RANGES: tuple[tuple[tuple[str, ...], str, Callable[[float], bool]], ...] = (
    (_AT_LEAST_ONE, "at least 1", lambda value: value >= 1),
    (_ABOVE_ZERO, "above 0", lambda value: value > 0),
    (_AT_LEAST_ZERO, "0 or more", lambda value: value >= 0),
    (("alignment_strength", "alignment_shrinkage"), "in 0..1", lambda value: 0 <= value <= 1),
    (("projection_dropout", "decoder_dropout"), "in 0..1 (1 excluded)", lambda value: 0 <= value < 1),
    (("logit_bias_init_value",), "finite", math.isfinite),
)

# The two published variants differ in these settings only. `clip4clip` is the older code base, `mmf` the newer one.
_PRESETS: dict[str, dict[str, Any]] = {
    "clip4clip": {
        "mask_padded_frames": False,
        "decoder_max_position_embeddings": 77,
        "decoder_layer_norm_eps": 1e-12,
        "contrastive_targets": "diagonal",
        "matching_targets": "diagonal",
        "matching_negatives": "hardest",
    },
    "mmf": {
        "normalize_frames": False,
        "logit_scale_init_value": 16.0,
        "learn_logit_scale": True,
        "logit_scale_max": None,
        "contrastive_targets": "diagonal",
        "matching_targets": "diagonal",
        "decoder_token_source": "raw",
        "decoder_self_layer_norm_eps": 1e-12,
        "decoder_normalize_key_value": False,
        "decoder_output_projection": True,
        "decoder_position_embeddings": False,
        "pooler_bias": False,
        "pooler_act": "relu",
        "matching_score": "cosine",
        "matching_scale": 10.0,
        "matching_negatives": "hardest",
        "reconstruction_include_cls": True,
        "reconstruction_softmax": True,
        "reconstruction_scale_attention": True,
        "reconstruction_softmax_over_padding": True,
        "reconstruction_loss_weight": 1.0,
    },
}


@strict
class RiceConfig(PreTrainedConfig):
    r"""
    Configuration of a [`RiceModel`] (RICE, ICCV 2023). The defaults are the published model on CLIP ViT-B/32 without
    the defects of the research code. [`RiceConfig.from_preset`] gives the two published variants unchanged.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*, defaults to CLIP ViT-B/32):
            Any transformers vision model or backbone, including timm's. Clips and images share it. A dry run at
            construction finds its input and output shapes ([`RiceConfig.layout`]).
        vision_pooling (`"cls"`, `"mean"`, `"pooler"`, *optional*):
            Global feature of an image: the encoder's class token, the mean over its last patches, or the output of its
            own pooler. The default is the first of class token, pooler and mean that the encoder has.
        vision_feature_layer (`int`, *optional*):
            Hidden state of the encoder whose patches the decoder sees; -1 is the last, other negative numbers count
            from the end. `None` takes the encoder's output. A chosen layer gets its own LayerNorm and linear layer to
            the decoder's width. The global feature is taken from the encoder's output in any case.
        patch_mask_pooling (`bool`, defaults to `False`):
            Apply a patch mask to the mean over patches and in the decoder, but not in the encoder's attention. Each
            patch then still carries what its receptive field covers outside the boxes. This makes patch masks possible
            for encoders without attention masks (ResNet, Swin). Needs `vision_pooling="mean"`.
        patch_saliency (`"none"`, `"learned"`):
            `"learned"` weights the patches of clip frames (not of images) in the mean over patches by a linear layer
            that the contrastive loss trains. It replaces boxes where there are none, and starts as the plain mean.
            Needs `vision_pooling="mean"`. The decoder is not affected; it weights patches by its own attention.
        projection_dim (`int`, defaults to 512): Width D of the shared embedding.
        projection_dropout (`float`, defaults to 0.0):
            Dropout on the input of the visual projection during training. Useful when the projection is trained on a
            frozen encoder and few clips.
        normalize_frames (`bool`, defaults to `True`):
            L2-normalise each frame before the mean over frames; `False` averages the raw features.
        temporal_pooling (`"mean"`, `"attention"`, `"lstm"`, `"transformer"`):
            How frame features become the clip's feature: mean (as published), mean weighted by a learnt saliency, an
            LSTM over the frames in order, or a transformer block with time positions. The learnt ones start as the
            mean.
        frame_consensus_scale (`float`, defaults to 0.0):
            Above 0, frames that agree with their clip's mean get more weight: the softmax of this factor times the
            cosine with the mean. Needs no training.
        logit_scale_init_value (`float`, defaults to 100.0): Contrastive temperature as a factor, > 0.
        learn_logit_scale (`bool`, defaults to `False`): Whether that factor is a parameter.
        logit_scale_max (`float`, *optional*, defaults to 100.0):
            Upper bound of a learnt factor, as in CLIP. `RiceModel.bound_logit_scale` applies it after each optimiser
            step, so that the factor still has a gradient at the bound.
        contrastive_loss (`"infonce"`, `"sigmoid"`):
            Softmax over the global batch (as published), or a binary decision per pair (SigLIP, ICCV 2023). The latter
            adds a learnt bias; good initial settings are `logit_scale_init_value=10` and `learn_logit_scale=True`.
        logit_bias_init_value (`float`, defaults to -10.0): Initial bias of the sigmoid loss.
        contrastive_targets (`"diagonal"`, `"masked"`, `"multi_positive"`):
            Treatment of other pairs of the same product (by `product_ids`): negatives (as published), left out of the
            loss, or positives with a uniform target (Supervised Contrastive Learning, NeurIPS 2020, eq. 2).
        mask_padded_frames (`bool`, defaults to `True`):
            `False` reproduces the older code under a patch mask: padded frames are encoded and attended to.
        use_decoder (`bool`, defaults to `True`): Build the pairwise matching decoder (PMD).
        decoder_token_source (`"projected"`, `"raw"`):
            Tokens the decoder sees: after norm and projection (width `projection_dim`), or the last block's.
        decoder_num_self_layers (`int`, defaults to 1): Self-attention blocks over image tokens, >= 0.
        decoder_num_heads (`int`, defaults to 8), decoder_intermediate_size (`int`, *optional*, 4 x width),
        decoder_hidden_act (`str`, defaults to `"quick_gelu"`), decoder_layer_norm_eps (`float`, defaults to 1e-5).
        decoder_self_layer_norm_eps (`float`, *optional*):
            LayerNorm eps of the self-attention blocks; by default `decoder_layer_norm_eps`.
        decoder_normalize_key_value (`bool`, defaults to `True`):
            Apply the first LayerNorm of the cross-attention block to keys and values too.
        decoder_output_projection (`bool`, defaults to `False`): Output projection of the cross-attention.
        decoder_position_embeddings (`bool`, defaults to `True`): Learnt position embeddings on image tokens.
        decoder_max_position_embeddings (`int`, *optional*):
            Number of position embeddings; by default as many as the image tokens (and a title token) need.
        decoder_dropout (`float`, defaults to 0.1): Dropout on position-embedded tokens and cross-attention weights.
        pooler_bias (`bool`), pooler_act (`str`):
            Bias and activation of the linear layer between the CLS row and the score.
        matching_score (`"linear"`, `"cosine"`): Linear head with bias, or cosine with the head's weight.
        matching_scale (`float`, defaults to 100.0): Factor on scores inside the matching loss.
        matching_negatives (`"hardest"`, `"all"`):
            `"hardest"`: per image the `num_hard_negatives` most similar clips (as published). `"all"`: every
            in-batch pair, images against clips and clips against images.
        matching_targets (`"diagonal"`, `"masked"`, `"multi_positive"`):
            As `contrastive_targets`, for the matching loss. `"multi_positive"` needs `matching_negatives="all"`.
        num_hard_negatives (`int`, defaults to 3): Clips mined per image, >= 1.
        detach_matching_features (`bool`, defaults to `False`):
            Train the decoder on features that carry no gradient into the encoder.
        use_reconstruction (`bool`, defaults to `True`): Build the patch feature reconstruction head (PFR).
        reconstruction_mixing (`"conv"`, `"mean"`):
            How attention heads become one map of reconstruction weights: two learnt 1x1 convolutions (as published),
            or the mean over heads, which has no parameters.
        reconstruction_include_cls (`bool`): Keep CLS rows and columns in the reconstruction.
        reconstruction_softmax (`bool`): Apply a softmax over keys after head mixing.
        reconstruction_scale_attention (`bool`):
            Multiply the attention probabilities by sqrt(head width) before head mixing.
        reconstruction_softmax_over_padding (`bool`, defaults to `False`):
            Include the keys of padded frames in that softmax, as the newer code does.
        contrastive_loss_weight, matching_loss_weight (1.0), reconstruction_loss_weight (0.05): Loss factors.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Any transformers text encoder (`model_type` defaults to `"bert"`), for titles and ASR alike.
        text_pooling (`"mean"`, `"cls"`): Feature of a text: the mean over its tokens, or its first token.
        text_embed_dim (`int`, *optional*):
            Width of precomputed title and ASR vectors, instead of a text encoder.
        decoder_text_tokens (`bool`, defaults to `True`):
            With texts, the decoder gets a title token beside the image tokens and an ASR token beside the clip tokens.
        text_score_weight (`float`, *optional*):
            Weight of the cosine between ASR and title, added to the visual cosine in `similarity` and in mining, >= 0.
            Training fits it on a validation split. `None` leaves the term out.
        text_logit_scale_init_value (`float`, defaults to 14.3): Initial value of the text loss's learnt temperature.
        text_loss_weight (1.0):
            Factor of the text loss, which applies to a text encoder with a `text_score_weight`.
        fusion_weight (`float`, *optional*):
            Weight of the matching z-score in the fused score, where the embedding z-score has weight 1, > 0. Fitted on
            a validation split.
        fused_text_weight (`float`, *optional*):
            Weight of the cosine between ASR and title in the fused score, >= 0. With it, the embedding z-score is that
            of the visual cosine alone. Fitted on a validation split, after `fusion_weight`. `None` for a model without
            score-level text. A checkpoint with score-level text that was saved before this field existed also has
            `None`; its embedding z-score includes the text, as when `fusion_weight` was fitted.
        alignment_weight (`float`, *optional*):
            Weight of the alignment z-score in the fused score, >= 0. Training fits it on a validation split. A model
            with a weight aligns patches, with statistics that are buffers of the checkpoint
            ([`RiceModel.fit_alignment`]). In a model without training these also centre its embeddings per view.
            `None` for a model without alignment.
        alignment_rank (`int`, defaults to 64): Width of the compared patch vectors, at most the encoder's patch width.
        alignment_strength (`float`, defaults to 1.0): Strength of the patch whitening, 0 (none) to 1.
        alignment_shrinkage (`float`, defaults to 0.1):
            Shrinkage of the whitening: how far variances are moved towards their mean, 0 to 1.
        ranking (`"embedding"`, `"matching"`, `"alignment"`, `"fused"`, *optional*):
            The default score for ranking images. Training sets it to `"fused"` after fitting the weights, unless it is
            set already. `None` means the fused score if it has a weight, else matching if there is a decoder, else the
            embedding score.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.

    Raises:
        ValueError: for settings that do not work together, with the reason.
    """

    model_type = "rice"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    vision_pooling: Literal["cls", "mean", "pooler"] | None = None
    vision_feature_layer: int | None = None
    patch_mask_pooling: bool = False
    patch_saliency: Literal["none", "learned"] = "none"
    projection_dim: int = 512
    projection_dropout: float | int = 0.0
    normalize_frames: bool = True
    temporal_pooling: Literal["mean", "attention", "lstm", "transformer"] = "mean"
    frame_consensus_scale: float | int = 0.0
    logit_scale_init_value: float | int = 100.0
    learn_logit_scale: bool = False
    logit_scale_max: float | int | None = 100.0
    contrastive_loss: Literal["infonce", "sigmoid"] = "infonce"
    logit_bias_init_value: float | int = -10.0
    contrastive_targets: Literal["diagonal", "masked", "multi_positive"] = "masked"
    mask_padded_frames: bool = True

    use_decoder: bool = True
    decoder_token_source: Literal["projected", "raw"] = "projected"
    decoder_num_self_layers: int = 1
    decoder_num_heads: int = 8
    decoder_intermediate_size: int | None = None
    decoder_hidden_act: str = "quick_gelu"
    decoder_layer_norm_eps: float = 1e-5
    decoder_self_layer_norm_eps: float | None = None
    decoder_normalize_key_value: bool = True
    decoder_output_projection: bool = False
    decoder_position_embeddings: bool = True
    decoder_max_position_embeddings: int | None = None
    decoder_dropout: float | int = 0.1
    pooler_bias: bool = True
    pooler_act: str = "quick_gelu"
    matching_score: Literal["linear", "cosine"] = "linear"
    matching_scale: float | int = 100.0
    matching_negatives: Literal["hardest", "all"] = "hardest"
    matching_targets: Literal["diagonal", "masked", "multi_positive"] = "masked"
    num_hard_negatives: int = 3
    detach_matching_features: bool = False

    use_reconstruction: bool = True
    reconstruction_mixing: Literal["conv", "mean"] = "conv"
    reconstruction_include_cls: bool = False
    reconstruction_softmax: bool = False
    reconstruction_scale_attention: bool = False
    reconstruction_softmax_over_padding: bool = False

    contrastive_loss_weight: float | int = 1.0
    matching_loss_weight: float | int = 1.0
    reconstruction_loss_weight: float | int = 0.05

    text_config: dict | PreTrainedConfig | None = None
    text_pooling: Literal["mean", "cls"] = "mean"
    text_embed_dim: int | None = None
    decoder_text_tokens: bool = True
    text_score_weight: float | int | None = None
    text_logit_scale_init_value: float | int = 14.3
    text_loss_weight: float | int = 1.0
    fusion_weight: float | int | None = None
    fused_text_weight: float | int | None = None
    alignment_weight: float | int | None = None
    alignment_rank: int = 64
    alignment_strength: float | int = 1.0
    alignment_shrinkage: float | int = 0.1
    ranking: Literal["embedding", "matching", "alignment", "fused"] | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.vision_config is None:
            self.vision_config = CLIPVisionConfig(**_VIT_B_32)
        elif isinstance(self.vision_config, dict):
            settings = dict(self.vision_config)
            model_type = settings.pop("model_type", "clip_vision_model")
            self.vision_config = AutoConfig.for_model(model_type, **settings)
        # The config of a full CLIP or SigLIP checkpoint holds both towers; RICE uses the visual one.
        if getattr(self.vision_config, "vision_config", None) is not None:
            self.vision_config = self.vision_config.vision_config
        if isinstance(self.text_config, dict):
            settings = {"model_type": "bert"} | self.text_config
            self.text_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        if getattr(self.text_config, "text_config", None) is not None:
            self.text_config = self.text_config.text_config
        for part in (self.vision_config, self.text_config):
            if part is not None:
                # The model reads the outputs of its encoders by name.
                part.return_dict = True
        super().__post_init__(**kwargs)
        # Called here too: errors from the strict dataclass's own call are wrapped and are no ValueError.
        self.validate_architecture()

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "RiceConfig":
        """
        The settings of a published variant: `"clip4clip"` (older code base) or `"mmf"` (newer one).

        Args:
            name (`str`): Which variant.
            overrides: Any field of the configuration.

        Raises:
            ValueError: for an unknown name.
        """
        if name not in _PRESETS:
            raise ValueError(f"Unknown preset {name!r}; choose one of {', '.join(map(repr, _PRESETS))}.")
        return cls(**{**_PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, but without `text_config` where it is `None`: mteb would take the key for an encoder."""
        settings = super().to_dict()
        if self.text_config is None:
            settings.pop("text_config", None)
        return settings

    @property
    def layout(self) -> EncoderLayout:
        """
        Input and output shapes of the encoder, found by a dry run and cached for the process.

        Raises:
            ValueError: for an encoder that RICE cannot use, with the reason.
        """
        return find_layout(self.vision_config)

    @property
    def patch_layout(self) -> PatchLayout:
        """The patches that the decoder sees; `vision_feature_layer` chooses them."""
        return self.layout.at(self.vision_feature_layer)

    @property
    def feature_pooling(self) -> Literal["cls", "mean", "pooler"]:
        """`vision_pooling`, or where it is `None` the first of class token, pooler and mean that the encoder has."""
        if self.vision_pooling is not None:
            return self.vision_pooling
        layout = self.layout
        return "cls" if layout.has_class_token else "mean" if layout.pooler_width is None else "pooler"

    @property
    def vision_hidden_size(self) -> int:
        """Width of the encoder's global feature."""
        layout = self.layout
        return layout.pooler_width if self.feature_pooling == "pooler" else layout.patches.width

    @property
    def projects_patches(self) -> bool:
        """Whether patches have their own projection: those of an inner layer or of another width need one."""
        layer, width = self.vision_feature_layer, self.layout.patches.width
        return self.use_decoder and (layer is not None or width != self.vision_hidden_size)

    @property
    def text_width(self) -> int | None:
        """Width of title and ASR features, precomputed or encoded; `None` for a model without text."""
        return self.text_embed_dim if self.text_config is None else self.text_config.hidden_size

    @property
    def has_text_tokens(self) -> bool:
        """Whether titles and ASR become tokens of the decoder."""
        return self.text_width is not None and self.decoder_text_tokens

    @property
    def decoder_hidden_size(self) -> int:
        """Width of the matching decoder, which follows its token source."""
        return self.projection_dim if self.decoder_token_source == "projected" else self.vision_hidden_size

    @property
    def num_patches(self) -> int:
        """Number P of patches per image that the decoder sees, at the encoder's native image size."""
        return self.patch_layout.num_patches

    @property
    def accepts_patch_mask(self) -> bool:
        """Whether a clip may come with a patch mask."""
        return self.patch_mask_pooling or self.vision_config.model_type in PATCH_MASK_ENCODERS

    @property
    def mask_patch_size(self) -> int:
        """Side in pixels of the patches of a patch mask, at the encoder's native image size."""
        return self.mask_patch_size_at(self.layout.image_size[0])

    def mask_patch_size_at(self, side: int) -> int:
        """
        Side in pixels of the patches of a patch mask, for images of `side` x `side` pixels: the size of a patch that
        the decoder sees, or the next smaller divisor of `side`.
        """
        stands_for = max(self.layout.image_size[0] // self.patch_layout.grid[0], 1)
        return next(size for size in range(min(stands_for, side), 0, -1) if side % size == 0)

    def validate_architecture(self):
        """Raises `ValueError` for settings that do not work together. Runs at construction."""
        for names, words, fits in _RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not math.isfinite(value):
                    raise ValueError(f"`{name}` must be a finite number, got {value}.")
                if value is not None and not fits(value):
                    raise ValueError(f"`{name}` must be {words}, got {value}.")
        self._validate_encoder()
        bound = self.logit_scale_max
        if bound is not None and self.learn_logit_scale and self.logit_scale_init_value > bound:
            raise ValueError(
                f"`logit_scale_max={bound}` must be, for a learnt scale, at least "
                f"`logit_scale_init_value={self.logit_scale_init_value}`; raise it, or set it to None."
            )
        if self.matching_targets == "multi_positive" and self.matching_negatives == "hardest":
            raise ValueError(
                '`matching_targets="multi_positive"` needs `matching_negatives="all"`, since an image has only one '
                "positive among mined negatives."
            )
        if self.use_decoder and self.decoder_hidden_size % self.decoder_num_heads:
            raise ValueError(
                f"The decoder's width {self.decoder_hidden_size} "
                f"(`decoder_token_source={self.decoder_token_source!r}`) "
                f"must be a multiple of `decoder_num_heads={self.decoder_num_heads}`; change one of them."
            )
        if self.reconstruction_softmax_over_padding and not self.reconstruction_softmax:
            raise ValueError(
                "`reconstruction_softmax_over_padding=True` needs `reconstruction_softmax=True`; set both, or neither."
            )
        mixes_heads = self.use_reconstruction and self.use_decoder and self.reconstruction_mixing == "conv"
        if mixes_heads and self.decoder_num_heads < 2:
            raise ValueError(
                "`use_reconstruction=True` mixes attention heads, so it needs `decoder_num_heads >= 2` or "
                '`reconstruction_mixing="mean"`.'
            )
        for name in ("decoder_hidden_act", "pooler_act"):
            if getattr(self, name) not in ACT2FN:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is not an activation of transformers; use one such as 'gelu'."
                )
        if self.temporal_pooling == "transformer" and self.projection_dim % self.decoder_num_heads:
            raise ValueError(
                f'`temporal_pooling="transformer"` needs `projection_dim={self.projection_dim}` to be a multiple of '
                f"`decoder_num_heads={self.decoder_num_heads}`."
            )
        self._validate_text()
        self._validate_ranking()

    def _validate_encoder(self):
        layout, name = self.layout, self.vision_config.model_type
        others = " or ".join(
            f'"{pooling}"'
            for pooling, has in (("cls", layout.has_class_token), ("pooler", layout.pooler_width), ("mean", True))
            if has
        )
        if self.vision_pooling == "cls" and not layout.has_class_token:
            raise ValueError(f"The vision model {name!r} has no class token; set `vision_pooling={others}`.")
        if self.vision_pooling == "pooler" and layout.pooler_width is None:
            raise ValueError(f"The vision model {name!r} has no pooler; set `vision_pooling={others}`.")
        # Raises for a layer that does not exist.
        layout.at(self.vision_feature_layer)
        for name, asked in (
            ("patch_mask_pooling", self.patch_mask_pooling),
            ("patch_saliency", self.patch_saliency != "none"),
        ):
            if asked and self.feature_pooling != "mean":
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` changes the mean over patches; set "
                    f'`vision_pooling="mean"`, not {self.feature_pooling!r}.'
                )

    def _validate_text(self):
        if self.text_config is not None:
            if self.text_embed_dim is not None:
                raise ValueError("`text_config` and `text_embed_dim` exclude each other; set one of them.")
            if self.text_config.is_encoder_decoder or not isinstance(
                getattr(self.text_config, "hidden_size", None), int
            ):
                raise ValueError(
                    f"`text_config` is a {self.text_config.model_type!r}, which is not a text encoder that RICE can "
                    f"use; choose one such as 'bert', 'roberta' or 'distilbert'."
                )
        if self.text_score_weight is not None and self.text_width is None:
            raise ValueError("`text_score_weight` needs text features; set `text_config` or `text_embed_dim`.")

    def _validate_ranking(self):
        has_alignment = self.alignment_weight is not None
        needed = {
            "matching": (self.use_decoder, "`use_decoder=True`"),
            "alignment": (has_alignment, "an `alignment_weight`"),
            "fused": (
                has_alignment or (self.use_decoder and self.fusion_weight is not None),
                "a `fusion_weight` with `use_decoder=True`, or an `alignment_weight`",
            ),
        }
        fits, what = needed.get(self.ranking, (True, ""))
        if not fits:
            raise ValueError(f"`ranking={self.ranking!r}` needs {what}; set it, or choose another `ranking`.")


RiceConfig.register_for_auto_class()

__all__ = ["RiceConfig"]
