"""
Cross-view alignment without trained parameters: each patch of an image is compared with its most similar patch of the
clip, and vice versa. This is the late interaction (MaxSim) of ColBERT and ColPali in both directions, on whitened
patches of an encoder.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .features_rice import require_pairs
from .loss_rice import l2_normalize

# Bytes of cosines held at a time: what fits into the cache of a CPU core, and what keeps a GPU busy.
_MEMORY = {"cpu": 2**20, "cuda": 2**30}
# Minimum number of images whose scores are computed together; one by one would cost more than the maxima.
_IMAGES_TOGETHER = 32
# Weight, in pictures, of the prior "no statistics" against a shop's pictures. Frames need no prior: a few of them
# already show the backgrounds that all have in common.
_SHOP_PRIOR = 8


class RiceAlignment(nn.Module):
    """
    Centring of embeddings and whitening of patches, by the statistics of a shop's pictures and, if given, of frames of
    clips. It has no trained parameters; `fit` fills its buffers.

    Args:
        patch_width: Width C of the encoder's patches at the chosen stage.
        rank: Width R of the compared patch vectors, at most C.
        embed_width: Width D of the global feature.
    """

    def __init__(self, patch_width: int, rank: int, embed_width: int):
        super().__init__()
        self.register_buffer("patch_mean", torch.empty(patch_width))
        self.register_buffer("patch_projection", torch.empty(patch_width, min(rank, patch_width)))
        self.register_buffer("image_mean", torch.empty(embed_width))
        self.register_buffer("video_mean", torch.empty(embed_width))
        for name, value in self.starting_buffers().items():
            getattr(self, name).copy_(value)

    def starting_buffers(self) -> dict[str, Tensor]:
        """Buffers before fitting: patches are not whitened, and embeddings are not centred."""
        buffers = {name: torch.zeros(buffer.shape) for name, buffer in self.named_buffers()}
        return buffers | {"patch_projection": torch.eye(*self.patch_projection.shape)}

    def fit(
        self,
        images: "ViewStatistics",
        frames: "ViewStatistics",
        strength: float,
        shrinkage: float,
        center: bool = True,
    ) -> str | None:
        """
        Fills the buffers from unlabelled pictures and frames.

        If there are frames, the patches of both views are whitened by the statistics of frames alone, because in a
        shop's pictures, mostly products on white, the background outweighs the products. Without frames the statistics
        of the pictures are used. A few pictures say little about others, so mean and strength are reduced for a small
        number of pictures.

        Args:
            images, frames: Statistics of the two views; a view needs at least two pictures.
            strength, shrinkage: As in [`whitening`].
            center: `False` leaves the means of the embeddings unchanged.

        Returns:
            One sentence about missing statistics, or `None`.

        Raises:
            ValueError: if there is neither a picture nor a frame, or the encoder's outputs are not finite.
        """
        if not images.count and not frames.count:
            raise ValueError("There is no picture to take statistics from; give at least one.")
        for view in (images, frames):
            if not (view.mean().isfinite().all() and view.patches.second_moment().isfinite().all()):
                raise ValueError(
                    "The encoder gives numbers that are not finite, so its weights are damaged; save it again."
                )
        view, prior = (frames, 0) if frames.count > 1 or not images.count else (images, _SHOP_PRIOR)
        # One picture has no statistics, but the axes must still be chosen if the rank is below the width.
        trust = view.count / (view.count + prior) if view.count > 1 else 0.0
        mean = view.patches.mean()
        moment = view.patches.covariance() + (1 - trust) ** 2 * mean[:, None] * mean
        # Before the first change, because the decomposition may fail.
        projection = whitening(moment, self.patch_projection.shape[1], trust * strength, shrinkage)
        self.patch_mean.copy_(trust * mean)
        self.patch_projection.copy_(projection)
        if not center:
            return None
        self.image_mean.zero_()
        self.video_mean.zero_()
        if view.count < 2:
            return "One picture has no statistics: embeddings are not centred, and patches are not whitened."
        if images.count < 2 or frames.count < 2:
            # With the mean of one view only, the two views would move apart.
            return "Embeddings are not centred, since this needs at least two pictures and two frames of clips."
        self.image_mean.copy_(images.mean())
        self.video_mean.copy_(frames.mean())
        return None

    def project(self, patches: Tensor) -> Tensor:
        """Patches `(..., C)` of either view -> `(..., R)`, whitened and L2-normalised."""
        # The scales of the axes differ too much for half precision, also under autocast.
        patches, mean, projection = (t.float() for t in (patches, self.patch_mean, self.patch_projection))
        with torch.autocast(patches.device.type, enabled=False):
            return l2_normalize((patches - mean) @ projection)

    def center(self, features: Tensor, is_clip: bool) -> Tensor:
        """Global features `(..., D)` of one view minus the mean of the view."""
        mean = self.video_mean if is_clip else self.image_mean
        return features - mean.to(features.dtype)


class RiceAlignmentSide:
    """The methods of [`RiceModel`] that fit and apply [`RiceAlignment`]."""

    # Attributes of the model.
    alignment: Any
    device: Any
    training: bool
    require_eval_mode: Any
    _encoder_output: Any
    _from_states: Any

    @torch.no_grad()
    def fit_alignment(
        self, images: Iterable[Tensor], frames: Iterable[Tensor] = (), center: bool = True
    ) -> str | None:
        """
        Fits centring and whitening to unlabelled pictures, with `config.alignment_strength` and
        `config.alignment_shrinkage`. Earlier encodings cannot be compared with later ones. Call in eval mode.

        Args:
            images: Batches `(n, 3, H, W)` of the shop's pictures, preprocessed.
            frames: Batches `(n, 3, H, W)` of frames of clips, preprocessed.
            center: `False` whitens patches only, for trained embeddings, which need no centring.

        Returns:
            As [`RiceAlignment.fit`].

        Raises:
            ValueError: if the model has no alignment, or there is no picture; in training mode if that changes
                encodings.
        """
        if self.alignment is None:
            raise ValueError("This model has no alignment to fit; set `alignment_weight` in its config.")
        self.require_eval_mode("fit_alignment")
        views = []
        for batches, is_clip in ((images, False), (frames, True)):
            views.append(ViewStatistics(len(self.alignment.patch_mean), len(self.alignment.image_mean)))
            for pixel_values in batches:
                states = self._encoder_output(pixel_values.to(self.device))
                views[-1].update(states.patches, self._from_states(states, is_clip=is_clip)[1])
        return self.alignment.fit(*views, self.config.alignment_strength, self.config.alignment_shrinkage, center)

    def _centred(self, features: Tensor, is_clip: bool) -> Tensor:
        """Global features `(..., D)` of one view; in a model with alignment minus the mean of the view."""
        return features if self.alignment is None else self.alignment.center(features, is_clip)

    def _aligned(self, patches: Tensor) -> Tensor | None:
        """The encoder's patches `(n, P, C)` -> patches for `align` `(n, P, R)`; `None` in training."""
        return None if self.alignment is None or self.training else self.alignment.project(patches)

    @torch.no_grad()
    def alignment_maps(self, pixel_values: Tensor, pixel_values_videos: Tensor, **batch) -> Tensor:
        """
        Cosines of all patch pairs, for image i with clip i; `align` takes the maxima of these.

        Args:
            pixel_values (`(B, 3, H, W)`), pixel_values_videos (`(B, T, 3, H, W)`): As in `forward`.
            batch: Other keys of a batch, as in `forward`.

        Returns:
            Cosines `(B, P, T, Q)` in -1..1 of each image patch with each patch of the clip; -1 for masked patches and
            padded frames.

        Raises:
            ValueError: if the model has no alignment, or images and clips differ in number.
        """
        if self.alignment is None:
            raise ValueError("This model has no alignment, so it has no maps of it; make one with `rice init`.")
        require_pairs(pixel_values, pixel_values_videos)
        gallery = self.encode_gallery(pixel_values)
        clips = self.encode_clips(pixel_values_videos, **batch)
        cosines = torch.einsum("bpr,btqr->bptq", gallery.patches.float(), clips.patches.float())
        return cosines.masked_fill(~clips.patch_mask[:, None], -1.0)


