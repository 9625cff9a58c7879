"""Converts checkpoints of the two official RICE code bases.

    python -m modeling_rice.convert_rice_original_to_hf CHECKPOINT OUTPUT_DIR

The layout is recognised from the keys, and all sizes from the shapes. A part that is completely absent (decoder,
reconstruction head, text projections) is switched off. A partly present part, or an unknown key, is an error that
lists the keys.
"""

import argparse
import math
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig

from .configuration_rice import RiceConfig
from .modeling_rice import RiceModel

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_STEM = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
}
# Prefixes of each layout: official to ours. A trailing name (weight, bias) is kept.
_CLIP4CLIP_DECODER = {
    "cross.embeddings.position_embeddings": "decoder.position_embedding",
    "cross.pooler.ln_pool": "decoder.head.layer_norm",
    "cross.pooler.dense": "decoder.head.dense",
    "similarity_dense": "decoder.head.score",
}
_MMF_DECODER = {
    "transformer.transformer.pooler.layer_norm": "decoder.head.layer_norm",
    "transformer.transformer.pooler.dense": "decoder.head.dense",
    "transformer.heads.vim": "decoder.head.score",
}
_IGNORED = {
    "clip4clip": (
        r"clip\.(positional_embedding|text_projection|logit_scale|token_embedding\..*|ln_final\..*|transformer\..*)",
        r"clip\.(input_resolution|context_length|vocab_size)",
        r"cross\.embeddings\.position_ids",
        # The official initialisation from CLIP's text tower creates more blocks than the decoder uses.
        r"cross\.transformer\.resblocks\..*",
    ),
    "mmf": (r"transformer\.transformer\.embeddings\..*",),
}


class _Source:
    """An official state dict that records which keys were read."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str):
        self.tensors = tensors
        self.prefix = prefix
        self.used: set[str] = set()
        self.missing: list[str] = []

    def take(self, key: str) -> Tensor | None:
        self.used.add(key)
        if key not in self.tensors:
            self.missing.append(key)
            return None
        return self.tensors[key].float()

    def has(self, *prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in self.tensors)

    def count(self, blocks: str) -> int:
        """Number of blocks below a prefix, counted from 0 up to the first gap; blocks after a gap are leftovers."""
        found = {int(match[1]) for key in self.tensors if (match := re.match(re.escape(blocks) + r"\.(\d+)\.", key))}
        if found and 0 not in found:
            raise ValueError(
                f"The checkpoint holds {blocks}.{min(found)}, but no {blocks}.0; it is damaged, so save it again."
            )
        return next(number for number in range(len(found) + 1) if number not in found)


def convert_original_checkpoint(state_dict: dict[str, Tensor]) -> RiceModel:
    """
    Builds the model of an official checkpoint with the preset of its code base, in fp32 and eval mode.

    Args:
        state_dict: State dict of the older (CLIP4Clip-based) or the newer (mmf-based) official code. Both layouts are
            recognised, with or without a leading `module.`.

    Returns:
        A [`RiceModel`]. The encoder has width / 64 heads and the decoder 8, as in both code bases.

    Raises:
        ValueError: for another layout; for missing or unknown keys, with a list of them.
    """
    tensors = _named_tensors(state_dict)
    if "clip.visual.conv1.weight" in tensors:
        layout, source = "clip4clip", _Source(tensors, "clip.visual.")
    elif "image_encoder.model.conv1.weight" in tensors:
        layout, source = "mmf", _Source(tensors, "image_encoder.model.")
    else:
        raise ValueError(
            "The checkpoint has neither official layout: it has no `clip.visual.conv1.weight` (older code) and no "
            "`image_encoder.model.conv1.weight` (newer code); give a checkpoint of the official code."
        )
    weights, overrides = _convert_encoder(source)
    convert_rest = _convert_clip4clip if layout == "clip4clip" else _convert_mmf
    convert_rest(source, weights, overrides)
    _refuse_leftovers(source, _IGNORED[layout])

    model = RiceModel(RiceConfig.from_preset(layout, **overrides))
    try:
        result = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"The checkpoint has inconsistent shapes: {' '.join(str(error).split())}") from error
    if result.missing_keys or result.unexpected_keys:
        raise ValueError(
            f"The checkpoint's keys do not match the model: {result.missing_keys} are missing, "
            f"{result.unexpected_keys} are left over."
        )
    return model.float().eval()


def _named_tensors(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names without the `module.` prefix of data parallel training."""
    tensors: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"The checkpoint must map names to tensors, but {key!r} is a {type(value).__name__}.")
        name = key.removeprefix("module.")
        if name in tensors:
            raise ValueError(f"The checkpoint holds {name} twice, with and without `module.`; remove one of them.")
        tensors[name] = value
    return tensors


