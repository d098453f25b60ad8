"""Memory levers of training."""

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlm.errors import VlmError


def checkpoint_layers(model: nn.Module) -> int:
    """Keep only the inputs of transformer layers and compute the rest again in the backward pass; returns how many.

    Chen et al. 2016. transformers' own switch works in training mode only, and frozen parts that gradients flow through
    stay in eval mode; this one works wherever gradients are asked for. Random states are restored, so dropout draws the
    same again. Raises VlmError if the model has no layer that can be computed again.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise VlmError("train.gradient_checkpointing: no part of this model has layers of transformers to checkpoint")
    for layer in layers:
        layer.forward = _checkpointed(layer.forward)
    return len(layers)


def _checkpointed(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        inputs = [*arguments, *options.values()]
        if not torch.is_grad_enabled() or not any(isinstance(i, torch.Tensor) and i.requires_grad for i in inputs):
            return forward(*arguments, **options)
        return checkpoint(forward, *arguments, use_reentrant=False, **options)

    return wrapped