class PatchStatistics:
    """
    Mean and covariance of patches, accumulated batch by batch in float64.

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
        """Mean `(C,)`, float64."""
        return self._sum / max(self.count, 1)

    def second_moment(self) -> Tensor:
        """Second moment about zero `(C, C)`, float64."""
        return self._products / max(self.count, 1)

    def covariance(self) -> Tensor:
        """Population covariance `(C, C)`, float64."""
        mean = self.mean()
        return self.second_moment() - mean[:, None] * mean


class ViewStatistics:
    """
    Statistics of one view, that is of shop pictures or of frames.

    Args:
        patch_width: Width C of the encoder's patches at the chosen stage.
        embed_width: Width D of the global feature.

    Attributes:
        count: Number of pictures or frames so far.
        patches: Statistics of their patches.
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
        """Mean of the global features `(D,)`, float64."""
        return self._sum / max(self.count, 1)


def whitening(covariance: Tensor, rank: int, strength: float, shrinkage: float) -> Tensor:
    """
    The projection of patches onto their principal axes, with the variances along the axes equalised.

    Args:
        covariance (`(C, C)`): Symmetric.
        rank: Number R of axes kept, those with the largest variance.
        strength: Each axis is divided by its standard deviation to this power. 0 is a rotation only, 1 gives all axes
            the same variance (PCA whitening, which is ZCA up to a rotation).
        shrinkage: How far variances are first moved towards their mean, 0..1, so that axes with little variance are
            not amplified too much.

    Returns:
        `(C, R)` in the precision of the covariance.
    """
    variances, axes = torch.linalg.eigh(covariance)
    variances, axes = variances.clamp(min=0).flip(0)[:rank], axes.flip(1)[:, :rank]
    shrunk = (1 - shrinkage) * variances + shrinkage * covariance.diagonal().mean()
    # Axes without any variance are not scaled.
    scale = torch.where(shrunk > 0, shrunk, torch.ones_like(shrunk)) ** (-strength / 2)
    return axes * scale


