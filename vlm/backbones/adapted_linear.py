"""A linear layer with its low-rank adapter as one step of autograd: fewer passes over memory than layer by layer."""

from typing import Any

import torch
from torch import Tensor, nn


def fuse_adapters(network: nn.Module) -> int:
    """Give peft's plain LoRA layers of a network a faster forward with the same result; returns how many.

    Layers over quantized weights keep their own; so does every layer while it drops out, is merged or switched off.
    """
    from peft.tuners.lora import Linear as LoraLinear

    layers = [m for m in network.modules() if isinstance(m, LoraLinear) and type(m.base_layer) is nn.Linear]
    for layer in layers:
        layer.forward = _fused(layer, layer.forward)
    return len(layers)


def _fused(layer: Any, plain: Any) -> Any:
    def forward(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        dropout = layer.lora_dropout["default"]
        drops = isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training
        if drops or layer.merged or layer.disable_adapters or not torch.is_grad_enabled():
            return plain(x, *arguments, **options)
        base = layer.base_layer
        tensors = [x, base.weight, base.bias, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.weight.dtype
        cast = [None if t is None else t.to(dtype) for t in tensors]
        return _AdaptedLinear.apply(*cast, layer.scaling["default"])

    return forward


class _AdaptedLinear(torch.autograd.Function):
    """x W^T + b + scale (x A^T) B^T (Hu et al. 2021, section 4.1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ a.T  # [M, r]
        out = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        out.addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, weight.shape[0])
        wanted = ctx.needs_input_grad
        into_low = (grad @ b).mul_(ctx.scale)  # [M, r]
        into_x = (grad @ weight).addmm_(into_low, a).view_as(x) if wanted[0] else None
        return (
            into_x,
            grad.T @ flat if wanted[1] else None,
            grad.sum(0) if wanted[2] else None,
            into_low.T @ flat if wanted[3] else None,
            (low.T @ grad).mul_(ctx.scale).T if wanted[4] else None,  # the narrow side first: twice as fast on a CPU
            None,
        )
