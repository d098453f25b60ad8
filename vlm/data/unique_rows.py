"""Rows of a tensor at places no two of which are alike, which autograd cannot know and would add up one by one."""

from typing import Any

import torch
from torch import Tensor


def take_rows(values: Tensor, places: Tensor) -> Tensor:
    """Rows [N,...] of values [M,...] at different places [N]."""
    taken: Tensor = _Take.apply(values, places)
    return taken


def put_rows(rows: Tensor, places: Tensor, length: int) -> Tensor:
    """Rows [N,...] at different places [N] of a tensor [length,...] that is zero elsewhere."""
    put: Tensor = _Put.apply(rows, places, length)
    return put


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.length = len(values)
        return values.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return put_rows(grads[0], places, ctx.length), None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(places)
        return rows.new_zeros(length, *rows.shape[1:]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return take_rows(grads[0], places), None, None
