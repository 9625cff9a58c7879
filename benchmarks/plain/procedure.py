"""RICE as published, step by step: the reference for the fast model.

It is written from the paper and the behaviour of the older official code, and uses the weights of a [`RiceModel`] with
the default architecture. Every frame is encoded, including padding. The decoder processes the pairs of two image rows
at a time, recomputes the clip's keys and values for every pair, and runs all query rows through the last block. The
encoder module is the same on both sides.
"""

import torch
from torch import Tensor, nn

from modeling_rice import RiceModel

ROWS_AT_A_TIME = 2


def encode_tokens(model: RiceModel, pixels: Tensor) -> Tensor:
    """Pictures `(n, 3, H, W)` -> projected tokens `(n, 1 + P, d)`, class token first."""
    states = model.vision_model(pixels.to(model.visual_projection.weight.dtype)).last_hidden_state
    return model.visual_projection(model.vision_model.post_layernorm(states))


def score_pairs(model: RiceModel, image_tokens: Tensor, clip_tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """
    The whole decoder for pair i = (image i, clip i).

    Args:
        image_tokens (`(n, L, d)`), clip_tokens (`(n, S, d)`), mask (`(n, S)` bool): One row per pair.

    Returns:
        Scores `(n,)` and attention probabilities `(n, H, L, S)`.
    """
    decoder, cross = model.decoder, model.decoder.cross_layer
    states = image_tokens + decoder.position_embedding.weight[: image_tokens.shape[1]]
    for layer in decoder.self_layers:
        states = layer(states)
    attention = cross.attention
    query = attention.split_heads(attention.q_proj(cross.layer_norm1(states)))
    normed = cross.layer_norm1(clip_tokens)
    key, value = (attention.split_heads(project(normed)) for project in (attention.k_proj, attention.v_proj))
    scores = query @ key.transpose(-1, -2) * attention.scaling
    scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    context = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(-2)
    states = states + context
    states = states + cross.mlp(cross.layer_norm2(states))
    return decoder.head(states[:, 0]), weights


@torch.no_grad()
def match(model: RiceModel, image_tokens: Tensor, clip_tokens: Tensor, mask: Tensor) -> Tensor:
    """Images `(n, L, d)` and clips `(c, S, d)` with mask `(c, S)` -> scores `(c, n)`."""
    columns = []
    for rows in image_tokens.split(ROWS_AT_A_TIME):
        count, clips = len(rows), len(clip_tokens)
        scores, _ = score_pairs(
            model,
            rows.repeat_interleave(clips, dim=0),
            clip_tokens.repeat(count, 1, 1),
            mask.repeat(count, 1),
        )
        columns.append(scores.view(count, clips))
    return torch.cat(columns).T


def training_loss(model: RiceModel, pixel_values: Tensor, pixel_values_videos: Tensor, frame_mask: Tensor) -> Tensor:
    """Contrastive, matching (three hardest clips per image) and reconstruction loss of a batch of pairs."""
    config = model.config
    batch, frames = frame_mask.shape
    images = encode_tokens(model, pixel_values)
    videos = encode_tokens(model, pixel_values_videos.flatten(0, 1)).unflatten(0, (batch, frames))

    image_embeds = nn.functional.normalize(images[:, 0], dim=-1)
    frame_embeds = nn.functional.normalize(videos[:, :, 0], dim=-1) * frame_mask[..., None]
    video_embeds = nn.functional.normalize(frame_embeds.sum(dim=1) / frame_mask.sum(dim=1, keepdim=True), dim=-1)
    logits = model.logit_scale.exp() * image_embeds @ video_embeds.T
    target = torch.arange(batch, device=logits.device)
    contrastive = (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2

    clip_tokens = videos.flatten(1, 2)
    mask = frame_mask[:, :, None].expand(-1, -1, videos.shape[2]).flatten(1)
    order = logits.detach().argsort(dim=1, descending=True).tolist()
    scores, attention = [], []
    for first in range(0, batch, ROWS_AT_A_TIME):
        rows = range(first, min(first + ROWS_AT_A_TIME, batch))
        pairs = [[i] + [j for j in order[i] if j != i][: config.num_hard_negatives] for i in rows]
        width = len(pairs[0])
        row_scores, row_attention = score_pairs(
            model,
            torch.stack([images[i] for i in rows for _ in range(width)]),
            torch.stack([clip_tokens[j] for pair in pairs for j in pair]),
            torch.stack([mask[j] for pair in pairs for j in pair]),
        )
        scores.append(row_scores.view(len(rows), width))
        attention.append(row_attention[::width])
    matching_logits = config.matching_scale * torch.cat(scores)
    matching = nn.functional.cross_entropy(matching_logits, torch.zeros_like(target))

    attention = torch.cat(attention)[:, :, 1:].unflatten(-1, (frames, -1))[..., 1:].flatten(-2)
    sources = (videos * frame_mask[..., None, None])[:, :, 1:].flatten(1, 2).detach()
    reconstructed = model.reconstruction_head(attention, mask.unflatten(-1, (frames, -1))[..., 1:].flatten(-2))
    error = nn.functional.mse_loss(reconstructed @ sources.to(reconstructed.dtype), images[:, 1:].detach())
    return contrastive + config.matching_loss_weight * matching + config.reconstruction_loss_weight * error
