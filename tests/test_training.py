"""The result of a run depends on its recipe alone."""

import json
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from generative_parts import generative_spec
from training_parts import (
    assert_same_runs,
    conversations,
    losses,
    tiny_recipe,
    train_command,
    train_in_processes,
    train_until,
    weights,
)

from vlm import load_model, train
from vlm.errors import VlmError
from vlm.models.build import build_model
from vlm.models.starting import start_from
from vlm.recipe import EvaluationSection, ObjectiveSpec
from vlm.training.checkpoints import newest_checkpoint
from vlm.training.loop import Trainer
from vlm.training.run_folder import RunFolder


@pytest.fixture
def data(tmp_path):
    return conversations(tmp_path / "data")


def test_training_lowers_the_loss_and_the_model_loads(tiny_folder, data, tmp_path):
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run", steps=20)
    result = train(recipe, quiet=True)
    assert result.finished
    assert result.steps == 20
    curve = losses(tmp_path / "run")
    assert curve[-1] < 0.8 * curve[0]
    picture = str(data.parent / "picture-0-0.png")
    assert isinstance(load_model(tmp_path / "run").answer(picture, "what is it?", max_new_tokens=3)[0], str)
    saved = weights(tmp_path / "run")
    assert saved
    assert all(name.startswith(("bridge.", "language_model.lora.")) for name in saved)


def test_micro_batches_do_not_change_the_result(tiny_folder, data, tmp_path):
    train(tiny_recipe(tiny_folder, data, tmp_path / "whole"), quiet=True)
    train(tiny_recipe(tiny_folder, data, tmp_path / "one", micro_batch_size=1), quiet=True)
    train(tiny_recipe(tiny_folder, data, tmp_path / "three", micro_batch_size=3), quiet=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "one")
    assert_same_runs(tmp_path / "whole", tmp_path / "three")


def test_threads_that_read_ahead_do_not_change_the_result(tiny_folder, data, tmp_path):
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "plain")
    train(recipe, quiet=True)
    section = recipe.data.model_copy(update={"workers": 3, "cache_features": False})
    train(recipe.model_copy(update={"data": section, "output": str(tmp_path / "ahead")}), quiet=True)
    assert_same_runs(tmp_path / "plain", tmp_path / "ahead")


def test_metrics_go_to_tensorboard_where_asked(tiny_folder, data, tmp_path):
    pytest.importorskip("tensorboard")
    train(tiny_recipe(tiny_folder, data, tmp_path / "run", steps=2, track=["tensorboard"]), quiet=True)
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_samples_and_checkpoints_take_no_time_of_the_rates(tiny_folder, data, tmp_path, monkeypatch):
    """On a clock that goes on in them alone, and a second in each step."""
    now = 0.0
    monkeypatch.setattr("vlm.training.meter.time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr("vlm.training.loop.matmul_peak", lambda *_: 1.0)

    def taking(seconds, run):
        def slow(*given):
            nonlocal now
            now += seconds
            return run(*given)

        return slow

    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run", steps=6, sample_every=2, checkpoint_every=2)
    trainer = Trainer(recipe, quiet=True)
    trainer.train_step = taking(1.0, trainer.train_step)
    for name in ("_show_samples", "save"):
        monkeypatch.setattr(trainer, name, taking(100.0, getattr(trainer, name)))
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["samples_per_s"] for line in lines] == [4.0] * 6


def test_cached_features_do_not_change_the_result(tiny_folder, data, tmp_path):
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "cached")
    train(recipe, quiet=True)
    section = recipe.data.model_copy(update={"cache_features": False})
    train(recipe.model_copy(update={"data": section, "output": str(tmp_path / "computed")}), quiet=True)
    assert_same_runs(tmp_path / "cached", tmp_path / "computed")


@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_does_not_change_the_result(tiny_folder, data, tmp_path, processes):
    train(tiny_recipe(tiny_folder, data, tmp_path / "one"), quiet=True)
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "many", micro_batch_size=1)
    train_in_processes(recipe, tmp_path, processes)
    assert_same_runs(tmp_path / "one", tmp_path / "many")


