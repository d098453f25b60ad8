"""The evaluator: runner, predictions from a file, report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_parts import HOSTILE, FakeDataset, FakeModel, read_lines, toy_benchmark, toy_records
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm.data.parsing import BrokenRecord
from vlm.data.records import Record
from vlm.errors import UnsupportedTask, VlmError
from vlm.evaluation import evaluate
from vlm.evaluation.report import render_report
from vlm.evaluation.sharing import in_batches


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    return toy_records(tmp_path)


@pytest.fixture
def benchmark(records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return toy_benchmark(records, tmp_path, monkeypatch)


# --- the runner ---


def test_a_model_is_scored_and_the_files_are_written(benchmark: str, tmp_path: Path) -> None:
    result = evaluate(benchmark, FakeModel(), output=tmp_path / "out", progress=False)
    assert result.score == pytest.approx(50.0)
    assert result.count == 6
    assert result.scores == {"exact": pytest.approx(50.0), "official": pytest.approx(50.0)}
    assert result.metrics == {"accuracy": pytest.approx(50.0)}
    assert result.tables["per_question_type"] == {"colour": pytest.approx(100 / 3), "odd": pytest.approx(200 / 3)}
    assert result.tables["per_answer_type"] == {"other": pytest.approx(50.0)}
    assert result.baselines == {"majority": pytest.approx(50.0), "per_question": pytest.approx(50.0)}
    assert 0 <= result.interval[0] <= 50 <= result.interval[1] <= 100

    written = json.loads((tmp_path / "out" / "results.json").read_text())
    for key in ("score", "count", "interval", "scores", "baselines", "settings", "versions", "git_commit", "seconds"):
        assert key in written
    assert written["settings"]["prompt"] == "Q: {question}"
    assert written["settings"]["limit"] is None
    assert {"python", "vlm", "torch", "transformers"} <= written["versions"].keys()
    assert written["model"] == "FakeModel"

    samples = read_lines(tmp_path / "out" / "samples.jsonl")
    assert [sample["id"] for sample in samples] == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]
    assert set(samples[0]) == {"id", "image", "question", "prediction", "answers", "score", "error", "groups"}
    assert samples[0]["groups"] == {"question_type": "colour", "answer_type": "other"}
    assert [sample["score"] for sample in samples] == [1, 0, 0, 0, 1, 1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.html",
        "results.json",
        "samples.jsonl",
    ]


def test_the_questions_of_a_picture_are_asked_in_one_call_with_prompt_and_decoding(benchmark: str) -> None:
    model = FakeModel()
    evaluate(benchmark, model, batch_size=3, progress=False)
    assert [len(questions) for _, questions, _ in model.calls] == [2, 2, 2]
    assert all(len(set(images)) == 1 for images, _, _ in model.calls)
    assert model.calls[0][1] == ["Q: which colour?", f"Q: {HOSTILE}"]
    assert model.calls[0][2] == {"max_new_tokens": 3}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=40), st.integers(1, 9))
def test_chunks_hold_whole_pictures_and_every_record_once(pictures: list[int], size: int) -> None:
    chunks = list(in_batches([0] * len(pictures), size, pictures))
    assert sorted(index for chunk in chunks for index in chunk) == list(range(len(pictures)))
    for chunk in chunks:
        held = {pictures[index] for index in chunk}
        assert len(chunk) == sum(pictures.count(picture) for picture in held)
        assert len(chunk) <= size or len(held) == 1


def test_limit_takes_the_first_records_and_says_so(benchmark: str) -> None:
    result = evaluate(benchmark, FakeModel(), limit=2, progress=False)
    assert [sample.id for sample in result.samples] == ["0-0", "0-1"]
    assert result.count == 2
    assert result.settings["limit"] == 2
    assert result.settings["records_in_data_set"] == 6
    assert "only the first 2 of 6" in render_report(result)


def test_a_broken_picture_counts_as_wrong_and_is_listed(benchmark: str, records: list[Record]) -> None:
    Path(records[0].images[0]).write_bytes(b"\x89PNG not a picture")
    result = evaluate(benchmark, FakeModel(), progress=False)
    assert result.count == 6
    assert result.score == pytest.approx(100 * 2 / 6)
    assert [entry["id"] for entry in result.broken] == ["0-0", "1-0"]
    assert all(entry["error"] for entry in result.broken)
    assert result.samples[0].prediction is None
    assert "2 samples could not be asked" in render_report(result)


def test_a_missing_picture_counts_as_wrong_but_all_missing_is_an_error(benchmark: str, records: list[Record]) -> None:
    Path(records[0].images[0]).unlink()
    assert evaluate(benchmark, FakeModel(), progress=False).score == pytest.approx(100 * 2 / 6)
    for record in records:
        Path(record.images[0]).unlink(missing_ok=True)
    with pytest.raises(VlmError, match=r"none of 6 records could be asked.*dataset\.images"):
        evaluate(benchmark, FakeModel(), progress=False)


def test_a_record_that_the_reader_could_not_read_counts_as_wrong(
    benchmark: str, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable = FakeDataset(
        records, broken=[BrokenRecord("a.json:7", "no question"), BrokenRecord("a.json:9", "no picture")]
    )
    monkeypatch.setattr("vlm.data.catalogue.load_dataset", lambda name, split, **options: unreadable)
    result = evaluate(benchmark, FakeModel(), progress=False)
    assert result.count == 8
    assert result.score == pytest.approx(100 * 3 / 8)
    assert result.score == pytest.approx(100 * np.mean([sample.score for sample in result.samples]))
    assert [entry["error"] for entry in result.broken] == ["a.json:7: no question", "a.json:9: no picture"]


def test_errors_of_the_model_itself_are_not_hidden(benchmark: str) -> None:
    class Short(FakeModel):
        def answer(self, images: list[str], questions: list[str], **decoding: Any) -> list[str]:
            return []

    class Failing(FakeModel):
        def answer(self, images: list[str], questions: list[str], **decoding: Any) -> list[str]:
            raise FileNotFoundError("weights")

    with pytest.raises(VlmError, match="0 answers to 6 questions"):
        evaluate(benchmark, Short(), progress=False)
    with pytest.raises(FileNotFoundError, match="weights"):
        evaluate(benchmark, Failing(), progress=False)
    with pytest.raises(UnsupportedTask, match="cannot answer questions"):
        evaluate(benchmark, object(), progress=False)


def test_records_that_cannot_be_scored_are_an_error(
    benchmark: str, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [*records, Record("x", records[0].images, question="which?")]
    monkeypatch.setattr("vlm.data.catalogue.load_dataset", lambda name, split, **options: FakeDataset(bad))
    with pytest.raises(VlmError, match="'x' has no answers"):
        evaluate(benchmark, FakeModel(), progress=False)
    monkeypatch.setattr("vlm.data.catalogue.load_dataset", lambda name, split, **options: FakeDataset([]))
    with pytest.raises(VlmError, match="no records"):
        evaluate(benchmark, FakeModel(), progress=False)


def test_output_goes_into_the_run_folder_of_a_named_model(
    benchmark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("{}")
    monkeypatch.setattr("vlm.loading.load_model", lambda name: FakeModel())
    assert evaluate(benchmark, run, progress=False).output == run / "eval" / "toy"
    assert (run / "eval" / "toy" / "results.json").is_file()
    (run / "model").mkdir()
    assert evaluate(benchmark, run / "model", progress=False).output == run / "eval" / "toy"
    assert evaluate(benchmark, "some/name", progress=False).output == Path("eval-results/toy")


def test_a_place_where_results_cannot_be_written_is_told_before_the_model_is_asked(
    benchmark: str, tmp_path: Path
) -> None:
    model = FakeModel()
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(VlmError, match="results cannot be written there"):
            evaluate(benchmark, model, output=place, progress=False)
    assert not model.calls


def test_overrides_reach_into_the_benchmark(benchmark: str) -> None:
    model = FakeModel()
    result = evaluate(benchmark, model, overrides=["protocol=lmms", "decoding.num_beams=4"], progress=False)
    assert result.protocol == "lmms"
    assert model.calls[0][2] == {"max_new_tokens": 3, "num_beams": 4}


def test_annotations_of_yours_are_read_as_the_data_sets_own_are(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "test"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(folder / "images" / "0.png")
    (folder / "images" / "1.png").write_bytes(b"broken")
    triples = [["what color is the shape?", "red", 0], ["is there a circle?", "yes", 0], ["which shape?", "red", 1]]
    (folder / "questions.json").write_text(json.dumps([*triples, ["no picture?", "no"]]))
    overrides = [f"dataset.annotations={tmp_path / 'mine'}", "baselines=null"]
    result = evaluate("easy_vqa", FakeModel(), overrides=overrides, output=tmp_path / "out", progress=False)
    assert result.score == pytest.approx(25.0)  # one right, one wrong, one broken picture, one malformed entry
    assert result.count == 4
    assert [entry["id"] for entry in result.broken] == ["test-2", "unreadable:0"]
    assert result.baselines == {}


# --- existing predictions ---


def test_both_kinds_of_prediction_files_give_the_models_score(benchmark: str, tmp_path: Path) -> None:
    first = evaluate(benchmark, FakeModel(), output=tmp_path / "first", progress=False)
    again = evaluate(benchmark, predictions=tmp_path / "first" / "samples.jsonl", progress=False)
    official = tmp_path / "official.json"
    official.write_text(json.dumps([{"question_id": s.id, "answer": s.prediction} for s in reversed(first.samples)]))
    assert again.score == evaluate(benchmark, predictions=official, progress=False).score == first.score
    # A character that UTF-8 cannot hold survives in its escaped form.
    official.write_text(json.dumps([{"question_id": s.id, "answer": "\ud800"} for s in first.samples]))
    odd = evaluate(benchmark, predictions=official, output=tmp_path / "odd", progress=False)
    assert odd.score == 0
    assert read_lines(tmp_path / "odd" / "samples.jsonl")[0]["prediction"] == "\ud800"


def test_predictions_for_all_records_can_be_scored_with_a_limit(benchmark: str, tmp_path: Path) -> None:
    evaluate(benchmark, FakeModel(), output=tmp_path / "first", progress=False)
    official = tmp_path / "first" / "samples.jsonl"
    assert evaluate(benchmark, predictions=official, limit=1, progress=False).score == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"question_id": "0-0", "answer": "red"}]', r"5 missing \(0-1, 0-2, 1-0, 1-1, 1-2\)"),
        (json.dumps([{"question_id": f"q{n}", "answer": ""} for n in range(9)]), r"6 missing.*9 unknown \(q0, q1"),
        ('[{"question_id": 1, "answer": "a"}, {"question_id": 1, "answer": "b"}]', r"1 given more than once \(1\)"),
        ('[{"question_id": 1, "reply": "a"}]', r"row 1: expected \{question_id, answer\}"),
        ('[{"question_id": 1, "answer": 3}]', "must be text, found 3"),
        ('{"id": "0-0", "prediction": "red"}\nnonsense\n', r"given\.json:2: not JSON"),
        ("[1, 2", "not JSON"),
        ("[7]", "found int"),
        ("\ufeff[7]", "row 1: .*found int"),  # as Windows' editors begin a file
        ("[" * 50_000, "nested without end"),
    ],
)
def test_a_wrong_file_of_predictions_is_an_error_that_says_why(
    benchmark: str, tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "given.json"
    path.write_text(content)
    with pytest.raises(VlmError, match=message):
        evaluate(benchmark, predictions=path, progress=False)


def test_model_and_predictions_exclude_each_other(benchmark: str, tmp_path: Path) -> None:
    with pytest.raises(VlmError, match="either a model or a file"):
        evaluate(benchmark)
    with pytest.raises(VlmError, match="either a model or a file"):
        evaluate(benchmark, FakeModel(), predictions="x.json")
    with pytest.raises(VlmError, match="cannot be read"):
        evaluate(benchmark, predictions=tmp_path / "absent.json")


# --- the report ---


def test_the_report_stands_alone_and_escapes_what_it_shows(benchmark: str) -> None:
    html = render_report(evaluate(benchmark, FakeModel(), progress=False))
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    assert "A &lt;b&gt;" in html
    assert "a paper, table 1" in html
    assert html.count('src="data:image/') == 3  # one picture each, shared by its two questions
    assert html.count('class="q ') == 6
    assert html.count('class="q wrong"') == 3
    assert 'src="http' not in html
    assert "$" not in html.split("<script>")[0]  # nothing of the template is left unfilled


def test_the_report_of_many_pictures_prefers_wrong_ones_and_says_how_many(
    benchmark: str, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = []
    for number in range(400):
        path = tmp_path / f"many{number}.png"
        Image.new("L", (2, 2), number % 256).save(path)
        answer = "red" if number % 2 else "blue"
        many.append(Record(f"m{number}", (str(path),), question="which?", answers=(answer,)))
    monkeypatch.setattr("vlm.data.catalogue.load_dataset", lambda name, split, **options: FakeDataset(many))
    html = render_report(evaluate(benchmark, FakeModel(), progress=False))
    assert "Shown: 300 of 400 pictures, 300 of 400 questions" in html
    assert html.count('class="q wrong"') == 200
    assert len(html) < 5_000_000
