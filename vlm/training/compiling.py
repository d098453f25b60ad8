"""Compiled transformer layers in training."""

import functools
import logging
from typing import Any

import torch
from torch import nn

from vlm.errors import VlmError
from vlm.training.memory import transformer_layers

logger = logging.getLogger(__name__)


def compile_layers(model: nn.Module) -> int:
    """Compile each transformer layer of transformers that gradients flow through, in place; returns how many.

    Layers alike share one compiled form, for any number of tokens. Answers are still generated without: their shapes
    change with every token. Random numbers stay torch's own, so dropout draws what it does uncompiled. Where nothing
    can be compiled (no C++ compiler on a CPU), training goes on without after a warning.
    Raises VlmError if the model has no such layer.
    """
    layers = transformer_layers(model)
    if not layers:
        raise VlmError("train.compile: no part of this model has layers of transformers to compile: set it to false")
    broken: list[Exception] = []  # why compiling does not work here, for all layers
    for layer in layers:
        layer.forward = _compiled(layer.forward, broken)
    return len(layers)


def _compiled(forward: Any, broken: list[Exception]) -> Any:
    fast = torch.compile(forward, dynamic=True, options={"fallback_random": True})

    @functools.wraps(forward)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        if broken or not torch.is_grad_enabled():
            return forward(*arguments, **options)
        try:
            return fast(*arguments, **options)
        except Exception as error:  # whatever goes wrong in a compiler; what is wrong with the layer shows below
            result = forward(*arguments, **options)
            broken.append(error)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning("train.compile: training uncompiled: %s", reason)
            return result

    return wrapped
