"""`--plan`: what it says of operations and memory is what a real step takes; every shipped recipe can be planned."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dual_parts import dual_recipe
from generative_parts import pictures
from test_qformer_model import qformer_recipe
from training_parts import tiny_recipe
from typer.testing import CliRunner

from vlm import VlmError, load_recipe
from vlm.models.meta import build_on_meta, part_sizes
from vlm.paths import yaml_names
from vlm.planning import plan as planning
from vlm.planning.measure import measure
from vlm.planning.meter import flop_counter
from vlm.planning.plan import make_plan
from vlm.planning.report import plan_text
from vlm.planning.workload import Workload
from vlm.recipe import Recipe
from vlm.training.loop import Trainer

SAYING = "a red circle that stands on a wide green field below the blue sky"


def conversations_of_one_length(folder: Path, count: int, words: tuple[str, ...] = (SAYING,)) -> Path:
    """The same sayings about every picture, so that all samples are of one length."""
    folder.mkdir(parents=True, exist_ok=True)
    items = [
        {
            "id": f"{i}-{said[:9]}",
            "image": Path(path).name,
            "conversations": [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": said}],
        }
        for i, path in enumerate(pictures(folder, count))
        for said in words
    ]
    file = folder / "train.json"
    file.write_text(json.dumps(items))
    return file


def _captions(folder: Path, count: int) -> Path:
    """Pairs whose texts are of one length."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = pictures(folder, count)
    lines = [{"id": str(i), "image": Path(path).name, "captions": [SAYING]} for i, path in enumerate(paths)]
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def _recipe(kind: str, tiny_folder: Callable[..., Path], folder: Path, **train: Any) -> Recipe:
    train = {"batch_size": 8, "steps": 2, **train}
    if kind == "generative":
        return tiny_recipe(tiny_folder, conversations_of_one_length(folder / "data", 8), folder / "run", **train)
    make = dual_recipe if kind == "dual encoder" else qformer_recipe
    return make(tiny_folder, _captions(folder / "data", 8), folder / "run", train=train)


def real_step(recipe: Recipe, cached: bool) -> tuple[Trainer, Any, Workload]:
    """A trainer, the samples of its first step, and what these are to a plan."""
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache_features": cached})})
    trainer = Trainer(recipe, quiet=True)
    trainer.model.train()
    samples = trainer.source.batch(0, recipe.train.batch_size)
    batch = trainer._collate(trainer.source.prepare(samples))
    count = len(batch.ids)
    assert count == len(samples)
    trainer.model.operations(batch)  # counted once and kept; not a part of the step
    tokens = batch.ids.shape[1] - getattr(trainer.model, "image_tokens", 0)
    labels = round(batch.num_labels / count) if recipe.model.type == "generative" else tokens
    return trainer, samples, Workload(count, 1.0, tokens, labels, assumed=False, packed=batch.mask.ndim == 4)


