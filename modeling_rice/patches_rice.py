"""Weights of patches: box masks, and a learnt saliency."""

import math

from torch import Tensor, nn

from .configuration_rice import RiceConfig
from .features_rice import require_tensor


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


def check_patch_mask(pixel_values: Tensor, patch_mask: Tensor | None) -> Tensor | None:
    """
    The patch mask `(n, P)` of `n` images or frames as bool.

    Raises:
        ValueError: for a mask that is not a tensor, or has another number of rows or axes.
    """
    if patch_mask is None:
        return None
    count = require_tensor("pixel_values", pixel_values).shape[0]
    if require_tensor("patch_mask", patch_mask).dim() != 2 or patch_mask.shape[0] != count:
        raise ValueError(f"`patch_mask` must be (n, P) with n = {count} images, got shape {tuple(patch_mask.shape)}.")
    return patch_mask.bool()
