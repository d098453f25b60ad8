"""Memory levers of training."""

import ctypes
import functools
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlm.errors import VlmError

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let a process that trains on its CPU keep the memory that a step frees for the next one; returns if it does.

    glibc gives freed memory back to the system, above all blocks that it took from there alone, and gets it again page
    by page, zeroed: a quarter of a small CLIP's training step, a tenth of a full-size Q-Former's. Elsewhere, and where
    the environment already says what malloc shall do, nothing is changed.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if chosen or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _NEVER) and mallopt(_MMAP_MAX, 0))


def checkpoint_layers(model: nn.Module) -> int:
    """Keep only the inputs of transformer layers and compute the rest again in the backward pass; returns how many.

    Chen et al. 2016. transformers' own switch works in training mode only, and frozen parts that gradients flow through
    stay in eval mode; this one works wherever gradients are asked for. Random states are restored, so dropout draws the
    same again. Under autocast, switch its cache off: it would keep a copy of every weight until the forward pass ends.
    Raises VlmError if the model has no layer that can be computed again.
    """
    layers = transformer_layers(model)
    if not layers:
        raise VlmError("train.gradient_checkpointing: no part of this model has layers of transformers to checkpoint")
    for layer in layers:
        layer.forward = _checkpointed(layer.forward)
    return len(layers)


def transformer_layers(model: nn.Module) -> list[Any]:
    """All layers of transformers' models that can be checkpointed one by one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _checkpointed(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        inputs = [*arguments, *options.values()]
        if not torch.is_grad_enabled() or not any(isinstance(i, torch.Tensor) and i.requires_grad for i in inputs):
            return forward(*arguments, **options)
        return checkpoint(forward, *arguments, use_reentrant=False, **options)

    return wrapped


def check_offload(device: torch.device) -> None:
    """Raises VlmError where activations would move from the CPU to the CPU."""
    if device.type != "cuda":
        raise VlmError(
            f"train.cpu_offload: training runs on {device.type}, which has no GPU memory to save: set it to false"
        )


def activations_on_cpu(on: bool, pinned: bool = True) -> AbstractContextManager[Any]:
    """While a forward pass runs in this, what it keeps for the backward pass waits in the CPU's memory, if `on`.

    Parameters stay where they are: they are kept anyway. pinned: page-locked memory, to which a GPU copies faster.
    """
    if not on:
        return nullcontext()

    def pack(tensor: torch.Tensor) -> Any:
        if tensor.is_leaf or isinstance(tensor._base, nn.Parameter):  # the latter: a weight seen transposed
            return tensor
        waiting = torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, pin_memory=pinned)
        waiting.copy_(tensor)
        return tensor.device, waiting

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        device, waiting = packed
        return waiting.to(device, non_blocking=pinned)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
