"""Pools the patches of a frame into its feature, weighted by a box mask or by a learnt saliency."""

import math

import torch
from torch import Tensor, nn

from .configuration_rice import RiceConfig


class RiceSaliencyScore(nn.Linear):
    """A linear layer. It has its own class so that `RiceModel._init_weights` can set it to zero."""


class RicePatchSaliency(nn.Module):
    """
    Saliency of each patch of a frame, that is how much it shows the intended product, learnt from the contrastive loss
    alone: a LayerNorm, a linear layer and a sigmoid on the encoder's last hidden states. Initial weights are equal, so
    that training can continue from a model with the mean over patches.
    """

    def __init__(self, config: RiceConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.vision_hidden_size)
        self.score = RiceSaliencyScore(config.vision_hidden_size, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """Patches `(n, P, W)` -> weights `(n, P)` in 0..1."""
        return self.score(self.norm(patches)).squeeze(-1).sigmoid()


def resize_patch_mask(patch_mask: Tensor, num_patches: int) -> Tensor:
    """
    Resizes a patch mask to the grid of the encoder's output.

    Args:
        patch_mask (`(..., P')`): Bool or 0..1, on a square grid.
        num_patches: Number P of patches of the encoder's output, also a square grid.

    Returns:
        `(..., P)` float: the fraction of each patch's area that the mask keeps, 0..1.

    Raises:
        ValueError: for grids that are not square.
    """
    mask = patch_mask if patch_mask.is_floating_point() else patch_mask.float()
    if mask.shape[-1] == num_patches:
        return mask
    given, wanted = math.isqrt(mask.shape[-1]), math.isqrt(num_patches)
    if given**2 != mask.shape[-1] or wanted**2 != num_patches:
        raise ValueError(
            f"`patch_mask` has {mask.shape[-1]} patches per frame and the encoder {num_patches}, which are not both "
            f"square grids; give square images and masks."
        )
    grid = nn.functional.interpolate(mask.reshape(-1, 1, given, given), size=(wanted, wanted), mode="area")
    return grid.reshape(*mask.shape[:-1], num_patches)


def pool_patches(patches: Tensor, weights: Tensor | None) -> Tensor:
    """Mean `(n, W)` of patches `(n, P, W)`, weighted by `(n, P)` of at least 0; zero if all weights are 0."""
    if weights is None:
        return patches.mean(dim=1)
    weights = weights[..., None].to(patches.dtype)
    return (patches * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=torch.finfo(patches.dtype).tiny)
