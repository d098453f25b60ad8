"""The evaluator: runner, files, report, intervals, baselines and the command."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from vlm.cli.errors import one_line_errors
from vlm.cli.eval import app
from vlm.data.images import load_image
from vlm.data.parsing import BrokenRecord
from vlm.data.records import Record
from vlm.errors import UnsupportedTask, VlmError
from vlm.evaluation import bootstrap_interval, evaluate, load_benchmark, vqa_accuracy
from vlm.evaluation.baselines import blind_baselines
from vlm.evaluation.report import render_report
from vlm.evaluation.sharing import in_batches
from vlm.paths import yaml_names

HOSTILE = "<script>alert('x')</script> & \"what\" colour?"


class FakeModel:
    """Answers "red" to everything, opens every picture, and keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[str], dict[str, Any]]] = []

    def answer(self, images: list[str], questions: list[str], **decoding: Any) -> list[str]:
        self.calls.append((list(images), list(questions), decoding))
        for image in images:
            load_image(image)
        return ["red"] * len(questions)


@dataclass
class FakeDataset:
    records: list[Record]
    broken: list[BrokenRecord] = field(default_factory=list)


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """Three pictures, two questions each: half of the answers are "red"."""
    made = []
    for number, colour in enumerate(("red", "blue", "green")):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (64, 64), colour).save(path)
        for turn, (question, answer) in enumerate([("which colour?", colour), (HOSTILE, "red" if number else "teal")]):
            meta = {"question_type": "colour" if turn == 0 else "odd", "answer_type": "other"}
            made.append(Record(f"{turn}-{number}", (str(path),), question=question, answers=(answer,), meta=meta))
    return sorted(made, key=lambda record: record.id)  # the questions of a picture lie apart


@pytest.fixture
def benchmark(records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A benchmark file over `records`, whose training split is the same records."""
    monkeypatch.setattr("vlm.data.catalogue.load_dataset", lambda name, split, **options: FakeDataset(records))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "toy.yaml"
    path.write_text(
        "name: toy\ndataset: toy\nprompt: 'Q: {question}'\ndecoding: {max_new_tokens: 3}\n"
        "protocol: exact\nalso: [official]\nbaselines: train\n"
        "published: [{model: 'A <b>', score: 50.5, source: 'a paper, table 1'}]\n"
    )
    return str(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
    assert set(samples[0]) == {"id", "image", "question", "prediction", "answers", "score", "error"}
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


# --- the command ---


def test_the_command_prints_a_table_and_writes_the_files(benchmark: str, tmp_path: Path) -> None:
    evaluate(benchmark, FakeModel(), output=tmp_path / "first", progress=False)
    predictions = str(tmp_path / "first" / "samples.jsonl")
    arguments = [benchmark, "--predictions", predictions, "--output", str(tmp_path / "out"), "protocol=lmms", "also=[]"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for text in ("lmms", "50.00", "95 % interval", "majority answer", "report.html"):
        assert text in done.stdout
    assert json.loads((tmp_path / "out" / "results.json").read_text())["protocol"] == "lmms"


def test_json_output_is_one_line_per_benchmark(benchmark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(Path(benchmark).read_text().replace("name: toy", "name: other"))
    monkeypatch.setattr("vlm.loading.load_model", lambda name: FakeModel())
    arguments = [benchmark, str(other), "--model", "m", "--json", "--limit", "1", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["benchmark"], line["model"], line["count"]) for line in lines] == [("toy", "m", 1), ("other", "m", 1)]
    assert (tmp_path / "out" / "other" / "results.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["easy_vqb", "--model", "m"], "no benchmark 'easy_vqb'.*did you mean 'easy_vqa'"),
        (["easy_vqa"], "either --model NAME or --predictions FILE"),
        ([], "name a benchmark"),
        (["easy_vqa", "--model", "m", "protocl=x"], "unknown key 'protocl'"),
        (["easy_vqa", "a", "--predictions", "f"], "answers of one benchmark"),
    ],
)
def test_errors_are_one_line_on_stderr_with_exit_status_2(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr)


def test_debug_lets_the_traceback_through() -> None:
    done = CliRunner().invoke(app, ["easy_vqb", "--model", "m", "--debug"])
    assert isinstance(done.exception, VlmError)


def test_listing_shows_the_shipped_benchmarks() -> None:
    assert "easy_vqa" in CliRunner().invoke(app, ["--list"]).stdout
    assert "easy_vqa" in json.loads(CliRunner().invoke(app, ["--list", "--json"]).stdout)


def _raise(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        with one_line_errors():
            raise error

    return body


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (VlmError("a\nb"), 2),
        (FileNotFoundError(2, "absent"), 2),
        (PermissionError(13, "forbidden"), 2),
        (OSError(28, "No space left on device"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_a_user_can_mend_ends_a_command_in_one_line(
    error: BaseException, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    with pytest.raises(typer.Exit) as caught:
        _raise(error)()
    assert caught.value.exit_code == status
    assert capsys.readouterr().err.count("\n") == 1


def test_an_error_of_ours_keeps_its_traceback() -> None:
    for error in (OSError(5, "Input/output error"), ValueError("bug")):
        with pytest.raises(type(error)):
            _raise(error)()


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['vlm-eval', '--help']\n"
        "from vlm.cli.eval import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--predictions" in done.stdout