def test_an_interrupted_run_goes_on_exactly(tiny_folder, data, tmp_path):
    train(tiny_recipe(tiny_folder, data, tmp_path / "through"), quiet=True)
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "halves")
    trainer = Trainer(recipe, quiet=True)
    assert not train_until(trainer, 5).finished
    assert newest_checkpoint(tmp_path / "halves" / "checkpoints").step == 5
    assert train(recipe, resume=True, quiet=True).finished
    assert_same_runs(tmp_path / "through", tmp_path / "halves", rtol=0, atol=0)


def test_a_run_killed_in_the_middle_goes_on_exactly(tiny_folder, data, tmp_path):
    train(tiny_recipe(tiny_folder, data, tmp_path / "through", steps=8, checkpoint_every=2), quiet=True)
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "killed", steps=8, checkpoint_every=2)
    process = _started(recipe, tmp_path)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert train(recipe, resume=True, quiet=True).finished
    assert_same_runs(tmp_path / "through", tmp_path / "killed", rtol=1e-6, atol=1e-7)


def test_sigterm_finishes_the_step_and_exits_cleanly(tiny_folder, data, tmp_path):
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run", steps=100_000, checkpoint_every=50_000, log_every=1)
    process = _started(recipe, tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 0
    assert newest_checkpoint(tmp_path / "run" / "checkpoints") is not None


def _started(recipe, folder):
    command, environment = train_command(recipe, folder)
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_folder_that_holds_a_run_is_not_overwritten(tiny_folder, data, tmp_path):
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run", steps=1)
    train(recipe, quiet=True)
    with pytest.raises(VlmError, match="--resume"):
        train(recipe, quiet=True)
    other = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"lr": 0.5})})
    with pytest.raises(VlmError, match=r"optimizer\.lr"):
        train(other, resume=True, quiet=True)


def test_a_run_that_failed_before_its_first_step_leaves_its_folder_free(tiny_folder, data, tmp_path):
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run", steps=1)
    section = recipe.data.model_copy(update={"train": [recipe.data.train[0].model_copy(update={"dataset": "nowhere"})]})
    with pytest.raises(VlmError, match="nowhere"):
        train(recipe.model_copy(update={"data": section}), quiet=True)
    assert train(recipe, quiet=True).finished


def test_lines_of_metrics_that_are_none_do_not_stop_a_resumed_run(tiny_folder, data, tmp_path):
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run", steps=1)
    train(recipe, quiet=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole + b'[1]\n{"a": 1}\n{"step": "x"}\n{"step": 1, "lo\xff')
    assert train(recipe, resume=True, quiet=True).finished
    assert metrics.read_bytes() == whole


def test_two_runs_in_one_folder_exclude_each_other(tiny_folder, data, tmp_path):
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run", steps=1)
    with RunFolder(recipe.output).alone(), pytest.raises(VlmError, match="another process trains in"):
        train(recipe, quiet=True)
    assert train(recipe, quiet=True).finished


