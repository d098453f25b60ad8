"""AdamW with parameter groups, and the learning rate over time."""

import math
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vlm.errors import VlmError, did_you_mean
from vlm.models.freezing import named_trainable
from vlm.recipe import OptimizerSection, ScheduleSection


def build_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.AdamW:
    """AdamW over what trains: no decay on norms, biases and other vectors; learning rates by name pattern.

    Raises VlmError if a pattern of `optimizer.groups` matches nothing.
    """
    named = list(named_trainable(model))
    for pattern in section.groups:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            hint = did_you_mean(pattern, (name for name, _ in named))
            raise VlmError(f"optimizer.groups: {pattern!r} matches nothing that trains{hint}")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        lr = next((value for pattern, value in section.groups.items() if fnmatchcase(name, pattern)), section.lr)
        decay = section.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay}
            for (lr, decay), members in groups.items()
        ],
        betas=section.betas,
        eps=section.eps,
    )


def schedule_factor(section: ScheduleSection, step: int, steps: int) -> float:
    """The share of the base learning rate at `step` of `steps` (both counted from 0).

    Linear warm-up from `warmup_start` to 1, then cosine, linear or constant down to `min_lr`.
    """
    warmup = section.warmup if section.warmup >= 1 else section.warmup * steps
    if step < warmup:
        return section.warmup_start + (1 - section.warmup_start) * (step + 1) / math.ceil(warmup)
    progress = min(1.0, (step - warmup) / max(1.0, steps - warmup))
    shape = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[section.name]
    return section.min_lr + (1 - section.min_lr) * shape


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group to `factor` of its base learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def gradients_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether no gradient holds NaN or infinity; of shards, those of this process."""
    gradients = (p.grad for p in parameters if p.grad is not None)
    return all(bool(torch.isfinite(g.to_local() if isinstance(g, DTensor) else g).all()) for g in gradients)
