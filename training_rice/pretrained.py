"""A new RICE model that starts from a pretrained encoder: its weights, its projection, and blocks for the decoder."""

import logging
from typing import Any

import torch
from torch import nn

from hub_rice.loading import load_encoder
from modeling_rice import RiceConfig, RiceModel

logger = logging.getLogger(__name__)

# Parts of a transformer block under the same names here and in CLIP's and SigLIP's towers, but for the attention's.
_BLOCK = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def start_from(path: str, settings: dict[str, Any]) -> RiceModel:
    """
    A RICE model on a pretrained encoder. What the source offers beyond the encoder is used where its shape fits: the
    visual projection, and blocks for the decoder as the two published variants take them. What was taken, and what
    starts at random, is logged.

    Args:
        path: Folder or Hub id of the encoder, or of a model that has one as `vision_model` (CLIP, SigLIP).
        settings: Fields of `RiceConfig`, plain values; `vision_config` is the source's whatever they say, and a
            warning tells when they say something else.

    Raises:
        FileNotFoundError, ValueError: as [`load_encoder`], and for settings that cannot work.
    """
    source = load_encoder(path)
    vision = getattr(source, "vision_model", source)
    asked = {"model_type": "clip_vision_model"} | (settings.get("vision_config") or {})
    other = [name for name, value in asked.items() if getattr(vision.config, name, None) != value]
    if settings.get("vision_config") and other:
        logger.warning(
            "The encoder of %s (%s) replaces the recipe's vision_config (%s), which differs in %s.",
            path,
            vision.config.model_type,
            asked["model_type"],
            ", ".join(other),
        )
    model = RiceModel(RiceConfig(**{**settings, "vision_config": vision.config}))
    model.vision_model.load_state_dict(vision.state_dict())
    taken, random = ["encoder"], []
    projection = getattr(getattr(source, "visual_projection", None), "weight", None)
    fits = projection is not None and projection.shape == model.visual_projection.weight.shape
    if fits:
        model.visual_projection.load_state_dict({"weight": projection})
    (taken if fits else random).append("projection")
    if model.decoder is not None:
        blocks = _start_decoder(model, vision, getattr(source, "text_model", None))
        if blocks is None:
            random.append("decoder")
        else:
            taken.append(f"decoder ({blocks})")
    logger.info("From %s: %s.%s", path, ", ".join(taken), f" At random: {', '.join(random)}." if random else "")
    return model


def _start_decoder(model: RiceModel, vision: nn.Module, text: nn.Module | None) -> str | None:
    """
    Fills decoder blocks from a tower of the decoder's width, and says from which; `None` where no tower fits.

    The newer code takes the encoder's last blocks, cross-attention last, which needs the encoder's own tokens
    (`decoder_token_source="raw"`). The older code, whose decoder has the projection's width, takes the first blocks of
    CLIP's text tower for the self-attention and the tower's positions; its cross-attention block starts at random.
    """
    decoder, width = model.decoder, model.config.decoder_hidden_size
    own = list(decoder.self_layers)
    if model.config.decoder_token_source == "raw" and (layers := _layers(vision, width, len(own) + 1)):
        for block, layer in zip([*own, decoder.cross_layer], layers[-len(own) - 1 :], strict=True):
            _copy_block(block, layer)
        return f"last {len(own) + 1} blocks of the encoder"
    if text is None or not own or not (layers := _layers(text, width, len(own))):
        return None
    for block, layer in zip(own, layers, strict=False):
        _copy_block(block, layer)
    positions = getattr(getattr(text.embeddings, "position_embedding", None), "weight", None)
    ours = decoder.position_embedding
    if ours is not None and positions is not None and len(positions) >= len(ours.weight):
        with torch.no_grad():
            ours.weight.copy_(positions[: len(ours.weight)])
    return f"first {len(own)} block(s) of the text tower"


def _layers(tower: nn.Module, width: int, count: int) -> list[nn.Module]:
    """The blocks of a tower, or none where they are of another width, another make, or too few."""
    layers = list(getattr(getattr(tower, "encoder", None), "layers", []))
    if len(layers) < count or getattr(tower.config, "hidden_size", None) != width:
        return []
    names = {name for name, _ in layers[0].named_parameters()}
    expected = {f"{part}.weight" for part in _BLOCK} | {f"self_attn.{part}.weight" for part in _ATTENTION}
    return layers if expected <= names and layers[0].mlp.fc1.out_features == 4 * width else []


def _copy_block(block: nn.Module, layer: nn.Module) -> None:
    for part in _BLOCK:
        block.get_submodule(part).load_state_dict(layer.get_submodule(part).state_dict())
    for part in _ATTENTION:
        target = block.attention.get_submodule(part)
        # Without an output projection there is nothing to fill.
        if isinstance(target, nn.Linear):
            target.load_state_dict(layer.self_attn.get_submodule(part).state_dict())