def test_a_run_may_follow_one_of_another_precision(tiny_folder, data, tmp_path):
    assert train(tiny_recipe(tiny_folder, data, tmp_path / "fp32", steps=1), quiet=True).finished
    assert train(tiny_recipe(tiny_folder, data, tmp_path / "bf16", steps=1, precision="bf16"), quiet=True).finished


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": [ObjectiveSpec(name="itc")]}, "cannot learn 'itc'; it can: lm"),
        ({"objectives": [ObjectiveSpec(name="itn")]}, "did you mean 'itm' or 'itc'"),
        ({"evaluation": EvaluationSection(benchmarks=["easy_vqq"])}, "did you mean 'easy_vqa'"),
    ],
)
def test_what_cannot_work_is_told_before_the_first_step(tiny_folder, data, tmp_path, changes, message):
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run").model_copy(update=changes)
    with pytest.raises(VlmError, match=message):
        train(recipe, quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_full_disk_leaves_the_old_checkpoint_whole(tiny_folder, data, tmp_path, monkeypatch):
    import vlm.training.checkpoints as checkpoints

    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run")
    trainer = Trainer(recipe, quiet=True)
    original = torch.save

    def full(*args, **options):
        if trainer.step > 3:
            raise OSError(28, "No space left on device")
        return original(*args, **options)

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(VlmError, match="No space left"):
        trainer.train()
    folder = tmp_path / "run" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    assert train(recipe, resume=True, quiet=True).finished


def test_a_torn_newest_checkpoint_falls_back_to_the_one_before(tiny_folder, data, tmp_path):
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run")
    train(recipe, quiet=True)
    folder = tmp_path / "run" / "checkpoints"
    newest = folder / "step-00000006" / "trained.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.warns(UserWarning, match="step-00000006"):
        assert newest_checkpoint(folder).step == 3
    (folder / "step-00000003" / "state.json").write_text("[]")
    with pytest.warns(UserWarning, match="step-00000003"):
        assert newest_checkpoint(folder) is None


def test_losses_that_are_not_finite_stop_the_run_with_the_samples_named(tiny_folder, data, tmp_path):
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run", max_bad_steps=2)
    trainer = Trainer(recipe, quiet=True)
    with torch.no_grad():
        trainer.model.bridge.layers[0].weight.fill_(float("nan"))
    with pytest.raises(VlmError, match="not finite"):
        trainer.train()
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    skipped = [entry for entry in entries if entry.get("skipped")]
    assert [entry["step"] for entry in skipped] == [1, 2]
    assert len(skipped[0]["samples"]) == 4


@pytest.mark.parametrize("cached", [True, False])
def test_a_broken_picture_is_skipped_and_too_many_stop_the_run(tiny_folder, data, tmp_path, cached):
    (data.parent / "picture-0-1.png").write_bytes(b"not a picture")
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run")
    section = recipe.data.model_copy(update={"cache_features": cached})
    assert train(recipe.model_copy(update={"data": section}), quiet=True).finished
    strict = section.model_copy(update={"max_broken": 0.01})
    with pytest.raises(VlmError, match="picture-0-1"):
        train(recipe.model_copy(update={"data": strict, "output": str(tmp_path / "strict")}), quiet=True)


def test_a_second_stage_starts_from_the_first(tiny_folder, data, tmp_path):
    first = tiny_recipe(tiny_folder, data, tmp_path / "first", steps=2)
    first = first.model_copy(
        update={
            "trainable": ["bridge.*"],
            "model": first.model.model_copy(
                update={"language_model": first.model.language_model.model_copy(update={"lora": None})}
            ),
        }
    )
    train(first, quiet=True)
    second = tiny_recipe(tiny_folder, data, tmp_path / "second", steps=1)
    trainer = Trainer(second.model_copy(update={"init_from": str(tmp_path / "first")}), quiet=True)
    carried = weights(tmp_path / "first")["bridge.layers.0.weight"]
    torch.testing.assert_close(trainer.model.bridge.layers[0].weight.detach().cpu(), carried)
    trainer.train()
    backwards = first.model_copy(update={"init_from": str(tmp_path / "second"), "output": str(tmp_path / "third")})
    with pytest.raises(VlmError, match=r"has no place for language_model\.lora"):
        train(backwards, quiet=True)


def test_a_stage_for_another_language_model_is_told_or_refused(tiny_folder, data, tmp_path):
    """Of another width nothing fits; of the same width everything does, and only names tell."""
    first = tiny_recipe(tiny_folder, data, tmp_path / "first", steps=1).model_copy(update={"trainable": ["bridge.*"]})
    train(first, quiet=True)
    same = build_model(first.model, ["bridge.*"], "cpu", "fp32")
    assert "WARNING" not in start_from(same, str(tmp_path / "first"))
    other = build_model(generative_spec(tiny_folder, "qwen2"), ["bridge.*"], "cpu", "fp32")
    said = start_from(other, str(tmp_path / "first"))
    assert f"WARNING: trained for the language model {first.model.language_model.name}" in said
    assert other.language_model.name in said
    other.bridge.layers[-1] = torch.nn.Linear(32, 48)
    with pytest.raises(VlmError, match=r"shapes differ for bridge\.layers\.2"):
        start_from(other, str(tmp_path / "first"))
