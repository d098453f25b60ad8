"""Training holds nothing back: the last step of a long run has in memory what an early one had."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dual_parts import captions, dual_recipe
from test_qformer_model import qformer_recipe
from torch._subclasses.fake_tensor import FakeTensor
from training_parts import conversations, tiny_recipe

from vlm import train
from vlm.recipe import Recipe
from vlm.training.run_folder import RunFolder

# `VLM_MEMORY_STEPS=10000 pytest tests/test_memory_flat.py` takes as long as it says.
STEPS = int(os.environ.get("VLM_MEMORY_STEPS", "240"))
EVERY, SETTLED = STEPS // 6, STEPS // 3


def llava(tiny_folder: Callable[..., Path], folder: Path) -> Recipe:
    made = tiny_recipe(tiny_folder, conversations(folder / "data"), folder / "run")
    return longer(made)


def qformer(tiny_folder: Callable[..., Path], folder: Path) -> Recipe:
    return longer(qformer_recipe(tiny_folder, captions(folder / "data"), folder / "run"))


def dual_encoder(tiny_folder: Callable[..., Path], folder: Path) -> Recipe:
    return longer(dual_recipe(tiny_folder, captions(folder / "data"), folder / "run"))


def longer(made: Recipe) -> Recipe:
    section = made.train.model_copy(
        update={"steps": STEPS, "log_every": EVERY, "checkpoint_every": STEPS, "epochs": None}
    )
    return made.model_copy(update={"train": section})


@pytest.mark.parametrize("family", [llava, qformer, dual_encoder])
def test_a_longer_run_needs_no_more_memory(
    family: Callable[..., Recipe], tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not measured: tensors alive and their bytes, and Python's objects, at each line of the log."""
    alive: list[tuple[int, int, int]] = []
    log = RunFolder.log

    def counted(self: RunFolder, entry: dict[str, Any]) -> None:
        log(self, entry)
        gc.collect()
        objects = gc.get_objects()
        # Not those without memory that a compiler keeps, where other tests of this process ran one.
        tensors = [o for o in objects if isinstance(o, torch.Tensor) and not isinstance(o, FakeTensor)]
        if entry.get("step", 0) >= SETTLED:
            alive.append((len(tensors), sum(t.nbytes for t in tensors), len(objects)))

    monkeypatch.setattr(RunFolder, "log", counted)
    train(family(tiny_folder, tmp_path), quiet=True)
    first, *_, last = alive
    assert len(alive) >= 4
    assert last[:2] == pytest.approx(first[:2], rel=0.01)
    assert last[2] - first[2] < (STEPS - SETTLED) / 2  # objects: fewer than one in two steps
