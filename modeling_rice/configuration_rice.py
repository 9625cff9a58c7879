"""Configuration of RICE: one vision encoder for clips and shop images, a matching decoder, a reconstruction head."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.activations import ACT2FN

from .encoders_rice import EncoderLayout, PatchLayout, find_layout

# Encoders whose layers were checked to honour a 4-D `attention_mask` keyword (tests/modeling_rice keeps the check).
PATCH_MASK_ENCODERS = ("clip_vision_model", "siglip_vision_model", "vit", "dinov2", "dinov3_vit")
if tuple(map(int, transformers_version.split(".")[:2])) < (5, 18):
    # Its layers dropped the mask without a word until then.
    PATCH_MASK_ENCODERS = tuple(name for name in PATCH_MASK_ENCODERS if name != "dinov2")

_VIT_B_32 = {"patch_size": 32, "image_size": 224}

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
    Configuration of a [`RiceModel`] (RICE, ICCV 2023). The defaults are the published model on CLIP ViT-B/32 with the
    defects of the research code left out; [`RiceConfig.from_preset`] gives the two published variants as they were.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*, defaults to CLIP ViT-B/32):
            Any transformers vision model or backbone, timm's included; clips and images share it. What it takes and
            gives is found out at construction ([`RiceConfig.layout`]).
        vision_pooling (`"cls"`, `"mean"`, `"pooler"`, *optional*):
            Global feature of an image: the encoder's class token, the mean over its last patches, or what its own
            pooler makes. By default the first that the encoder has of class token, pooler and mean.
        vision_feature_layer (`int`, *optional*):
            Hidden state of the encoder whose patches the decoder sees, of which -1 is the last; negative numbers count
            from the end. `None` takes the encoder's output. A chosen one has a norm and a linear layer of its own to
            the decoder's width, and the global feature stays the output's.
        patch_mask_pooling (`bool`, defaults to `False`):
            Apply a patch mask to the mean over patches and in the decoder, not in the encoder's attention, whose
            patches then still carry what their receptive fields saw outside the boxes. Makes patch masks possible for
            encoders without attention masks (ResNet, Swin); needs `vision_pooling="mean"`.
        patch_saliency (`"none"`, `"learned"`):
            `"learned"` weighs the patches of clips' frames, not of images, in the mean over patches by a linear layer
            that the contrastive loss trains; a stand-in for boxes that needs none, starting as the plain mean. Needs
            `vision_pooling="mean"`. The decoder chooses among patches by its own attention.
        projection_dim (`int`, defaults to 512): Width D of the shared embedding.
        projection_dropout (`float`, defaults to 0.0):
            Dropout, in training, on what the visual projection is applied to, for a projection that is trained on a
            frozen encoder and few clips.
        normalize_frames (`bool`, defaults to `True`):
            L2-normalise each frame before the mean over frames; `False` averages the raw features.
        temporal_pooling (`"mean"`, `"attention"`, `"lstm"`, `"transformer"`):
            Frame features to a clip's: their mean as published, weighted by a learnt saliency, read in order by an
            LSTM, or by a transformer block that knows the time of each. The learnt ones start as the mean.
        frame_consensus_scale (`float`, defaults to 0.0):
            Above 0, frames that agree with their clip's mean count for more: the softmax of this many times the cosine
            weighs them. Needs no training.
        logit_scale_init_value (`float`, defaults to 100.0): Contrastive temperature as a factor, > 0.
        learn_logit_scale (`bool`, defaults to `False`): Whether that factor is a parameter.
        logit_scale_max (`float`, *optional*, defaults to 100.0):
            Upper bound of a learnt factor, as in CLIP; `RiceModel.bound_logit_scale` applies it after each optimiser
            step, so that the gradient at the bound still leads back.
        contrastive_loss (`"infonce"`, `"sigmoid"`):
            Softmax over the global batch as published, or a binary decision per pair (SigLIP, ICCV 2023), which adds
            a learnt bias and starts well from `logit_scale_init_value=10` with `learn_logit_scale=True`.
        logit_bias_init_value (`float`, defaults to -10.0): Start of the sigmoid loss's bias.
        contrastive_targets (`"diagonal"`, `"masked"`, `"multi_positive"`):
            Other pairs of the same product (by `product_ids`) are negatives as published, are left out, or are
            positives too, with a uniform target over them (Supervised Contrastive Learning, NeurIPS 2020, eq. 2).
        mask_padded_frames (`bool`, defaults to `True`):
            `False` reproduces the older code under a patch mask: padded frames are encoded and attended to.
        use_decoder (`bool`, defaults to `True`): Build the pairwise matching decoder (PMD).
        decoder_token_source (`"projected"`, `"raw"`):
            Tokens the decoder sees: after norm and projection (width `projection_dim`), or the last block's.
        decoder_num_self_layers (`int`, defaults to 1): Self-attention blocks over image tokens, >= 0.
        decoder_num_heads (`int`, defaults to 8), decoder_intermediate_size (`int`, *optional*, 4 x width),
        decoder_hidden_act (`str`, defaults to `"quick_gelu"`), decoder_layer_norm_eps (`float`, defaults to 1e-5).
        decoder_self_layer_norm_eps (`float`, *optional*): Of the self-attention blocks, where it differs.
        decoder_normalize_key_value (`bool`, defaults to `True`):
            Apply the cross block's first norm to keys and values too.
        decoder_output_projection (`bool`, defaults to `False`): Output projection of the cross-attention.
        decoder_position_embeddings (`bool`, defaults to `True`): Learned positions on image tokens.
        decoder_max_position_embeddings (`int`, *optional*):
            How many; by default exactly what the image tokens (and a title token) need.
        decoder_dropout (`float`, defaults to 0.1): On position-embedded tokens and cross-attention weights.
        pooler_bias (`bool`), pooler_act (`str`): Linear layer and activation between the CLS row and the score.
        matching_score (`"linear"`, `"cosine"`): Linear head with bias, or cosine with the head's weight.
        matching_scale (`float`, defaults to 100.0): Factor on scores inside the matching loss.
        matching_negatives (`"hardest"`, `"all"`):
            `"hardest"`: per image the `num_hard_negatives` most similar clips (as published). `"all"`: every
            in-batch pair, images against clips and clips against images.
        matching_targets (`"diagonal"`, `"masked"`, `"multi_positive"`):
            As `contrastive_targets`, for the matching loss; mined negatives know no further positives.
        num_hard_negatives (`int`, defaults to 3).
        detach_matching_features (`bool`, defaults to `False`):
            Train the decoder on features that carry no gradient into the encoder.
        use_reconstruction (`bool`, defaults to `True`): Build the patch feature reconstruction head (PFR).
        reconstruction_mixing (`"conv"`, `"mean"`):
            How attention heads become one map of reconstruction weights: two learnt 1x1 convolutions as published, or
            their mean, which has no parameters.
        reconstruction_include_cls, reconstruction_softmax, reconstruction_scale_attention (`bool`):
            Reconstruct with CLS rows and columns kept; softmax over keys after head mixing; multiply the attention
            probabilities by sqrt(head width) before it.
        reconstruction_softmax_over_padding (`bool`, defaults to `False`):
            Let that softmax count the keys of padded frames, as the newer code does.
        contrastive_loss_weight, matching_loss_weight (1.0), reconstruction_loss_weight (0.05): Loss factors.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Any transformers text encoder (`model_type` defaults to `"bert"`), for titles and ASR alike.
        text_pooling (`"mean"`, `"cls"`): Its feature of a text: the mean over tokens, or the first token.
        text_embed_dim (`int`, *optional*):
            Width of precomputed title and ASR vectors, instead of a text encoder.
        decoder_text_tokens (`bool`, defaults to `True`):
            With texts, a title token joins the image's and an ASR token the clip's in the decoder.
        text_score_weight (`float`, *optional*):
            Weight of the cosine between ASR and title beside the visual one, in `similarity` and in mining, >= 0;
            fitted on a validation split in training. `None` leaves the term out.
        text_logit_scale_init_value (`float`, defaults to 14.3): Start of the learnt temperature of the text loss.
        text_loss_weight (1.0): Factor of the text loss, which a text encoder with a score-level term has.
        fusion_weight (`float`, *optional*):
            Weight of the matching z-score beside the embedding z-score, fitted on a validation split.
        fused_text_weight (`float`, *optional*):
            Weight of the cosine between ASR and title beside those two in the fused score, whose embedding z-score
            then is of the visual cosine alone, >= 0; fitted on a validation split, after `fusion_weight`. `None` for a
            model without score-level text; in a checkpoint that has it and was saved before this field was, the
            embedding z-score goes on to include the text, as `fusion_weight` was fitted.
        alignment_weight (`float`, *optional*):
            Weight of the alignment z-score in the fused score, >= 0; fitted on a validation split in training. With
            one the model has an alignment of patches, by statistics that are buffers of the checkpoint
            ([`RiceModel.fit_alignment`]); without training these centre its embeddings per view, too. `None` for a
            model without.
        alignment_rank (`int`, defaults to 64): Numbers of a patch that are compared, at most the patch's width.
        alignment_strength (`float`, defaults to 1.0): Of the patches' whitening, 0 (none) to 1.
        alignment_shrinkage (`float`, defaults to 0.1):
            Of the whitening: how far variances are drawn towards their mean, 0 to 1.
        ranking (`"embedding"`, `"matching"`, `"alignment"`, `"fused"`, *optional*):
            The score that images are ranked by wherever none is asked for; training sets it to `"fused"` once it has
            fitted the weights, unless it was set before. By default the fused score where it has a weight, else
            matching where there is a decoder, else the embeddings' score.
        initializer_range (`float`, defaults to 0.02).

    Raises:
        ValueError: for a combination that cannot work, with the reason.
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
        # A whole CLIP or SigLIP checkpoint's config holds both towers; RICE uses the visual one.
        if getattr(self.vision_config, "vision_config", None) is not None:
            self.vision_config = self.vision_config.vision_config
        if isinstance(self.text_config, dict):
            settings = {"model_type": "bert"} | self.text_config
            self.text_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        if getattr(self.text_config, "text_config", None) is not None:
            self.text_config = self.text_config.text_config
        super().__post_init__(**kwargs)
        # Run here too, since the strict dataclass wraps what its own call raises in an error that is no ValueError.
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
        """As transformers does it, but without a text encoder that is not there: mteb reads one that is named."""
        settings = super().to_dict()
        if self.text_config is None:
            settings.pop("text_config", None)
        return settings

    @property
    def layout(self) -> EncoderLayout:
        """
        What the encoder takes and gives, found out by a dry run the first time and kept for the process.

        Raises:
            ValueError: for an encoder that cannot work, with the reason.
        """
        return find_layout(self.vision_config)

    @property
    def patch_layout(self) -> PatchLayout:
        """Patches that the decoder sees, which `vision_feature_layer` chooses."""
        return self.layout.at(self.vision_feature_layer)

    @property
    def feature_pooling(self) -> Literal["cls", "mean", "pooler"]:
        """`vision_pooling`, or what the encoder has where that is left open."""
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
        """Whether patches have a projection of their own, as those of an inner layer or of another width need one."""
        layer, width = self.vision_feature_layer, self.layout.patches.width
        return self.use_decoder and (layer is not None or width != self.vision_hidden_size)

    @property
    def text_width(self) -> int | None:
        """Width of title and ASR features, whoever makes them; `None` for a model without text."""
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
        """Patches P of an image that the decoder sees, at the encoder's native size."""
        return self.patch_layout.num_patches

    @property
    def accepts_patch_mask(self) -> bool:
        """Whether a clip may come with a patch mask."""
        return self.patch_mask_pooling or self.vision_config.model_type in PATCH_MASK_ENCODERS

    @property
    def mask_patch_size(self) -> int:
        """Side in pixels of the patches of a patch mask, for pictures of the encoder's native size."""
        return self.mask_patch_size_at(self.layout.image_size[0])

    def mask_patch_size_at(self, side: int) -> int:
        """
        Of pictures of `side` pixels: what one patch that the decoder sees stands for, or less where that does not
        divide the picture.
        """
        stands_for = max(self.layout.image_size[0] // self.patch_layout.grid[0], 1)
        return next(size for size in range(min(stands_for, side), 0, -1) if side % size == 0)

    def validate_architecture(self):
        """Refuses combinations that cannot work; runs at construction."""
        self._validate_encoder()
        for name in ("projection_dim", "decoder_num_heads", "num_hard_negatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.decoder_num_self_layers < 0:
            raise ValueError(f"`decoder_num_self_layers` must be 0 or more, got {self.decoder_num_self_layers}.")
        for name in ("logit_scale_init_value", "matching_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        bound = self.logit_scale_max
        if bound is not None and (bound <= 0 or (self.learn_logit_scale and self.logit_scale_init_value > bound)):
            raise ValueError(
                f"`logit_scale_max={bound}` must be above 0 and no lower than a learnt scale's "
                f"`logit_scale_init_value={self.logit_scale_init_value}`; raise it, or set it to None."
            )
        if self.matching_targets == "multi_positive" and self.matching_negatives == "hardest":
            raise ValueError(
                '`matching_targets="multi_positive"` needs `matching_negatives="all"`, since among mined negatives '
                "an image has one positive only."
            )
        if self.use_decoder and self.decoder_hidden_size % self.decoder_num_heads:
            raise ValueError(
                f"The decoder's width {self.decoder_hidden_size} "
                f"(`decoder_token_source={self.decoder_token_source!r}`) "
                f"is not a multiple of `decoder_num_heads={self.decoder_num_heads}`."
            )
        if self.reconstruction_softmax_over_padding and not self.reconstruction_softmax:
            raise ValueError(
                "`reconstruction_softmax_over_padding=True` needs `reconstruction_softmax=True`, since there is no "
                "softmax to count padded frames in."
            )
        mixes_heads = self.use_reconstruction and self.use_decoder and self.reconstruction_mixing == "conv"
        if mixes_heads and self.decoder_num_heads < 2:
            raise ValueError(
                "`use_reconstruction=True` mixes attention heads and needs `decoder_num_heads >= 2` or "
                '`reconstruction_mixing="mean"`.'
            )
        for name in ("decoder_hidden_act", "pooler_act"):
            if getattr(self, name) not in ACT2FN:
                raise ValueError(f"`{name}={getattr(self, name)!r}` is no activation that transformers knows.")
        for name in ("projection_dropout", "decoder_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in 0..1 (1 excluded), got {getattr(self, name)}.")
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
            raise ValueError(f"The vision model {name!r} has no class token; declare `vision_pooling={others}`.")
        if self.vision_pooling == "pooler" and layout.pooler_width is None:
            raise ValueError(f"The vision model {name!r} has no pooler; declare `vision_pooling={others}`.")
        # Refuses a layer that is not there.
        layout.at(self.vision_feature_layer)
        for name, asked in (
            ("patch_mask_pooling", self.patch_mask_pooling),
            ("patch_saliency", self.patch_saliency != "none"),
        ):
            if asked and self.feature_pooling != "mean":
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` changes the mean over patches; declare "
                    f'`vision_pooling="mean"`, not {self.feature_pooling!r}.'
                )

    def _validate_text(self):
        if self.text_config is not None:
            if self.text_embed_dim is not None:
                raise ValueError(
                    "`text_config` and `text_embed_dim` both say where text vectors come from; leave one out."
                )
            if self.text_config.is_encoder_decoder or not isinstance(
                getattr(self.text_config, "hidden_size", None), int
            ):
                raise ValueError(
                    f"`text_config` is a {self.text_config.model_type!r}, which is no plain text encoder; choose one "
                    f"such as 'bert', 'roberta' or 'distilbert'."
                )
        if self.text_score_weight is not None and self.text_width is None:
            raise ValueError("`text_score_weight` needs texts; set `text_config`, or `text_embed_dim`.")
        for name in ("text_score_weight", "fused_text_weight", "alignment_weight", "frame_consensus_scale"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")
        if self.text_logit_scale_init_value <= 0:
            raise ValueError(f"`text_logit_scale_init_value` must be above 0, got {self.text_logit_scale_init_value}.")

    def _validate_ranking(self):
        if self.alignment_rank < 1:
            raise ValueError(f"`alignment_rank` must be at least 1, got {self.alignment_rank}.")
        for name in ("alignment_strength", "alignment_shrinkage"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in 0..1, got {getattr(self, name)}.")
        if self.fusion_weight is not None and self.fusion_weight <= 0:
            raise ValueError(f"`fusion_weight` must be above 0, got {self.fusion_weight}.")
        has_alignment = self.alignment_weight is not None
        needed = {
            "matching": (self.use_decoder, "`use_decoder=True`"),
            "alignment": (has_alignment, "an `alignment_weight`"),
            "fused": (
                has_alignment or (self.use_decoder and self.fusion_weight is not None),
                "a `fusion_weight` beside `use_decoder=True`, or an `alignment_weight`",
            ),
        }
        fits, what = needed.get(self.ranking, (True, ""))
        if not fits:
            raise ValueError(f"`ranking={self.ranking!r}` needs {what}; set it, or choose another `ranking`.")


RiceConfig.register_for_auto_class()

__all__ = ["RiceConfig"]
