"""Starts a new RICE model from a pretrained encoder: weights, projection, and blocks for the decoder."""

import logging
from typing import Any

import torch
from torch import nn

from hub_rice.loading import load_encoder
from modeling_rice import RiceConfig, RiceModel

logger = logging.getLogger(__name__)

# Parts of a transformer block with the same names here and in CLIP's and SigLIP's towers, except the attention.
_BLOCK = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def start_from(path: str, settings: dict[str, Any]) -> RiceModel:
    """
    A RICE model on a pretrained encoder. Other parts of the source are used if their shapes fit: the visual
    projection, and blocks for the decoder as in the two published variants. The copied parts and the randomly
    initialised parts are logged.

    Args:
        path: Folder or Hub id of the encoder, or of a model that has one as `vision_model` (CLIP, SigLIP).
        settings: Fields of `RiceConfig` as plain values. The source always gives `vision_config`; a different value in
            the settings causes a warning.

    Raises:
        FileNotFoundError, ValueError: as [`load_encoder`]; ValueError also for invalid settings.
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
    logger.info("From %s: %s.%s", path, ", ".join(taken), f" Random: {', '.join(random)}." if random else "")
    return model


def _start_decoder(model: RiceModel, vision: nn.Module, text: nn.Module | None) -> str | None:
    """
    Fills decoder blocks from a tower of the decoder's width, and returns the source; `None` if no tower fits.

    The newer code copies the encoder's last blocks, with cross-attention last. This needs the encoder's own tokens
    (`decoder_token_source="raw"`). The decoder of the older code has the projection's width. It copies the first
    blocks of CLIP's text tower for self-attention, and the tower's positions; its cross-attention block is random.
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
    """The blocks of a tower; empty if they have another width or structure, or if there are too few."""
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
        # Without an output projection nothing is copied.
        if isinstance(target, nn.Linear):
            target.load_state_dict(layer.self_attn.get_submodule(part).state_dict())
