"""Embeddings of past batches as additional negatives of the contrastive loss."""

from typing import Any

import torch
from torch import Tensor

from modeling_rice.loss_rice import EMPTY


class MemoryQueue:
    """
    The last `size` pairs of embeddings; the oldest are replaced first (Cross-Batch Memory for Embedding Learning, CVPR
    2020). They have no gradient and come from earlier weights. Each process pushes the global batch, so the queue is
    equal on all processes. A published model does not contain it; training checkpoints do.

    Args:
        size: Number Q of pairs, >= 1.
        dim: Width D of the embeddings.
        device: Device of the queue.

    Attributes:
        image_embeds, video_embeds (`(Q, D)` float32): Normalised embeddings.
        product_ids (`(Q,)` int64): `EMPTY` in free places.
    """

    def __init__(self, size: int, dim: int, device: torch.device | str = "cpu"):
        if size < 1:
            raise ValueError(f"memory_queue_size must be at least 1, got {size}.")
        self.size, self.position = size, 0
        self.image_embeds = torch.zeros(size, dim, device=device)
        self.video_embeds = torch.zeros(size, dim, device=device)
        self.product_ids = torch.full((size,), EMPTY, dtype=torch.long, device=device)

    def __len__(self) -> int:
        """Number of pairs in the queue."""
        return int((self.product_ids != EMPTY).sum())

    @torch.no_grad()
    def push(self, image_embeds: Tensor, video_embeds: Tensor, product_ids: Tensor) -> None:
        """
        Adds a batch, or the last pairs of a batch that is larger than the queue. A pair with an embedding that is not
        finite is ignored, because it would make every step invalid until it is replaced.

        Args:
            image_embeds, video_embeds (`(B, D)`): Normalised embeddings of the global batch.
            product_ids (`(B,)` int64): Their products.
        """
        image_embeds, video_embeds = image_embeds[-self.size :].float(), video_embeds[-self.size :].float()
        finite = torch.isfinite(image_embeds).all(dim=1) & torch.isfinite(video_embeds).all(dim=1)
        places = (self.position + torch.arange(len(image_embeds), device=finite.device)) % self.size
        self.image_embeds[places] = image_embeds.masked_fill(~finite[:, None], 0.0)
        self.video_embeds[places] = video_embeds.masked_fill(~finite[:, None], 0.0)
        self.product_ids[places] = product_ids[-self.size :].masked_fill(~finite, EMPTY)
        self.position = (self.position + len(places)) % self.size

    def state_dict(self) -> dict[str, Any]:
        return {
            "image_embeds": self.image_embeds,
            "video_embeds": self.video_embeds,
            "product_ids": self.product_ids,
            "position": self.position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["image_embeds"].shape != self.image_embeds.shape:
            raise ValueError(
                f"The checkpoint's memory queue is {tuple(state['image_embeds'].shape)}, the run's "
                f"{tuple(self.image_embeds.shape)}; do not change memory_queue_size and projection_dim."
            )
        for name in ("image_embeds", "video_embeds", "product_ids"):
            getattr(self, name).copy_(state[name])
        self.position = state["position"]
