"""Scores while training: shared by the processes, and the best model so far is kept, also over an interruption."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from training_parts import (
    assert_same_runs,
    caption_benchmark,
    conversations,
    tiny_recipe,
    train_in_processes,
    train_until,
)

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


SCORES = [10.0, 30.0, 20.0, 30.0, 25.0]


def _scored(monkeypatch: pytest.MonkeyPatch, fails_at: int = 0) -> list[int]:
    """Let evaluations score SCORES by step; the first of step `fails_at` fails. Returns the steps asked for."""
    asked: list[int] = []

    def evaluate(name: str, model: Any, **_: Any) -> Scored:
        asked.append(model.step_now())
        if asked[-1] == fails_at and asked.count(fails_at) == 1:
            raise RuntimeError("the evaluation fails")
        return Scored(SCORES[asked[-1] - 1])

    monkeypatch.setattr("vlm.evaluation.evaluate", evaluate)
    return asked


def _trainer(recipe: Recipe, resume: bool = False) -> Trainer:
    trainer = Trainer(recipe, resume, quiet=True)
    trainer.model.step_now = lambda: trainer.step
    return trainer


def _best(folder: Path) -> dict[str, torch.Tensor]:
    return read_weights(folder / "best" / "trained.safetensors")


@pytest.fixture
def through(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that nothing interrupts."""
    folder = tmp_path / "through"
    asked = _scored(monkeypatch)
    assert _trainer(recipe.model_copy(update={"output": str(folder)})).train().finished
    assert asked == [1, 2, 3, 4, 5]
    return folder


def _assert_scored_as(through: Path, run: Path) -> None:
    assert _evaluations(run) == _evaluations(through) == list(enumerate(SCORES, start=1))
    assert_same_runs(run, through, rtol=0, atol=0)
    torch.testing.assert_close(_best(run), _best(through), rtol=0, atol=0)


@pytest.mark.parametrize("stop", [2, 3])
def test_the_best_model_is_kept_over_an_interruption(
    stop: int, through: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _scored(monkeypatch)
    assert not train_until(_trainer(recipe), stop).finished
    again = _trainer(recipe, resume=True)
    assert (again.best["score"], again.best["step"]) == ((10.0, 1) if stop == 2 else (30.0, 2))
    assert again.train().finished
    assert asked == [1, 2, 3, 4, 5]
    assert again.best["step"] == 2  # the first of two that are as good
    _assert_scored_as(through, tmp_path / "run")
    last = read_weights(tmp_path / "run" / "model" / "trained.safetensors")
    kept = _best(tmp_path / "run")
    assert any(not torch.equal(last[name], kept[name]) for name in kept)
    picture = str(next((tmp_path / "data").glob("*.png")))
    model: Any = load_model(tmp_path / "run" / "best")
    assert isinstance(model.answer(picture, "what is it?", max_new_tokens=2)[0], str)


@pytest.mark.parametrize("step", [2, 3, 5])
def test_an_evaluation_that_fails_costs_no_step_and_is_asked_for_again(
    step: int, through: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _scored(monkeypatch, fails_at=step)
    with pytest.raises(RuntimeError, match="the evaluation fails"):
        _trainer(recipe).train()
    again = _trainer(recipe, resume=True)
    assert again.step == step
    assert again.scored == step - 1
    assert again.train().finished
    assert asked == sorted([1, 2, 3, 4, 5, step])
    _assert_scored_as(through, tmp_path / "run")
    assert _trainer(recipe, resume=True).train().finished
    assert len(asked) == 6  # a run that is done and scored asks nothing more


def test_scores_of_an_evaluation_that_was_killed_are_not_told_twice(
    through: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the line of the log and the checkpoint that knows of it."""
    _scored(monkeypatch)
    trainer = _trainer(recipe)

    def killed(*_: Any) -> None:
        if trainer.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("vlm.training.loop.amend_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    monkeypatch.undo()
    _scored(monkeypatch)
    assert _trainer(recipe, resume=True).train().finished
    _assert_scored_as(through, tmp_path / "run")


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
