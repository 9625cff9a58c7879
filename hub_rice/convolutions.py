"""Speeds up convolutional encoders for inference: folds batch norms and uses the channels-last memory format."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_SIDE = 64
_TOLERANCE = 1e-3


@torch.no_grad()
def speed_up(model: Any) -> int:
    """
    Speeds up the encoder of a [`RiceModel`] in place; an encoder without batch norms is left unchanged. Outputs are
    the same up to rounding, which is checked on a random image. The model keeps its fingerprint.

    Args:
        model: In eval mode, float32; to be used for inference only afterwards.

    Returns:
        Number of batch norms that were folded into the convolution before them.
    """
    encoder = model.vision_model
    if not any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules()):
        return 0
    model.settle()
    size = getattr(model.layout, "image_size", None) or (_SIDE, _SIDE)
    picture = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(model.device)
    before = model._encoder_output(picture).features
    originals = _fold(encoder)
    after = model._encoder_output(picture).features
    if (after - before).abs().max() > _TOLERANCE * before.abs().max().clamp(min=1.0):
        # In this network a norm does not directly follow the convolution that is registered before it.
        for parent, name, module in originals:
            setattr(parent, name, module)
        originals = []
    encoder.to(memory_format=torch.channels_last)
    return len(originals) // 2


def _fold(encoder: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Folds each norm that is registered right after a convolution of its width; returns the replaced modules."""
    originals = []
    for parent in list(encoder.modules()):
        children = list(parent.named_children())
        for (first, conv), (second, norm) in zip(children, children[1:]):
            if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
                continue
            if conv.out_channels != norm.num_features or norm.running_mean is None:
                continue
            originals += [(parent, first, conv), (parent, second, norm)]
            setattr(parent, first, fuse_conv_bn_eval(conv, norm))
            # timm's norms include their activation.
            rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
            setattr(parent, second, nn.Sequential(*rest))
    return originals
