"""Kills at any moment, full disks, processes that die, clocks that jump: nothing is lost and the result is the same."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training_parts import (
    assert_same_runs,
    caption_benchmark,
    conversations,
    tiny_recipe,
    train_command,
    train_until,
    weights,
)

from vlm import VlmError, evaluate, train
from vlm.recipe import Recipe
from vlm.training.checkpoints import newest_checkpoint
from vlm.training.loop import Trainer

# How many seeds of random kills: a few with every run of the tests, twenty with VLM_KILL_SEEDS=20.
SEEDS = range(int(os.environ.get("VLM_KILL_SEEDS", "2")))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return conversations(tmp_path / "data")


def _trials(*arguments: object) -> None:
    command = [sys.executable, str(Path(__file__).with_name("fault_trials.py")), *map(str, arguments)]
    command.append(",".join(map(str, SEEDS)))
    here = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env={**os.environ, **here}, capture_output=True, text=True, timeout=300 + 60 * len(SEEDS)
    )
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]


def _written(recipe: Recipe, folder: Path) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return file


@pytest.mark.timeout(300 + 60 * len(SEEDS))
def test_kills_at_any_moment_of_caching_and_training_change_nothing(
    tiny_folder: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "unused", steps=12, checkpoint_every=2, log_every=5)
    _trials("train", _written(recipe, tmp_path), tmp_path)
    for seed in SEEDS:
        run = tmp_path / f"run-{seed}"
        assert_same_runs(run, tmp_path / "run-through", rtol=1e-6, atol=1e-7)
        lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert lines == [5, 10, 12]
        assert sorted(p.name for p in run.iterdir()) == [
            *([".lock"] if (run / ".lock").exists() else []), "checkpoints", "metrics.jsonl", "model", "recipe.yaml",
        ]  # fmt: skip
        assert all(p.name.startswith("step-") for p in (run / "checkpoints").iterdir())


@pytest.mark.timeout(300 + 60 * len(SEEDS))
def test_kills_at_any_moment_of_an_evaluation_change_nothing(
    tiny_folder: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    train(tiny_recipe(tiny_folder, data, tmp_path / "model", steps=1), quiet=True)
    benchmark = caption_benchmark(tmp_path, data.parent)
    _trials("evaluate", benchmark, tmp_path / "model", tmp_path)

    def result(seed: object) -> tuple[str, float]:
        folder = tmp_path / f"run-{seed}"
        assert {p.name for p in folder.iterdir()} >= {"report.html", "results.json", "samples.jsonl"}
        return (folder / "samples.jsonl").read_text(), json.loads((folder / "results.json").read_text())["score"]

    assert len(result("through")[0].splitlines()) == 6
    for seed in SEEDS:
        assert result(seed) == result("through")


def _group_of_two() -> list[dict[str, str]]:
    """What two processes find in their environment that torchrun would start."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


