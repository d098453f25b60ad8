"""Results files for the servers of splits whose answers are secret."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from vlm.cli.eval import app
from vlm.errors import VlmError
from vlm.evaluation.submission import submit


class Model:
    name = "some/model 7B"

    def answer(self, images: list[str], questions: list[str], **decoding: Any) -> list[str]:
        from vlm.data.images import load_image

        return [f"{load_image(image).width} {question.split()[0]}" for image, question in zip(images, questions)]

    def caption(self, images: list[str], prompt: str | None = None, **decoding: Any) -> list[str]:
        return ["a dog"] * len(images)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Questions without answers in the official layout."""
    for number in (1, 2):
        Image.new("RGB", (8 * number, 8)).save(tmp_path / f"COCO_test2015_{number:012d}.jpg")
    asked = [{"question_id": 10 * n + k, "image_id": n, "question": "why so?"} for n in (2, 1) for k in (0, 1)]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"questions": asked, "data_subtype": "test-dev2015"}))
    return path


def test_evalais_file_holds_every_question_once(questions: Path, tmp_path: Path) -> None:
    overrides = [f"dataset.annotations={questions}", "dataset.split=test-dev"]
    file = submit("vqav2", Model(), overrides=overrides, output=tmp_path / "out", progress=False)
    assert file.name == "vqav2_test-dev_model-7B_results.json"
    rows = json.loads(file.read_text())
    assert rows == [
        {"question_id": key, "answer": f"{8 * (key // 10)} why"} for key in (20, 21, 10, 11)
    ]  # numbers, in the order asked
    (tmp_path / "COCO_test2015_000000000001.jpg").unlink()
    with pytest.raises(VlmError, match="2 records could not be asked"):
        submit("vqav2", Model(), overrides=overrides, output=tmp_path / "out", progress=False)


def test_cocos_file_is_named_and_laid_out_as_its_server_asks(tmp_path: Path) -> None:
    images = [{"id": 7, "file_name": "a.png"}]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = tmp_path / "image_info.json"
    path.write_text(json.dumps({"images": images}))
    overrides = [f"dataset.annotations={path}", "dataset.split=test2014"]
    file = submit("coco_captions", Model(), overrides=overrides, output=tmp_path, progress=False, model_name="fakecap")
    assert file.name == "captions_test2014_fakecap_results.json"
    assert json.loads(file.read_text()) == [{"image_id": 7, "caption": "a dog"}]


def test_the_command_prints_where_the_file_is(questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.loading.load_model", lambda name, **options: Model())
    arguments = [
        "vqav2",
        "--model",
        "m",
        "--submit",
        f"dataset.annotations={questions}",
        "--output",
        str(tmp_path / "o"),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert Path(done.stdout.strip()).is_file()
    with pytest.raises(VlmError, match="no server takes results of the task retrieval"):
        submit(
            "coco_captions", Model(), overrides=["task=retrieval", "metric=TR@1", "protocol=expected", "decoding={}"]
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--submit", "--model", "m", "--limit", "3"], "leave --limit out"),
        (["--submit", "--model", "m", "--json"], "leave --json out"),
        (["--submit", "--predictions", "answers.json"], "--submit asks a model"),
        (["--model", "m", "--partial"], "--partial is about a file"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["vqav2", *options])
    assert done.exit_code == 2
    assert said in done.stderr
