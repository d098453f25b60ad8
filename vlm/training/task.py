"""Model + objectives as one module: a batch goes in, a loss ready for backward comes out."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm.errors import VlmError, did_you_mean
from vlm.objectives import OBJECTIVES
from vlm.recipe import ObjectiveSpec


class Task(nn.Module):
    """The module that is wrapped for distribution: gradients flow through its `forward`."""

    def __init__(self, model: nn.Module, objectives: Sequence[ObjectiveSpec]) -> None:
        super().__init__()
        self.model = model
        for spec in objectives:
            if spec.name not in OBJECTIVES:
                raise VlmError(f"objectives: unknown objective {spec.name!r}{did_you_mean(spec.name, OBJECTIVES)}")
        self.objectives = [(spec.name, spec.weight, OBJECTIVES[spec.name]) for spec in objectives]

    def counts(self, batches: Sequence[Any]) -> Tensor:
        """How many loss terms each objective finds in `batches`: [number of objectives]."""
        totals = [sum(objective.count(batch) for batch in batches) for _, _, objective in self.objectives]
        return torch.tensor(totals, dtype=torch.float64)

    @property
    def report_names(self) -> list[str]:
        """Everything that `forward` may report, in one order on every process."""
        return [n for name, _, objective in self.objectives for n in (name, *objective.reports)]

    def forward(self, batch: Any | None, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """This batch's share of the global batch's loss, and of what is reported.

        counts: loss terms of the *whole* global batch, so that shares add up to its mean however it was split.
        batch: None where a process has nothing left while others still work.
        """
        # Every trained parameter takes part, also where a batch shows no picture: processes must agree on gradients.
        total = sum((p.sum() * 0.0 for p in self.model.parameters() if p.requires_grad), start=torch.zeros(()))
        report: dict[str, Tensor] = {}
        if batch is None:
            return total, report
        losses: list[Tensor] = []
        for (name, weight, objective), count in zip(self.objectives, counts.tolist()):
            if not count:
                continue
            loss, parts = objective.loss(self.model, batch)
            losses.append(weight * loss / count)
            report[name] = loss.detach() / count
            report |= {key: value.detach() / count for key, value in parts.items()}
        if not losses:
            return total, report
        # The zero terms cost a pass over the weights, so they are added only where something may be left out.
        total = sum(losses[1:], start=losses[0]) + (total if batch.image_inputs is None else 0.0)
        return total, report


def add_reports(reports: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sums by name."""
    total: dict[str, Tensor] = {}
    for report in reports:
        for name, value in report.items():
            total[name] = total[name] + value if name in total else value
    return total
