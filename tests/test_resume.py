"""`--resume` goes on exactly on every stage of every family, with any number of processes; old checkpoints go."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dual_parts import captions, dual_recipe
from test_qformer_model import qformer_recipe, qformer_spec
from training_parts import (
    assert_same_runs,
    conversations,
    run_in_processes,
    tiny_recipe,
    train_command,
    train_until,
)

from vlm import train
from vlm.recipe import Recipe
from vlm.training.loop import Trainer

Make = Callable[..., Recipe]


@pytest.fixture
def make(tiny_folder: Callable[..., Path], tmp_path: Path) -> Make:
    """Recipes of four steps: `make(stage, output, **train)`."""
    pairs, talks = captions(tmp_path / "pairs"), conversations(tmp_path / "talks")
    section: dict[str, Any] = {"batch_size": 5, "steps": 4, "checkpoint_every": 2, "micro_batch_size": 2}

    def recipe_of(stage: str, output: str, **train: Any) -> Recipe:
        train = {**section, **train}
        folder = tmp_path / output
        if stage == "contrast":
            return dual_recipe(tiny_folder, pairs, folder, trainable=["bridge.*", "image_encoder.*"], train=train)
        if stage == "Q-Former stage 1":  # hard negatives and dropout are drawn
            model = qformer_spec(tiny_folder)
            model["bridge"]["dropout"] = 0.1
            return qformer_recipe(tiny_folder, pairs, folder, model=model, train=train)
        if stage == "mixed":
            items = json.loads(talks.read_text())
            for item in items[::2]:
                item.pop("image", None)
                item["conversations"][0]["value"] = "what is a circle?"
            talks.with_name("mixed.json").write_text(json.dumps(items))
            return tiny_recipe(tiny_folder, talks.with_name("mixed.json"), folder, **train)
        made = tiny_recipe(tiny_folder, talks, folder, **train)
        if stage == "projection":
            return made
        lora = {"rank": 2, "alpha": 4, "dropout": 0.2}
        content = made.model_dump(mode="json")
        content["model"]["language_model"]["lora"] = lora
        return Recipe.model_validate({**content, "init_from": str(tmp_path / "before")})

    return recipe_of


def _stopped(recipe: Recipe, step: int) -> None:
    assert not train_until(Trainer(recipe, quiet=True), step).finished


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("stage", ["Q-Former stage 1", "second stage"])
def test_an_interrupted_stage_goes_on_exactly(stage: str, stop: int, make: Make, tmp_path: Path) -> None:
    """Random negatives, dropout and what the stage before left; the others have such a test beside their own."""
    if stage == "second stage":
        train(make("projection", "before", steps=1), quiet=True)
    train(make(stage, "through"), quiet=True)
    recipe = make(stage, "halves")
    _stopped(recipe, stop)
    assert train(recipe, resume=True, quiet=True).finished
    assert_same_runs(tmp_path / "through", tmp_path / "halves", rtol=0, atol=0)


def test_a_second_stage_of_a_q_former_goes_on_exactly(
    tiny_folder: Callable[..., Path], make: Make, tmp_path: Path
) -> None:
    first = make("Q-Former stage 1", "first", steps=1)
    train(first, quiet=True)
    content = make("projection", "x").model_dump(mode="json")
    content["model"]["bridge"] = {
        "type": "qformer",
        **first.model.bridge.model_dump(mode="json", exclude={"embed_width"}),
    }
    content["model"]["image_encoder"] = first.model.image_encoder.model_dump(mode="json")
    second = Recipe.model_validate({**content, "init_from": str(tmp_path / "first")})
    train(second.model_copy(update={"output": str(tmp_path / "through")}), quiet=True)
    recipe = second.model_copy(update={"output": str(tmp_path / "halves")})
    _stopped(recipe, 3)
    assert train(recipe, resume=True, quiet=True).finished
    assert_same_runs(tmp_path / "through", tmp_path / "halves", rtol=0, atol=0)


def test_a_run_goes_on_with_another_number_of_processes(make: Make, tmp_path: Path) -> None:
    """Begun by one, ended by three, in micro-batches that leave the last process less to do."""
    stages = ["contrast", "Q-Former without dropout", "mixed"]

    def recipe_of(stage: str, output: str) -> Recipe:
        if stage != "Q-Former without dropout":
            return make(stage, output)
        content = make("Q-Former stage 1", output).model_dump(mode="json")
        content["model"]["bridge"]["dropout"] = 0.0
        return Recipe.model_validate(content)

    recipes = [recipe_of(stage, f"{stage}-many") for stage in stages]
    for stage, recipe in zip(stages, recipes):
        train(recipe_of(stage, f"{stage}-one"), quiet=True)
        _stopped(recipe, 1)
    run_in_processes(tmp_path, 3, *((recipe, True, 0) for recipe in recipes))
    for stage in stages:
        assert_same_runs(tmp_path / f"{stage}-one", tmp_path / f"{stage}-many", rtol=1e-3, atol=1e-4)


def test_accelerate_launches_it_too(make: Make, tmp_path: Path) -> None:
    train(make("projection", "one"), quiet=True)
    command, environment = train_command(make("projection", "many"), tmp_path)
    options = ["--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, *command[1:]]
    done = subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WORLD_SIZE" not in environment
    assert_same_runs(tmp_path / "one", tmp_path / "many")


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept(keep: int, make: Make, tmp_path: Path) -> None:
    recipe = make("projection", "run", steps=5, checkpoint_every=1, keep_checkpoints=keep)
    _stopped(recipe, 4)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [f"step-{n:08d}" for n in range(5 - keep, 5)]
    assert train(recipe, resume=True, quiet=True).finished
    assert sorted(p.name for p in folder.iterdir()) == [f"step-{n:08d}" for n in range(6 - keep, 6)]
