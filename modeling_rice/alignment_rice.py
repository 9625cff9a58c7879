"""
Cross-view alignment without training: every patch of an image looks for its like among a clip's, and the other way
round. This is the late interaction of ColBERT and ColPali, MaxSim, in both directions, on whitened patches of a frozen
encoder.
"""

import torch
from torch import Tensor, nn

# Bytes of cosines held at a time: what stays in a core's cache, and what keeps a GPU busy.
_MEMORY = {"cpu": 2**20, "cuda": 2**30}


class RiceAlignment(nn.Module):
    """
    What the statistics of a shop's pictures, and of clips' frames where there are any, make of an encoder's outputs.
    Nothing in it is trained; its buffers are filled by `fit`.

    Args:
        patch_width: Width C of the encoder's patches at the chosen stage.
        rank: Width R of the patches that are compared; C where that is less.
        embed_width: Width D of the global feature.
    """

    def __init__(self, patch_width: int, rank: int, embed_width: int):
        super().__init__()
        self.register_buffer("patch_mean", torch.zeros(patch_width))
        self.register_buffer("patch_projection", torch.eye(patch_width, min(rank, patch_width)))
        self.register_buffer("image_mean", torch.zeros(embed_width))
        self.register_buffer("video_mean", torch.zeros(embed_width))

    def fit(self, images: "ViewStatistics", frames: "ViewStatistics", strength: float, shrinkage: float) -> str | None:
        """
        Fills the buffers from unlabelled pictures and frames.

        Patches of both views are whitened by the statistics of frames alone where there are any: in a shop's pictures,
        which are mostly products cut out before white, the background outweighs the products.

        Args:
            images, frames: Of the two views; a view of fewer than two pictures has no statistics.
            strength, shrinkage: As in [`whitening`].

        Returns:
            One sentence that says what is done without, or `None`.

        Raises:
            ValueError: when there is neither a picture nor a frame.
        """
        if not images.count and not frames.count:
            raise ValueError("There is no picture to take statistics from; give at least one.")
        self.image_mean.zero_()
        self.video_mean.zero_()
        seen = [view for view in (frames, images) if view.count > 1]
        if not seen:
            whole = images if images.count else frames
            # Axes still have to be chosen where the rank is lower than the width.
            self.patch_mean.zero_()
            self.patch_projection.copy_(whitening(whole.patches.second_moment(), self.patch_projection.shape[1], 0, 0))
            return "One picture has no statistics: embeddings are not centred, and patches are not whitened."
        patches = seen[0].patches
        self.patch_mean.copy_(patches.mean())
        self.patch_projection.copy_(
            whitening(patches.covariance(), self.patch_projection.shape[1], strength, shrinkage)
        )
        if len(seen) == 1:
            # Both views less the mean of one would move apart.
            return "Embeddings are not centred, which takes two pictures and two frames."
        self.image_mean.copy_(images.mean())
        self.video_mean.copy_(frames.mean())
        return None

    def project(self, patches: Tensor) -> Tensor:
        """Patches `(..., C)` of either view -> `(..., R)`, whitened and L2-normalised."""
        return nn.functional.normalize((patches - self.patch_mean) @ self.patch_projection, dim=-1)

    def center(self, features: Tensor, is_clip: bool) -> Tensor:
        """Global features `(..., D)` of one view -> the same less their view's mean, L2-normalised."""
        return nn.functional.normalize(features - (self.video_mean if is_clip else self.image_mean), dim=-1)


class PatchStatistics:
    """
    Mean and covariance of patches that come batch by batch, summed up in float64.

    Args:
        width: Width C of a patch.
    """

    def __init__(self, width: int):
        self.count = 0
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._products = torch.zeros(width, width, dtype=torch.float64)

    def update(self, patches: Tensor) -> None:
        """Adds patches `(..., C)`."""
        patches = patches.detach().reshape(-1, len(self._sum)).to("cpu", torch.float64)
        self.count += len(patches)
        self._sum += patches.sum(dim=0)
        self._products += patches.T @ patches

    def mean(self) -> Tensor:
        """`(C,)` float64."""
        return self._sum / max(self.count, 1)

    def second_moment(self) -> Tensor:
        """`(C, C)` float64, about zero."""
        return self._products / max(self.count, 1)

    def covariance(self) -> Tensor:
        """`(C, C)` float64, of the population."""
        mean = self.mean()
        return self.second_moment() - mean[:, None] * mean


class ViewStatistics:
    """
    What one view, shop pictures or frames, has been seen to look like.

    Args:
        patch_width: Width C of the encoder's patches at the chosen stage.
        embed_width: Width D of the global feature.

    Attributes:
        count: Pictures or frames seen.
        patches: Statistics of theirs.
    """

    def __init__(self, patch_width: int, embed_width: int):
        self.count = 0
        self.patches = PatchStatistics(patch_width)
        self._sum = torch.zeros(embed_width, dtype=torch.float64)

    def update(self, patches: Tensor, features: Tensor) -> None:
        """Adds pictures or frames: patches `(n, P, C)` and global features `(n, D)`."""
        self.count += len(features)
        self.patches.update(patches)
        self._sum += features.detach().to("cpu", torch.float64).sum(dim=0)

    def mean(self) -> Tensor:
        """Of the global features, `(D,)` float64."""
        return self._sum / max(self.count, 1)


