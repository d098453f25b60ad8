"""Objectives: what is learned. Each is a pure function of a model and a batch.

An objective returns the *sum* of its loss and says by how many terms (trained tokens, pairs) that sum is to be
divided. The training step divides by the count of the whole global batch, so that the result does not depend on how
the batch was split.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlm.objectives.lm import lm_count, lm_loss


@dataclass(frozen=True)
class Objective:
    """count(batch): terms of the loss sum. loss(model, batch): (sum, what to report beside it, each a sum as well).

    reports: the names that `loss` reports.
    """

    count: Callable[[Any], int]
    loss: Callable[[Any, Any], tuple[Tensor, Mapping[str, Tensor]]]
    reports: tuple[str, ...] = ()


OBJECTIVES: dict[str, Objective] = {"lm": Objective(lm_count, lm_loss, ("token_accuracy",))}
