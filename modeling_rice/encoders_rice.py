"""Finds the input and output shapes of a vision encoder of any family by one dry run, without lists of model names.

The dry run uses torch's meta device, which computes shapes but no values, if the encoder supports it.
"""

import functools
import importlib
import inspect
import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, is_timm_available

# Side of an image in pixels, for encoders whose config and weights do not depend on it.
_ANY_SIZE = 224
# A class token and a distillation token; the number of register tokens is in the config.
_MOST_PREFIX_TOKENS = 2
# Maximum number of parameters of an encoder that is built on the CPU for the dry run if the meta device fails.
_LARGEST_BUILT = 500_000_000
# Config fields that describe the origin and storage of the weights, not the architecture.
ORIGIN_FIELDS = ("_name_or_path", "architectures", "dtype", "transformers_version")
# Maximum side in pixels of patches that are matched with each other: a 14 x 14 grid of an image of 224 pixels.
_FINE_STRIDE = 16


@dataclass(frozen=True)
class PatchLayout:
    """
    Layout of an encoder's patches at one layer.

    Attributes:
        width: Width W of a patch vector.
        grid: Rows and columns of patches.
        num_prefix_tokens: Tokens before the patches: class token, distillation token, registers.
        order: Order of the dimensions: `"tokens"` `(n, prefix + P, W)`, `"channels_first"` `(n, W, rows, columns)` or
            `"channels_last"` `(n, rows, columns, W)`.
    """

    width: int
    grid: tuple[int, int]
    num_prefix_tokens: int
    order: str

    @property
    def num_patches(self) -> int:
        """Number P of patches."""
        return self.grid[0] * self.grid[1]

    def tokens(self, states: Tensor) -> Tensor:
        """States in the encoder's order of dimensions -> `(n, prefix + P, W)`."""
        if self.order == "tokens":
            return states
        return states.flatten(2).transpose(1, 2) if self.order == "channels_first" else states.flatten(1, 2)

    def grid_of(self, num_tokens: int) -> tuple[int, int]:
        """
        Rows and columns of `num_tokens` tokens of an image of any size with the native aspect ratio.

        Raises:
            ValueError: if the tokens are not such a grid.
        """
        count = num_tokens - self.num_prefix_tokens
        rows = round(math.sqrt(max(count, 0) * self.grid[0] / self.grid[1]))
        columns = round(rows * self.grid[1] / self.grid[0])
        if rows < 1 or rows * columns != count:
            raise ValueError(f"{num_tokens} tokens are not a grid of patches with the aspect ratio of {self.grid}.")
        return rows, columns

    def states(self, tokens: Tensor) -> Tensor:
        """Tokens `(n, prefix + P, W)` -> states in the encoder's order; for convolutions in channels-last memory."""
        if self.order == "tokens":
            return tokens
        states = tokens.unflatten(1, self.grid_of(tokens.shape[1]))
        return states.permute(0, 3, 1, 2) if self.order == "channels_first" else states


@dataclass(frozen=True)
class EncoderLayout:
    """
    Input and output of an encoder.

    Attributes:
        image_size: Native height and width of its input images, in pixels.
        patches: Layout of its output.
        hidden: Layout of each hidden state, `None` for one that is not a grid of patches; empty if the encoder returns
            no hidden states.
        pooler_width: Width of its own global feature, `None` if it has none.
        has_class_token: Whether its first token is a global feature.
        skips_final_norm: Whether its output has not passed its `post_layernorm`, as in CLIP.
        cut_to: Side in pixels of the patches that its input is cut into, `None` if it takes whole images.
        image_mean, image_std: Normalisation of its training images, `None` if its config does not have it.
    """

    image_size: tuple[int, int]
    patches: PatchLayout
    hidden: tuple[PatchLayout | None, ...] = ()
    pooler_width: int | None = None
    has_class_token: bool = False
    skips_final_norm: bool = False
    cut_to: int | None = None
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None

    @property
    def takes_one_size(self) -> bool:
        """
        Whether images must have `image_size`. This holds for encoders with one grid of tokens and fixed positions.
        Encoders whose grids shrink from layer to layer use convolutions or padded windows, and take any size.
        """
        grids = {patches.grid for patches in self.hidden if patches}
        return self.patches.order == "tokens" and len(grids) <= 1

    def at(self, layer: int | None) -> PatchLayout:
        """
        Layout of a hidden state, or of the output for `None`.

        Raises:
            ValueError: if there is no such hidden state, or it is no grid of patches.
        """
        if layer is None:
            return self.patches
        chosen = self.hidden[layer] if -len(self.hidden) <= layer < len(self.hidden) else None
        if chosen is None:
            grids = [str(number) for number, patches in enumerate(self.hidden) if patches]
            raise ValueError(
                f"`vision_feature_layer={layer}` is not a hidden state with a grid of patches; the encoder has "
                f"{', '.join(grids) or 'none'}."
            )
        return chosen

    @property
    def fine_layer(self) -> int:
        """Index of the deepest hidden state whose patches are small enough to match; -1 (the last) if none is."""
        rows = self.image_size[0] / _FINE_STRIDE
        fine = [layer for layer, patches in enumerate(self.hidden) if patches and patches.grid[0] >= rows]
        return fine[-1] if fine else -1


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """
    A new encoder with random weights. Its class is that of AutoModel or AutoBackbone for the config, else the vision
    part of a model that is registered as a whole only (AltCLIP, BLIP, MetaCLIP 2).

    Raises:
        ValueError: for a config without a vision model, for config values that do not work together, and for a model
            whose package is not installed.
    """
    try:
        return _new_encoder(config)
    except Exception as error:
        raise ValueError(_refusal(config, error)) from error


