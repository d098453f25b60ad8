"""Fully sharded training gives what one process gives, and says where it cannot work."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from generative_parts import generative_spec
from training_parts import conversations, losses, tiny_recipe, weights

from vlm import VlmError, train
from vlm.models.build import build_model
from vlm.training.checkpoints import newest_checkpoint
from vlm.training.sharding import shard_task
from vlm.training.task import Task


def _launch(recipe, folder, processes=2, *options):
    file = folder / f"{os.path.basename(recipe.output)}.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, "-m", "vlm.cli.train", str(file), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def _same(one, other):
    torch.testing.assert_close(losses(one), losses(other), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-4, atol=1e-5)


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    data = conversations(tmp_path / "data")

    def make(output, trainable=None, **options):
        made = tiny_recipe(tiny_folder, data, tmp_path / output, **options)
        return made.model_copy(update={"trainable": trainable}) if trainable else made

    return make


def test_shards_do_not_change_the_result(recipe, tmp_path):
    train(recipe("one"), quiet=True)
    # 4 samples in micro-batches of 1 over 3 processes: one of them has less to do than the others
    _launch(recipe("shards", fsdp=True, micro_batch_size=1, gradient_checkpointing=True), tmp_path, processes=3)
    _same(tmp_path / "one", tmp_path / "shards")


def test_a_language_model_that_learns_as_a_whole_is_sharded_too(recipe, tmp_path):
    def whole(output, **options):
        made = recipe(output, ["bridge.*", "language_model.*"], steps=3, **options)
        language = made.model.language_model.model_copy(update={"lora": None})
        model = made.model.model_copy(update={"language_model": language})
        return made.model_copy(update={"model": model})

    train(whole("one"), quiet=True)
    _launch(whole("shards", fsdp=True), tmp_path)
    _same(tmp_path / "one", tmp_path / "shards")


def test_processes_with_and_without_pictures_stay_together(recipe, tmp_path):
    """Where one process shows pictures and another text alone, both reduce the same gradients."""
    items = json.loads((tmp_path / "data" / "train.json").read_text())
    for item in items[::2]:
        del item["image"]
        item["conversations"][0]["value"] = "what is a circle?"
    (tmp_path / "data" / "train.json").write_text(json.dumps(items))
    train(recipe("one", steps=4), quiet=True)
    _launch(recipe("shards", steps=4, fsdp=True, micro_batch_size=1), tmp_path)
    _same(tmp_path / "one", tmp_path / "shards")


def test_a_sharded_run_goes_on_whole_and_a_whole_one_sharded(recipe, tmp_path):
    train(recipe("one"), quiet=True)
    for name, first, then in (("whole", True, False), ("sharded", False, True)):
        half = recipe(name, fsdp=first)
        half = half.model_copy(update={"train": half.train.model_copy(update={"checkpoint_every": 3})})
        _launch(half, tmp_path) if first else train(half, quiet=True)
        folder = tmp_path / name
        checkpoints = folder / "checkpoints"
        for path in checkpoints.glob("step-00000006"):
            subprocess.run(["rm", "-r", str(path)], check=True)
        assert newest_checkpoint(checkpoints).step == 3
        saved = folder / "recipe.yaml"  # the lever is no part of the result
        saved.write_text(saved.read_text().replace(f"fsdp: {str(first).lower()}", f"fsdp: {str(then).lower()}"))
        other = half.model_copy(update={"train": half.train.model_copy(update={"fsdp": then})})
        _launch(other, tmp_path, 2, "--resume") if then else train(other, resume=True, quiet=True)
        _same(tmp_path / "one", folder)


@pytest.mark.parametrize(
    ("changes", "world", "error"),
    [
        ({}, 1, "start it with torchrun"),
        ({"batch_size": 2}, 4, "without a sample"),
        ({"sample_every": 5}, 2, "sample_every"),
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
