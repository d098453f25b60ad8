"""What scoring answers to questions gives, and the rules of data sets with short answers: GQA, A-OKVQA."""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vlm.data.records import Record
from vlm.evaluation.intervals import Parts
from vlm.evaluation.tables import Table, mean_table

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """Scores of answers by one protocol.

    per_sample: each question's own score between 0 and 1. scores: every metric in per cent; by default `accuracy`, the
    mean. contributions: metric -> what `vlm.evaluation.task.Judged` says. tables: title -> scores of groups.
    """

    per_sample: list[float]
    scores: dict[str, float]
    contributions: Mapping[str, list[float | None] | Parts]
    tables: dict[str, Table] = field(default_factory=dict)


Scorer = Callable[[Sequence[Record], Sequence[str | None]], AnswerScores]


def mean_scores(records: Sequence[Record], values: list[float], *keys: str) -> AnswerScores:
    """The mean as `accuracy`, also of each group that a key of the records' `meta` makes."""
    whole: list[float | None] = [*values]
    score = 100 * sum(values) / len(values)
    return AnswerScores(values, {"accuracy": score}, {"accuracy": whole}, mean_tables(records, values, *keys))


def mean_tables(records: Sequence[Record], values: list[float], *keys: str) -> dict[str, Table]:
    """The mean of each group that a key of the records' `meta` makes."""
    return {f"per_{key}": mean_table(key, [record.meta.get(key) for record in records], values) for key in keys}


def score_gqa(records: Sequence[Record], texts: Sequence[str | None]) -> AnswerScores:
    """GQA (Hudson and Manning 2019): equal to the answer, case and punctuation aside."""

    def plain(text: str) -> str:
        return " ".join(text.lower().translate(_NO_PUNCTUATION).split())

    values = [
        float(text is not None and plain(text) in {plain(answer) for answer in record.answers})
        for record, text in zip(records, texts, strict=True)
    ]
    return mean_scores(records, values, "question_type", "semantic_type")


def score_aokvqa(records: Sequence[Record], texts: Sequence[str | None]) -> AnswerScores:
    """A-OKVQA's direct answers (Schwenk et al. 2022): min(1, equal human answers / 3), case aside."""
    values = [
        0.0 if text is None else min(1.0, [a.lower() for a in record.answers].count(text.strip().lower()) / 3)
        for record, text in zip(records, texts, strict=True)
    ]
    return mean_scores(records, values)
