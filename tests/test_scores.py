"""Scores, intervals, blind baselines, and benchmark files."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.records import Record
from vlm.errors import VlmError
from vlm.evaluation import bootstrap_interval, load_benchmark, vqa_accuracy
from vlm.evaluation.baselines import blind_baselines
from vlm.paths import yaml_names

# --- scores, intervals, baselines ---


def test_predictions_by_id_must_be_about_the_same_questions() -> None:
    annotations = [{"question_id": 1, "answers": [{"answer": "red", "answer_id": n} for n in range(10)]}]
    assert vqa_accuracy({1: "red"}, annotations).accuracy == 100
    with pytest.raises(VlmError, match=r"1 missing \(1\); 1 unknown \(2\)"):
        vqa_accuracy({2: "red"}, annotations)
    with pytest.raises(VlmError, match="2 predictions for 1 questions"):
        vqa_accuracy(["red", "blue"], [["red"]])
    with pytest.raises(VlmError, match="did you mean 'official'"):
        vqa_accuracy(["red"], [["red"]], protocol="oficial")


def test_equal_records_without_ids_exclude_each_other() -> None:
    texts = ["red"] * 3 + ["blue"] * 7
    with_ids = [{"answers": [{"answer": text, "answer_id": n} for n, text in enumerate(texts)]}]
    without = [{"answers": [{"answer": text} for text in texts]}]
    assert vqa_accuracy(["red"], with_ids).accuracy == pytest.approx(90)
    assert vqa_accuracy(["red"], without).accuracy == pytest.approx(70)  # the three red ones see no other red one
    assert vqa_accuracy(["red"], without, "evalai").accuracy == pytest.approx(90)


def test_no_prediction_is_wrong_even_where_an_empty_answer_is_right() -> None:
    assert vqa_accuracy([""], [[""] * 10]).accuracy == 100
    assert vqa_accuracy([None], [[""] * 10]).accuracy == 0
    assert vqa_accuracy([None], [[""]], "exact").accuracy == 0


def test_fewer_than_ten_answers_are_scored_by_the_same_rule() -> None:
    assert vqa_accuracy(["red"], [["red", "red"]]).accuracy == pytest.approx(100 / 3)  # each sees one other
    assert vqa_accuracy(["red"], [["red"] * 4 + ["blue"]]).accuracy == pytest.approx(100)
    assert vqa_accuracy(["red"], [["red", "blue", "green"]]).accuracy == pytest.approx(100 * (0 + 1 / 3 + 1 / 3) / 3)
    with pytest.raises(VlmError, match="must be a list that is not empty"):
        vqa_accuracy(["red"], [[]])


def test_a_single_answer_stands_for_ten_that_agree() -> None:
    for protocol in ("official", "official-2017", "lmms", "evalai", "exact"):
        assert vqa_accuracy(["teal", "red"], [["teal"], ["teal"]], protocol).accuracy == 50


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=12), st.lists(st.text(max_size=12), min_size=1, max_size=10))
def test_scores_lie_between_0_and_1_for_any_text(prediction: str, answers: list[str]) -> None:
    for protocol in ("official", "official-2017", "lmms", "evalai", "exact"):
        (score,) = vqa_accuracy([prediction], [answers], protocol).per_sample
        assert 0 <= score <= 1


def test_the_interval_covers_the_mean_and_widens_with_clusters() -> None:
    values = np.repeat(np.random.default_rng(1).integers(0, 2, 200), 5).astype(float)  # five equal answers a picture
    alone = bootstrap_interval(values, list(range(1000)))
    clustered = bootstrap_interval(values, [n // 5 for n in range(1000)])
    assert alone[0] < values.mean() < alone[1]
    # The standard error of the mean, with 1000 and with 200 independent values.
    for (low, high), independent in ((alone, 1000), (clustered, 200)):
        assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(independent), rel=0.15)
    assert clustered == bootstrap_interval(values, [n // 5 for n in range(1000)])
    assert bootstrap_interval([1.0, 1.0], ["a", "b"]) == (1.0, 1.0)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([], [])


def test_blind_baselines_learn_the_answers_of_training() -> None:
    training = [
        Record("1", question="which?", answers=("red", "red", "blue")),
        Record("2", question="how many?", answers=("2",)),
        Record("3", question="Which? ", answers=("red",)),
    ]
    guesses = blind_baselines(training, ["which?", "HOW many?", "why?"])
    assert guesses == {"majority": ["red"] * 3, "per_question": ["red", "2", "red"]}
    with pytest.raises(VlmError, match="no questions with answers"):
        blind_baselines([Record("1", captions=("a dog",))], ["why?"])


@pytest.mark.starter
def test_blind_baselines_on_easy_vqa_have_their_known_scores() -> None:
    from vlm.data.catalogue import load_dataset

    test = load_dataset("easy_vqa", "test").records
    guesses = blind_baselines(load_dataset("easy_vqa", "train").records, [record.question or "" for record in test])
    answers = [record.answers for record in test]
    assert len(test) == 9673
    for protocol in ("exact", "official"):
        assert round(vqa_accuracy(guesses["majority"], answers, protocol).accuracy, 1) == 37.3
        assert round(vqa_accuracy(guesses["per_question"], answers, protocol).accuracy, 1) == 67.0


# --- benchmark files ---


@pytest.mark.parametrize("name", yaml_names("eval"))
def test_shipped_benchmarks_load_under_their_own_name(name: str) -> None:
    assert load_benchmark(name).name == name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("protocl=lmms", "unknown key 'protocl'; did you mean 'protocol'"),
        ("protocol=lmm", "unknown protocol 'lmm'.*did you mean 'lmms'"),
        ("metric=acuracy", "unknown metric 'acuracy'.*did you mean 'accuracy'"),
        ("task=vq", "unknown task.*did you mean 'vqa'"),
        ("prompt=hello", "lacks {question}"),
        ("name=../up", "name: "),
    ],
)
def test_a_wrong_benchmark_is_an_error_that_names_the_key(override: str, message: str) -> None:
    with pytest.raises(VlmError, match=message):
        load_benchmark("easy_vqa", [override])
