"""Fully sharded training gives what one process gives, and says where it cannot work."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from dual_parts import captions, dual_recipe
from generative_parts import generative_spec
from test_qformer_model import qformer_recipe
from training_parts import assert_same_runs, caption_benchmark, conversations, losses, run_in_processes, tiny_recipe

from vlm import VlmError, train
from vlm.models.build import build_model, read_weights
from vlm.training.checkpoints import newest_checkpoint
from vlm.training.sharding import shard_task
from vlm.training.task import Task

FAMILIES = ["dual_encoder", "qformer"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def recipe(tiny_folder, folder):
    data = conversations(folder / "data")

    def make(output, **options):
        return tiny_recipe(tiny_folder, data, folder / output, **options)

    return make


@pytest.fixture(scope="module")
def whole_language_model(recipe):
    """Recipes in which the language model learns as a whole."""

    def make(output, **options):
        made = recipe(output, steps=3, **options)
        language = made.model.language_model.model_copy(update={"lora": None})
        model = made.model.model_copy(update={"language_model": language})
        return made.model_copy(update={"model": model, "trainable": ["bridge.*", "language_model.*"]})

    return make


@pytest.fixture(scope="module")
def scored(recipe, folder):
    """Recipes of runs that show samples and are scored as they go."""
    benchmark = caption_benchmark(folder, folder / "data")

    def make(output, **options):
        made = recipe(output, sample_every=2, **options)
        section = made.evaluation.model_copy(update={"benchmarks": [str(benchmark)], "every": 2})
        return made.model_copy(update={"evaluation": section})

    return make


@pytest.fixture(scope="module")
def mixed(tiny_folder, folder):
    """Recipes of a data set half of which shows no picture: one process shows some, another text alone."""
    data = conversations(folder / "mixed")
    items = json.loads(data.read_text())
    for item in items[::2]:
        del item["image"]
        item["conversations"][0]["value"] = "what is a circle?"
    data.write_text(json.dumps(items))

    def make(output, **options):
        return tiny_recipe(tiny_folder, data, folder / output, steps=4, **options)

    return make


@pytest.fixture(scope="module")
def comparing(tiny_folder, folder):
    """Recipes of objectives that compare the whole batch: both towers of a dual encoder, or a Q-Former."""
    data = captions(folder / "captions")
    # 7 samples: processes have unequal shares, and of the last micro-batch some have none.
    section = {"batch_size": 7, "steps": 4, "checkpoint_every": 2}

    def make(family, output, **options):
        train = {**section, **options}
        if family == "qformer":
            return qformer_recipe(tiny_folder, data, folder / f"{family}-{output}", train=train)
        towers = ["bridge.*", "image_encoder.*"]
        return dual_recipe(tiny_folder, data, folder / f"{family}-{output}", trainable=towers, train=train)

    return make


@pytest.fixture(scope="module")
def sharded(recipe, whole_language_model, scored, mixed, comparing, folder):
    """All runs that need several processes: starting those is what takes long."""
    begun_whole = recipe("begun-whole")
    train(begun_whole, quiet=True)
    due = scored("shards-due", fsdp=True)  # stopped where it has to be scored: that comes before its next step
    cut = [recipe("cut", fsdp=True), *(comparing(f, "cut", fsdp=True, micro_batch_size=2) for f in FAMILIES)]
    run_in_processes(
        folder,
        3,
        # 4 samples in micro-batches of 1 over 3 processes: one of them has less to do than the others
        (recipe("shards", fsdp=True, micro_batch_size=1, gradient_checkpointing=True), False, 0),
        (whole_language_model("shards-language", fsdp=True), False, 0),
        (mixed("shards-mixed", fsdp=True, micro_batch_size=1), False, 0),
        (recipe("begun-sharded", fsdp=True), False, 0),
        (_back_at_step_3(begun_whole, fsdp=True), True, 0),
        *((comparing(family, "shards", fsdp=True), False, 0) for family in FAMILIES),
        (scored("shards-scored", fsdp=True), False, 0),
        (due, False, 2),
        (scored("shards-half", fsdp=True, precision="bf16"), False, 0),
        (whole_language_model("shards-half-whole", fsdp=True, precision="bf16", gradient_checkpointing=True), False, 0),
        *((made, False, 3) for made in cut),
    )
    run_in_processes(folder, 2, (due, True, 0), *((made, True, 0) for made in cut))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("output", ["shards", "cut"])
def test_objectives_that_compare_the_whole_batch_are_sharded(sharded, comparing, folder, family, output):
    """Also in micro-batches, stopped and gone on with by fewer processes."""
    if not (folder / f"{family}-one").exists():
        train(comparing(family, "one"), quiet=True)
    assert_same_runs(folder / f"{family}-one", folder / f"{family}-{output}", rtol=1e-3, atol=1e-4)


def test_a_sharded_run_goes_on_with_another_number_of_processes(sharded, one, folder):
    assert_same_runs(one, folder / "cut")


def _back_at_step_3(recipe, fsdp):
    """The recipe with the lever turned, its run as it was half-way."""
    folder = Path(recipe.output)
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    assert newest_checkpoint(folder / "checkpoints").step == 3
    saved = folder / "recipe.yaml"  # the lever is no part of the result
    saved.write_text(saved.read_text().replace(f"fsdp: {str(not fsdp).lower()}", f"fsdp: {str(fsdp).lower()}"))
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"fsdp": fsdp})})


@pytest.fixture(scope="module")
def one(recipe, folder):
    """The run of one process."""
    train(recipe("one"), quiet=True)
    return folder / "one"


def test_shards_do_not_change_the_result(sharded, one, folder):
    assert_same_runs(one, folder / "shards")


def test_a_language_model_that_learns_as_a_whole_is_sharded_too(sharded, whole_language_model, folder):
    train(whole_language_model("one-language"), quiet=True)
    assert_same_runs(folder / "one-language", folder / "shards-language")


def test_processes_with_and_without_pictures_stay_together(sharded, mixed, folder):
    train(mixed("one-mixed"), quiet=True)
    assert_same_runs(folder / "one-mixed", folder / "shards-mixed")


def test_a_sharded_run_is_scored_as_it_goes(sharded, scored, folder):
    """On three processes, and gone on with on two, where a score comes before any step."""
    train(scored("one-scored"), quiet=True)

    def scored_after(run):
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [line["step"] for line in lines if any(name.startswith("eval/") for name in line)]

    def said(run):
        return [json.loads(line)["prediction"] for line in (run / "eval/tiny/samples.jsonl").read_text().splitlines()]

    for output in ("one-scored", "shards-scored", "shards-due"):
        assert scored_after(folder / output) == [2, 4, 6]
        assert said(folder / output) == said(folder / "one-scored")
        assert_same_runs(folder / "one-scored", folder / output)


def test_shards_in_bf16_learn_what_one_process_learns(sharded, scored, whole_language_model, folder):
    """Layers are gathered as bf16, which autocast would make of them; scores come in between."""
    for output, make in (("half", scored), ("half-whole", whole_language_model)):
        train(make(f"one-{output}", precision="bf16"), quiet=True)
        torch.testing.assert_close(
            losses(folder / f"shards-{output}"), losses(folder / f"one-{output}"), rtol=2e-3, atol=0
        )
    for run in ("shards-half", "one-half"):  # the best model is kept as it learned, not as it was gathered
        kept = read_weights(folder / run / "best" / "trained.safetensors")
        assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


def test_a_whole_run_goes_on_sharded(sharded, one, folder):
    assert_same_runs(one, folder / "begun-whole")


def test_a_sharded_run_goes_on_whole(sharded, one, recipe, folder):
    train(_back_at_step_3(recipe("begun-sharded", fsdp=True), fsdp=False), resume=True, quiet=True)
    assert_same_runs(one, folder / "begun-sharded")


@pytest.mark.parametrize(
    ("changes", "world", "error"),
    [
        ({}, 1, "start it with torchrun"),
        ({"batch_size": 2}, 4, "without a sample"),
    ],
)
def test_where_sharding_cannot_work_is_told_in_one_line(tiny_folder, recipe, changes, world, error):
    made = recipe("run", fsdp=True, **changes)
    model = build_model(generative_spec(tiny_folder, "llama"), ["bridge.*"], device="cpu", precision="fp32")
    with pytest.raises(VlmError, match=rf"train\.fsdp: .*{error}"):
        shard_task(Task(model, made.objectives), made, world, torch.device("cpu"), "fp32")


def test_fp16_and_other_devices_are_refused(tiny_folder, recipe):
    made = recipe("run", fsdp=True)
    model = build_model(generative_spec(tiny_folder, "llama"), ["bridge.*"], device="cpu", precision="fp32")
    task = Task(model, made.objectives)
    with pytest.raises(VlmError, match="use bf16"):
        shard_task(task, made, 2, torch.device("cpu"), "fp16")
    with pytest.raises(VlmError, match="mps devices"):
        shard_task(task, made, 2, torch.device("mps"), "fp32")