def _wait_for_a_step(run: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Until the processes have logged one; fails where one of them ends before."""
    until = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)


@pytest.mark.parametrize("torchrun", [False, True])
def test_when_a_process_dies_the_others_say_so_and_end(
    torchrun: bool, tiny_folder: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run", steps=100_000, checkpoint_every=100_000)
    command, environment = train_command(recipe, tmp_path, 2 if torchrun else 0)
    each = [{}] if torchrun else _group_of_two()
    processes = [
        subprocess.Popen(command, env={**environment, **own}, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for own in each
    ]
    try:
        _wait_for_a_step(tmp_path / "run", processes)
        os.kill(_workers(processes[0].pid)[1] if torchrun else processes[1].pid, signal.SIGKILL)
        _, told = processes[0].communicate(timeout=60)
        assert processes[0].returncode == (1 if torchrun else 2)
        assert "another of the 2 processes has ended" in told
        assert "--resume" in told
        assert "Traceback" not in told or torchrun  # torchrun has one of its own
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_a_sigterm_to_one_process_of_a_group_ends_all_at_one_step_with_a_checkpoint(
    tiny_folder: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run", steps=100_000, checkpoint_every=100_000)
    command, environment = train_command(recipe, tmp_path)
    processes = [
        subprocess.Popen(command, env={**environment, **own}, stderr=subprocess.PIPE, text=True)
        for own in _group_of_two()
    ]
    try:
        _wait_for_a_step(tmp_path / "run", processes)
        processes[1].send_signal(signal.SIGTERM)
        told = [process.communicate(timeout=60)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], told
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    found = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.step == last


def _workers(parent: int) -> list[int]:
    """Child processes, in the order they were started."""
    return [int(number) for number in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_an_error_of_a_data_worker_ends_the_run_with_its_reason(
    tiny_folder: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": 2})})
    trainer = Trainer(recipe, quiet=True)
    good = trainer.source.load_picture

    def dying(path: str, step: int) -> Any:
        if step == 4:
            raise MemoryError("no memory for a picture")
        return good(path, step)

    trainer.source.load_picture = dying
    with pytest.raises(MemoryError, match="no memory for a picture"):
        trainer.train()
    train(recipe.model_copy(update={"output": str(tmp_path / "through")}), quiet=True)
    assert train(recipe, resume=True, quiet=True).finished
    assert_same_runs(tmp_path / "run", tmp_path / "through", rtol=0, atol=0)


def test_a_batch_that_is_not_finite_is_skipped_and_the_run_goes_on_also_when_resumed(
    tiny_folder: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    def run(name: str, stop: int) -> None:
        recipe = tiny_recipe(tiny_folder, data, tmp_path / name, steps=6, max_bad_steps=3)
        for resume in (False, True):
            trainer = Trainer(recipe, resume, quiet=True)
            good = trainer.source.load_picture
            trainer.source.load_picture = lambda path, step, good=good: (  # type: ignore[misc]
                good(path, step) * (float("nan") if step in (1, 2) else 1.0)
            )
            train_until(trainer, stop)

    run("through", 99)
    run("resumed", 2)  # between the two bad batches
    lines = [json.loads(line) for line in (tmp_path / "through" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("skipped")] == [2, 3]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "through").values())
    assert_same_runs(tmp_path / "resumed", tmp_path / "through", rtol=0, atol=0)


def test_bad_steps_in_a_row_are_counted_over_a_resume(
    tiny_folder: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run", steps=6, max_bad_steps=2, checkpoint_every=1)
    for resume in (False, True):
        trainer = Trainer(recipe, resume, quiet=True)
        trainer.source.load_picture = lambda path, step: torch.full((16, 32), float("nan"))
        if not resume:
            assert train_until(trainer, 1).steps == 1
        else:
            with pytest.raises(VlmError, match="2 steps in a row"):
                trainer.train()


def test_a_clock_that_jumps_changes_nothing(
    tiny_folder: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_recipe(tiny_folder, data, tmp_path / "steady"), quiet=True)
    real, calls = time.time, iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: real() + (-1e8 if next(calls) % 2 else 1e8))
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "jumping")
    trainer = Trainer(recipe, quiet=True)
    train_until(trainer, 4)
    # The newest is the one of most steps, whatever the times of files say.
    for age, folder in enumerate(sorted((tmp_path / "jumping" / "checkpoints").iterdir())):
        os.utime(folder, (1e9 - age * 1e6, 1e9 - age * 1e6))
    assert train(recipe, resume=True, quiet=True).finished
    assert_same_runs(tmp_path / "jumping", tmp_path / "steady", rtol=0, atol=0)


# A limit on the size of files, which every write runs into as into a full disk.
_FULL = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("room", [300, 3_000, 40_000])
def test_where_the_disk_is_full_a_line_says_so_and_the_run_goes_on_later(
    room: int, tiny_folder: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """However much there is room for: the folder's recipe, features, the metrics, parts of a checkpoint."""
    assert hasattr(resource, "RLIMIT_FSIZE")
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run")
    command, environment = train_command(recipe, tmp_path)
    environment["VLM_CACHE"] = str(tmp_path / "cache")
    full = [sys.executable, "-c", _FULL, str(room), "vlm.cli.train", command[-1], "--resume", "--quiet"]
    done = subprocess.run(full, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-3000:]
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr[-3000:]
    assert "File too large" in done.stderr or "is the disk full?" in done.stderr
    assert train(recipe, resume=True, quiet=True).finished
    train(recipe.model_copy(update={"output": str(tmp_path / "through")}), quiet=True)
    assert_same_runs(tmp_path / "run", tmp_path / "through", rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("room", [50, 2_000])
def test_where_the_disk_is_full_an_evaluation_says_so_and_ends_the_same_later(
    room: int, tiny_folder: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """Where answers are kept, and where results are written."""
    train(tiny_recipe(tiny_folder, data, tmp_path / "model", steps=1), quiet=True)
    benchmark = caption_benchmark(tmp_path, data.parent)
    asked = ["vlm.cli.eval", str(benchmark), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "scored")]
    environment = {**os.environ, "VLM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    full = [sys.executable, "-c", _FULL, str(room), *asked]
    done = subprocess.run(full, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-3000:]
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr[-3000:]
    assert "File too large" in done.stderr
    assert not (tmp_path / "scored" / "results.json").exists()
    results = [
        evaluate(benchmark, tmp_path / "model", output=tmp_path / name, progress=False) for name in ("scored", "x")
    ]
    assert results[0].score == results[1].score
    assert len((tmp_path / "scored" / "samples.jsonl").read_text().splitlines()) == 6


def test_a_folder_that_cannot_be_written_is_told_in_one_line(
    tiny_folder: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "file" / "run")
    with pytest.raises(VlmError, match="cannot be written"):
        train(recipe, quiet=True)
