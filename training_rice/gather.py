"""Gathers rows of other processes with a gradient, and counts the exchanged bytes."""

import torch
import torch.distributed as dist
from torch import Tensor

from modeling_rice import RiceConfig


class AllGather:
    """
    Concatenates the equally shaped tensors of all processes along the first dimension.

    The backward pass sums the gradients of a row over all processes. Together with the averaging of data parallel
    training, the gradient equals that of one process with the whole batch. Integer tensors have no gradient.

    Attributes:
        rank: Position of this process's rows, in units of its batch.
        world_size: Number of processes.
        bytes_sent: Bytes that this process has sent to the others so far, forward and backward: its rows, and the
            gradients of their rows, once to each of them. The routing of the backend is not considered.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group or dist.group.WORLD
        self.rank = dist.get_rank(self.group)
        self.world_size = dist.get_world_size(self.group)
        self.bytes_sent = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        if tensor.is_floating_point() and tensor.requires_grad:
            return _GatherWithGradient.apply(tensor, self)
        return self._gather(tensor)

    def _gather(self, tensor: Tensor) -> Tensor:
        self._count(tensor)
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor, group=self.group)
        return torch.cat(gathered)

    def _sum_and_scatter(self, gathered: Tensor) -> Tensor:
        rows = gathered.new_empty(len(gathered) // self.world_size, *gathered.shape[1:])
        self._count(rows)
        dist.reduce_scatter_tensor(rows, gathered.contiguous(), group=self.group)
        return rows

    def _count(self, rows: Tensor) -> None:
        self.bytes_sent += rows.numel() * rows.element_size() * (self.world_size - 1)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, gather: AllGather) -> Tensor:
        ctx.gather = gather
        return gather._gather(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.gather._sum_and_scatter(gradient), None


def exchanged_bytes(config: RiceConfig, batch_size: int, world_size: int, element_size: int = 4) -> int:
    """
    Bytes that a process sends to the others in one step of the losses, forward and backward: `W - 1` times

    * both embeddings of its pairs, `2 B D` numbers, and their product ids, `8 B` bytes;
    * for a score-level text term, the embeddings of titles and ASR, `2 B E` numbers;
    * for the matching loss, a decoder row per image, `B d`, and the scores of its clips, `B x B W`.

    The gradients of the weights, which data parallel training averages too, are not counted.

    Args:
        config: Config of the model.
        batch_size: Pairs B per process and step.
        world_size: Processes W.
        element_size: Bytes per number.
    """
    numbers = 2 * batch_size * config.projection_dim
    if config.text_score_weight is not None:
        numbers += 2 * batch_size * (config.projection_dim if config.text_config is not None else config.text_width)
    if config.use_decoder:
        numbers += batch_size * config.decoder_hidden_size + batch_size * batch_size * world_size
    return (world_size - 1) * (2 * element_size * numbers + 8 * batch_size)
