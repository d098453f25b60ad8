"""Scores of groups of samples: per question type, per category, per domain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlm.evaluation.intervals import Parts, mean_parts
from vlm.evaluation.named_scores import NamedScores


@dataclass(frozen=True, eq=False)
class Table(NamedScores):
    """A score of each group, in per cent, as a mapping.

    by: what parts the samples (`question_type`); tables by the same have the same groups.
    parts: group -> the numbers of its samples, and what each of these adds to its score / 100.
    """

    scores: dict[str, float]
    by: str
    parts: Mapping[str, tuple[Sequence[int], Parts]]


def table_of(by: str, parts: Mapping[str, tuple[Sequence[int], Parts]]) -> Table:
    """The scores that the parts of each group's samples sum up to."""
    scores = {group: 100 * float(of.metric(of.rows.sum(axis=0)[None])[0]) for group, (_, of) in parts.items()}
    return Table(scores, by, parts)


def mean_table(by: str, groups: Sequence[object], values: Sequence[float]) -> Table:
    """The mean of each group in per cent, in order of appearance; what has no group is left out."""
    members = members_of(groups)
    return table_of(by, {group: (own, mean_parts([values[n] for n in own])) for group, own in members.items()})


def members_of(groups: Sequence[object]) -> dict[str, list[int]]:
    """Group -> numbers of its samples, in order of appearance; None is no group."""
    members: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        if group is not None:
            members.setdefault(str(group), []).append(number)
    return members