def _new_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    kind = encoder_class(config)
    if config.model_type == "timm_wrapper" and not is_timm_available():
        raise ImportError("it needs the package timm: pip install 'rice-retrieval[encoder]'")
    if kind.main_input_name != "pixel_values":
        raise ValueError(f"it takes {kind.main_input_name}, not images")
    use_what_it_has(config, kind)
    return kind._from_config(config)


def use_what_it_has(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> None:
    """Sets eager attention for an encoder without sdpa, if the model around it is to use sdpa."""
    if config._attn_implementation == "sdpa" and not model_class._supports_sdpa:
        config._attn_implementation = "eager"


def encoder_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that [`build_encoder`] builds. Raises `ValueError` if there is none."""
    for auto in (AutoModel, AutoBackbone):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.config_class is type(config)
        and value.main_input_name == "pixel_values"
        and "forward" in vars(value)
    ]
    if not classes:
        raise ValueError("transformers has no vision model for it")
    # Base classes share the config; the model's name ends with "Model".
    return next((value for value in classes if value.__name__.endswith("Model")), classes[0])


def encoder_inputs(pixel_values: Tensor, side: int | None) -> dict[str, Tensor | None]:
    """Arguments of an encoder's `forward` for images `(n, 3, H, W)`, which are cut into patches if `side` is given."""
    if side is None:
        return {"pixel_values": pixel_values}
    patches = pixel_values.unfold(2, side, side).unfold(3, side, side)
    count, _, rows, columns = patches.shape[:4]
    return {
        "pixel_values": patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2),
        # No patch is padding.
        "pixel_attention_mask": None,
        # The encoder reads the values, which the meta device does not have.
        "spatial_shapes": torch.tensor([[rows, columns]] * count, device="cpu"),
    }


def _cut_to(encoder: nn.Module) -> int | None:
    return encoder.config.patch_size if "spatial_shapes" in inspect.signature(encoder.forward).parameters else None


def parts_to_compile(encoder: nn.Module) -> list[nn.Module]:
    """
    The blocks of an encoder if they are alike, so that one graph serves all of them and is compiled once. Otherwise
    the whole encoder, since each stage would need its own graph.
    """
    for blocks in encoder.modules():
        is_trunk = isinstance(blocks, (nn.ModuleList, nn.Sequential)) and 2 * _count(blocks) > _count(encoder)
        if is_trunk and len(blocks) > 1:
            kinds = {(type(block), tuple(p.shape for p in block.parameters())) for block in blocks}
            return list(blocks) if len(kinds) == 1 else [encoder]
    return [encoder]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def last_states(output: ModelOutput) -> Tensor:
    """States of the last layer: the last hidden state of a model, or the last feature map of a backbone."""
    states = output.get("last_hidden_state")
    return output["feature_maps"][-1] if states is None else states


def find_layout(config: PreTrainedConfig) -> EncoderLayout:
    """
    Input and output of the encoder of a config, cached per config.

    Raises:
        ValueError: if the encoder cannot be built, does not take images, or returns no grid of patches.
    """
    settings = {name: value for name, value in config.to_dict().items() if name not in ORIGIN_FIELDS}
    return _find_layout(json.dumps(settings, sort_keys=True, default=str))


@functools.lru_cache(maxsize=64)
def _find_layout(text: str) -> EncoderLayout:
    settings = json.loads(text)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        encoder = build_encoder(config).eval()
    size = _image_size(config, _trained_with(encoder))
    try:
        output, skips_final_norm = _dry_run(encoder, size)
    except Exception as error:
        # Some encoders read values of their tensors, or keep tensors that do not move to a device.
        if encoder.num_parameters() > _LARGEST_BUILT:
            raise ValueError(_refusal(config, error)) from error
        # Explicitly on the CPU, since a checkpoint's model is built on the meta device.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            encoder = build_encoder(config).eval()
        try:
            output, skips_final_norm = _dry_run(encoder, size)
        except Exception as error:
            raise ValueError(_refusal(config, error)) from error
    if output.get("ids_restore") is not None:
        raise ValueError(_refusal(config, "it drops patches at random"))
    try:
        patches = _layout(last_states(output), encoder, size, channels_last=_is_channels_last(encoder))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(_refusal(config, error)) from error
    pooled = output.get("pooler_output")
    timm_model, trained_with = getattr(encoder, "timm_model", None), _trained_with(encoder)
    return EncoderLayout(
        image_size=size,
        patches=patches,
        hidden=tuple(_layout_or_none(states, encoder, size) for states in output.get("hidden_states") or ()),
        pooler_width=None if pooled is None else math.prod(pooled.shape[1:]),
        has_class_token=patches.num_prefix_tokens > 0 and bool(getattr(timm_model, "has_class_token", True)),
        skips_final_norm=skips_final_norm,
        cut_to=_cut_to(encoder),
        image_mean=tuple(trained_with["mean"]) if "mean" in trained_with else None,
        image_std=tuple(trained_with["std"]) if "std" in trained_with else None,
    )


