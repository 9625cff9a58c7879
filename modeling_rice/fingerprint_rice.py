"""Fingerprints of models: they decide which encodings may be compared.

Two models have the same fingerprint if three things agree: the settings that encodings depend on, the weights that
encodings depend on (up to a cast to bfloat16 or float16), and the active adapters. Training or eval mode, device,
attention back end, and the settings and weights of losses and score fusion do not matter. An adapter that is switched
off counts as absent. A merged adapter counts as part of its layer's weights.
"""

import dataclasses
import hashlib
import json
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedConfig

from .configuration_rice import RiceConfig

# Fields and weights that no encoding depends on, or that `_settings` adds separately.
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

# A field that only one kind of encodings has.
_OWN_FIELDS = {"gallery": "states", "clips": "keys", "frames": "features"}

# PEFT's names for the layer that adapters are attached to.
_ORIGINALS = ("base_layer", "original_module")


class RiceIdentity(nn.Module):
    """The methods of [`RiceModel`] that identify its state and compare encodings with it."""

    _fingerprint: tuple[tuple, str | None] | None = None
    _settled: str | None = None

    def fingerprint(self) -> str | None:
        """
        32 hexadecimal digits that identify the settings and weights this model's encodings depend on; compare two by
        `same_state`. Training and switching an adapter change the fingerprint. Saving, moving to a device and a cast
        to half precision do not. `None` while weights are offloaded. The results of `encode_gallery` and
        `encode_clips` carry it as `model_fingerprint`.
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
        Freezes the current fingerprint, for a model that is used for inference only. Afterwards a cast to another
        precision, or a conversion of the weights for speed, leaves it unchanged. Real changes of the weights are not
        detected until `train()` is called.

        Args:
            ending: Suffix of the fingerprint, for a model whose encodings differ from the original's, such as a
                quantised one.
        """
        name = self.fingerprint()
        self._settled = None if name is None else name + ending
        return self

    def train(self, mode: bool = True) -> Self:
        """As `torch.nn.Module.train`; also discards the stored fingerprint."""
        if mode:
            self._settled = None
        # A fused optimiser changes weights without raising their version, so nothing is kept from before training.
        self._fingerprint = None
        return super().train(mode)

    def refuse_foreign(self, **encodings: Any) -> None:
        """Raises `ValueError` as [`require_encodings`], and for what another model is known to have encoded."""
        require_encodings(**encodings)
        own = self.fingerprint()
        for name, features in encodings.items():
            if not same_state(own, features.model_fingerprint):
                raise ValueError(
                    f"`{name}` was encoded by another model, or by this one before its weights changed or its "
                    f"adapters were switched (fingerprint {features.model_fingerprint}, this model has {own}); encode "
                    f"it again with this model."
                )

    def require_eval_mode(self, method: str, part: nn.Module | None = None) -> None:
        """
        Raises `ValueError` if training mode would change the results of `method`, or the model while it runs. `part`
        is the part of the model that the method runs; all of it by default.
        """
        if any(changes_in_training(module) for module in (self if part is None else part).modules()):
            raise ValueError(
                f"`{method}` needs the model in eval mode, since dropout or batch normalisation is active in training "
                f"mode; call `model.eval()` first."
            )


def require_encodings(**encodings: Any) -> None:
    """Raises `ValueError` for a `gallery`, `clips` or `frames` that are not encodings of that kind."""
    for name, features in encodings.items():
        # By a field, since the classes of remote code are others than those of the package.
        if not hasattr(features, _OWN_FIELDS[name]):
            kind = type(features).__name__
            raise ValueError(f"`{name}` is a {kind}; give what `encode_{name}` of this model returns.")


def changes_in_training(module: nn.Module) -> bool:
    """Whether a module is in training mode and acts differently there: batch normalisation, or any dropout."""
    if not module.training:
        return False
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.track_running_stats
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    # Attention and stochastic depth store their rates as plain floats: `dropout`, `attention_dropout`, `drop_prob`.
    rates = (value for name, value in vars(module).items() if "drop" in name)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def same_state(one: str | None, other: str | None) -> bool:
    """
    Whether two fingerprints may belong to one model in one state. A model and its copy in half precision share half
    of their digits. `None`, an unknown fingerprint, matches any other.
    """
    if one is None or other is None or one == other:
        return True
    return any(a == b for a, b in zip(_halves(one), _halves(other), strict=False))


def _halves(name: str) -> tuple[str, ...]:
    # Fingerprints with an ending, such as those of quantised copies, have no halves and must be equal.
    return (name[:16], name[16:]) if len(name) == 32 else ()


def weights_state(model: nn.Module) -> tuple:
    """
    A value that changes with the weights or the active adapters, and is cheap to compute: the addresses of the
    weights and their version counters. Changes by fused optimisers or through `.data` are not detected.
    """
    # Every search calls this several times. `modules()` and `parameters()` take five times as long: they build names,
    # use a generator per level, and looking up a missing attribute of a module composes an error message.
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
            # PEFT's module holds the adapters and, as a child, the layer that they are attached to.
            if not children.keys().isdisjoint(_ORIGINALS) and _is_adapted(module):
                adapters.append(_adapters_in_use(module))
    return tuple(weights), tuple(adapters)


def fingerprint(model: Any) -> str | None:
    """
    32 hexadecimal digits that identify everything the encodings of a [`RiceModel`] depend on; `None` while its weights
    are offloaded.

    They are hashes of the settings and, for speed, of up to 2,048 evenly spaced values of each weight; a training step
    changes some of these. The first 16 digits hash the values rounded to bfloat16, the last 16 those rounded to
    float16. A copy in either precision therefore keeps one half. No single rounding would give all three copies the
    same hash.
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
        # Through single precision, as when a double-precision model was cast to half precision via float32.
        numbers = numbers[:: max(1, len(numbers) // _SAMPLES_PER_WEIGHT)].to("cpu", torch.float32)
        for dtype, digest in digests.items():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(numbers.to(dtype).contiguous().view(torch.int16).numpy().tobytes())
    return "".join(digest.hexdigest() for digest in digests.values())


def _is_adapted(module: nn.Module) -> bool:
    """Whether a layer carries adapters, as PEFT attaches them."""
    return hasattr(module, "disable_adapters") and any(hasattr(module, name) for name in _ORIGINALS)


def _adapters_in_use(module: Any) -> list:
    """The adapters that change a layer's output, with their scale, in order; none while they are switched off."""
    merged = list(getattr(module, "merged_adapters", []))
    if module.disable_adapters:
        # PEFT unmerges the weights at the next forward pass, so this state is temporary.
        return [["merged and switched off", *merged]] if merged else []
    scales = getattr(module, "scaling", {})
    return [[name, scales.get(name)] for name in module.active_adapters if name not in merged]


def _plain_name(name: str, in_use: dict[str, list]) -> str | None:
    """
    Name of a weight in the model without adapters. An adapter's weight keeps its name; one not in use gets `None`.
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
    """A config's own fields that differ from their default; so new fields of later versions change no fingerprint."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    fields = [field for field in dataclasses.fields(config) if field.name not in common]
    # Tuples of a saved config are loaded as lists.
    values = {f.name: _as_list(getattr(config, f.name)) for f in fields}
    return {f.name: repr(values[f.name]) for f in fields if values[f.name] != _as_list(f.default)}


def _as_list(value: object) -> object:
    return [_as_list(entry) for entry in value] if isinstance(value, (list, tuple)) else value
