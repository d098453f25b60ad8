"""A toy benchmark over a few pictures, and a model that always says the same."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.data.images import load_image
from vlm.data.parsing import BrokenRecord
from vlm.data.records import Record

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


def toy_records(tmp_path: Path) -> list[Record]:
    """Three pictures, two questions each: half of the answers are "red"."""
    made = []
    for number, colour in enumerate(("red", "blue", "green")):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (64, 64), colour).save(path)
        for turn, (question, answer) in enumerate([("which colour?", colour), (HOSTILE, "red" if number else "teal")]):
            meta = {"question_type": "colour" if turn == 0 else "odd", "answer_type": "other"}
            made.append(Record(f"{turn}-{number}", (str(path),), question=question, answers=(answer,), meta=meta))
    return sorted(made, key=lambda record: record.id)  # the questions of a picture lie apart


def toy_benchmark(records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
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
