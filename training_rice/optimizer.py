"""The optimiser settings of the older official code, for comparison with its figures.

They differ from AdamW with the Trainer's cosine schedule in three ways. There is no bias correction: relative to AdamW
with the same betas, the first step is 0.7 times as long, the fourteenth 1.55 times, and steps after two hundred are
equal. Weight decay applies to everything except biases, so also to norms and embeddings. The cosine counts from the
first step, and a line replaces it during warm-up.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable

import torch
from torch import nn

from modeling_rice import RiceModel

_ENCODER = "vision_model."


class BertAdam(torch.optim.Optimizer):
    """
    Adam without bias correction, with decoupled weight decay: `p -= lr * (m / (sqrt(v) + eps) + weight_decay * p)`.

    Clip gradients by their global norm before the step. The official class also clips each parameter to norm 1. This
    is left out, because it has no effect after a global clip to 1.

    Args:
        params: Parameters or parameter groups, as for every optimiser.
        lr: Learning rate, >= 0; the schedule multiplies it.
        betas: Decay of the first and second moment, each in 0..1 (1 excluded).
        eps: Added to the root of the second moment.
        weight_decay: >= 0.

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.2,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {value}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"`betas` must be in 0..1 (1 excluded), got {betas}.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One update; `closure` re-evaluates the loss, as for every optimiser."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for p in parameters:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            gradients = [p.grad for p in parameters]
            first = [self.state[p]["exp_avg"] for p in parameters]
            second = [self.state[p]["exp_avg_sq"] for p in parameters]
            beta1, beta2 = group["betas"]
            torch._foreach_lerp_(first, gradients, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)
            scale = torch._foreach_sqrt(second)
            torch._foreach_add_(scale, group["eps"])
            # The decay uses the weights before the step.
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_addcdiv_(parameters, first, scale, value=-group["lr"])
        return loss


def warmup_cosine(step: int, total_steps: int, warmup: float = 0.1) -> float:
    """
    Factor of the learning rate, for `torch.optim.lr_scheduler.LambdaLR`.

    Args:
        step: Number of updates so far; the first update has factor 0.
        total_steps: Number of updates of the whole training.
        warmup: Share of updates with a linear rise. The cosine counts from step 0, so at the end of a warm-up of 0.1
            the factor drops from 1 to 0.976.
    """
    progress = step / max(1, total_steps)
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    vision_learning_rate: float,
    weight_decay: float,
    is_vision: Callable[[str], bool],
    is_decayed: Callable[[str], bool],
    rate_factor: Callable[[str], float] = lambda name: 1.0,
) -> list[dict]:
    """
    Parameter groups for an optimiser: encoder and rest, each with and without decay, and one per factor of the
    learning rate. Frozen parameters are left out.

    Args:
        model: Model whose parameters are grouped.
        learning_rate, vision_learning_rate: Learning rates of the rest and of the encoder.
        weight_decay: Weight decay of the decayed parameters; the others have 0.
        is_vision, is_decayed, rate_factor: Functions of a parameter's name.
    """
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((is_vision(name), is_decayed(name), rate_factor(name)), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": factor * (vision_learning_rate if vision else learning_rate),
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (vision, decayed, factor), parameters in groups.items()
    ]


def layer_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """
    Factors of the learning rate that decrease from layer to layer towards the encoder's input (as in the fine-tuning
    of BEiT, ICLR 2022): `decay` for the last of L layers, `decay ** L` for the first, `decay ** (L + 1)` for the
    embeddings before it, and 1 for modules after the layers and outside the encoder.

    Args:
        model: A model with a `vision_model` whose layers are numbered, as in all encoders of transformers. In staged
            encoders (Swin, ResNet) a stage is a layer.
        decay: Decay in 0..1, 0 excluded.

    Returns:
        Parameter name -> factor.

    Raises:
        ValueError: the encoder has no numbered layers.
    """
    names = [name for name, _ in model.named_parameters()]
    numbers = {name: _layer_number(name) for name in names if name.startswith(_ENCODER)}
    found = [number for number in numbers.values() if number is not None]
    if not found:
        raise ValueError(
            f"layer_decay: the layers of {type(model.vision_model).__name__} are not numbered; leave it out."
        )
    last, reached, factors = max(found), False, {}
    for name in names:
        number = numbers.get(name)
        reached = reached or number is not None
        if not name.startswith(_ENCODER) or (number is None and reached):
            factors[name] = 1.0
        else:
            factors[name] = decay ** (last + 1 - (-1 if number is None else number))
    return factors


def _layer_number(name: str) -> int | None:
    match = re.search(r"\.(?:layers?|blocks?|stages)\.(\d+)\.", name)
    return int(match[1]) if match else None


def published_parameter_groups(
    model: nn.Module, learning_rate: float = 3e-4, vision_learning_rate: float = 3e-7, weight_decay: float = 0.2
) -> list[dict]:
    """
    Parameter groups of the older recipe: a thousandth of the learning rate for the encoder and its projection, and
    weight decay for all parameters except biases. Frozen parameters are left out; the recipe freezes [`VISION_STEM`].
    """
    return parameter_groups(
        model,
        learning_rate,
        vision_learning_rate,
        weight_decay,
        is_vision=lambda name: name.startswith(("vision_model.", "visual_projection.")),
        is_decayed=lambda name: "bias" not in name,
    )


# Frozen in the older recipe: the patch, class and position embeddings of a CLIP encoder and the norm after them.
VISION_STEM = ("vision_model.embeddings", "vision_model.pre_layrnorm")


def freeze(model: nn.Module, prefixes: Iterable[str]) -> list[nn.Module]:
    """
    Excludes weights from training.

    Args:
        model: The model.
        prefixes: Names of modules or weights; a name includes everything below it.

    Returns:
        The modules that are completely frozen. Keep them in eval mode, or their batch norms would still change.

    Raises:
        ValueError: the model has no module or weight of a name.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    frozen = []
    for prefix in prefixes:
        if prefix in modules:
            modules[prefix].requires_grad_(False)
            frozen.append(modules[prefix])
        elif prefix in parameters:
            parameters[prefix].requires_grad_(False)
        else:
            close = difflib.get_close_matches(prefix, [*modules, *parameters], n=1)
            raise ValueError(
                f"freeze: the model has no {prefix!r}" + (f"; did you mean {close[0]!r}?" if close else ".")
            )
    return frozen


def unfreeze_last_stage(model: RiceModel) -> list[nn.Module]:
    """
    Makes the last stage of a frozen encoder trainable. Its batch norms keep their statistics, because images and clips
    pass through it one after the other, and alternating statistics would fit neither.

    Returns:
        The modules to set to training mode, including nested ones.

    Raises:
        ValueError: the last stage of the encoder cannot run separately.
    """
    stage, encoder = model.split_last_stage(), model.vision_model
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or stage.owns(name))
    return [
        module
        for name, module in encoder.named_modules()
        if stage.owns(name) and not isinstance(module, nn.modules.batchnorm._NormBase)
    ]
