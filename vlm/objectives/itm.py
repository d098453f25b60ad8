"""Image-text matching: does this text belong to this image? The wrong pairs are the hard ones of the global batch.

Li et al. 2021 (ALBEF), section 3.2, and Li et al. 2023 (BLIP-2), section 3.1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NONE = -1  # in place of a negative where there is none


@dataclass(frozen=True)
class Negatives:
    """The wrong image of each text and the wrong text of each image: places in the global batch [b], NONE for none."""

    image: Tensor
    text: Tensor

    def count(self) -> Tensor:
        """How many there are."""
        return (self.image != NONE).sum() + (self.text != NONE).sum()


def uniform_numbers(seed: int, places: Tensor) -> Tensor:
    """Two numbers in [0,1) for each place of the global batch [b,2], float64 on the CPU.

    They depend on seed and place alone, so that neither processes nor micro-batches change what is drawn.
    """
    mask = (1 << 64) - 1

    def mixed(state: int) -> int:
        """SplitMix64 (Steele et al. 2014): every bit of the state in every bit of the result."""
        state = (state + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        return state ^ (state >> 31)

    start = mixed(seed & mask)
    numbers = [[(mixed(mixed(start ^ place) + side) >> 11) / (1 << 53) for side in (0, 1)] for place in places.tolist()]
    return torch.tensor(numbers, dtype=torch.float64).view(len(places), 2)


def draw_negatives(logits: Tensor, belong: Tensor, uniform: Tensor) -> Tensor:
    """One candidate for each row, drawn from the softmax of its logits over those that do not belong to it [b].

    logits: similarity over temperature [b,B]. belong: True for the positives, which are never drawn [b,B].
    uniform: a number in [0,1) a row [b]; the draw inverts the cumulative distribution there. NONE where everything
    belongs. Logits that are not finite count as equal ones, so that a broken step is found by its loss.
    """
    allowed = ~belong
    scores = logits.detach().double().nan_to_num(0.0, 0.0, 0.0).masked_fill(belong, -torch.inf)
    some = allowed.any(1)
    weights = torch.where(some[:, None], scores, 0.0).softmax(1).masked_fill(belong, 0.0)
    steps = weights.cumsum(1)
    goal = uniform.to(steps)[:, None] * steps[:, -1:]
    drawn = torch.searchsorted(steps, goal, right=True)[:, 0].clamp(max=steps.shape[1] - 1)
    # Rounding may end on a candidate of weight zero: take the next likely one before it.
    last = torch.where(weights > 0, torch.arange(steps.shape[1], device=steps.device), NONE).cummax(1).values
    drawn = last.gather(1, drawn[:, None])[:, 0]
    first = (weights > 0).int().argmax(1)
    return torch.where(some, torch.where(drawn < 0, first, drawn), NONE)


def itm_loss(right: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropy of the logits (no match, match) of right pairs [r,2] and wrong ones [w,2].

    Also how many of them are judged rightly. Divide by r + w; BLIP-2 has twice as many wrong pairs as right ones.
    """
    logits = torch.cat([right, wrong]).float()
    labels = torch.cat([torch.ones(len(right)), torch.zeros(len(wrong))]).long().to(logits.device)
    return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum()
