"""Cross-entropy over a vocabulary projection that does not learn: its gradient is known as soon as its value is."""

from typing import Any

import torch
from torch import Tensor


def frozen_head_cross_entropy_sum(states: Tensor, targets: Tensor, head: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """What `vlm.objectives.lm.cross_entropy_sum` gives for states [n,D], targets [n] and a frozen `head` [V,D].

    The gradient of the states is made beside the loss, chunk by chunk: logits [chunk,V] exist once, are overwritten in
    place, and none are kept or computed again for the backward pass.
    """
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.dtype
    with torch.autocast(kind, enabled=False):
        loss, correct = _FrozenHeadLoss.apply(states, targets, head.to(dtype), chunk)
    return loss, correct


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, head: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        loss, correct = states.new_zeros((), dtype=torch.float32), targets.new_zeros(())
        gradients = []
        for piece, target in zip(states.split(chunk), targets.split(chunk)):
            scores = (piece.to(head.dtype) @ head.T).float()  # [m, V]
            highest, best = scores.max(-1)
            wanted = scores.gather(1, target[:, None])[:, 0]
            total = scores.sub_(highest[:, None]).exp_().sum(-1)
            loss += (total.log() + highest - wanted).sum()
            correct += (best == target).sum()
            if ctx.needs_input_grad[0]:
                expected = (scores.to(head.dtype) @ head).float() / total[:, None]  # [m, D]
                gradients.append((expected - head[target].float()).to(states.dtype))
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None
