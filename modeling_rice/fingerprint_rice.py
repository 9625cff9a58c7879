"""The same model in the same state: one rule by which encodings are known to be comparable.

Two models are the same where these are: the settings that encodings depend on, the weights that take part in them, up
to a cast to bfloat16 or float16, and which adapters are active. Training or eval mode, device and attention back end
are no part of it, nor are weights and settings of the losses and of the scores' sum. An adapter that is switched off
is as good as absent, and one that was merged is weights of its layer.
"""

import dataclasses
import hashlib
import json
from typing import Any, Self

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
    "projection_dropout",
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

# What PEFT calls the layer that adapters are attached to.
_ORIGINALS = ("base_layer", "original_module")


class RiceIdentity(nn.Module):
    """What [`RiceModel`] knows of its own state."""

    _fingerprint: tuple[tuple, str | None] | None = None
    _settled: str | None = None

    def fingerprint(self) -> str | None:
        """
        Names what this model's encodings depend on, the settings and the weights, in 32 hexadecimal digits, to be
        compared by `same_state`. Training changes it, and so does switching an adapter; saving, moving and a copy in
        half precision do not. `None` while weights are offloaded. What `encode_gallery` and `encode_clips` return
        carries it as `model_fingerprint`.
        """
        if self._settled is not None:
            return self._settled
        if self.training:
            return fingerprint(self)
        state = weights_state(self)
        if self._fingerprint is None or self._fingerprint[0] != state:
            self._fingerprint = (state, fingerprint(self))
        return self._fingerprint[1]

    def settle(self, ending: str = "") -> Self:
        """
        Keeps the fingerprint that the model has now, for one that is only used from now on: a cast to another
        precision, or weights that are brought into a faster form, change nothing that matters to who compares
        encodings. Weights that are changed for real go unnoticed until `train()` is called.

        Args:
            ending: Of the name, where encodings are not those of the model any more, as of a quantised one.
        """
        name = self.fingerprint()
        self._settled = None if name is None else name + ending
        return self

    def train(self, mode: bool = True) -> Self:
        """As of any module."""
        if mode:
            self._settled = None
        # A fused optimiser changes weights without a trace on them, so that nothing is kept from before training.
        self._fingerprint = None
        return super().train(mode)

    def refuse_foreign(self, **encodings: Any) -> None:
        """Raises `ValueError` for encodings, by their name, that are none or known to be another model's."""
        own = self.fingerprint()
        for name, features in encodings.items():
            if not hasattr(features, "model_fingerprint"):
                kind = type(features).__name__
                raise ValueError(f"`{name}` is a {kind}; give what `encode_{name}` of this model returns.")
            if not same_state(own, features.model_fingerprint):
                raise ValueError(
                    f"`{name}` was encoded by another model, or by this one before its weights changed or its "
                    f"adapters were switched ({features.model_fingerprint}, this one is {own}); encode it anew with "
                    f"this model."
                )

    def require_eval_mode(self, method: str) -> None:
        """Raises `ValueError` where training mode would change what `method` returns, or the model while it runs."""
        if any(changes_in_training(module) for module in self.modules()):
            raise ValueError(
                f"`{method}` needs the model in eval mode, since dropout or batch normalisation is active in training "
                f"mode; call `model.eval()` first."
            )


def changes_in_training(module: nn.Module) -> bool:
    """Whether a module is in training mode and then does something else: batch normalisation, dropout in any form."""
    if not module.training:
        return False
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.track_running_stats
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    # Attention and stochastic depth keep their rates as plain numbers: `dropout`, `attention_dropout`, `drop_prob`.
    rates = (value for name, value in vars(module).items() if "drop" in name)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def same_state(one: str | None, other: str | None) -> bool:
    """
    Whether two fingerprints may be of one model in one state. A model and its copy in half precision share a half of
    their names; a name that is not known is taken to fit.
    """
    if one is None or other is None or one == other:
        return True
    return any(a == b for a, b in zip(_halves(one), _halves(other), strict=False))


def _halves(name: str) -> tuple[str, ...]:
    # Names with an ending, such as those of quantised copies, are whole or not the same.
    return (name[:16], name[16:]) if len(name) == 32 else ()