def _convert_encoder(source: _Source) -> tuple[dict[str, Tensor | None], dict]:
    prefix = source.prefix
    weights = {ours: source.take(prefix + theirs) for theirs, ours in _STEM.items()}
    projection = source.take(prefix + "proj")
    layers = max(1, source.count(f"{prefix}transformer.resblocks"))
    for i in range(layers):
        _convert_block(
            source, weights, f"{prefix}transformer.resblocks.{i}", f"vision_model.encoder.layers.{i}", "self_attn"
        )
    if source.missing:
        _raise_keys("misses", source.missing)
    patches = weights["vision_model.embeddings.patch_embedding.weight"]
    positions = weights["vision_model.embeddings.position_embedding.weight"]
    for name, tensor, rank in (("conv1.weight", patches, 4), ("positional_embedding", positions, 2)):
        _check_rank(prefix + name, tensor, rank)
    _check_rank(f"{prefix}proj", projection, 2)
    weights["visual_projection.weight"] = projection.T.contiguous()
    width, _, patch_size, _ = patches.shape
    grid = math.isqrt(max(len(positions) - 1, 0))
    if width % 64 or grid * grid != len(positions) - 1:
        raise ValueError(
            f"The checkpoint's encoder has width {width} and {len(positions)} positions; the width must be a multiple "
            f"of 64, and the number of positions one more than a square."
        )
    vision_config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=source.tensors[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=grid * patch_size,
        patch_size=patch_size,
        projection_dim=projection.shape[1],
    )
    return weights, {"vision_config": vision_config, "projection_dim": projection.shape[1]}


def _check_rank(name: str, tensor: Tensor, rank: int) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"The checkpoint's {name} has shape {tuple(tensor.shape)}, but must have {rank} dimensions.")


def _convert_block(source: _Source, weights: dict, theirs: str, ours: str, attention: str = "attention") -> None:
    """Converts a pre-norm block whose attention packs query, key and value in one matrix."""
    for kind in ("weight", "bias"):
        packed = source.take(f"{theirs}.attn.in_proj_{kind}")
        if packed is not None:
            for name, part in zip(("q_proj", "k_proj", "v_proj"), packed.chunk(3), strict=True):
                weights[f"{ours}.{attention}.{name}.{kind}"] = part.clone()
        weights[f"{ours}.{attention}.out_proj.{kind}"] = source.take(f"{theirs}.attn.out_proj.{kind}")
    _convert_linears(source, weights, {f"{theirs}.{a}": f"{ours}.{b}" for a, b in _BLOCK.items()})


def _convert_linears(source: _Source, weights: dict, names: dict[str, str], kinds=("weight", "bias")) -> None:
    for theirs, ours in names.items():
        for kind in kinds:
            weights[f"{ours}.{kind}"] = source.take(f"{theirs}.{kind}")


def _set_intermediate_size(weights: dict, overrides: dict) -> None:
    inner = weights["decoder.cross_layer.mlp.fc1.weight"]
    if inner is not None and len(inner) != 4 * inner.shape[-1]:
        overrides["decoder_intermediate_size"] = len(inner)


def _convert_reconstruction(source: _Source, weights: dict, overrides: dict, prefix: str) -> None:
    overrides["use_reconstruction"] = source.has(prefix)
    if overrides["use_reconstruction"]:
        _convert_linears(
            source, weights, {f"{prefix}0": "reconstruction_head.conv1", f"{prefix}2": "reconstruction_head.conv2"}
        )


