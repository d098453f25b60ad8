"""Reductions of a similarity matrix that never exists as a whole: memory grows with the batch, not with its square.

The matrix is S = scale * image @ text.T [N,M], computed tile by tile. A logsumexp needs all of it before any gradient
is known, so its tiles are computed again in the backward pass: one matrix product forward and three backward. A sum of
softplus does not: value and gradients come of the same tile, three products in all.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Pair = tuple[slice, slice]


def default_block(device: torch.device) -> int:
    """Rows and columns of a tile: on a CPU it stays in the cache, on an accelerator it fills the machine."""
    return 1024 if device.type == "cpu" else 4096


def streamed_logsumexp(image: Tensor, text: Tensor, scale: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """logsumexp of S over its columns [N] and over its rows [M], for image [N,E], text [M,E] and a scalar scale.

    Differentiable once, in all three.
    """
    rows, columns = _Logsumexp.apply(image, text, scale, block)
    return rows, columns


def streamed_softplus(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, block: int) -> Tensor:
    """Sum of softplus(S + bias) over all pairs, a scalar. Differentiable once, in all four."""
    total: Tensor = _Softplus.apply(image, text, scale, bias, block, torch.is_grad_enabled())
    return total


def _outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(ctx, tensor, ...)` in its tensors' own precision, whatever surrounds the call."""

    @wraps(function)
    def plain(ctx: Any, first: Tensor, *others: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(ctx, first, *others)

    return plain


class _Logsumexp(torch.autograd.Function):
    @staticmethod
    @_outside_autocast
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, block: int) -> tuple[Tensor, Tensor]:
        rows = image.new_full((len(image),), -torch.inf)
        columns = text.new_full((len(text),), -torch.inf)
        for (r, c), tile in _tiles(image, text, scale, block):
            torch.logaddexp(rows[r], tile.logsumexp(1), out=rows[r])
            torch.logaddexp(columns[c], tile.logsumexp(0), out=columns[c])
        ctx.save_for_backward(image, text, scale, rows, columns)
        ctx.block = block
        return rows, columns

    @staticmethod
    @once_differentiable
    @_outside_autocast
    def backward(ctx: Any, of_rows: Tensor, of_columns: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, rows, columns = ctx.saved_tensors

        def gradient(place: Pair, tile: Tensor) -> Tensor:
            r, c = place
            by_row = (tile - rows[r, None]).exp_().mul_(of_rows[r, None])
            return tile.sub_(columns[c]).exp_().mul_(of_columns[c]).add_(by_row)

        return (*_gradients(image, text, scale, ctx.block, ctx.needs_input_grad[:3], gradient), None)


class _Softplus(torch.autograd.Function):
    @staticmethod
    @_outside_autocast
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, block: int, learns: bool) -> Tensor:
        rows = image.new_zeros(len(image))
        of_bias = torch.zeros_like(bias)

        def gradient(place: Pair, tile: Tensor) -> Tensor:
            rows[place[0]] += F.softplus(tile.add_(bias)).sum(1)
            result = tile.sigmoid_()
            of_bias.add_(result.sum())
            return result

        needs = ctx.needs_input_grad[:4] if learns else (False,) * 4
        found: tuple[Tensor | None, ...] = (None, None, None)
        if any(needs[:3]):
            found = _gradients(image, text, scale, block, needs[:3], gradient)
        else:
            for place, tile in _tiles(image, text, scale, block):
                gradient(place, tile)
        ctx.save_for_backward(*found, of_bias if needs[3] else None)
        return rows.sum()

    @staticmethod
    @once_differentiable
    @_outside_autocast
    def backward(ctx: Any, of_total: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if found is None else found * of_total for found in ctx.saved_tensors), None, None)


def _blocks(count: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, count)) for start in range(0, count, block)]


def _tiles(image: Tensor, text: Tensor, scale: Tensor, block: int) -> Iterator[tuple[Pair, Tensor]]:
    """Where a tile of S lies, and its values, which the caller may overwrite."""
    for r in _blocks(len(image), block):
        scaled = image[r] * scale
        for c in _blocks(len(text), block):
            yield (r, c), scaled @ text[c].T


def _gradients(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    block: int,
    needs: tuple[bool, ...],
    gradient: Callable[[Pair, Tensor], Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of image, text and scale, where `gradient` turns a tile of S into the gradient of that tile."""
    need_image, need_text, need_scale = needs
    if not any(needs):
        return None, None, None
    of_text = torch.zeros_like(text) if need_text else None
    of_image = torch.zeros_like(image) if need_image or of_text is None else None
    for (r, c), tile in _tiles(image, text, scale, block):
        of_tile = gradient((r, c), tile)
        if of_image is not None:
            of_image[r].addmm_(of_tile, text[c])
        if of_text is not None:
            of_text[c].addmm_(of_tile.T, image[r])
    # Up to here without the scale, so that its own gradient is the inner product with what it multiplies.
    of_scale = None
    if need_scale:
        pair = (of_image, image) if of_image is not None else (of_text, text)
        of_scale = (pair[0] * pair[1]).sum().reshape(scale.shape)
    return (
        of_image.mul_(scale) if of_image is not None and need_image else None,
        of_text.mul_(scale) if of_text is not None else None,
        of_scale,
    )
