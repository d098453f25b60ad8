"""Rules of answers against the same rules written out plainly, one question at a time, on many random answers."""

import re
import string
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.records import Record
from vlm.evaluation.answers import score_aokvqa, score_gqa
from vlm.evaluation.choices import score_circular, score_scienceqa
from vlm.evaluation.yes_no import score_mme, score_pope
from vlm.evaluation.zero_shot import zero_shot_scores

YES_NO = st.sampled_from(["yes", "no"])
TALK = st.sampled_from(
    ["Yes", "yes.", "No", "no, it is not", "There is not", "Yes, there is. No doubt", "NO", "Not", "none", "", "maybe"]
)
SAID = st.one_of(TALK, st.text(string.ascii_letters + " .,'", max_size=12))


def record(number: int, answer: str, image: str = "a.jpg", **meta: Any) -> Record:
    return Record(str(number), (image,), question="?", answers=(answer,), meta=meta)


@given(st.lists(st.tuples(YES_NO, SAID, st.sampled_from(["random", "popular"])), min_size=1, max_size=40))
def test_pope(rows: list[tuple[str, str, str]]) -> None:
    found = score_pope([record(n, row[0], category=row[2]) for n, row in enumerate(rows)], [row[1] for row in rows])
    kinds = {kind for _, _, kind in rows}
    sums = dict.fromkeys(("accuracy", "precision", "recall", "F1", "yes_ratio"), 0.0)
    for kind in kinds:
        pairs = []
        for label, text, of in rows:
            if of == kind:
                words = text[: text.index(".")] if "." in text else text
                words = words.replace(",", "").split(" ")
                pairs.append((label == "yes", not ("No" in words or "not" in words or "no" in words)))
        hit, false, missed = (pairs.count(pair) for pair in ((True, True), (False, True), (True, False)))
        precision = hit / (hit + false) if hit + false else 0.0
        recall = hit / (hit + missed) if hit + missed else 0.0
        sums["accuracy"] += sum(a == b for a, b in pairs) / len(pairs)
        sums["precision"] += precision
        sums["recall"] += recall
        sums["F1"] += 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        sums["yes_ratio"] += sum(said for _, said in pairs) / len(pairs)
    for name, total in sums.items():
        assert abs(found.scores[name] - 100 * total / len(kinds)) < 1e-9, name


@given(
    st.lists(
        st.tuples(st.sampled_from(["existence", "code_reasoning"]), SAID, SAID, st.booleans()), min_size=1, max_size=20
    )
)
def test_mme(rows: list[tuple[str, str, str, bool]]) -> None:
    """Two questions about each picture, one of them answered by yes."""
    records, texts = [], []
    expected: dict[str, list[float]] = {}
    for number, (kind, first, second, yes_first) in enumerate(rows):
        right = 0
        for turn, text in enumerate((first, second)):
            label = "yes" if (turn == 0) == yes_first else "no"
            records.append(record(2 * number + turn, label.capitalize(), f"{number}.jpg", category=kind))
            texts.append(text)
            start = text.strip().lower()[:4]
            read = "yes" if "yes" in start else "no" if "no" in start else "other"
            right += read == label
        of = expected.setdefault(kind, [0.0, 0.0, 0.0])
        of[0] += right
        of[1] += right == 2
        of[2] += 1
    found = score_mme(records, texts)
    sums = {kind: 100 * right / (2 * count) + 100 * both / count for kind, (right, both, count) in expected.items()}
    assert all(abs(found.tables["score_per_category"][kind] - total) < 1e-9 for kind, total in sums.items())
    assert abs(found.scores["MME"] - sum(sums.values())) < 1e-9
    assert abs(found.scores["MME-perception"] - sums.get("existence", 0.0)) < 1e-9


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=12))
def test_mmbench(questions: list[list[bool]]) -> None:
    """So many rotations of each question; whether each is answered rightly."""
    records, texts = [], []
    for number, rotations in enumerate(questions):
        for turn, right in enumerate(rotations):
            choices = [f"choice {(k + turn) % 4}" for k in range(4)]
            correct = choices.index("choice 0")
            records.append(record(number + 1_000_000 * turn, "x", choices=choices, correct_choice=correct))
            texts.append("ABCD"[correct if right else (correct + 1) % 4])
    found = score_circular(records, texts)
    whole = [all(rotations) for rotations in questions]
    assert abs(found.scores["accuracy"] - 100 * sum(whole) / len(whole)) < 1e-9


@given(
    st.lists(
        st.one_of(
            st.sampled_from(["A", "B. ", "C. word", "The answer is B.", "The answer is A. The answer is B.", "D", "b"]),
            st.text("ABCDE. theanswris", max_size=20),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_scienceqa(texts: list[str]) -> None:
    records = [record(n, "x", choices=["u", "v"], correct_choice=n % 2) for n in range(len(texts))]
    right = 0
    for number, text in enumerate(texts):
        said = text.strip()
        if said in list("ABCDE"):
            letter = said
        elif len(said) >= 3 and said[0] in "ABCDE" and said[1:3] == ". ":
            letter = said[0]
        else:
            named = re.findall(r"The answer is ([A-Z])\.", said)
            letter = named[0] if len(named) == 1 else "none"
        right += letter == "AB"[number % 2]
    assert abs(score_scienceqa(records, texts).scores["accuracy"] - 100 * right / len(texts)) < 1e-9


@given(st.lists(st.tuples(SAID, SAID), min_size=1, max_size=20), st.booleans())
def test_gqa_and_aokvqa(rows: list[tuple[str, str]], same: bool) -> None:
    records = [
        Record(str(n), ("a",), question="?", answers=(answer, answer, said)) for n, (said, answer) in enumerate(rows)
    ]
    texts = [answer if same else said for said, answer in rows]
    direct = [min(1, sum(a.lower() == t.strip().lower() for a in r.answers) / 3) for r, t in zip(records, texts)]
    assert score_aokvqa(records, texts).per_sample == direct

    def letters(text: str) -> list[str]:
        return "".join(c for c in text.lower() if c not in string.punctuation).split()

    one = [Record(str(n), ("a",), question="?", answers=(answer,)) for n, (_, answer) in enumerate(rows)]
    exact = [float(letters(t) == letters(r.answers[0])) for r, t in zip(one, texts)]
    assert score_gqa(one, texts).per_sample == exact


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(6, 12))
def test_zero_shot_accuracy_is_that_of_a_sort(seed: int, count: int, classes: int) -> None:
    import numpy as np

    random = np.random.default_rng(seed)
    table, labels = random.random((count, classes)), random.integers(0, classes, count)
    found = zero_shot_scores(table, labels.tolist())
    order = np.argsort(-table, axis=1)
    for k in (1, 5):
        assert abs(found[f"acc@{k}"] - 100 * np.mean([label in row[:k] for label, row in zip(labels, order)])) < 1e-9
    recalls = [np.mean(order[labels == label, 0] == label) for label in set(labels.tolist())]
    assert abs(found["mean_per_class_recall"] - 100 * np.mean(recalls)) < 1e-9