def whitening(covariance: Tensor, rank: int, strength: float, shrinkage: float) -> Tensor:
    """
    The projection that turns patches onto their principal axes and evens out how much they vary along these.

    Args:
        covariance: `(C, C)`, symmetric.
        rank: R, axes kept, those along which patches vary most.
        strength: 0 only turns, 1 gives every axis the same variance (ZCA and PCA whitening, up to a rotation); an
            axis is divided by its standard deviation to this power.
        shrinkage: Share in 0..1 of the mean variance that every axis is given before, so that axes which the
            statistics hardly saw are not blown up.

    Returns:
        `(C, R)` in the covariance's precision.
    """
    variances, axes = torch.linalg.eigh(covariance)
    variances, axes = variances.clamp(min=0).flip(0)[:rank], axes.flip(1)[:, :rank]
    shrunk = (1 - shrinkage) * variances + shrinkage * covariance.diagonal().mean()
    # No variance at all along an axis, and no shrinkage: nothing to even out.
    scale = torch.where(shrunk > 0, shrunk, torch.ones_like(shrunk)) ** (-strength / 2)
    return axes * scale


@torch.no_grad()
def align_patches(
    image_patches: Tensor, video_patches: Tensor, video_mask: Tensor | None = None, max_memory: int | None = None
) -> Tensor:
    """
    Late interaction of every clip with every image: the mean over an image's patches of their best cosine with any
    patch of the clip, plus the maximum over frames of the mean over the frame's patches of their best cosine with any
    patch of the image. Memory is bounded whatever the sizes, masked patches cost nothing, and no gradient is kept.

    Args:
        image_patches (`(n, P, R)`): L2-normalised, of any floating type.
        video_patches (`(c, T, Q, R)`): L2-normalised; cosines are computed in their type, means in float32.
        video_mask (`(c, T, Q)` bool, *optional*): `True` = real: `frame_mask[..., None]`, a patch mask, or both. A
            frame without a real patch does not count, and a clip without one scores 0.
        max_memory: Bytes of the cosines held at a time, at least those of one image; by default what suits the device.

    Returns:
        `(c, n)` float32 in -2..2.

    Raises:
        ValueError: when the two widths differ.
    """
    if image_patches.shape[-1] != video_patches.shape[-1]:
        raise ValueError(
            f"The patches of images have width {image_patches.shape[-1]} and those of clips "
            f"{video_patches.shape[-1]}; encode both with one model."
        )
    if video_mask is None:
        video_mask = torch.ones(video_patches.shape[:3], dtype=torch.bool, device=video_patches.device)
    rows = [
        _align_clip(image_patches, patches, mask.expand(patches.shape[:2]), max_memory)
        for patches, mask in zip(video_patches, video_mask, strict=True)
    ]
    return torch.stack(rows) if rows else image_patches.new_zeros(0, len(image_patches), dtype=torch.float32)


def _align_clip(image_patches: Tensor, patches: Tensor, mask: Tensor, max_memory: int | None) -> Tensor:
    """One clip `(T, Q, R)` with its mask `(T, Q)` -> `(n,)`."""
    lengths = mask.sum(dim=1)
    frames = torch.arange(len(mask), device=mask.device)[lengths > 0]
    if not len(frames) or not len(image_patches):
        return patches.new_zeros(len(image_patches), dtype=torch.float32)
    # Means over frames of unlike lengths, as one matrix product.
    frame_of_patch = frames.repeat_interleave(lengths[frames])
    weights = (frame_of_patch[:, None] == frames).float() / lengths[frames]
    patches = patches[mask]
    max_memory = max_memory or _MEMORY.get(patches.device.type, _MEMORY["cuda"])
    num_images = max(1, max_memory // (image_patches.shape[1] * len(patches) * patches.itemsize))
    # One piece of memory for all products: new pages would cost as much as the maxima.
    products = patches.new_empty(min(num_images, len(image_patches)) * image_patches.shape[1], len(patches))
    scores = []
    for images in image_patches.split(num_images):
        cosines = products[: images[..., 0].numel()]
        torch.mm(images.to(patches.dtype).flatten(0, 1), patches.T, out=cosines)
        cosines = cosines.unflatten(0, images.shape[:2])
        frame_scores = _largest(cosines, dim=1) @ weights
        scores.append(_largest(cosines, dim=2).mean(dim=1) + frame_scores.amax(dim=1))
    return torch.cat(scores)


def _largest(cosines: Tensor, dim: int) -> Tensor:
    """`amax` in float32. A CPU compares whole numbers several times as fast, and bits order numbers from 0 upwards."""
    if cosines.device.type == "cpu" and cosines.itemsize < 8:
        largest = cosines.view(torch.int32 if cosines.itemsize == 4 else torch.int16).amax(dim)
        # Otherwise there was none from 0 upwards somewhere.
        if not (largest < 0).any():
            return largest.view(cosines.dtype).float()
    return cosines.amax(dim).float()
