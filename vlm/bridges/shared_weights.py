"""Linear layers and embeddings that serve several passes of a step: a CPU sums their weight's gradient in place.

autograd gives each use a gradient as large as the weight, and adds them up. Where texts are short these additions, and
writing to memory that no cache holds, cost as much as the products themselves. Here the first use of a weight in a
backward pass makes its gradient and the others add to it. Other devices, and autocast, use torch's own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

# Of each weight: the backward pass that its gradient was begun in, and that gradient, which autograd holds until all
# uses of the weight have given theirs.
_begun: Any = WeakIdKeyDictionary()


class Linear(nn.Linear):
    """torch's, for a weight that several passes of a step use."""

    def forward(self, states: Tensor) -> Tensor:
        return linear(states, self.weight, self.bias)


class Embedding(nn.Embedding):
    """torch's, for a table that several passes of a step use."""

    def forward(self, ids: Tensor) -> Tensor:
        if not _applies(self.weight):
            return super().forward(ids)
        embedded: Tensor = _Embedding.apply(ids, self.weight)
        return embedded


def linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """states [...,I] times weight [O,I], plus bias [O]: [...,O]."""
    if not _applies(weight):
        return F.linear(states, weight, bias)
    out: Tensor = _Linear.apply(states, weight, bias)
    return out


def _applies(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return on_cpu and weight.requires_grad and torch.is_grad_enabled()


def _begun_gradient(weight: Tensor) -> Tensor | None:
    """The gradient that another use of this weight has made in the backward pass that runs now."""
    task, gradient = _begun.get(weight, (None, None))
    return gradient() if task == torch._C._current_graph_task_id() else None


def _begin(weight: Tensor, gradient: Tensor) -> Tensor:
    _begun[weight] = torch._C._current_graph_task_id(), TensorWeakRef(gradient)
    return gradient


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states, weight)
        return F.linear(states, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        states, weight = ctx.saved_tensors
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])  # [N, O]
        of_weight = None
        if wants_weight:
            flat = states.reshape(-1, states.shape[-1])  # [N, I]
            begun = _begun_gradient(weight)
            if begun is None:
                of_weight = _begin(weight, rows.T @ flat)
            else:
                torch.addmm(begun, rows.T, flat, out=begun)  # `addmm_` is not among what torch's counters count
        of_states = (rows @ weight).view_as(states) if wants_states else None
        return of_states, of_weight, rows.sum(0) if wants_bias else None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, weight)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        ids, weight = ctx.saved_tensors
        begun = _begun_gradient(weight)
        into = torch.zeros_like(weight) if begun is None else begun
        into.index_add_(0, ids.flatten(), gradient.reshape(-1, gradient.shape[-1]))
        return None, _begin(weight, into) if begun is None else None
