"""Tensors of all processes together, with gradients that flow back to the process a row came from.

Everywhere a gradient is that of the *sum* of what the processes compute, whichever of them it was.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def num_processes() -> int:
    """Processes of the default group; 1 where none was set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_sizes(count: int, device: torch.device) -> list[int]:
    """How many rows each process has, in their order; `count` is this one's."""
    if num_processes() == 1:
        return [count]
    mine = torch.tensor([count], device=device)
    theirs = [torch.zeros_like(mine) for _ in range(num_processes())]
    dist.all_gather(theirs, mine)
    return [int(n) for n in torch.cat(theirs)]


def own_rows(sizes: list[int]) -> slice:
    """Where this process's rows lie among all rows."""
    rank = dist.get_rank() if len(sizes) > 1 else 0
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def gather_with_gradient(tensor: Tensor, sizes: list[int] | None = None) -> Tensor:
    """The rows [B,...] of all processes in their order, from this process's rows [b,...]; b may differ.

    sizes: what `process_sizes` says, to spare asking again.
    """
    if num_processes() == 1:
        return tensor
    gathered: Tensor = _Gather.apply(tensor, sizes or process_sizes(len(tensor), tensor.device))
    return gathered


def logsumexp_over_processes(partial: Tensor) -> Tensor:
    """logsumexp over the processes' values of each element; the same result on all of them."""
    if num_processes() == 1:
        return partial
    combined: Tensor = _Logsumexp.apply(partial)
    return combined


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sizes: list[int]) -> Tensor:
        ctx.own = own_rows(sizes)
        # Collectives want equal shapes, so short ones are filled up and cut again.
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        pieces = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(pieces, padded)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.own], None


class _Logsumexp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor) -> Tensor:
        largest = partial.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        total = (partial - largest).exp_()
        dist.all_reduce(total)
        result = total.log_().add_(largest)
        ctx.save_for_backward(partial, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        partial, result = ctx.saved_tensors
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.mul_((partial - result).exp_())
