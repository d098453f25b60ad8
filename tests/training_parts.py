"""A tiny recipe over tiny parts, trainable in a second."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from generative_parts import generative_spec, pictures

from vlm.recipe import Recipe
from vlm.training.loop import Trainer, TrainResult

# An eps of Adam far above rounding: a gradient that is rounding alone makes no step, so that two ways to compute one
# run end with the same weights.
STEADY_EPS = 1e-3
ANSWERS = ["red", "a circle", "yes", "no it is not", "blue"]


def conversations(folder: Path, count: int = 12) -> Path:
    """A LLaVA file of `count` questions about every second picture of a few, answers of unequal length."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = pictures(folder, (count + 1) // 2)
    items = [
        {
            "id": str(i),
            "image": Path(paths[i // 2]).name,
            "conversations": [
                {"from": "human", "value": f"<image>\nwhat is shape number {i}?"},
                {"from": "gpt", "value": " ".join([ANSWERS[i % len(ANSWERS)]] * (1 + i % 3))},
            ],
        }
        for i in range(count)
    ]
    file = folder / "train.json"
    file.write_text(json.dumps(items))
    return file


def tiny_recipe(tiny_folder: Callable[..., Path], data: Path, output: Path, **train: Any) -> Recipe:
    """LoRA and projection on a tiny Llama; `train` overrides keys of the train section."""
    spec = generative_spec(tiny_folder, "llama", language={"lora": {"rank": 2, "alpha": 4}})
    content = {
        "model": spec.model_dump(mode="json"),
        "trainable": ["bridge.*", "language_model.lora.*"],
        "data": {
            "train": [{"dataset": str(data), "format": "llava_json", "images": str(data.parent)}],
            "max_broken": 0.2,
        },
        "optimizer": {"lr": 1e-2, "eps": STEADY_EPS},
        "train": {"batch_size": 4, "steps": 6, "log_every": 1, "checkpoint_every": 3, **train},
        "output": str(output),
    }
    return Recipe.model_validate(content)


def caption_benchmark(folder: Path, pictures: Path) -> Path:
    """A benchmark over the pictures of a folder, written to another; returns its file."""
    paths = sorted(pictures.glob("*.png"))
    lines = [json.dumps({"image": str(path), "captions": [f"shape {number}"]}) for number, path in enumerate(paths)]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    splits = {"test": {"path": str(folder / "captions.jsonl")}}
    about = {"name": "tiny_data", "licence": "MIT", "format": "captions_jsonl", "splits": splits}
    (folder / "tiny_data.yaml").write_text(yaml.safe_dump(about))
    benchmark = {"name": "tiny", "task": "caption", "dataset": str(folder / "tiny_data.yaml")}
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump({**benchmark, "decoding": {"max_new_tokens": 8}}))
    return file


def losses(folder: Path) -> list[float]:
    """The loss of each logged step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line and not line.get("skipped")]


def train_until(trainer: Trainer, steps: int) -> TrainResult:
    """Train as if SIGTERM came in the step that makes it `steps`."""
    original = trainer.train_step

    def stopping(*given: Any) -> dict[str, float]:
        trainer.stopping = trainer.step + 1 == steps
        return original(*given)

    trainer.train_step = stopping  # type: ignore[method-assign]
    return trainer.train()


def assert_same_runs(one: Path, other: Path, **tolerance: float) -> None:
    """Two runs had the same losses and ended with the same weights."""
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(losses(one), losses(other), **tolerance)
    torch.testing.assert_close(weights(one), weights(other), **tolerance)


def train_command(recipe: Recipe, folder: Path, processes: int = 0) -> tuple[list[str], dict[str, str]]:
    """Command and environment of `vlm-train` on a recipe written to `folder`; under torchrun with processes."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return [sys.executable, *launcher, "-m", "vlm.cli.train", str(file)], environment


def train_in_processes(recipe: Recipe, folder: Path, processes: int) -> None:
    """Train a recipe in several processes."""
    command, environment = train_command(recipe, folder, processes)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


_RUNS = """
import json, sys
from training_parts import train_until
from vlm import load_recipe
from vlm.cli.processes import leave_the_group
from vlm.training.loop import Trainer
for file, resume, stop in json.loads(sys.argv[1]):
    trainer = Trainer(load_recipe(file), resume, quiet=True)
    assert train_until(trainer, stop).finished == (stop == 0)
    del trainer
leave_the_group()
"""


def run_in_processes(folder: Path, processes: int, *runs: tuple[Recipe, bool, int]) -> None:
    """Runs as (recipe, whether to go on with it, step to stop at or 0), one after the other in the same processes."""
    asked = []
    for number, (recipe, resume, stop) in enumerate(runs):
        file = folder / f"run-{number}.yaml"
        file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        asked.append((str(file), resume, stop))
    program_in_processes(folder, processes, _RUNS, json.dumps(asked))


def program_in_processes(folder: Path, processes: int, program: str, *arguments: str) -> str:
    """What a program that may import these parts prints when torchrun starts it in several processes."""
    file = folder / "program.py"
    file.write_text(program)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(paths)}
    command = [sys.executable, *launcher, str(file), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def weights(folder: Path) -> dict[str, Any]:
    """The trained weights of a run."""
    from vlm.models.build import read_weights

    return read_weights(folder / "model" / "trained.safetensors")