@pytest.mark.parametrize("micro", [8, 4])
@pytest.mark.parametrize("kind", ["generative", "dual encoder", "Q-Former"])
def test_operations_are_those_of_a_real_step(
    kind: str, micro: int, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = _recipe(kind, tiny_folder, tmp_path, micro_batch_size=micro)
    trainer, samples, work = real_step(recipe, cached=False)
    with flop_counter() as counter:
        trainer.train_step(samples)
    planned = measure(recipe, work, "fp32", micro, 8, cached=False, checkpointing=False)
    each = sum(forward + backward for forward, backward in planned.flops.values())
    assert each * 8 == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_that_of_a_real_step(checkpointing: bool, tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """As torch's allocator counts it while the trainer makes a step; weights and optimiser are there before.

    Two texts share a picture, so that a row needs a mask: transformers leaves out one that hides nothing.
    """
    recipe = _recipe("generative", tiny_folder, tmp_path, gradient_checkpointing=checkpointing, batch_size=8)
    file = conversations_of_one_length(tmp_path / "long", 8, (" ".join([SAYING] * 4), " ".join([SAYING[::-1]] * 4)))
    source = recipe.data.train[0].model_copy(update={"dataset": str(file), "images": str(file.parent)})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": [source]})})
    trainer, samples, work = real_step(recipe, cached=False)
    trainer.train_step(samples)  # the optimiser's state is made here
    peak = allocated(lambda: trainer.train_step(samples))
    planned = measure(recipe, work, "fp32", 8, 8, cached=False, checkpointing=checkpointing)
    assert planned.working == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("kind", ["dual encoder", "Q-Former"])
def test_memory_of_pairs_is_that_of_a_real_step(kind: str, tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """As above, of objectives that compare the whole batch."""
    recipe = _recipe(kind, tiny_folder, tmp_path)
    trainer, samples, work = real_step(recipe, cached=False)
    trainer.train_step(samples)
    peak = allocated(lambda: trainer.train_step(samples))
    planned = measure(recipe, work, "fp32", 8, 8, cached=False, checkpointing=False)
    assert planned.working == pytest.approx(peak, rel=0.15)


def allocated(run: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator on the CPU held at a time, above what it held before."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        run()
    now = peak = 0
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("name", yaml_names("recipes"))
def test_every_shipped_recipe_can_be_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer layers, for speed; what does not depend on them is told for the whole model."""
    recipe = load_recipe(name)
    if getattr(recipe.model.bridge, "init", "") == "hf:bert-base-uncased":
        recipe = load_recipe(name, ["model.bridge.layers=2"])
    whole = build_on_meta(recipe.model, recipe.trainable, "bf16")
    sizes = part_sizes(whole)
    monkeypatch.setattr("vlm.planning.plan.build_on_meta", lambda *_: whole)  # built once
    monkeypatch.setattr("vlm.planning.measure.build_on_meta", lambda *args: build_on_meta(*args, depth=2))
    plan = make_plan(recipe, gpu="h100", gpus=8, samples=1000)
    assert sum(sizes.values()) >= sum(plan.parameters.values()) > 0
    assert plan.flops_per_sample > 0
    assert plan.memory.total > plan.memory.weights > 0
    assert plan.steps
    assert plan.hours
    text = plan_text(plan)
    assert f"{sum(plan.parameters.values()):,}" in text
    assert json.loads(json.dumps(plan.to_dict()))["gpus"] == 8


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("clip_vit_b32", 151_277_313), ("siglip_b16", 203_155_970)],
)
def test_dual_encoders_have_their_published_size(name: str, parameters: int) -> None:
    recipe = load_recipe(name)
    assert sum(part_sizes(build_on_meta(recipe.model)).values()) == parameters


def test_a_lever_that_makes_it_fit_does_make_it_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.planning.measure.build_on_meta", lambda *args: build_on_meta(*args, depth=3))
    found = None
    for usable in (0.9, 0.5, 0.3, 0.2, 0.15, 0.1):
        monkeypatch.setattr(planning, "USABLE", usable)
        plan = make_plan(load_recipe("llava15_finetune_lora"), gpu="rtx4090")
        if not plan.fits and plan.levers:
            found = plan
            break
    assert found is not None
    assert " ".join(found.levers) in plan_text(found)
    if not any("4bit" in lever for lever in found.levers):
        assert make_plan(load_recipe("llava15_finetune_lora", found.levers), gpu="rtx4090").fits


@pytest.mark.parametrize("name", ["blip2_stage1", "siglip_b16", "llava15_pretrain"])
def test_sharding_saves_memory_in_every_family(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.planning.measure.build_on_meta", lambda *args: build_on_meta(*args, depth=2))
    monkeypatch.setattr(planning._Trial, "options", lambda *_: {})  # which would measure every other way as well
    plans = [make_plan(load_recipe(name, [f"train.fsdp={on}"]), gpus=8) for on in ("false", "true")]
    whole, sharded = (plan.memory for plan in plans)
    assert sharded.optimizer == whole.optimizer / 8
    assert sharded.gradients == whole.gradients / 8
    assert sharded.total < whole.total


def test_what_cannot_be_planned_is_told_in_one_line() -> None:
    recipe = load_recipe("starter/llava_pretrain")
    with pytest.raises(VlmError, match=r"unknown GPU 'h10'.*h100"):
        make_plan(recipe, gpu="h10")
    with pytest.raises(VlmError, match="--gpus"):
        make_plan(recipe, gpus=0)
    tiles = load_recipe("llava15_pretrain", ["model.image_encoder.resize=anyres"])
    with pytest.raises(VlmError, match="tiles"):
        make_plan(tiles)


def test_the_command_prints_text_or_json() -> None:
    from vlm.cli.train import app

    options = ["starter/clip_openmoji", "--plan", "--gpu", "a100"]
    told = CliRunner().invoke(app, options)
    assert told.exit_code == 0, told.output
    assert "it fits" in told.output
    made = json.loads(CliRunner().invoke(app, [*options, "--json"]).output)
    assert made["trained"] == {"bridge": 1_691_137}
    assert made["steps"] == 16
