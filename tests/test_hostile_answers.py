"""Answers and captions as anybody may write them: markup, line breaks of every kind, nothing, too few humans."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.errors import VlmError
from vlm.evaluation import caption_scores, evaluate, vqa_accuracy

SCRIPT = "</script><script>alert(1)</script>"
ATTRIBUTE = "\"><img src=x onerror='alert(2)'>"
BREAKS = "a\u2028red\x85dog\u2029on\x0bgrass\r\nhere"


def files(folder: Path, answers: dict[int, list[str]]) -> list[str]:
    """The official files of questions and annotations, as overrides."""
    Image.new("RGB", (8, 8), "red").save(folder / "COCO_val2014_000000000001.jpg")
    head = {"data_subtype": "val2014", "data_type": "mscoco"}
    asked = [{"question_id": key, "image_id": 1, "question": f"what is {SCRIPT}?"} for key in answers]
    notes = [
        {
            "question_id": key,
            "image_id": 1,
            "question_type": ATTRIBUTE,
            "answer_type": "other",
            "answers": [{"answer_id": n, "answer": text} for n, text in enumerate(told)],
        }
        for key, told in answers.items()
    ]
    (folder / "q.json").write_text(json.dumps({**head, "questions": asked}))
    (folder / "a.json").write_text(json.dumps({**head, "annotations": notes}))
    return [f"dataset.{kind}={folder / name}" for kind, name in (("questions", "q.json"), ("annotations", "a.json"))]


def scored(folder: Path, overrides: list[str], rows: list[dict[str, Any]], benchmark: str = "vqav2") -> Any:
    (folder / "r.json").write_text(json.dumps(rows))
    out = folder / "out"
    return evaluate(benchmark, predictions=folder / "r.json", overrides=overrides, output=out, progress=False)


def test_markup_in_answers_is_text_in_the_report(tmp_path: Path) -> None:
    overrides = [*files(tmp_path, {1: [SCRIPT] * 10, 2: [ATTRIBUTE] * 10}), f"dataset.images={tmp_path}"]
    rows = [{"question_id": 1, "answer": SCRIPT}, {"question_id": 2, "answer": ATTRIBUTE}]
    result = scored(tmp_path, overrides, rows)
    assert result.score == 100
    report = (tmp_path / "out/report.html").read_text()
    assert "<img src=x" not in report
    assert report.count("<script>") == report.count("</script>") == 1
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in report
    assert report.count("data-groups=") == 2


@pytest.mark.parametrize("answer", [BREAKS, "", " \u3000 ", "\ud800"])
def test_answers_of_any_characters_are_kept_and_scored_again_the_same(tmp_path: Path, answer: str) -> None:
    overrides = files(tmp_path, {1: ["red"] * 9 + ["blue"], 2: [answer or "nothing"] * 10})
    rows = [{"question_id": 1, "answer": answer}, {"question_id": 2, "answer": answer}]
    first = scored(tmp_path, overrides, rows)
    samples = tmp_path / "out/samples.jsonl"
    assert samples.read_text(encoding="utf-8").count("\n") == 2
    again = evaluate("vqav2", predictions=samples, overrides=overrides, output=tmp_path / "again", progress=False)
    assert (again.score, again.metrics, again.tables) == (first.score, first.metrics, first.tables)


@pytest.mark.parametrize("answer", [3, 2.5, True, ["red"], {"text": "red"}])
def test_what_is_no_text_is_refused_with_its_row(tmp_path: Path, answer: object) -> None:
    overrides = files(tmp_path, {1: ["red"] * 10, 2: ["red"] * 10})
    rows = [{"question_id": 1, "answer": "red"}, {"question_id": 2, "answer": answer}]
    with pytest.raises(VlmError, match=r"r\.json: row 2: the answer must be text, found"):
        scored(tmp_path, overrides, rows)


def test_questions_of_fewer_than_ten_humans_are_scored_by_the_same_rule(tmp_path: Path) -> None:
    humans = {1: ["red"] * 4 + ["blue"], 2: ["red", "red", "blue"], 3: ["red"]}
    result = scored(tmp_path, files(tmp_path, humans), [{"question_id": key, "answer": "red"} for key in humans])
    # Each human against the others: all of 4 or 5 find three that agree; of 3, two find one and one finds two.
    assert [sample.score for sample in result.samples] == pytest.approx([1, (1 / 3 + 1 / 3 + 2 / 3) / 3, 1])
    assert result.score == pytest.approx(vqa_accuracy(["red"] * 3, list(humans.values())).accuracy)


def test_captions_with_breaks_and_empty_ones_keep_their_pictures(tmp_path: Path) -> None:
    told = {1: ["a red dog on grass here"], 2: ["two cats"], 3: ["one tree", "a tree"]}
    images = [{"id": key, "file_name": f"{key}.png"} for key in told]
    notes = [{"image_id": key, "id": 10 * key + n, "caption": t} for key, ts in told.items() for n, t in enumerate(ts)]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": notes}))
    rows = [{"image_id": 1, "caption": BREAKS}, {"image_id": 2, "caption": ""}, {"image_id": 3, "caption": "a tree"}]
    result = scored(tmp_path, [f"dataset.annotations={tmp_path / 'c.json'}"], rows, "coco_captions")
    expected = caption_scores(["a red dog on grass here", "", "a tree"], list(told.values()))
    assert result.metrics == {name: pytest.approx(100 * score) for name, score in expected.items()}
    assert [sample.score > 0 for sample in result.samples] == [True, False, True]
