"""Which model encoded a gallery: a short name for what a model's encodings depend on."""

import dataclasses
import hashlib
import json

import torch
from torch import nn
from transformers import PreTrainedConfig

from .configuration_rice import RiceConfig

# Fields and weights that no encoding depends on, or that are told by themselves.
_TRAINING_FIELDS = (
    "alignment_weight",
    "contrastive_",
    "decoder_dropout",
    "detach_",
    "fused_",
    "fusion_",
    "initializer_",
    "learn_",
    "logit_",
    "matching_loss_",
    "matching_negatives",
    "matching_scale",
    "matching_targets",
    "num_hard_negatives",
    "ranking",
    "reconstruction_",
    "text_config",
    "text_logit_",
    "text_loss_",
    "text_score_",
    "use_reconstruction",
    "vision_config",
)
_TRAINING_WEIGHTS = ("logit_", "reconstruction_head.", "text_logit_")
_SAMPLES_PER_WEIGHT = 1024


def weights_state(model: nn.Module) -> tuple:
    """
    Changes when the weights do, at next to no cost: where they lie, and how often they were written to. What fused
    optimisers do, or writing through `.data`, is not counted.
    """
    # `parameters()` also builds names and looks for duplicates, which takes longer than matching a few pairs.
    tensors = (t for m in model.modules() for group in (m._parameters, m._buffers) for t in group.values())
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if t is not None)


def fingerprint(model: nn.Module) -> str | None:
    """
    32 hexadecimal digits for what the encodings of a [`RiceModel`] depend on, `None` while its weights are offloaded.

    They stand for the settings and, for speed, up to 2,048 evenly spaced numbers of each weight, some of which any
    training step moves. Rounded to bfloat16, so that a copy in that precision has the same name.
    """
    weights = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    if any(tensor.is_meta for tensor in weights.values()):
        return None
    digest = hashlib.blake2b(json.dumps(_settings(model.config), sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(weights.items()):
        if name.startswith(_TRAINING_WEIGHTS):
            continue
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        numbers = tensor.detach().flatten()
        numbers = numbers[:: max(1, len(numbers) // _SAMPLES_PER_WEIGHT)]
        digest.update(numbers.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _settings(config: RiceConfig) -> dict[str, str]:
    settings = {n: value for n, value in _changed_fields(config).items() if not n.startswith(_TRAINING_FIELDS)}
    vision = _changed_fields(config.vision_config)
    if config.text_config is not None:
        text = sorted(_changed_fields(config.text_config).items())
        settings |= {"text_config": repr(text), "text_encoder": config.text_config.model_type}
    return settings | {"vision_config": repr(sorted(vision.items())), "encoder": config.vision_config.model_type}


def _changed_fields(config: PreTrainedConfig) -> dict[str, str]:
    """A config's own fields that are not at their default: fields that a later version adds change no fingerprint."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    fields = [field for field in dataclasses.fields(config) if field.name not in common]
    return {f.name: repr(getattr(config, f.name)) for f in fields if getattr(config, f.name) != f.default}
