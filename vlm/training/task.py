"""Model + objectives as one module: a batch goes in, a loss ready for backward comes out."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm.errors import VlmError, did_you_mean
from vlm.objectives import OBJECTIVES, Objective, Pairs, ReadOuts
from vlm.objectives.micro_batches import Replay, plan_replay
from vlm.objectives.objective import make_pairs
from vlm.recipe import ObjectiveSpec

Report = dict[str, Tensor]


@dataclass(frozen=True)
class FirstPass:
    """What a step learns of all its micro-batches before the first backward, where objectives compare whole batches.

    replay: gradients of the comparing losses by the embeddings. report: of those losses. prepared: for the other
    objectives. rows: where each micro-batch's pairs lie in this process's pairs.
    """

    replay: Replay
    report: Report
    prepared: Mapping[str, Any]
    rows: Sequence[slice]


class Task(nn.Module):
    """The module that is wrapped for distribution: gradients flow through its `forward`."""

    def __init__(self, model: nn.Module, objectives: Sequence[ObjectiveSpec]) -> None:
        super().__init__()
        self.model: Any = model
        for spec in objectives:
            if spec.name not in OBJECTIVES:
                raise VlmError(f"objectives: unknown objective {spec.name!r}{did_you_mean(spec.name, OBJECTIVES)}")
            if not OBJECTIVES[spec.name].suits(model):
                known = ", ".join(name for name, objective in OBJECTIVES.items() if objective.suits(model))
                raise VlmError(f"objectives: a {self.model.family} model cannot learn {spec.name!r}; it can: {known}")
        self.objectives: list[tuple[ObjectiveSpec, Objective]] = [(spec, OBJECTIVES[spec.name]) for spec in objectives]
        self.needs_pairs = any(objective.needs_pairs for _, objective in self.objectives)

    def counts(self, batches: Sequence[Any]) -> Tensor:
        """How many loss terms each objective finds in `batches`: [number of objectives]."""
        totals = [sum(objective.count(batch) for batch in batches) for _, objective in self.objectives]
        return torch.tensor(totals, dtype=torch.float64)

    @property
    def report_names(self) -> list[str]:
        """Everything that may be reported, in one order on every process."""
        return [n for spec, objective in self.objectives for n in (spec.name, *objective.reports)]

    def first_pass(self, batches: Sequence[Any], counts: Tensor, seed: int) -> FirstPass:
        """Embed all micro-batches without gradient, compare them, and prepare what the second pass needs.

        Every process of the group has to call it, with at least one batch (an empty one where it has none).
        """
        report: Report = {}
        joined: list[Pairs] = []

        def embed(batch: Any) -> tuple[Tensor, Tensor]:
            return ReadOuts(self.model, batch)("pairs")

        def compared(image: Tensor, text: Tensor) -> Tensor:
            pairs = make_pairs(image, text, batches, seed)
            joined.append(pairs.detached())
            loss, found = self._compare(pairs, counts)
            report.update(found)
            return loss

        replay = plan_replay(embed, batches, compared, self.model.comparison_parameters())
        ends = torch.tensor([len(batch) for batch in batches]).cumsum(0).tolist()
        rows = [slice(end - len(batch), end) for end, batch in zip(ends, batches)]
        return FirstPass(replay, {"loss": replay.loss, **report}, self._prepare(joined[0], batches), rows)

    def forward(
        self, batch: Any | None, counts: Tensor, seed: int = 0, first: FirstPass | None = None, number: int = 0
    ) -> tuple[Tensor, Report]:
        """This batch's share of the global batch's loss, and of what is reported.

        counts: loss terms of the *whole* global batch, so that shares add up to its mean however it was split.
        batch: None where a process has nothing left while others still work.
        seed: of this step's draws. first, number: what `first_pass` found, and which of its batches this is; without
        it, the batch holds all that this process has in this step.
        """
        if batch is None:
            return self._nothing(), {}
        # What a first pass drew has to be drawn again, so nothing joins the embeddings then.
        read = ReadOuts(self.model, batch, expected=frozenset() if first else self._reads(batch, counts))
        losses: list[Tensor] = []
        report: Report = {}
        if self.needs_pairs:
            with first.replay.again(number) if first else nullcontext():
                embeddings = read("pairs")
            if first is None:
                pairs = make_pairs(embeddings[0], embeddings[1], [batch], seed)
                loss, report = self._compare(pairs, counts)
                report["loss"] = loss.detach()
                losses.append(loss)
                read.prepared = self._prepare(pairs.detached(), [batch])
            else:
                losses.append(first.replay.surrogate(number, embeddings, self.model.comparison_parameters()))
                report = dict(first.report) if number == 0 else {}
                read.prepared, read.rows = first.prepared, first.rows[number]
        value = report.pop("loss", torch.zeros((), device=counts.device))
        for (spec, objective), count in zip(self.objectives, counts.tolist()):
            if objective.loss is None or not count or not objective.count(batch):
                continue
            loss, parts = objective.loss(read, spec)
            losses.append(spec.weight * loss / count)
            value = value + losses[-1].detach()
            report[spec.name] = report.get(spec.name, 0.0) + loss.detach() / count
            report |= {key: part.detach() / count for key, part in parts.items()}
        if not losses:
            return self._nothing(), report
        # The zero terms cost a pass over the weights, so they are added only where something may be left out.
        partial = batch.image_inputs is None or (self.needs_pairs and not len(batch))
        total = sum(losses[1:], start=losses[0]) + (self._nothing() if partial else 0.0)
        return total, {"loss": value, **report}

    def _reads(self, batch: Any, counts: Tensor) -> frozenset[str]:
        """The read-outs that the objectives will ask of a batch."""
        pairs = zip(self.objectives, counts.tolist())
        return frozenset(
            n for (_, objective), total in pairs if total and objective.count(batch) for n in objective.reads
        )

    def _nothing(self) -> Tensor:
        """Zero in which every trained parameter takes part, also those that a batch without a picture leaves out:
        processes must agree on gradients."""
        learning = (p for p in self.model.parameters() if p.requires_grad and not isinstance(p, DTensor))
        return sum((p.sum() * 0.0 for p in learning), start=torch.zeros(()))

    def _compare(self, pairs: Pairs, counts: Tensor) -> tuple[Tensor, Report]:
        """The comparing objectives' weighted share of the loss, and what they report."""
        losses: list[Tensor] = [pairs.text.new_zeros((), dtype=torch.float32)]
        report: Report = {}
        for (spec, objective), count in zip(self.objectives, counts.tolist()):
            if objective.compare is None or not count:
                continue
            loss, parts = objective.compare(self.model, pairs, spec)
            losses.append(spec.weight * loss / count)
            report[spec.name] = loss.detach() / count
            report |= {key: part.detach() / count for key, part in parts.items()}
        return sum(losses[1:], start=losses[0]), report

    def _prepare(self, pairs: Pairs, batches: Sequence[Any]) -> dict[str, Any]:
        return {
            spec.name: objective.prepare(self.model, pairs, batches, spec)
            for spec, objective in self.objectives
            if objective.prepare is not None
        }


def add_reports(reports: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sums by name."""
    total: dict[str, Tensor] = {}
    for report in reports:
        for name, value in report.items():
            total[name] = total[name] + value if name in total else value
    return total
