"""A training step as a chain of parts, so that operations can be counted by part, forward and backward apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlm.planning.meter import StepMeter


@dataclass(frozen=True)
class Part:
    """A piece of a step: reads tensors by name, and writes others.

    name: under which its operations are counted. run: tensors in the order of `reads` to those of `writes`. The last
    part writes `loss`.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    run: Callable[..., tuple[Tensor, ...]]


@dataclass
class Cost:
    """Operations by part of one micro-batch, and the most bytes alive in it above what was there before."""

    forward: dict[str, int] = field(default_factory=dict)
    backward: dict[str, int] = field(default_factory=dict)
    peak: int = 0

    @property
    def total(self) -> int:
        """All operations."""
        return sum(self.forward.values()) + sum(self.backward.values())


def run_step(
    parts: Sequence[Part], inputs: dict[str, Tensor], precision: torch.dtype, backward: bool = True, cache: bool = True
) -> Cost:
    """Forward and backward of a chain of parts on `inputs`, with autocast where `precision` is not fp32.

    cache: whether autocast keeps the weights that it casts.

    Each part's backward runs by itself, from the gradients of what it wrote to those of what it read, so that
    everything is counted where it belongs.
    """
    cost = Cost()
    device = next(iter(inputs.values())).device.type
    values, chain = dict(inputs), []
    with StepMeter() as meter:
        with torch.autocast(device, precision, enabled=precision != torch.float32, cache_enabled=cache):
            seen = 0
            for part in parts:
                read = [values[name] for name in part.reads]
                cut = [v.detach().requires_grad_(v.requires_grad) if v.grad_fn is not None else v for v in read]
                written = part.run(*cut)
                values |= zip(part.writes, written)
                chain.append((part, cut, written))
                cost.forward[part.name] = cost.forward.get(part.name, 0) + meter.flops - seen
                seen = meter.flops
                del read, cut, written
        gradients: dict[str, Tensor] = {}
        values.clear()
        while chain and backward:
            part, cut, written = chain.pop()
            pairs = [(v, gradients.pop(name, None)) for name, v in zip(part.writes, written)]
            wanted = [(v, g) for v, g in pairs if v.requires_grad and (g is not None or v.ndim == 0)]
            del written, pairs
            if wanted:
                torch.autograd.backward([v for v, _ in wanted], [g for _, g in wanted])
            del wanted
            for name, value in zip(part.reads, cut):
                if value.grad is not None:
                    gradients[name] = gradients[name] + value.grad if name in gradients else value.grad
                    value.grad = None
            cost.backward[part.name] = cost.backward.get(part.name, 0) + meter.flops - seen
            seen = meter.flops
            del cut, value
    cost.peak = meter.peak + sum(value.nbytes for value in inputs.values())
    return cost
