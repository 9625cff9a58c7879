"""RICE's three losses as pure functions of tensors (RICE, ICCV 2023, section 4).

Under data parallelism every process holds the scores of its own rows against the global batch and averages its own
rows; the mean of these losses (and of their gradients) over processes of equal batch is that of one process.
"""

import torch
from torch import Tensor, nn


def false_negative_mask(row_product_ids: Tensor, column_product_ids: Tensor, row_offset: int = 0) -> Tensor:
    """
    Pairs that show the same product although they are not the pair itself.

    Args:
        row_product_ids (`(rows,)` int64), column_product_ids (`(columns,)` int64): Product of each row and column.
        row_offset: Column that holds the positive of row 0; row i's positive is column `row_offset + i`.

    Returns:
        `(rows, columns)` bool, `True` = must not serve as a negative.
    """
    same = row_product_ids[:, None] == column_product_ids[None, :]
    rows = torch.arange(len(row_product_ids), device=same.device)
    same[rows, rows + row_offset] = False
    return same


def diagonal_cross_entropy(logits: Tensor, row_offset: int = 0, ignore: Tensor | None = None) -> Tensor:
    """
    Cross-entropy of each row against its own column.

    Args:
        logits (`(rows, columns)`): Scores.
        row_offset: See [`false_negative_mask`].
        ignore (`(rows, columns)` bool, *optional*): Pairs left out of the softmax.

    Returns:
        Scalar, mean over rows.
    """
    if ignore is not None:
        logits = logits.masked_fill(ignore, torch.finfo(logits.dtype).min)
    target = torch.arange(len(logits), device=logits.device) + row_offset
    return nn.functional.cross_entropy(logits, target)


def symmetric_loss(
    rows: Tensor,
    columns: Tensor,
    product_ids: Tensor | None = None,
    all_product_ids: Tensor | None = None,
    row_offset: int = 0,
) -> Tensor:
    """
    Symmetric InfoNCE (paper eq. 1): images against all clips and clips against all images, averaged. The contrastive
    loss feeds it scaled cosines; the matching loss over all in-batch pairs feeds it decoder scores.

    Args:
        rows (`(b, B)`): This process's images against all B clips.
        columns (`(b, B)`): This process's clips against all B images.
        product_ids (`(b,)`), all_product_ids (`(B,)`): int64; pairs of one product are no negatives.
        row_offset: Position of this process's first row in the global batch.
    """
    ignore = None
    if product_ids is not None:
        ignore = false_negative_mask(product_ids, all_product_ids, row_offset)
    return (diagonal_cross_entropy(rows, row_offset, ignore) + diagonal_cross_entropy(columns, row_offset, ignore)) / 2


def mine_hard_negatives(similarity: Tensor, num_negatives: int, ignore: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """
    Per image its own clip and the most similar other clips (paper section 4.2; no gradient through the choice).

    Args:
        similarity (`(B, B)`): Images x clips, positives on the diagonal.
        num_negatives: Clips to pick per image.
        ignore (`(B, B)` bool, *optional*): Pairs that show one product.

    Returns:
        `(B, 1 + num_negatives)` int64 clip index, the positive first, and a bool tensor of that shape: `False` where
        fewer negatives exist than asked for.

    Raises:
        ValueError: when the batch is not larger than `num_negatives`.
    """
    size = len(similarity)
    if size <= num_negatives:
        raise ValueError(
            f"Mining {num_negatives} hard negatives needs a global batch of at least {num_negatives + 1}, got {size}; "
            f"raise the batch size or lower `num_hard_negatives`."
        )
    similarity = similarity.detach().float().clone()
    if ignore is not None:
        similarity = similarity.masked_fill(ignore, -torch.inf)
    similarity.fill_diagonal_(-torch.inf)
    values, negatives = similarity.sort(dim=1, descending=True, stable=True)
    positive = torch.arange(size, device=similarity.device)[:, None]
    index = torch.cat([positive, negatives[:, :num_negatives]], dim=1)
    valid = torch.cat([torch.ones_like(positive, dtype=torch.bool), values[:, :num_negatives] > -torch.inf], dim=1)
    return index, valid


def reconstruction_loss(weights: Tensor, clip_tokens: Tensor, image_tokens: Tensor) -> Tensor:
    """
    Patch feature reconstruction (paper section 4.3): mean squared error between image patches and their
    reconstruction from the clip's patches. Neither side of the comparison carries a gradient; the weights do.

    Args:
        weights (`(B, P, S)`): Reconstruction weights.
        clip_tokens (`(B, S, d)`): Clip patches, zero where masked.
        image_tokens (`(B, P, d)`): Image patches.
    """
    reconstruction = weights @ clip_tokens.detach().to(weights.dtype)
    precision = torch.promote_types(reconstruction.dtype, torch.float32)
    return nn.functional.mse_loss(reconstruction.to(precision), image_tokens.detach().to(precision))