@torch.no_grad()
def _dry_run(encoder: nn.Module, size: tuple[int, int]) -> tuple[ModelOutput, bool]:
    """The output for a blank image, and whether the last hidden state has not passed the final norm."""
    norm, normalised = getattr(encoder, "post_layernorm", None), []
    if norm is not None:
        # The norm of a global feature has two dimensions, that of the tokens three.
        norm.register_forward_hook(lambda _, inputs, output: normalised.append(output.dim() == 3))
    with encoder.device:
        inputs = encoder_inputs(torch.zeros(1, 3, *size), _cut_to(encoder))
        try:
            output = encoder(**inputs, output_hidden_states=True)
        except (TypeError, ValueError, NotImplementedError):
            # Not every encoder returns hidden states.
            output = encoder(**inputs)
    return output, norm is not None and not any(normalised)


def _trained_with(encoder: nn.Module) -> dict:
    """timm's description of a network's training images, from its config, else from its architecture."""
    own = getattr(getattr(encoder, "timm_model", None), "pretrained_cfg", None) or {}
    return {**own, **(getattr(encoder.config, "pretrained_cfg", None) or {})}


def _image_size(config: PreTrainedConfig, trained_with: dict) -> tuple[int, int]:
    size = getattr(config, "image_size", None)
    if size is None and isinstance(getattr(config, "num_patches", None), int):
        size = math.isqrt(config.num_patches) * config.patch_size
    if size is None:
        size = trained_with.get("input_size", _ANY_SIZE)
    return (size, size) if isinstance(size, int) else tuple(size[-2:])


def _is_channels_last(encoder: nn.Module) -> bool:
    """Whether a timm network's output has the channels last; its hidden states have them first in any case."""
    return str(getattr(getattr(encoder, "timm_model", None), "output_fmt", "")).endswith("NHWC")


def _layout(states: Tensor, encoder: nn.Module, size: tuple[int, int], channels_last: bool = False) -> PatchLayout:
    if states.dim() == 4 and channels_last:
        return PatchLayout(states.shape[3], tuple(states.shape[1:3]), 0, "channels_last")
    if states.dim() == 4:
        return PatchLayout(states.shape[1], tuple(states.shape[2:]), 0, "channels_first")
    if states.dim() != 3:
        raise ValueError(f"its output has {states.dim()} dimensions")
    grid, prefix = _grid(states.shape[1], encoder, size)
    return PatchLayout(states.shape[2], grid, prefix, "tokens")


def _layout_or_none(states: object, encoder: nn.Module, size: tuple[int, int]) -> PatchLayout | None:
    try:
        return _layout(states, encoder, size) if torch.is_tensor(states) else None
    except ValueError:
        return None


def _grid(num_tokens: int, encoder: nn.Module, size: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """Rows and columns of patches among `num_tokens` tokens, and the number of tokens before them."""
    config = encoder.config
    side = getattr(config, "patch_size", None)
    known = getattr(getattr(encoder, "timm_model", None), "num_prefix_tokens", None)
    most = _MOST_PREFIX_TOKENS + (getattr(config, "num_register_tokens", 0) or 0)
    prefixes = range(most + 1) if known is None else [known]
    if isinstance(side, int):
        grid = (size[0] // side, size[1] // side)
        if num_tokens - math.prod(grid) in prefixes:
            return grid, num_tokens - math.prod(grid)
    # The grid shrinks from layer to layer, or the config has no patch size; it has the image's aspect ratio anyway.
    for prefix in prefixes:
        rows = round(math.sqrt((num_tokens - prefix) * size[0] / size[1])) if num_tokens > prefix else 0
        columns = round(rows * size[1] / size[0])
        if rows and rows * columns == num_tokens - prefix:
            return (rows, columns), prefix
    raise ValueError(f"its {num_tokens} tokens are not a grid of patches of a {size[0]} x {size[1]} image")


def _refusal(config: PreTrainedConfig, reason: Exception | str) -> str:
    reason = (" ".join(str(reason).split()) or type(reason).__name__).rstrip(".")
    return f"The vision model {config.model_type!r} cannot be RICE's encoder ({reason}); choose another."