def _convert_clip4clip(source: _Source, weights: dict, overrides: dict) -> None:
    weights["logit_scale"] = torch.tensor(math.log(100.0))
    overrides["use_decoder"] = source.has("cross.", "similarity_dense.")
    if overrides["use_decoder"]:
        layers = source.count("cross.transformer.resblocks")
        overrides["decoder_num_self_layers"] = layers
        for i in range(layers):
            _convert_block(source, weights, f"cross.transformer.resblocks.{i}", f"decoder.self_layers.{i}")
        theirs, ours = "cross.transformer.cross_attention", "decoder.cross_layer"
        names = {f"{theirs}.{a}": f"{ours}.{b}" for a, b in _BLOCK.items()}
        names |= {f"{theirs}.attn.{name}": f"{ours}.attention.{name[0]}_proj" for name in ("query", "key", "value")}
        _convert_linears(source, weights, names)
        _set_intermediate_size(weights, overrides)
        for theirs, ours in _CLIP4CLIP_DECODER.items():
            kinds = ("weight",) if theirs.endswith("embeddings") else ("weight", "bias")
            _convert_linears(source, weights, {theirs: ours}, kinds)
        positions = weights["decoder.position_embedding.weight"]
        if positions is not None:
            overrides["decoder_max_position_embeddings"] = len(positions)
    if source.has("fc_title.", "fc_asr."):
        _convert_linears(source, weights, {"fc_title": "decoder.title_projection", "fc_asr": "decoder.asr_projection"})
        if weights["decoder.title_projection.weight"] is not None:
            overrides["text_embed_dim"] = weights["decoder.title_projection.weight"].shape[1]
    _convert_reconstruction(source, weights, overrides, "recons_weights.conv.")


def _convert_mmf(source: _Source, weights: dict, overrides: dict) -> None:
    # Both embeddings are multiplied by the stored scalar, so the logits carry its square.
    name = "transformer.contrastive_norm.norm_s"
    if not source.has(name):
        name = "transformer.logit_scale"
    scalar = source.take(name)
    if scalar is not None and (scalar.numel() != 1 or not scalar.abs().item() > 0):
        raise ValueError(f"The checkpoint's {name} must be one number other than 0, the scale of the embeddings.")
    weights["logit_scale"] = None if scalar is None else 2 * scalar.reshape(()).abs().log()
    source.used |= {"transformer.logit_scale", "transformer.contrastive_norm.norm_s"}
    prefix = "transformer.transformer.transformer.layers"
    overrides["use_decoder"] = source.has(prefix, "transformer.transformer.pooler.", "transformer.heads.vim.")
    if overrides["use_decoder"]:
        if source.count(prefix) > 2:
            raise ValueError(
                "The checkpoint's decoder has more than one pair of self- and cross-attention blocks; RICE supports "
                "one pair, since only then can scores be computed exactly from cached keys and values."
            )
        overrides["decoder_num_self_layers"] = 1
        _convert_block(source, weights, f"{prefix}.0", "decoder.self_layers.0")
        _convert_block(source, weights, f"{prefix}.1", "decoder.cross_layer")
        _set_intermediate_size(weights, overrides)
        for theirs, ours in _MMF_DECODER.items():
            _convert_linears(
                source, weights, {theirs: ours}, ("weight", "bias") if theirs.endswith("norm") else ("weight",)
            )
    _convert_reconstruction(source, weights, overrides, "transformer.heads.rec.")


def _refuse_leftovers(source: _Source, ignored: tuple[str, ...]) -> None:
    if source.missing:
        _raise_keys("misses", source.missing)
    leftovers = [
        key
        for key in source.tensors
        if key not in source.used and not any(re.fullmatch(pattern, key) for pattern in ignored)
    ]
    if leftovers:
        _raise_keys("holds unknown", leftovers)


def _raise_keys(verb: str, keys: list[str]) -> None:
    raise ValueError(f"The checkpoint {verb} {len(keys)} key(s): {', '.join(sorted(keys))}.")


def load_original_state_dict(path: str | Path) -> dict[str, Tensor]:
    """
    Reads a `.safetensors` file, or a torch file of plain tensors (optionally under `model` or `state_dict`).

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {path}; give the path of one.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    # The unpickler can fail in many ways on a file that is not a checkpoint.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"The checkpoint {path} cannot be read ({reason}); it must hold plain tensors.") from error
    if not isinstance(state_dict, dict):
        raise ValueError(
            f"The checkpoint {path} holds a {type(state_dict).__name__}; it must hold a dict of tensors by name."
        )
    for key in ("model", "state_dict"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    return {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="checkpoint of an official code base (.pth, .bin, .pt or .safetensors)")
    parser.add_argument("output_dir", help="folder for config.json and model.safetensors")
    options = parser.parse_args(arguments)
    try:
        model = convert_original_checkpoint(load_original_state_dict(options.checkpoint))
        model.save_pretrained(options.output_dir)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"Wrote {options.output_dir} ({sum(p.numel() for p in model.parameters()):,} parameters).")


if __name__ == "__main__":
    main()
