"""Dropout on a CPU at a fraction of torch's cost: its random numbers, and what is done with them, in few passes.

torch draws a number an element, writes it as a float and has no fused attention with dropout there. Here one random
word of 64 bits serves four elements, whose chance is exact to 2^-17, and the masks are kept as 16-bit integers. Other
devices use torch's own. Draws come from torch's generator, so that seeds and saved states of it hold.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_LEVELS = 1 << 16


def dropout(states: Tensor, rate: float) -> Tensor:
    """As torch's in training mode."""
    if not rate or states.device.type != "cpu":
        return F.dropout(states, rate)
    dropped: Tensor = _Dropout.apply(states, None, rate)
    return dropped


def add_dropped(residual: Tensor, states: Tensor, rate: float) -> Tensor:
    """residual + dropout(states), of one shape."""
    if not rate or states.device.type != "cpu" or residual.dtype != states.dtype:
        return residual + dropout(states, rate)
    summed: Tensor = _Dropout.apply(states, residual, rate)
    return summed


def attention_with_dropout(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    """Attention of heads [B,h,S,d] over keys and values [B,h,K,d], with dropout on its probabilities: [B,h,S,d].

    mask: True where a query sees a key, broadcast to [B,h,S,K]; every query must see a key.
    """
    attended: Tensor = _Attention.apply(queries, keys, values, mask, rate)
    return attended


def _draw(shape: torch.Size, rate: float) -> tuple[Tensor, float]:
    """int16 of that shape, 1 where an element is kept and 0 where it is dropped; one over the share that is kept."""
    dropped = round(rate * _LEVELS)
    words = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    bits = words.view(torch.int16)[: shape.numel()].view(shape)
    return bits.ge_(dropped - _LEVELS // 2), _LEVELS / (_LEVELS - dropped)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, residual: Tensor | None, rate: float) -> Tensor:
        kept, scale = _draw(states.shape, rate)
        ctx.save_for_backward(kept)
        ctx.scale = scale
        ctx.adds = residual is not None
        factor = kept.to(states.dtype)
        if residual is None:
            return factor.mul_(scale).mul_(states)
        return torch.addcmul(residual, states, factor, value=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (kept,) = ctx.saved_tensors
        return kept.to(gradient.dtype).mul_(ctx.scale).mul_(gradient), gradient if ctx.adds else None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, rate: float) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            scaled = (queries * queries.shape[-1] ** -0.5).flatten(0, 1)  # [B * h, S, d]
            keys, values = keys.to(scaled.dtype).flatten(0, 1), values.to(scaled.dtype).flatten(0, 1)
            scores = torch.bmm(scaled, keys.mT)  # [B * h, S, K]
            if mask is not None:
                scores.unflatten(0, queries.shape[:2]).masked_fill_(~mask, -torch.inf)
            probabilities = scores.softmax(-1)
            kept, scale = _draw(scores.shape, rate)
            dropped = torch.mul(probabilities, kept.to(scores.dtype), out=scores)
            attended = torch.bmm(dropped, values).mul_(scale)
        ctx.save_for_backward(scaled, keys, values, probabilities, kept, attended)
        ctx.scale = scale
        return attended.unflatten(0, queries.shape[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        scaled, keys, values, probabilities, kept, attended = ctx.saved_tensors
        heads = gradient.shape[:2]
        flat = (gradient * ctx.scale).flatten(0, 1)  # [B * h, S, d]
        # What softmax takes off each row comes from the output, not from the scores (Dao et al. 2022, section 3.1).
        row = (flat * attended).sum(-1, keepdim=True).div_(ctx.scale)
        factor = kept.to(probabilities.dtype)
        of_scores = torch.bmm(flat, values.mT).mul_(factor).sub_(row).mul_(probabilities)
        of_values = torch.bmm(factor.mul_(probabilities).mT, flat)
        of_queries = torch.bmm(of_scores, keys).mul_(gradient.shape[-1] ** -0.5)
        of_keys = torch.bmm(of_scores.mT, scaled)
        return *(x.unflatten(0, heads) for x in (of_queries, of_keys, of_values)), None, None