@torch.no_grad()
def align_patches(
    image_patches: Tensor, video_patches: Tensor, video_mask: Tensor | None = None, max_memory: int | None = None
) -> Tensor:
    """
    Late interaction (MaxSim) of every clip with every image. The score is the sum of two terms: the mean over an
    image's patches of their best cosine with any patch of the clip, and the maximum over frames of the mean over the
    frame's patches of their best cosine with any patch of the image. Memory is bounded, masked patches cost nothing,
    and there is no gradient.

    Args:
        image_patches (`(n, P, R)`): L2-normalised, of any floating type.
        video_patches (`(c, T, Q, R)`): L2-normalised; cosines are computed in their type, means in float32.
        video_mask (`(c, T, Q)` bool, *optional*): `True` = real patch: `frame_mask[..., None]`, a patch mask, or both
            combined. A frame without real patches is ignored, and a clip without any scores 0.
        max_memory: Bytes of cosines held at a time, at least those of one image; by default what suits the device.

    Returns:
        `(c, n)` float32 in -2..2.

    Raises:
        ValueError: if the two widths differ.
    """
    if image_patches.shape[-1] != video_patches.shape[-1]:
        raise ValueError(
            f"The patches of images have width {image_patches.shape[-1]} and those of clips "
            f"{video_patches.shape[-1]}; encode both with one model."
        )
    if video_mask is None:
        video_mask = torch.ones(video_patches.shape[:3], dtype=torch.bool, device=video_patches.device)
    # Autocast would compute the means in half precision, which makes ties.
    with torch.autocast(video_patches.device.type, enabled=False):
        rows = [
            _align_clip(image_patches, patches, mask.expand(patches.shape[:2]), max_memory)
            for patches, mask in zip(video_patches, video_mask, strict=True)
        ]
    return torch.stack(rows) if rows else image_patches.new_zeros(0, len(image_patches), dtype=torch.float32)


def _align_clip(image_patches: Tensor, patches: Tensor, mask: Tensor, max_memory: int | None) -> Tensor:
    """Scores `(n,)` of one clip `(T, Q, R)` with its mask `(T, Q)`."""
    lengths = mask.sum(dim=1)
    frames = torch.arange(len(mask), device=mask.device)[lengths > 0]
    if not len(frames) or not len(image_patches):
        return patches.new_zeros(len(image_patches), dtype=torch.float32)
    # Means over frames with different numbers of patches, as one matrix product.
    frame_of_patch = frames.repeat_interleave(lengths[frames])
    weights = (frame_of_patch[:, None] == frames).float() / lengths[frames]
    patches = patches[mask]
    max_memory = max_memory or _MEMORY.get(patches.device.type, _MEMORY["cuda"])
    num_images = max(1, max_memory // (image_patches.shape[1] * len(patches) * patches.itemsize))
    # One buffer for all products, since allocating new pages would cost as much as the maxima.
    products = patches.new_empty(min(num_images, len(image_patches)) * image_patches.shape[1], len(patches))
    scores = []
    for images in image_patches.split(max(num_images, _IMAGES_TOGETHER)):
        of_images, of_clip = _best_cosines(images.to(patches.dtype).split(num_images), patches, products)
        scores.append(of_images.mean(dim=1) + (of_clip @ weights).amax(dim=1))
    return torch.cat(scores)


def _best_cosines(images: Sequence[Tensor], patches: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """
    Maximum cosines, float32: `(n, P)` over the clip's patches, and `(n, Q)` over each image's patches.

    Args:
        images: The images' patches in parts `(n_i, P, R)`.
        patches (`(Q, R)`): The clip's patches.
        products: Buffer for the cosines of the largest part.
    """
    dtype = patches.dtype
    # A CPU compares integers several times as fast, and the bits of floats >= 0 have the same order.
    is_bits = patches.device.type == "cpu" and patches.itemsize < 8
    kinds = [torch.int32 if patches.itemsize == 4 else torch.int16] if is_bits else []
    for kind in (*kinds, dtype):
        maxima = []
        for part in images:
            cosines = products[: part[..., 0].numel()]
            torch.mm(part.flatten(0, 1), patches.T, out=cosines)
            cosines = cosines.view(kind).unflatten(0, part.shape[:2])
            maxima.append((cosines.amax(dim=2), cosines.amax(dim=1)))
        found = [torch.cat(each) for each in zip(*maxima)]
        # A negative maximum means that no cosine was >= 0; the order of the bits is then reversed, so floats are used.
        if kind == dtype or not any((each < 0).any() for each in found):
            break
    return found[0].view(dtype).float(), found[1].view(dtype).float()
