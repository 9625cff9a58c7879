"""RICE's three losses as pure functions of tensors (RICE, ICCV 2023, section 4).

Under data parallelism every process computes the mean over its own rows of the global batch. With equal batch sizes,
the mean of these losses (and of their gradients) over processes equals the loss of one process on the global batch.
The same holds for a caller that computes the rows of a batch in blocks of equal size.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

Targets = Literal["diagonal", "masked", "multi_positive"]
ContrastiveKind = Literal["infonce", "sigmoid"]

# Product id of an empty entry of a memory; ids of products are 0 or more.
EMPTY = -1


class Memory(Protocol):
    """Embeddings of past batches, used as additional negatives; see `training_rice.memory_queue`."""

    image_embeds: Tensor
    video_embeds: Tensor
    product_ids: Tensor

    def push(self, image_embeds: Tensor, video_embeds: Tensor, product_ids: Tensor | None) -> None: ...


def at_least_single(tensor: Tensor) -> Tensor:
    """The tensor in single precision, or in its own if that is higher."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def l2_normalize(vectors: Tensor) -> Tensor:
    """Vectors `(..., D)` L2-normalised in at least single precision; in float16 a zero vector would become NaN."""
    return nn.functional.normalize(at_least_single(vectors), dim=-1)


def cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """Cosines of normalised rows, never autocast: at a scale of 100, half precision would create ties."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ columns.T


def false_negative_mask(row_product_ids: Tensor, column_product_ids: Tensor, row_offset: int = 0) -> Tensor:
    """
    Mask of pairs, other than the positive pairs, whose image and clip show the same product.

    Args:
        row_product_ids (`(rows,)` int64), column_product_ids (`(columns,)` int64): Product of each row and column.
        row_offset: Column of row 0's positive; the positive of row i is column `row_offset + i`.

    Returns:
        `(rows, columns)` bool, `True` = must not be used as a negative.
    """
    same = row_product_ids[:, None] == column_product_ids[None, :]
    rows = torch.arange(len(row_product_ids), device=same.device)
    same[rows, rows + row_offset] = False
    return same


def pair_masks(
    targets: Targets,
    product_ids: Tensor | None,
    all_product_ids: Tensor | None,
    row_offset: int = 0,
    memory_product_ids: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """
    Masks of each row's positives besides its own column, and of the columns it is not compared with.

    Args:
        targets: `"diagonal"`: every other pair is a negative, as published. `"masked"`: other pairs of the same
            product are ignored. `"multi_positive"`: other pairs of the same product are positives.
        product_ids (`(rows,)` int64), all_product_ids (`(B,)` int64): Without them every `targets` acts as
            `"diagonal"`.
        row_offset: See [`false_negative_mask`].
        memory_product_ids (`(Q,)` int64, *optional*): Products of additional columns, which are never positives;
            `EMPTY` for empty entries.

    Returns:
        `positives` and `ignore`, each `(rows, B + Q)` bool, or `None` if no entry would be `True`.

    Raises:
        ValueError: for a memory without `product_ids`.
    """
    positives = ignore = None
    if product_ids is not None and targets != "diagonal":
        same = false_negative_mask(product_ids, all_product_ids, row_offset)
        positives, ignore = (same, None) if targets == "multi_positive" else (None, same)
    if memory_product_ids is None:
        return positives, ignore
    if product_ids is None:
        raise ValueError("A memory of past batches needs `product_ids` to mask entries of one product; give them.")
    unfit = (memory_product_ids == EMPTY)[None]
    if targets != "diagonal":
        unfit = unfit | (product_ids[:, None] == memory_product_ids[None])
    rows, columns = len(product_ids), len(all_product_ids)
    known = ignore if ignore is not None else unfit.new_zeros(rows, columns)
    ignore = torch.cat([known, unfit.expand(rows, -1)], dim=1)
    if positives is not None:
        positives = nn.functional.pad(positives, (0, len(memory_product_ids)), value=False)
    return positives, ignore


def diagonal_cross_entropy(
    logits: Tensor, row_offset: int = 0, ignore: Tensor | None = None, positives: Tensor | None = None
) -> Tensor:
    """
    Cross-entropy of each row with its own column as target. With `positives` the target is the uniform distribution
    over its own column and them (Supervised Contrastive Learning, NeurIPS 2020, eq. 2).

    Args:
        logits (`(rows, columns)`): Scores.
        row_offset: See [`false_negative_mask`].
        ignore, positives (`(rows, columns)` bool, *optional*): Pairs left out of the softmax, and additional
            positives besides the row's own column.

    Returns:
        Scalar, mean over rows.
    """
    if ignore is not None:
        logits = logits.masked_fill(ignore, torch.finfo(logits.dtype).min)
    target = torch.arange(len(logits), device=logits.device) + row_offset
    if positives is None:
        return nn.functional.cross_entropy(logits, target)
    positives = positives.scatter(1, target[:, None], True)
    log_probabilities = logits.log_softmax(dim=1).masked_fill(~positives, 0.0)
    return -(log_probabilities.sum(dim=1) / positives.sum(dim=1)).mean()


def pairwise_sigmoid_loss(
    logits: Tensor, row_offset: int = 0, ignore: Tensor | None = None, positives: Tensor | None = None
) -> Tensor:
    """
    Sigmoid loss: every pair is an independent binary decision with label +1 or -1 (Sigmoid Loss for Language Image
    Pre-Training, ICCV 2023, section 3.2). Arguments as in [`diagonal_cross_entropy`]; `logits` include scale and bias.

    Returns:
        Scalar, summed over columns, mean over rows.
    """
    target = torch.arange(len(logits), device=logits.device) + row_offset
    if positives is None:
        positives = torch.zeros_like(logits, dtype=torch.bool)
    positives = positives.scatter(1, target[:, None], True)
    losses = nn.functional.softplus(torch.where(positives, -logits, logits))
    if ignore is not None:
        losses = losses.masked_fill(ignore, 0.0)
    return losses.sum(dim=1).mean()


def symmetric_loss(
    rows: Tensor,
    columns: Tensor,
    product_ids: Tensor | None = None,
    all_product_ids: Tensor | None = None,
    row_offset: int = 0,
    targets: Targets = "masked",
    kind: ContrastiveKind = "infonce",
    memory_product_ids: Tensor | None = None,
) -> Tensor:
    """
    Mean of two losses: images against all clips, and clips against all images. With cross-entropy it is symmetric
    InfoNCE (paper eq. 1). The contrastive loss calls it with scaled cosines, the matching loss over all in-batch pairs
    with decoder scores.

    Args:
        rows (`(b, B + Q)`): Scores of these rows' images with all B clips and the memory's Q clips.
        columns (`(b, B + Q)`): Scores of these rows' clips with all B images and the memory's Q images.
        product_ids (`(b,)`), all_product_ids (`(B,)`), memory_product_ids (`(Q,)`): int64, see [`pair_masks`].
        row_offset: Position of the first row in the global batch.
        targets: See [`pair_masks`].
        kind: `"infonce"` ([`diagonal_cross_entropy`]) or `"sigmoid"` ([`pairwise_sigmoid_loss`]).
    """
    one_way = pairwise_sigmoid_loss if kind == "sigmoid" else diagonal_cross_entropy
    positives, ignore = pair_masks(targets, product_ids, all_product_ids, row_offset, memory_product_ids)
    return (one_way(rows, row_offset, ignore, positives) + one_way(columns, row_offset, ignore, positives)) / 2


def contrastive_loss(
    image_embeds: Tensor,
    video_embeds: Tensor,
    scale: Tensor | float,
    product_ids: Tensor | None = None,
    rows: slice | None = None,
    bias: Tensor | float = 0.0,
    targets: Targets = "masked",
    kind: ContrastiveKind = "infonce",
    memory: Memory | None = None,
) -> Tensor:
    """
    Instance contrastive loss (ICL, paper section 4.1) of some rows of the global batch.

    Args:
        image_embeds, video_embeds (`(B, D)`): Normalised embeddings of the global batch; row i of each is pair i.
        scale, bias: Logits are `scale * cosine + bias`.
        product_ids (`(B,)` int64, *optional*), targets, kind: See [`symmetric_loss`].
        rows: Which rows to average over; all of them by default.
        memory: Past embeddings, used as additional negatives without a gradient (Cross-Batch Memory for Embedding
            Learning, CVPR 2020). Needs `product_ids`.
    """
    rows = rows or slice(0, len(image_embeds))
    images, clips, memory_product_ids = image_embeds, video_embeds, None
    if memory is not None:
        images = torch.cat([image_embeds, memory.image_embeds.to(image_embeds.dtype)])
        clips = torch.cat([video_embeds, memory.video_embeds.to(video_embeds.dtype)])
        memory_product_ids = memory.product_ids
    return symmetric_loss(
        scale * cosines(image_embeds[rows], clips) + bias,
        scale * cosines(video_embeds[rows], images) + bias,
        None if product_ids is None else product_ids[rows],
        product_ids,
        rows.start,
        targets,
        kind,
        memory_product_ids,
    )


def mine_hard_negatives(
    similarity: Tensor, num_negatives: int, ignore: Tensor | None = None, row_offset: int = 0
) -> tuple[Tensor, Tensor]:
    """
    For each image, its own clip and the most similar other clips (paper section 4.2). The choice has no gradient.

    Args:
        similarity (`(rows, B)`): Similarity of images (rows) and clips (columns).
        num_negatives: Clips to mine per image.
        ignore (`(rows, B)` bool, *optional*): Pairs of the same product, which are not mined.
        row_offset: The own clip of row i is column `row_offset + i`.

    Returns:
        `(rows, 1 + num_negatives)` int64 clip indices, the positive first, and a bool tensor of the same shape,
        `False` where fewer than `num_negatives` clips may be mined.

    Raises:
        ValueError: if the batch is not larger than `num_negatives`.
    """
    size = similarity.shape[1]
    if size <= num_negatives:
        raise ValueError(
            f"Mining {num_negatives} hard negatives needs a global batch of at least {num_negatives + 1}, got {size}; "
            f"raise the batch size or lower `num_hard_negatives`."
        )
    similarity = similarity.detach().float().clone()
    if ignore is not None:
        similarity = similarity.masked_fill(ignore, -torch.inf)
    positive = torch.arange(len(similarity), device=similarity.device)[:, None] + row_offset
    similarity.scatter_(1, positive, -torch.inf)
    values, negatives = similarity.sort(dim=1, descending=True, stable=True)
    index = torch.cat([positive, negatives[:, :num_negatives]], dim=1)
    valid = torch.cat([torch.ones_like(positive, dtype=torch.bool), values[:, :num_negatives] > -torch.inf], dim=1)
    return index, valid


def mined_logits(logits: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """Scores of images with all clips `(rows, B)` -> scores with the mined clips `(rows, 1 + k)`, positive first."""
    return logits.gather(1, index).masked_fill(~valid, torch.finfo(logits.dtype).min)


def mined_loss(logits: Tensor) -> Tensor:
    """Cross-entropy with the first column, each image's own clip, as target; mean over rows."""
    return nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def reconstruction_loss(weights: Tensor, clip_tokens: Tensor, image_tokens: Tensor) -> Tensor:
    """
    Patch feature reconstruction (paper section 4.3): mean squared error between image patches and their
    reconstruction from the clip's patches. Only the weights carry a gradient; the patches of both sides do not.

    Args:
        weights (`(B, P, S)`): Reconstruction weights.
        clip_tokens (`(B, S, d)`): Clip patches, zero where masked.
        image_tokens (`(B, P, d)`): Image patches.
    """
    reconstruction = weights @ clip_tokens.detach().to(weights.dtype)
    return nn.functional.mse_loss(at_least_single(reconstruction), at_least_single(image_tokens.detach()))
