"""Vocabulary projection and cross-entropy as one kernel (liger), where there is a GPU and the package."""

import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@lru_cache(maxsize=1)
def _installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def can_fuse(states: Tensor, head: Tensor | None) -> bool:
    """Whether the loss of states [n,D] on a plain vocabulary projection `head` [V,D] can be one kernel."""
    return states.is_cuda and head is not None and head.is_floating_point() and _installed()


def fused_cross_entropy_sum(
    states: Tensor, targets: Tensor, head: Tensor, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What `vlm.objectives.lm.cross_entropy_sum` gives, without logits in memory.

    head: [V,D], no bias. The gradient is computed in the forward pass, in the type that autocast asks for.
    """
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.dtype
    kernel: Any = LigerFusedLinearCrossEntropyLoss(
        reduction="sum", label_smoothing=smoothing, accum_dtype=torch.float32, return_predicted_tokens=True
    )
    with torch.autocast(kind, enabled=False):
        result = kernel(head.to(dtype), states.to(dtype), targets)
    return result.loss.float(), (result.predicted_tokens == targets).sum().detach()
