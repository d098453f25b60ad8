"""Questions that are answered by yes or no: POPE's scores of object hallucination, and MME's."""

from collections.abc import Callable, Sequence

import numpy as np

from vlm.data.records import Record
from vlm.errors import VlmError
from vlm.evaluation.answers import AnswerScores
from vlm.evaluation.intervals import Parts
from vlm.evaluation.tables import Table, members_of, table_of

# MME's categories (Fu et al. 2023, section 2.2); others count as perception.
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
POPE_METRICS = ("accuracy", "precision", "recall", "F1", "yes_ratio")
MME_METRICS = ("MME", "MME-perception", "MME-cognition", "accuracy", "accuracy+")


def pope_answer(text: str) -> str:
    """`yes` or `no` as POPE's own code reads an answer: "No", "not" or "no" as a word of the first sentence is no."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme_answer(text: str) -> str | None:
    """`yes` or `no` as MME's own code reads an answer: what stands in its first four letters, else neither."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def score_pope(records: Sequence[Record], texts: Sequence[str | None]) -> AnswerScores:
    """POPE (Li et al. 2023, section 5.1): scores of "yes" in each category, and their means over the categories.

    What was not asked counts as the wrong answer.
    """
    kinds = [str(record.meta.get("category", "all")) for record in records]
    members = members_of(kinds)
    categories = list(members)
    rows = np.zeros((len(records), len(categories), 4))  # true and false positives, true and false negatives
    values = []
    for number, (record, text) in enumerate(zip(records, texts, strict=True)):
        label = _label(record)
        said = ("no" if label == "yes" else "yes") if text is None else pope_answer(text)
        place = (0 if label == "yes" else 1) if said == "yes" else (2 if label == "no" else 3)
        rows[number, categories.index(kinds[number]), place] = 1
        values.append(float(said == label))
    flat = rows.reshape(len(records), -1)

    def metric(sums: np.ndarray, name: str) -> np.ndarray:  # [R, categories * 4] -> [R]
        return _pope(sums.reshape(len(sums), len(categories), 4), name).mean(axis=1)

    def part(kind: str, name: str) -> tuple[list[int], Parts]:
        counts = rows[members[kind], categories.index(kind)]
        return members[kind], Parts(counts, lambda sums: _pope(sums, name))

    total = flat.sum(axis=0)[None]
    return AnswerScores(
        values,
        {name: 100 * float(metric(total, name)[0]) for name in POPE_METRICS},
        {name: Parts(flat, lambda sums, name=name: metric(sums, name)) for name in POPE_METRICS},  # type: ignore[misc]
        {name: table_of("category", {kind: part(kind, name) for kind in categories}) for name in POPE_METRICS},
    )


def _pope(counts: np.ndarray, name: str) -> np.ndarray:
    """A metric [...] of counts [..., 4]; 0 where nothing could be counted."""
    tp, fp, tn, fn = np.moveaxis(counts, -1, 0)
    top, bottom = {
        "accuracy": (tp + tn, tp + fp + tn + fn),
        "precision": (tp, tp + fp),
        "recall": (tp, tp + fn),
        "F1": (2 * tp, 2 * tp + fp + fn),
        "yes_ratio": (tp + fp, tp + fp + tn + fn),
    }[name]
    return np.divide(top, bottom, out=np.zeros_like(tp), where=bottom != 0)


def score_mme(records: Sequence[Record], texts: Sequence[str | None]) -> AnswerScores:
    """MME (Fu et al. 2023, section 2.3): of each category accuracy + accuracy+ in per cent, summed.

    accuracy counts questions, accuracy+ pictures whose questions are all right. `MME-perception` (up to 2,000 by ten
    categories) and `MME-cognition` (up to 800 by four) are the sums, `MME` both; `accuracy` and `accuracy+` are means
    over categories.
    """
    values = [
        float(text is not None and mme_answer(text) == _label(record))
        for record, text in zip(records, texts, strict=True)
    ]
    kinds = [str(record.meta.get("category", "all")) for record in records]
    members = members_of(kinds)
    categories = list(members)
    pictures: dict[tuple[str, str], list[int]] = {}
    for number, (record, kind) in enumerate(zip(records, kinds, strict=True)):
        pictures.setdefault((kind, record.images[0]), []).append(number)
    rows = np.zeros((len(records), len(categories), 4))  # right questions, questions, right pictures, pictures
    for (kind, _), asked in pictures.items():
        column = categories.index(kind)
        rows[asked, column, 0] = [values[number] for number in asked]
        rows[asked, column, 1] = 1
        rows[asked[0], column, 2:] = min(values[number] for number in asked), 1
    flat = rows.reshape(len(records), -1)
    cognition = np.array([kind in COGNITION for kind in categories])

    def metric(sums: np.ndarray, name: str) -> np.ndarray:  # [R, C * 4] -> [R]
        questions, both = _shares(sums.reshape(len(sums), len(categories), 4))
        if name in ("accuracy", "accuracy+"):
            return (questions if name == "accuracy" else both).mean(axis=1)
        chosen = {"MME": cognition | True, "MME-perception": ~cognition, "MME-cognition": cognition}[name]
        return (questions + both)[:, chosen].sum(axis=1)

    def table(of: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Table:
        parts = {}
        for column, kind in enumerate(categories):
            counts = rows[members[kind], column]
            parts[kind] = (members[kind], Parts(counts, lambda sums: of(*_shares(sums))))
        return table_of("category", parts)

    total = flat.sum(axis=0)[None]
    return AnswerScores(
        values,
        {name: 100 * float(metric(total, name)[0]) for name in MME_METRICS},
        {name: Parts(flat, lambda sums, name=name: metric(sums, name)) for name in MME_METRICS},  # type: ignore[misc]
        {
            "score_per_category": table(lambda questions, both: questions + both),
            "accuracy_per_category": table(lambda questions, both: questions),
            "accuracy+_per_category": table(lambda questions, both: both),
        },
    )


def _shares(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares [...] of right questions and of pictures whose questions are all right; of counts [..., 4], those beside
    how many there are; 0 where there are none."""
    zero = np.zeros(counts.shape[:-1])
    questions = np.divide(counts[..., 0], counts[..., 1], out=zero.copy(), where=counts[..., 1] != 0)
    return questions, np.divide(counts[..., 2], counts[..., 3], out=zero, where=counts[..., 3] != 0)


def _label(record: Record) -> str:
    label = record.answers[0].strip().lower() if record.answers else ""
    if label not in ("yes", "no"):
        raise VlmError(f"record {record.id!r}: its answer is {label!r}, and this protocol scores yes and no")
    return label
