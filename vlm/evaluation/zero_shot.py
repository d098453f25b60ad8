"""Zero-shot classification: accuracy among the first k guesses and mean recall per class.

Where classes score the same, the one that comes first in the order of the classes is the guess.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm.errors import VlmError
from vlm.evaluation.named_scores import NamedScores


@dataclass(frozen=True, eq=False)
class ZeroShotScores(NamedScores):
    """Scores by name, in per cent: `acc@1`, `acc@5`, ..., `mean_per_class_recall` (first guess, classes that occur).

    ranks: [N] the place of the right class among the guesses, from 0; inf where nothing was guessed.
    contributions: what each picture adds to each score; their mean is the score / 100.
    """

    scores: dict[str, float]
    ranks: np.ndarray
    contributions: dict[str, np.ndarray]


def zero_shot_scores(scores: Any, labels: Sequence[int], ks: Sequence[int] = (1, 5)) -> ZeroShotScores:
    """Scores of probabilities or logits [N,C] (array or tensor) against the numbers of the right classes [N].

    Raises VlmError on shapes that do not fit, labels that are no class, or scores that are not numbers.
    """
    table = np.asarray(scores.detach().float().cpu() if hasattr(scores, "detach") else scores, dtype=float)
    right = np.asarray(labels)
    if table.ndim != 2 or right.shape != (len(table),) or not len(table):
        raise VlmError(f"expected scores [N,C] and N labels, got shapes {list(table.shape)} and {list(right.shape)}")
    if right.dtype.kind not in "iu" or right.min() < 0 or right.max() >= table.shape[1]:
        raise VlmError(f"labels must be numbers of classes, 0 to {table.shape[1] - 1}")
    return scores_of_ranks(class_ranks(table, right), right.tolist(), ks)


def class_ranks(table: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The place [N] of the right class [N] among the guesses that scores [N,C] make, from 0."""
    if len(bad := np.flatnonzero(np.isnan(table).any(axis=1))):
        raise VlmError(f"the scores of picture {bad[0]} (and {len(bad) - 1} more) are not numbers")
    own = table[np.arange(len(table)), right][:, None]  # [N, 1]
    before = np.arange(table.shape[1])[None] < right[:, None]  # [N, C]
    return (table > own).sum(axis=1) + ((table == own) & before).sum(axis=1)


def scores_of_ranks(
    ranks: Sequence[float] | np.ndarray, labels: Sequence[Hashable], ks: Sequence[int] = (1, 5)
) -> ZeroShotScores:
    """Scores of the places [N] of the right classes among the guesses (from 0), and what the right classes are [N]."""
    places = np.asarray(ranks, dtype=float)
    if len(places) != len(labels) or not len(places):
        raise VlmError(f"{len(places)} ranks for {len(labels)} labels: give as many of both, at least one")
    contributions = {f"acc@{k}": (places < k).astype(float) for k in ks}
    numbers: dict[Hashable, int] = {}
    classes = np.array([numbers.setdefault(label, len(numbers)) for label in labels])  # [N]
    sizes = np.bincount(classes)  # [K]
    contributions["mean_per_class_recall"] = (places < 1) * len(places) / (len(sizes) * sizes[classes])
    scores = {name: 100 * float(values.mean()) for name, values in contributions.items()}
    return ZeroShotScores(scores, places, contributions)
