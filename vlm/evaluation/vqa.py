"""VQA accuracy by the protocols the field uses; every result names its protocol, for they differ by many points.

| protocol | rule |
|---|---|
| `official` | GT-Vision-Lab/VQA since 2021: where all stripped human answers are the same, neither side is normalised |
| `official-2017` | the same before 2021 (LAVIS, BLIP): predictions fully, human answers for punctuation only |
| `lmms` | lmms-eval's vqav2: both sides always normalised |
| `evalai` | EvalAI and m4c (TextVQA, OK-VQA): its own word splitting first, both sides always normalised |
| `exact` | stripped and lower-cased, equal to any of the answers; for data sets with one answer |
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vlm.errors import VlmError, did_you_mean
from vlm.evaluation.vqa_tables import ARTICLES, CONTRACTIONS, NUMBERS, PUNCTUATION

PROTOCOLS = ("official", "official-2017", "lmms", "evalai", "exact")

_DIGIT_COMMA = re.compile(r"\d,\d")
_EVALAI_DIGIT_COMMA = re.compile(r"(?<=\d),+(?=\d)")
# The official look-behind is mistyped (`?!<=` for `?<!`): it asks for no literal "<=" and so always holds.
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")
# `re.UNICODE` stands where `count` belongs in the official call, and its value is 32.
_PERIODS_REMOVED = 32

Answers = Sequence[str] | Mapping[str, Any]


@dataclass(frozen=True)
class VqaScores:
    """Accuracies in per cent; `per_sample` holds each question's score between 0 and 1, in the order given."""

    accuracy: float
    per_sample: list[float]
    per_question_type: dict[str, float]
    per_answer_type: dict[str, float]
    protocol: str
    count: int


def clean(text: str) -> str:
    """Newlines and tabs to spaces, ends stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str, digit_comma: re.Pattern[str] = _DIGIT_COMMA) -> str:
    """The official `processPunctuation`: each sign is deleted or becomes a space, then periods go.

    A sign is deleted where, in the text as it came, it touches a space or any two digits are joined by a comma.
    """
    joined_digits = digit_comma.search(text) is not None
    result = text
    for sign in PUNCTUATION:
        if sign in text:
            delete = joined_digits or f"{sign} " in text or f" {sign}" in text
            result = result.replace(sign, "" if delete else " ")
    return _PERIOD.sub("", result, count=_PERIODS_REMOVED)


def strip_articles(text: str) -> str:
    """The official `processDigitArticle`: lower case, number words to digits, no articles, contractions mended."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1 << 17)
def normalise(text: str) -> str:
    """The whole official normalisation of one answer."""
    return strip_articles(strip_punctuation(clean(text)))


@lru_cache(maxsize=1 << 17)
def normalise_evalai(text: str) -> str:
    """EvalAI's normalisation: its word splitting, then the official steps with its own rule for commas."""
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return strip_articles(strip_punctuation(clean(words), _EVALAI_DIGIT_COMMA))


def vqa_accuracy(
    predictions: Sequence[str | None] | Mapping[Any, str | None],
    answers: Sequence[Answers] | Mapping[Any, Answers],
    protocol: str = "official",
    question_types: Sequence[str | None] | None = None,
    answer_types: Sequence[str | None] | None = None,
) -> VqaScores:
    """Soft VQA accuracy (Antol et al. 2015, section 3; code of GT-Vision-Lab/VQA), or exact match.

    predictions: texts in the order of `answers`, or a mapping from question id to text; None (nothing was answered) is
    wrong whatever the humans said.
    answers: per question its human answers as texts, or an official annotation (a mapping with `answers`, whose records
    hold `answer`, and `question_id`, `question_type`, `answer_type`); a list, or a mapping from question id. A question
    with a single answer counts as ten humans who agree on it.
    question_types, answer_types: in the order of `answers`; by default what the annotations say.

    Raises VlmError on an unknown protocol, or when the two sides are not about the same questions.
    """
    if protocol not in PROTOCOLS:
        raise VlmError(f"unknown VQA protocol {protocol!r}{did_you_mean(protocol, PROTOCOLS)}")
    texts, entries = _pair(predictions, answers)
    scores = [_score(text, entry, protocol) for text, entry in zip(texts, entries, strict=True)]
    return VqaScores(
        accuracy=_percent(scores),
        per_sample=scores,
        per_question_type=_per_type(scores, entries, question_types, "question_type"),
        per_answer_type=_per_type(scores, entries, answer_types, "answer_type"),
        protocol=protocol,
        count=len(scores),
    )


