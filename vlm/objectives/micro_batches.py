"""A loss over the embeddings of a whole batch when only a part of it fits through the model at once.

Gao et al. 2021 (GradCache), section 3: embed every micro-batch without gradient, take the loss's gradient with respect
to the embeddings, then embed each micro-batch again and send that gradient through. Both passes see the same random
numbers, so dropout does not make them differ. Statistics that a layer keeps (batch norm) are updated twice.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Micro = TypeVar("Micro")


@dataclass(frozen=True)
class RandomState:
    """The state of torch's generators on the CPU and on the current accelerator."""

    cpu: Tensor
    cuda: Tensor | None
    mps: Tensor | None

    @classmethod
    def now(cls) -> "RandomState":
        """The state at this moment."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
        return cls(torch.get_rng_state(), cuda, mps)

    def restore(self) -> None:
        """Make the generators go on from here."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        if self.mps is not None:
            torch.mps.set_rng_state(self.mps)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Random numbers as from this state on inside; outside as if nothing had happened."""
        outside = RandomState.now()
        self.restore()
        try:
            yield
        finally:
            outside.restore()


@dataclass(frozen=True)
class Replay:
    """What the second pass needs: each micro-batch embedded again under its random state, and one backward each.

    loss: of the whole batch, detached. gradients: of each micro-batch's embeddings. shared: of the parameters that the
    loss reads beside the embeddings.
    """

    loss: Tensor
    states: Sequence[RandomState]
    gradients: Sequence[tuple[Tensor | None, ...]]
    shared: Sequence[Tensor | None]

    def again(self, number: int) -> AbstractContextManager[None]:
        """Random numbers as micro-batch `number` saw them in the first pass."""
        return self.states[number].again()

    def surrogate(self, number: int, embeddings: Sequence[Tensor], shared: Sequence[Tensor] = ()) -> Tensor:
        """A scalar whose gradient is micro-batch `number`'s part of the whole loss's gradient.

        embeddings: of that micro-batch, computed again within `again(number)`. shared: as in `plan_replay`; their
        gradient is part of the last one, so that everything flows through one place. The scalar's value means nothing.
        """
        pairs = list(zip(embeddings, self.gradients[number]))
        if number == len(self.gradients) - 1:
            pairs += zip((p for p in shared if p.requires_grad), self.shared)
        terms = [(value * gradient).sum() for value, gradient in pairs if gradient is not None]
        return sum(terms[1:], start=terms[0])


def plan_replay(
    embed: Callable[[Micro], tuple[Tensor, ...]],
    micro_batches: Sequence[Micro],
    loss: Callable[..., Tensor],
    shared: Sequence[Tensor] = (),
) -> Replay:
    """The first pass: embeddings of every micro-batch without gradient, the loss on all, and its gradients.

    embed(micro_batch): embeddings, each [b,...]. loss(*embeddings): scalar of the embeddings of the whole batch,
    each [B,...]. shared: what else the loss differentiates by (logit scale, bias).
    """
    states, pieces = [], []
    with torch.no_grad():
        for micro_batch in micro_batches:
            states.append(RandomState.now())
            pieces.append(tuple(e.detach() for e in embed(micro_batch)))
            # Autocast keeps half-precision copies of weights; those made here carry no gradient.
            torch.clear_autocast_cache()
    whole = [torch.cat(parts).requires_grad_() for parts in zip(*pieces)]
    learning = [p for p in shared if p.requires_grad]
    with torch.enable_grad():
        value = loss(*whole)
    found = torch.autograd.grad(value, [*whole, *learning], allow_unused=True)
    gradients: list[tuple[Tensor | None, ...]] = []
    start = 0
    for piece in pieces:
        rows = slice(start, start + len(piece[0]))
        gradients.append(tuple(None if g is None else g[rows] for g in found[: len(whole)]))
        start = rows.stop
    return Replay(value.detach(), states, gradients, found[len(whole) :])
