"""Blind baselines: what a VQA benchmark gives to someone who never looks at the pictures."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from vlm.data.records import Record
from vlm.errors import VlmError

# Key in results.json -> what people read.
BASELINES = {
    "majority": "blind: majority answer",
    "per_question": "blind: most frequent answer per question",
}


def blind_baselines(training: Iterable[Record], questions: Sequence[str]) -> dict[str, list[str]]:
    """The predictions of both blind baselines for `questions`, learned from training records.

    `majority`: the most frequent answer of all. `per_question`: the most frequent answer to the same question (case and
    outer spaces aside), or the majority answer where training never asks it. Every human answer counts once; on a tie
    the answer seen first wins.

    Raises VlmError if no training record has a question with answers.
    """
    overall: Counter[str] = Counter()
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for record in training:
        if record.question is not None:
            overall.update(record.answers)
            by_question[_key(record.question)].update(record.answers)
    if not overall:
        raise VlmError("the training split has no questions with answers, which the blind baselines learn from")
    majority = _top(overall)
    per_question = {question: _top(counts) for question, counts in by_question.items() if counts}
    return {
        "majority": [majority] * len(questions),
        "per_question": [per_question.get(_key(question), majority) for question in questions],
    }


def _key(question: str) -> str:
    return question.strip().lower()


def _top(counts: Counter[str]) -> str:
    return counts.most_common(1)[0][0]
