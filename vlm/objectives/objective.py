"""What an objective is: how it counts its terms, and what it computes of one batch or of a whole step's pairs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vlm.errors import VlmError
from vlm.objectives.processes import gather_with_gradient, own_rows, process_sizes
from vlm.recipe import ObjectiveSpec

Loss = tuple[Tensor, Mapping[str, Tensor]]  # a sum over terms, and what to report beside it: sums as well


@dataclass(frozen=True)
class Pairs:
    """All image-text pairs of this process in one step, as points of the joint space.

    image: unit length [b,E], of a Q-Former [b,Q,E]. text: unit length [b,E]. picture_ids: int64 [b], equal where texts
    describe the same picture, on all processes. text_ids: int64 [b], equal where texts are. places: int64 [b], each
    pair's place in the global batch. seed: what this step's random draws depend on, beside the places.
    """

    image: Tensor
    text: Tensor
    picture_ids: Tensor
    text_ids: Tensor
    places: Tensor
    seed: int = 0

    def __len__(self) -> int:
        return len(self.text)

    def detached(self) -> "Pairs":
        """The same without gradient."""
        return replace(self, image=self.image.detach(), text=self.text.detach())

    def together(self, spec: ObjectiveSpec) -> Tensor:
        """Integers [b], equal where a picture and a text belong together though they stand in different pairs."""
        return joined_groups(self.picture_ids, self.text_ids) if spec.equal_texts else self.picture_ids


@dataclass
class ReadOuts:
    """What a model says of a batch, by name; each read-out is computed once, however many objectives ask for it.

    A read-out NAME is the model's method `read_NAME(read)`, which may ask for others in turn.
    prepared: objective's name -> what its `prepare` returned. rows: where the batch lies in this process's pairs.
    expected: read-outs that will be asked for, so that a model may compute some of them together.
    """

    model: Any
    batch: Any
    prepared: Mapping[str, Any] = field(default_factory=dict)
    rows: slice = field(default_factory=lambda: slice(None))
    expected: frozenset[str] = frozenset()
    _known: dict[str, Any] = field(default_factory=dict)

    def __call__(self, name: str) -> Any:
        if name not in self._known:
            method = getattr(self.model, f"read_{name}", None)
            if method is None:
                raise VlmError(f"objectives: a {self.model.family} model has no read-out {name!r}; another objective?")
            self._known[name] = method(self)
        return self._known[name]


@dataclass(frozen=True)
class Objective:
    """One thing that is learned. It gives `loss`, `compare` or both.

    count: terms of a batch; the step divides sums by those of the whole global batch.
    loss: (read-outs of one batch, its part of the recipe) -> sum; for what is a sum over samples.
    compare: (model, all pairs of this process, its part of the recipe) -> this process's share of a sum over all pairs
    of the global batch, with gradients across processes. Called once a step whatever the micro-batches.
    prepare: (model, all pairs without gradient, this process's batches, its part of the recipe) -> what `loss` finds in
    `read.prepared`; called once a step on every process, so it may communicate.
    needs: what a model must have for it, as dotted attributes. reads: the read-outs that it asks for.
    reports: the names that are reported beside the loss.
    """

    count: Callable[[Any], int]
    loss: Callable[[ReadOuts, ObjectiveSpec], Loss] | None = None
    compare: Callable[[Any, Pairs, ObjectiveSpec], Loss] | None = None
    prepare: Callable[[Any, Pairs, Sequence[Any], ObjectiveSpec], Any] | None = None
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    reports: tuple[str, ...] = ()

    def suits(self, model: Any) -> bool:
        """Whether the model has what the objective needs."""
        return all(_has(model, name) for name in (*self.needs, *(f"read_{name}" for name in self.reads)))

    @property
    def needs_pairs(self) -> bool:
        """Whether the step has to embed the whole batch first."""
        return self.compare is not None or self.prepare is not None


def _has(model: Any, dotted: str) -> bool:
    for part in dotted.split("."):
        if not hasattr(model, part):
            return False
        model = getattr(model, part)
    return True


def make_pairs(image: Tensor, text: Tensor, batches: Sequence[Any], seed: int) -> Pairs:
    """Embeddings of several batches, one behind the other, as the pairs they are of."""
    picture_ids, text_ids, places = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("picture_ids", "text_ids", "places")
    )
    return Pairs(image, text, picture_ids, text_ids, places, seed)


def joined_groups(one: Tensor, other: Tensor) -> Tensor:
    """Integers [b], equal for pairs of all processes that a chain of equal numbers in `one` or `other` [b] joins."""
    sizes = process_sizes(len(one), one.device)
    numbers = [gather_with_gradient(ids, sizes).unique(return_inverse=True)[1] for ids in (one, other)]
    groups = torch.arange(sum(sizes), device=one.device)
    while True:
        before = groups
        for number in numbers:  # each group takes the smallest number in it
            smallest = torch.full_like(groups, len(groups)).scatter_reduce(0, number, groups, "amin")
            groups = smallest[number]
        if torch.equal(before, groups):
            return groups[own_rows(sizes)]
