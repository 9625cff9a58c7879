"""Rows of other processes, with a gradient."""

import torch
import torch.distributed as dist
from torch import Tensor


class AllGather:
    """
    Concatenates the equally shaped tensors of all processes along the first dimension.

    The backward pass sums over processes what each of them derived for a row, so that with the averaging of data
    parallel training the gradient is exactly that of one process with the whole batch. Integer tensors carry none.

    Attributes:
        rank: Position of this process's rows, in units of its batch.
        world_size: Number of processes.
        bytes_sent: What this process has handed to the others so far.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group or dist.group.WORLD
        self.rank = dist.get_rank(self.group)
        self.world_size = dist.get_world_size(self.group)
        self.bytes_sent = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        self.bytes_sent += tensor.numel() * tensor.element_size() * (self.world_size - 1)
        if tensor.is_floating_point() and tensor.requires_grad:
            return _gather_with_gradient(tensor, self.group)
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor, group=self.group)
        return torch.cat(gathered)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.rows = group, len(tensor)
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, tensor, group=group)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.rows
        return gradient[start : start + ctx.rows], None


def _gather_with_gradient(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _GatherWithGradient.apply(tensor, group)
