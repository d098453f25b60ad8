"""Language modelling: cross-entropy of the next token, only where there is a label."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm.objectives.frozen_head import frozen_head_cross_entropy_sum
from vlm.objectives.fused import can_fuse, fused_cross_entropy_sum
from vlm.objectives.objective import Loss, ReadOuts
from vlm.recipe import ObjectiveSpec

CHUNK = 2048  # labelled positions whose logits exist at one time


def lm_count(batch: Any) -> int:
    """Trained tokens of a batch."""
    return int(batch.num_targets)


def lm_loss(read: ReadOuts, spec: ObjectiveSpec) -> Loss:
    """Sum of cross-entropy over the labelled positions, and how many of them the model gets right."""
    states, targets = read("label_states")  # [n, D], [n]
    model = read.model
    head = model.plain_head
    if len(targets) and can_fuse(states, head):
        loss, correct = fused_cross_entropy_sum(states, targets, head, spec.smoothing)
    elif head is not None and not head.requires_grad and head.is_floating_point() and not spec.smoothing:
        loss, correct = frozen_head_cross_entropy_sum(states, targets, head, CHUNK)
    else:
        loss, correct = cross_entropy_sum(states, targets, model.word_logits, smoothing=spec.smoothing)
    return loss, {"token_accuracy": correct}


def cross_entropy_sum(
    states: Tensor,
    targets: Tensor,
    logits: Callable[[Tensor], Tensor],
    chunk: int = CHUNK,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropy of states [n,D] against targets [n], and the number of right predictions.

    The vocabulary projection and the loss run in chunks that are recomputed in the backward pass, so that at most
    [chunk, V] logits exist at a time. In fp32 whatever the states' type. smoothing: share of the target that is spread
    over the vocabulary.
    """
    loss, correct = states.new_zeros((), dtype=torch.float32), targets.new_zeros(())
    pieces = list(zip(states.split(chunk), targets.split(chunk)))
    for piece, target in pieces:
        if len(pieces) > 1 and torch.is_grad_enabled():
            part, right = checkpoint(_chunk, piece, target, logits, smoothing, use_reentrant=False)
        else:
            part, right = _chunk(piece, target, logits, smoothing)
        loss, correct = loss + part, correct + right
    return loss, correct


def _chunk(
    states: Tensor, targets: Tensor, logits: Callable[[Tensor], Tensor], smoothing: float
) -> tuple[Tensor, Tensor]:
    scores = logits(states).float()  # [n, V]
    loss = F.cross_entropy(scores, targets, reduction="sum", label_smoothing=smoothing)
    return loss, (scores.argmax(-1) == targets).sum().detach()


def token_log_probs(states: Tensor, targets: Tensor, logits: Callable[[Tensor], Tensor], chunk: int = CHUNK) -> Tensor:
    """Log-probability [n] of each target under its state [n,D], in fp32."""
    pieces = [
        -F.cross_entropy(logits(piece).float(), target, reduction="none")
        for piece, target in zip(states.split(chunk), targets.split(chunk))
    ]
    return torch.cat(pieces) if pieces else states.new_zeros(0, dtype=torch.float32)
