"""Configuration of RICE: one vision encoder for clips and shop images, a matching decoder, a reconstruction head."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig
from transformers.activations import ACT2FN

# Encoders whose layers were checked to honour a 4-D `attention_mask` keyword (tests/modeling_rice keeps the check).
PATCH_MASK_ENCODERS = ("clip_vision_model", "siglip_vision_model", "vit", "dinov2", "dinov3_vit")

# Encoders with one flat grid of patches and nothing before it; hierarchical ones are told by their config.
_NO_CLASS_TOKEN = ("siglip_vision_model", "siglip2_vision_model", "ijepa")

_VIT_B_32 = {"patch_size": 32, "image_size": 224}

# The two published variants differ in these settings only. `clip4clip` is the older code base, `mmf` the newer one.
_PRESETS: dict[str, dict[str, Any]] = {
    "clip4clip": {
        "mask_padded_frames": False,
        "decoder_max_position_embeddings": 77,
        "matching_negatives": "hardest",
    },
    "mmf": {
        "normalize_frames": False,
        "logit_scale_init_value": 16.0,
        "learn_logit_scale": True,
        "decoder_token_source": "raw",
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
            Any transformers vision model; clips and images share it.
        vision_pooling (`"cls"`, `"mean"`, `"pooler"`, *optional*):
            Global feature of an image. `"cls"` needs an encoder with a class token and is the default; encoders
            without one (SigLIP, Swin, ResNet) must declare `"mean"` or `"pooler"`.
        projection_dim (`int`, defaults to 512): Width D of the shared embedding.
        normalize_frames (`bool`, defaults to `True`):
            L2-normalise each frame before the mean over frames; `False` averages the raw features.
        logit_scale_init_value (`float`, defaults to 100.0): Contrastive temperature as a factor, > 0.
        learn_logit_scale (`bool`, defaults to `False`): Whether that factor is a parameter.
        mask_padded_frames (`bool`, defaults to `True`):
            `False` reproduces the older code under a patch mask: padded frames are encoded and attended to.
        use_decoder (`bool`, defaults to `True`): Build the pairwise matching decoder (PMD).
        decoder_token_source (`"projected"`, `"raw"`):
            Tokens the decoder sees: after norm and projection (width `projection_dim`), or the last block's.
        decoder_num_self_layers (`int`, defaults to 1): Self-attention blocks over image tokens, >= 0.
        decoder_num_heads (`int`, defaults to 8), decoder_intermediate_size (`int`, *optional*, 4 x width),
        decoder_hidden_act (`str`, defaults to `"quick_gelu"`), decoder_layer_norm_eps (`float`).
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
        num_hard_negatives (`int`, defaults to 3).
        detach_matching_features (`bool`, defaults to `False`):
            Train the decoder on features that carry no gradient into the encoder.
        use_reconstruction (`bool`, defaults to `True`): Build the patch feature reconstruction head (PFR).
        reconstruction_include_cls, reconstruction_softmax, reconstruction_scale_attention (`bool`):
            Reconstruct with CLS rows and columns kept; softmax over keys after head mixing; multiply the attention
            probabilities by sqrt(head width) before it.
        reconstruction_softmax_over_padding (`bool`, defaults to `False`):
            Let that softmax count the keys of padded frames, as the newer code does.
        contrastive_loss_weight, matching_loss_weight (1.0), reconstruction_loss_weight (0.05): Loss factors.
        text_embed_dim (`int`, *optional*):
            Width of precomputed title and ASR vectors; builds the projections of the decoder's text tokens.
        fusion_weight (`float`, *optional*):
            Weight of the matching z-score beside the embedding z-score, fitted on a validation split.
        initializer_range (`float`, defaults to 0.02).

    Raises:
        ValueError: for a combination that cannot work, with the reason.
    """

    model_type = "rice"
    sub_configs = {"vision_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    vision_pooling: Literal["cls", "mean", "pooler"] | None = None
    projection_dim: int = 512
    normalize_frames: bool = True
    logit_scale_init_value: float | int = 100.0
    learn_logit_scale: bool = False
    mask_padded_frames: bool = True

    use_decoder: bool = True
    decoder_token_source: Literal["projected", "raw"] = "projected"
    decoder_num_self_layers: int = 1
    decoder_num_heads: int = 8
    decoder_intermediate_size: int | None = None
    decoder_hidden_act: str = "quick_gelu"
    decoder_layer_norm_eps: float = 1e-5
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
    num_hard_negatives: int = 3
    detach_matching_features: bool = False

    use_reconstruction: bool = True
    reconstruction_include_cls: bool = False
    reconstruction_softmax: bool = False
    reconstruction_scale_attention: bool = False
    reconstruction_softmax_over_padding: bool = False

    contrastive_loss_weight: float | int = 1.0
    matching_loss_weight: float | int = 1.0
    reconstruction_loss_weight: float | int = 0.05

    text_embed_dim: int | None = None
    fusion_weight: float | int | None = None
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

    @property
    def vision_hidden_size(self) -> int:
        """Width of the encoder's last hidden state."""
        config = self.vision_config
        for name in ("hidden_size", "embed_dim"):
            if isinstance(getattr(config, name, None), int):
                return config.hidden_size if name == "hidden_size" else config.embed_dim
        sizes = getattr(config, "hidden_sizes", None)
        if sizes:
            return sizes[-1]
        raise ValueError(f"The vision model {config.model_type!r} states no hidden size; choose another encoder.")

    @property
    def decoder_hidden_size(self) -> int:
        """Width of the matching decoder, which follows its token source."""
        return self.projection_dim if self.decoder_token_source == "projected" else self.vision_hidden_size

    @property
    def num_patches(self) -> int | None:
        """Patches P of an image at the encoder's native size, `None` where the config does not tell (Swin, ResNet)."""
        size = getattr(self.vision_config, "image_size", None)
        patch = getattr(self.vision_config, "patch_size", None)
        if not isinstance(size, int) or not isinstance(patch, int) or self.vision_grid_shrinks:
            return None
        return (size // patch) ** 2

    @property
    def vision_grid_shrinks(self) -> bool:
        """Whether the encoder shrinks its grid stage by stage, so that patches are not `image_size/patch_size`."""
        return any(hasattr(self.vision_config, name) for name in ("depths", "hidden_sizes"))

    @property
    def has_class_token(self) -> bool:
        """Whether the encoder's first token is a global one. Encoders that are not known are taken to have it."""
        return not self.vision_grid_shrinks and self.vision_config.model_type not in _NO_CLASS_TOKEN

    @property
    def accepts_patch_mask(self) -> bool:
        """Whether patches can be hidden from the encoder's attention."""
        return self.vision_config.model_type in PATCH_MASK_ENCODERS

    def validate_architecture(self):
        """Refuses combinations that cannot work; runs at construction."""
        for name in ("projection_dim", "decoder_num_heads", "num_hard_negatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.decoder_num_self_layers < 0:
            raise ValueError(f"`decoder_num_self_layers` must be 0 or more, got {self.decoder_num_self_layers}.")
        for name in ("logit_scale_init_value", "matching_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
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
        if self.use_reconstruction and self.use_decoder and self.decoder_num_heads < 2:
            raise ValueError("`use_reconstruction=True` mixes attention heads and needs `decoder_num_heads >= 2`.")
        for name in ("decoder_hidden_act", "pooler_act"):
            if getattr(self, name) not in ACT2FN:
                raise ValueError(f"`{name}={getattr(self, name)!r}` is no activation that transformers knows.")
        if not 0 <= self.decoder_dropout < 1:
            raise ValueError(f"`decoder_dropout` must be in 0..1 (1 excluded), got {self.decoder_dropout}.")
        if (self.vision_pooling or "cls") == "cls" and not self.has_class_token:
            raise ValueError(
                f"The vision model {self.vision_config.model_type!r} has no class token; declare "
                f'`vision_pooling="mean"` or `"pooler"`.'
            )


RiceConfig.register_for_auto_class()

__all__ = ["RiceConfig"]