def check_same_ids(given: Sequence[Any], expected: Sequence[Any], where: str, what: str = "question") -> None:
    """Raise VlmError that counts and names missing, unknown and repeated ids, unless both sides hold the same set."""
    seen = Counter(map(str, given))
    wanted = set(map(str, expected))
    problems = [
        f"{len(ids)} {problem} ({', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''})"
        for problem, ids in (
            ("missing", sorted(wanted - seen.keys())),
            ("unknown", sorted(seen.keys() - wanted)),
            ("given more than once", sorted(key for key, times in seen.items() if times > 1)),
        )
        if ids
    ]
    if problems:
        raise VlmError(f"{where}: the {what} ids do not match the data set's {len(wanted)}: " + "; ".join(problems))


def _pair(
    predictions: Sequence[str | None] | Mapping[Any, str | None], answers: Sequence[Answers] | Mapping[Any, Answers]
) -> tuple[list[str | None], list[Answers]]:
    """Both sides in the order of `answers`."""
    entries = list(answers.values()) if isinstance(answers, Mapping) else list(answers)
    if isinstance(predictions, Mapping):
        ids = list(answers) if isinstance(answers, Mapping) else [_question_id(entry) for entry in entries]
        by_id = {str(key): text for key, text in predictions.items()}
        check_same_ids(list(predictions), ids, "predictions")
        return [by_id[str(key)] for key in ids], entries
    texts = list(predictions)
    if len(texts) != len(entries):
        raise VlmError(f"{len(texts)} predictions for {len(entries)} questions: give one prediction per question")
    return texts, entries


def _question_id(entry: Answers) -> Any:
    if isinstance(entry, Mapping) and "question_id" in entry:
        return entry["question_id"]
    raise VlmError("predictions by question id need answers by question id, or annotations that hold `question_id`")


def _humans(entry: Answers, protocol: str) -> tuple[list[str], Sequence[Any]]:
    """The human answers of one question, cleaned, and their records.

    The code before 2021 took the answers as they stand, spaces and all.
    """
    records: Sequence[Any] = entry["answers"] if isinstance(entry, Mapping) else entry
    if isinstance(records, str) or not records:
        raise VlmError(f"a question's answers must be a list that is not empty, found {records!r}")
    texts = [str(record["answer"] if isinstance(record, Mapping) else record) for record in records]
    if protocol != "official-2017":
        texts = [clean(text) for text in texts]
    if len(texts) == 1:
        return texts * 10, ()
    return texts, records


def _score(prediction: str | None, entry: Answers, protocol: str) -> float:
    """One question's score between 0 and 1: the mean over humans of min(1, agreeing others / 3)."""
    given, records = _humans(entry, protocol)
    if prediction is None:
        return 0.0
    text = clean(prediction)
    unanimous = given.count(given[0]) == len(given)
    if protocol == "exact":
        return float(text.lower() in {answer.lower() for answer in given})
    if protocol == "official":
        if not unanimous:
            text, given = normalise(text), [normalise(answer) for answer in given]
    elif protocol == "official-2017":
        text, given = normalise(text), given if unanimous else [strip_punctuation(answer) for answer in given]
    elif protocol == "lmms":
        text, given = normalise(text), [normalise(answer) for answer in given]
    else:
        text, given = normalise_evalai(text), [normalise_evalai(answer) for answer in given]
    agreeing = given.count(text)
    if not agreeing:
        return 0.0
    alike = [] if protocol == "evalai" else _alike([r for r, a in zip(records, given) if a == text])
    # The others of an agreeing human are the records that differ from its own: records equal to it leave with it.
    shares = [min(1.0, (agreeing - same) / 3) for same in alike or [1] * agreeing]
    return (sum(shares) + (len(given) - agreeing) * min(1.0, agreeing / 3)) / len(given)


def _alike(records: list[Any]) -> list[int]:
    """How many of some records of agreeing humans are equal to each, itself included; empty if all differ.

    Texts, and EvalAI's code in any case, tell humans apart by position.
    """
    if not all(isinstance(record, Mapping) for record in records):
        return []
    if None not in (ids := {record.get("answer_id") for record in records}) and len(ids) == len(records):
        return []
    rest = [{key: value for key, value in record.items() if key != "answer"} for record in records]
    return [rest.count(one) for one in rest]


def _percent(scores: Sequence[float]) -> float:
    return 100 * sum(scores) / len(scores) if scores else 0.0


def _per_type(
    scores: list[float], entries: list[Answers], types: Sequence[str | None] | None, key: str
) -> dict[str, float]:
    """Accuracy in per cent per type, in order of appearance; questions without a type are left out."""
    if types is None:
        types = [entry.get(key) if isinstance(entry, Mapping) else None for entry in entries]
    if len(types) != len(scores):
        raise VlmError(f"{len(types)} values of {key} for {len(scores)} questions")
    groups: dict[str, list[float]] = defaultdict(list)
    for kind, score in zip(types, scores, strict=True):
        if kind is not None:
            groups[str(kind)].append(score)
    return {kind: _percent(values) for kind, values in groups.items()}
