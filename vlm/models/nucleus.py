"""Nucleus sampling whose words depend on a seed for each text, not on what shares its batch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


class SeededNucleus(LogitsProcessor):
    """Makes greedy search draw from the nucleus (Holtzman et al. 2020, section 3.1), each row by a seed of its own.

    The most probable of logits with Gumbel noise is a draw from their softmax, so a row's words follow from its own
    seed and logits alone: a text is the same alone, in any batch and in any number of processes.

    seeds: [B] of the rows. top_p: the smallest set of tokens at least so probable is drawn from.
    """

    def __init__(self, seeds: Sequence[int], top_p: float = 0.9, temperature: float = 1.0) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.top_p = top_p
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B,V] with noise, -inf outside the nucleus. Raises ValueError for another number of rows."""
        if len(scores) != len(self.generators):
            raise ValueError(f"{len(scores)} rows for {len(self.generators)} seeds: give each row a seed")
        logits = scores.float() / self.temperature
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= self.top_p  # what goes before is enough
        outside[:, 0] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
        width = logits.shape[-1]
        drawn = torch.stack([torch.rand(width, generator=g, dtype=torch.float64) for g in self.generators])
        noise = -torch.log(-torch.log(drawn.clamp(1e-300, 1 - 1e-16)))
        return logits + noise.to(logits)
