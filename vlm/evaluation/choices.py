"""Questions with choices: which one an answer means, ScienceQA's accuracy and MMBench's circular one."""

import re
from collections.abc import Sequence

import numpy as np

from vlm.data.records import Record
from vlm.errors import VlmError
from vlm.evaluation.answers import AnswerScores, mean_scores
from vlm.evaluation.intervals import Parts
from vlm.evaluation.tables import members_of, table_of

LETTERS = "ABCDEFGHIJ"
_ROTATION = 1_000_000  # indices of MMBench's rotations of a question differ by a multiple of it
_SENTENCE = re.compile(r"The answer is ([A-Z])\.")


def listed(record: Record) -> str:
    """The choices of a record, one a line: `A. first`."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, record.meta.get("choices", ())))


def letter_of(text: str) -> str | None:
    """The letter an answer names, by LLaVA's rule for ScienceQA: `X`, `X. ...`, or exactly one "The answer is X."."""
    said = text.strip()
    if len(said) == 1 and said in LETTERS:
        return said
    if said[:1] and said[0] in LETTERS and said[1:3] == ". ":
        return said[0]
    found = _SENTENCE.findall(said)
    return found[0] if len(found) == 1 and found[0] in LETTERS else None


def choice_of(text: str, choices: Sequence[str]) -> int | None:
    """The number of the choice that an answer means.

    By `letter_of`, also with a bracket, colon or period behind or around the letter; else the only choice whose text
    the answer is or contains. (MMBench asks a language model where rules fail; here that is wrong.)
    """
    if letter := letter_of(text):
        return LETTERS.index(letter)
    # A sign behind the letter: "A dog" names no choice by its first word.
    if match := re.fullmatch(r"\(?([A-J])[).:](?:\s.*)?", text.strip(), re.DOTALL):
        return LETTERS.index(match[1])
    said = text.strip().lower().rstrip(".")
    equal = [n for n, choice in enumerate(choices) if choice.strip().lower().rstrip(".") == said]
    within = equal or [n for n, choice in enumerate(choices) if choice.strip() and choice.strip().lower() in said]
    return within[0] if len(within) == 1 else None


def score_scienceqa(records: Sequence[Record], texts: Sequence[str | None]) -> AnswerScores:
    """ScienceQA (Lu et al. 2022) by the rule of LLaVA's evaluation: an answer that names no letter is wrong."""
    values = [
        float(text is not None and letter_of(text) == LETTERS[_right(record)])
        for record, text in zip(records, texts, strict=True)
    ]
    return mean_scores(records, values, "subject", "grade")


def score_choices(records: Sequence[Record], texts: Sequence[str | None]) -> AnswerScores:
    """Accuracy of choices, each question by itself."""
    return mean_scores(records, _chosen(records, texts), "category", "l2-category")


def score_circular(records: Sequence[Record], texts: Sequence[str | None]) -> AnswerScores:
    """MMBench (Liu et al. 2023, section 4.1): a question is right only if it is in every rotation of its choices."""
    values = _chosen(records, texts)
    groups: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        key = str(int(record.id) % _ROTATION) if record.id.isdecimal() else record.id
        groups.setdefault(key, []).append(number)
    rows = np.zeros((len(records), 2))
    for members in groups.values():
        rows[members[0]] = min(values[number] for number in members), 1
    whole = Parts(rows, lambda sums: sums[:, 0] / sums[:, 1])
    tables = {}
    for key in ("category", "l2-category"):
        members_by_key = members_of([record.meta.get(key) for record in records])
        parts = {group: (own, Parts(rows[own], whole.metric)) for group, own in members_by_key.items()}
        tables[f"per_{key}"] = table_of(key, parts)
    score = 100 * float(whole.metric(rows.sum(axis=0)[None])[0])
    return AnswerScores(values, {"accuracy": score}, {"accuracy": whole}, tables)


def _chosen(records: Sequence[Record], texts: Sequence[str | None]) -> list[float]:
    return [
        float(text is not None and choice_of(text, record.meta.get("choices", ())) == _right(record))
        for record, text in zip(records, texts, strict=True)
    ]


def _right(record: Record) -> int:
    right = record.meta.get("correct_choice")
    if not isinstance(right, int):
        raise VlmError(f"record {record.id!r} has no choices with a right one, which this protocol scores")
    return right