def weights_state(model: nn.Module) -> tuple:
    """
    Changes when the weights or the adapters in use do, at next to no cost: where weights lie, and how often they were
    written to. What fused optimisers do, or writing through `.data`, is not counted.
    """
    # A search asks several times. `modules()` and `parameters()` build names and pass through a generator per level,
    # and asking a module for what it lacks composes an error: five times as long as this walk.
    weights, adapters = [], []
    waiting, seen = [model], set()
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for group in (module._parameters, module._buffers):
            for tensor in group.values():
                if tensor is not None:
                    weights.append((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version))
        children = module._modules
        if children:
            waiting += [child for child in children.values() if child is not None]
            # Adapters are beside the layer that they are attached to, which is a module within theirs.
            if not children.keys().isdisjoint(_ORIGINALS) and _is_adapted(module):
                adapters.append(_adapters_in_use(module))
    return tuple(weights), tuple(adapters)


def fingerprint(model: Any) -> str | None:
    """
    32 hexadecimal digits for what the encodings of a [`RiceModel`] depend on, `None` while its weights are offloaded.

    They stand for the settings and, for speed, up to 2,048 evenly spaced numbers of each weight, some of which any
    training step moves: the first 16 with the numbers rounded to bfloat16, the last 16 to float16. A copy in either
    precision so keeps one half; no rounding would give all three one name.
    """
    weights = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    if any(tensor.is_meta for tensor in weights.values()):
        return None
    about: dict[str, Any] = {"settings": _settings(model.config)}
    in_use = {name: _adapters_in_use(module) for name, module in model.named_modules() if _is_adapted(module)}
    if any(in_use.values()):
        about["adapters"] = in_use
    digests = {
        dtype: hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8)
        for dtype in (torch.bfloat16, torch.float16)
    }
    named = {plain: tensor for name, tensor in weights.items() if (plain := _plain_name(name, in_use)) is not None}
    for name, tensor in sorted(named.items()):
        if name.startswith(_TRAINING_WEIGHTS):
            continue
        numbers = tensor.detach().flatten()
        # By way of single precision, as a copy of a double model in half precision may have come about.
        numbers = numbers[:: max(1, len(numbers) // _SAMPLES_PER_WEIGHT)].to("cpu", torch.float32)
        for dtype, digest in digests.items():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(numbers.to(dtype).contiguous().view(torch.int16).numpy().tobytes())
    return "".join(digest.hexdigest() for digest in digests.values())


def _is_adapted(module: nn.Module) -> bool:
    """Whether a layer carries adapters, as PEFT attaches them."""
    return hasattr(module, "disable_adapters") and any(hasattr(module, name) for name in _ORIGINALS)


def _adapters_in_use(module: Any) -> list:
    """The adapters that change what a layer returns, with their scale, in order; none while they are switched off."""
    merged = list(getattr(module, "merged_adapters", []))
    if module.disable_adapters:
        # PEFT takes merged weights apart again at the next forward pass: a state that is about to change.
        return [["merged and switched off", *merged]] if merged else []
    scales = getattr(module, "scaling", {})
    return [[name, scales.get(name)] for name in module.active_adapters if name not in merged]


def _plain_name(name: str, in_use: dict[str, list]) -> str | None:
    """
    What a weight is called without adapters, its own name for an adapter's; `None` for weights that take no part.
    """
    for prefix, adapters in in_use.items():
        rest = name.removeprefix(f"{prefix}.")
        if rest == name:
            continue
        first, _, inner = rest.partition(".")
        if first in _ORIGINALS:
            name = f"{prefix}.{inner}"
        elif not {adapter for adapter, *_ in adapters} & set(inner.split(".")):
            return None
    return name


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
    # A saved config's tuples come back as lists.
    values = {f.name: _as_list(getattr(config, f.name)) for f in fields}
    return {f.name: repr(values[f.name]) for f in fields if values[f.name] != _as_list(f.default)}


def _as_list(value: object) -> object:
    return [_as_list(entry) for entry in value] if isinstance(value, (list, tuple)) else value
