"""Scores while training: shared by the processes, and the best model so far is kept, also over an interruption."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from training_parts import caption_benchmark, conversations, tiny_recipe, train_in_processes, train_until

from vlm import load_model, train
from vlm.models.build import read_weights
from vlm.recipe import EvaluationSection, Recipe
from vlm.training.loop import Trainer


@dataclass
class Scored:
    score: float


@pytest.fixture
def recipe(tiny_folder: Callable[..., Path], tmp_path: Path) -> Recipe:
    data = conversations(tmp_path / "data")
    made = tiny_recipe(tiny_folder, data, tmp_path / "run", steps=5, checkpoint_every=10)
    section = EvaluationSection(benchmarks=[str(caption_benchmark(tmp_path, data.parent))], every=1)
    return made.model_copy(update={"evaluation": section})


def _evaluations(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], value) for line in lines for key, value in line.items() if key.startswith("eval/")]


@pytest.mark.parametrize("stop", [2, 3])
def test_the_best_model_is_kept_over_an_interruption(
    stop: int, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([10.0, 30.0, 20.0, 30.0, 25.0])
    monkeypatch.setattr("vlm.evaluation.evaluate", lambda *_, **__: Scored(next(scores)))
    trainer = Trainer(recipe, quiet=True)
    assert not train_until(trainer, stop).finished
    kept = read_weights(tmp_path / "run" / "best" / "trained.safetensors")
    again = Trainer(recipe, resume=True, quiet=True)
    assert again.best["score"] == 30.0
    assert again.best["step"] == 2
    assert again.train().finished
    torch.testing.assert_close(read_weights(tmp_path / "run" / "best" / "trained.safetensors"), kept, rtol=0, atol=0)
    last = read_weights(tmp_path / "run" / "model" / "trained.safetensors")
    assert any(not torch.equal(last[name], kept[name]) for name in kept)
    assert [score for _, score in _evaluations(tmp_path / "run")] == [10.0, 30.0, 20.0, 30.0, 25.0]
    picture = str(next((tmp_path / "data").glob("*.png")))
    model: Any = load_model(tmp_path / "run" / "best")
    assert isinstance(model.answer(picture, "what is it?", max_new_tokens=2)[0], str)


def test_processes_share_an_evaluation_while_training(recipe: Recipe, tmp_path: Path) -> None:
    section = recipe.evaluation.model_copy(update={"every": 2})
    recipe = recipe.model_copy(update={"evaluation": section})
    train(recipe.model_copy(update={"output": str(tmp_path / "one")}), quiet=True)
    train_in_processes(recipe, tmp_path, 2)
    assert [step for step, _ in _evaluations(tmp_path / "run")] == [2, 4, 5]
    one, shared = (
        [json.loads(line) for line in (run / "eval" / "tiny" / "samples.jsonl").read_text().splitlines()]
        for run in (tmp_path / "one", tmp_path / "run")
    )
    assert [sample["id"] for sample in shared] == [sample["id"] for sample in one]
    assert len(shared) == 6
