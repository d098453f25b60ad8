"""Answers are kept as they come: a killed evaluation goes on, nothing is asked twice, processes share the questions."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlm.evaluation import evaluate

SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from vlm.evaluation import evaluate

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def answer(self, images, questions, **decoding):
        with open(sys.argv[2], "a") as log:
            log.writelines(f"{os.environ.get('RANK', 0)} {question}\\n" for question in questions)
        if len(sys.argv) > 4 and "7" in "".join(questions):
            os.kill(os.getpid(), signal.SIGKILL)
        return [question.split()[-1] for question in questions]

evaluate(sys.argv[1], Model(), output=sys.argv[3], batch_size=2, progress=False)
"""


class Model(torch.nn.Module):
    """Answers the last word, and keeps what it was asked."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), weight))
        self.asked: list[str] = []

    def answer(self, images: list[str], questions: list[str], **decoding: Any) -> list[str]:
        from vlm.data.images import load_image

        for image in images:
            load_image(image)
        self.asked += questions
        return [question.split()[-1] for question in questions]


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """Ten questions, one a picture; odd ones are answered right."""
    folder = tmp_path / "data" / "test"
    (folder / "images").mkdir(parents=True)
    questions = []
    for number in range(10):
        Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(folder / "images" / f"{number}.png")
        questions.append([f"say {number}", str(number) if number % 2 else "x", number])
    (folder / "questions.json").write_text(json.dumps(questions))
    (tmp_path / "toy_data.yaml").write_text(
        "name: toy_data\nlicence: MIT\nformat: easy_vqa\nsplits: {test: {path: data}}\n"
    )
    path = tmp_path / "toy.yaml"
    path.write_text(f"name: toy\ndataset: {tmp_path / 'toy_data.yaml'}\nprotocol: exact\n")
    return path


def run(benchmark: Path, log: Path, output: Path, *more: str, launcher: tuple[str, ...] = ()) -> int:
    script = benchmark.parent / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, *launcher, str(script), str(benchmark), str(log), str(output), *more]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, check=False).returncode


def test_a_killed_evaluation_goes_on_and_ends_as_one_left_alone(
    benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    log = tmp_path / "asked.txt"
    assert run(benchmark, log, tmp_path / "killed", "die") == -signal.SIGKILL
    assert not (tmp_path / "killed" / "results.json").exists()
    before = log.read_text().splitlines()
    (kept,) = (tmp_path / "cache" / "responses").glob("*.jsonl")
    with kept.open("a") as file:
        file.write('{"sample": "cut o')
    assert run(benchmark, log, tmp_path / "killed") == 0
    again = log.read_text().splitlines()[len(before) :]
    assert sorted({*before, *again}) == [f"0 say {n}" for n in range(10)]
    assert set(before[:6]).isdisjoint(again)  # whole batches were kept
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "other"))
    assert run(benchmark, log, tmp_path / "alone") == 0
    files = [tmp_path / name / "samples.jsonl" for name in ("killed", "alone")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_processes_ask_every_question_once(benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    log = tmp_path / "asked.txt"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert run(benchmark, log, tmp_path / "two", launcher=launcher) == 0
    asked = [line.split(" ", 1) for line in log.read_text().splitlines()]
    assert sorted(question for _, question in asked) == [f"say {n}" for n in range(10)]
    assert {rank for rank, _ in asked} == {"0", "1"}
    alone = evaluate(benchmark, Model(), output=tmp_path / "one", cache=False, progress=False)
    assert alone.score == 50
    files = [tmp_path / name / "samples.jsonl" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_was_said_is_taken_only_where_nothing_differs(
    benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))

    def asked(model: Model, *overrides: str, **options: Any) -> int:
        evaluate(benchmark, model, overrides=overrides, output=tmp_path / "out", progress=False, **options)
        return len(model.asked)

    assert asked(Model(), limit=4) == 4
    assert asked(Model()) == 6
    assert asked(Model()) == 0
    assert asked(Model(), cache=False) == 10
    assert asked(Model(2.0)) == 10
    assert asked(Model(), "decoding.num_beams=3") == 10
    assert asked(Model(), "prompt=Please {question}") == 10
    Image.new("RGB", (8, 8), "white").save(tmp_path / "data" / "test" / "images" / "3.png")
    assert asked(Model()) == 1
    (tmp_path / "data" / "test" / "images" / "5.png").unlink()
    assert asked(Model()) == 0
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "data" / "test" / "images" / "5.png")
    assert asked(Model()) == 1
