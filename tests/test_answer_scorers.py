"""GQA, A-OKVQA, ScienceQA, MMBench, POPE and MME by cases counted by hand."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.data.records import Record
from vlm.errors import VlmError
from vlm.evaluation import lemmas
from vlm.evaluation.answers import score_aokvqa, score_gqa
from vlm.evaluation.benchmark import load_benchmark
from vlm.evaluation.choices import choice_of, letter_of, score_choices, score_circular, score_scienceqa
from vlm.evaluation.intervals import Parts, bootstrap_interval
from vlm.evaluation.lemmas import lemmatized
from vlm.evaluation.task import Job, Prediction
from vlm.evaluation.tasks import SCORERS, TASKS, filled_prompt
from vlm.evaluation.yes_no import mme_answer, pope_answer, score_mme, score_pope
from vlm.paths import yaml_names


def asked(key: str, answer: str, image: str = "", **meta: Any) -> Record:
    return Record(key, (image or f"{key}.jpg",), question="?", answers=(answer,), meta=meta)


def choosing(key: str, right: int, *choices: str, **meta: Any) -> Record:
    return asked(key, choices[right], image="a.jpg", choices=list(choices), correct_choice=right, **meta)


def test_gqa_ignores_case_and_punctuation_and_nothing_else() -> None:
    records = [asked(str(n), "Yes", question_type="verify" if n < 2 else "query") for n in range(4)]
    found = score_gqa(records, [" yes.", "YES!", "yes it is", None])
    assert found.per_sample == [1, 1, 0, 0]
    assert found.scores == {"accuracy": 50}
    assert found.tables["per_question_type"] == {"verify": 100, "query": 0}


def test_aokvqa_gives_a_third_for_each_human() -> None:
    record = Record("1", ("a.jpg",), question="?", answers=("Bus", "bus", "van", "car", "car", "car", "car"))
    found = score_aokvqa([record] * 5, ["bus ", "van", "car", "the bus", None])
    assert found.per_sample == pytest.approx([2 / 3, 1 / 3, 1, 0, 0])


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" B\n", "B"),
        ("B. the moon", "B"),
        ("The answer is C.", "C"),
        ("Because. The answer is C. So", "C"),
        ("The answer is C. The answer is D.", None),
        ("The answer is C", None),
        ("(B)", None),
        ("b", None),
        ("B the moon", None),
        ("the moon", None),
        ("", None),
    ],
)
def test_the_letter_by_llavas_rule_for_scienceqa(text: str, letter: str | None) -> None:
    assert letter_of(text) == letter


def test_scienceqa_counts_what_names_no_letter_as_wrong() -> None:
    records = [choosing(str(n), 1, "sun", "moon", subject="natural science") for n in range(4)]
    found = score_scienceqa(records, ["B", "moon", "A", None])
    assert found.per_sample == [1, 0, 0, 0]
    assert found.tables["per_subject"] == {"natural science": 25}


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("(B) moon", 1),
        ("B: moon", 1),
        ("B)", 1),
        ("Moon.", 1),
        ("it is the moon", 1),
        ("the sun and the moon", None),
        ("A moon", 1),
        ("stars", None),
    ],
)
def test_a_choice_is_named_by_letter_or_by_its_text_alone(text: str, choice: int | None) -> None:
    assert choice_of(text, ["sun", "moon"]) == choice


def test_circular_asks_for_every_rotation() -> None:
    records = [
        choosing("7", 0, "sun", "moon", category="sky"),
        choosing("1000007", 1, "moon", "sun", category="sky"),
        choosing("8", 0, "cat", "dog", category="pets"),
        choosing("1000008", 1, "dog", "cat", category="pets"),
    ]
    said = ["A", "A", "A", "B"]
    found = score_circular(records, said)
    assert found.scores == {"accuracy": 50}
    assert found.tables["per_category"] == {"sky": 0, "pets": 100}
    assert found.per_sample == [1, 0, 1, 1]
    assert score_choices(records, said).scores == {"accuracy": 75}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("No", "no"),
        ("No, there is none.", "no"),
        ("There is not a dog", "no"),
        ("no dog", "no"),
        ("Yes. There is no cat.", "yes"),
        ("NO", "yes"),
        ("Nothing", "yes"),
        ("maybe", "yes"),
        ("", "yes"),
    ],
)
def test_pope_reads_answers_as_its_own_code_does(text: str, answer: str) -> None:
    assert pope_answer(text) == answer


def test_pope_by_hand() -> None:
    labels = ["yes", "yes", "no", "no", "yes", "no"]
    kinds = ["random"] * 4 + ["popular"] * 2
    records = [asked(str(n), label, category=kind) for n, (label, kind) in enumerate(zip(labels, kinds))]
    found = score_pope(records, ["Yes", "No", "Yes", "No", "yes", "no"])
    assert found.tables["F1"] == {"random": pytest.approx(50), "popular": pytest.approx(100)}
    assert found.scores == {
        "accuracy": pytest.approx(75),
        "precision": pytest.approx(75),
        "recall": pytest.approx(75),
        "F1": pytest.approx(75),
        "yes_ratio": pytest.approx(50),
    }
    assert score_pope(records[:2], [None, None]).scores["accuracy"] == 0
    with pytest.raises(VlmError, match="scores yes and no"):
        score_pope([asked("1", "red")], ["Yes"])


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from("ab")), min_size=1, max_size=30))
def test_pope_scores_lie_between_0_and_100_and_in_their_intervals(rows: list[tuple[bool, bool, str]]) -> None:
    records = [asked(str(n), "yes" if label else "no", category=kind) for n, (label, _, kind) in enumerate(rows)]
    found = score_pope(records, ["yes" if said else "no" for _, said, _ in rows])
    for name, score in found.scores.items():
        assert 0 <= score <= 100
        parts = found.contributions[name]
        assert isinstance(parts, Parts)
        low, high = bootstrap_interval(parts, range(len(rows)), resamples=50)
        assert 0 <= low <= high <= 1


def test_mme_by_hand() -> None:
    read = [mme_answer(text) for text in ("Yes", " yes, it is", "No.", "I do not", "none")]
    assert read == ["yes", "yes", "no", None, "no"]
    records = [
        asked("1", "Yes", "a.jpg", category="color"),
        asked("2", "No", "a.jpg", category="color"),
        asked("3", "Yes", "b.jpg", category="color"),
        asked("4", "No", "b.jpg", category="color"),
        asked("5", "Yes", "a.jpg", category="code_reasoning"),
        asked("6", "No", "a.jpg", category="code_reasoning"),
    ]
    found = score_mme(records, ["Yes", "No", "Yes", "Yes", "No", "No"])
    # color: 3 of 4 questions, 1 of 2 pictures; code: 1 of 2, 0 of 1.
    assert found.tables["score_per_category"] == {"color": pytest.approx(125), "code_reasoning": pytest.approx(50)}
    assert found.scores["MME-perception"] == pytest.approx(125)
    assert found.scores["MME-cognition"] == pytest.approx(50)
    assert found.scores["MME"] == pytest.approx(175)
    assert found.scores["accuracy"] == pytest.approx((75 + 50) / 2)
    assert found.scores["accuracy+"] == pytest.approx((50 + 0) / 2)
    perfect = score_mme(records, ["Yes", "No"] * 3)
    assert (perfect.scores["MME-perception"], perfect.scores["MME-cognition"]) == (200, 200)


def test_a_prompt_holds_choices_and_hint_and_takes_braces_as_they_are() -> None:
    record = choosing("1", 0, "sun", "{hint}", hint="Look up.")
    assert filled_prompt("{hint}{question}\n{choices}\nLetter?", record) == "Look up.\n?\nA. sun\nB. {hint}\nLetter?"
    assert filled_prompt("{hint}{question}", asked("1", "yes")) == "?"


@pytest.mark.parametrize("protocol", [name for name in SCORERS if name != "lavis-okvqa"])  # which needs spaCy
def test_the_task_gives_every_metric_of_a_protocol_with_an_interval(protocol: str) -> None:
    plan = load_benchmark("vqav2", [f"protocol={protocol}", "also=[]"])
    records = [choosing(str(n), 0, "yes", "no", category="x") for n in range(4)]
    job = Job(plan, records, records, unreadable=4)
    said = [Prediction("yes"), Prediction("A"), Prediction("No"), Prediction(None, "broken")]
    judged = TASKS["vqa"].judge(job, said, protocol)
    assert judged.scores.keys() == judged.contributions.keys()
    assert judged.scores["accuracy"] <= 50  # as many could not be read
    assert judged.samples[3].error == "broken"
    assert judged.samples[3].score == 0


@pytest.mark.parametrize("name", yaml_names("eval"))
def test_a_shipped_benchmark_is_about_a_data_set_that_has_its_split(name: str) -> None:
    from vlm.data.catalogue import load_spec

    plan = load_benchmark(name)
    assert plan.dataset.split in load_spec(plan.dataset.name)[0].splits
    assert plan.description
    for entry in plan.published:
        assert entry.source
        for key in entry.settings:
            assert key.split(".")[0] in type(plan).model_fields, key


def test_a_prompt_names_the_text_found_in_the_picture() -> None:
    record = Record("1", ("p.jpg",), question="what brand?", meta={"ocr_tokens": ["COCA", "Cola, {question}"]})
    assert filled_prompt("{question}\nReference OCR token: {ocr}\nBriefly.", record) == (
        "what brand?\nReference OCR token: COCA, Cola, {question}\nBriefly."
    )
    assert filled_prompt("{ocr}|{question}", Record("2", question="q")) == "|q"


def test_nouns_and_verbs_become_lemmas_and_other_words_stay() -> None:
    tokens = [
        SimpleNamespace(pos_=kind, lemma_=lemma, text=text)
        for kind, lemma, text in (("NOUN", "dog", "dogs"), ("VERB", "run", "running"), ("ADJ", "good", "better"))
    ]
    assert lemmatized(tokens) == "dog run better"


def test_lemmas_are_compared_as_the_code_of_2017_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def words(text: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(pos_="NOUN", lemma_=word.removesuffix("s"), text=word) for word in text.split()]

    monkeypatch.setattr(lemmas, "_parser", lambda: words)
    records = [Record(str(n), ("p.jpg",), question="?", answers=("dog",) * 4 + ("cat",) * 6) for n in range(3)]
    assert SCORERS["lavis-okvqa"](records, ["dogs", "cow", None]).per_sample == [1.0, 0.0, 0.0]


def test_lemmas_without_spacy_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)  # importing it fails, also where it is installed
    lemmas._parser.cache_clear()
    with pytest.raises(VlmError, match="python -m spacy download en_core_web_sm"):
        SCORERS["lavis-okvqa"]([Record("1", ("p.jpg",), question="?", answers=("dog",))], ["dogs"])
