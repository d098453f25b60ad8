"""Checkpoints: everything needed to go on exactly, written aside and then renamed."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vlm.errors import VlmError
from vlm.models.build import read_weights

_WEIGHTS, _OPTIMIZER, _STATE = "trained.safetensors", "optimizer.pt", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk: weights and optimiser are read on demand."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.state["step"])

    def weights(self) -> dict[str, torch.Tensor]:
        """Trained parameters by logical name."""
        return read_weights(self.folder / _WEIGHTS)

    def optimizer(self) -> dict[str, Any]:
        """State of the optimiser."""
        return torch.load(self.folder / _OPTIMIZER, map_location="cpu", weights_only=True)


def save_checkpoint(
    folder: Path, weights: dict[str, torch.Tensor], optimizer: dict[str, Any], state: dict[str, Any], keep: int
) -> Path:
    """Write `folder/step-NNNNNNNN`, then delete all but the newest `keep` checkpoints.

    One of that step that is there already, and whole, stays: a run at a step is the same however it came there.
    Raises VlmError if the disk is full or read-only; earlier checkpoints are then untouched.
    """
    target = folder / f"step-{state['step']:08d}"
    aside = folder / f".{target.name}"
    if target.exists():
        try:
            _read(target)
            return target
        except Exception:  # torn: written anew
            shutil.rmtree(target, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*"):  # by a kill
            shutil.rmtree(left)
        aside.mkdir()
        save_file(weights, aside / _WEIGHTS, metadata={"format": "pt"})
        torch.save(optimizer, aside / _OPTIMIZER)
        (aside / _STATE).write_text(json.dumps(state))
        for name in (_WEIGHTS, _OPTIMIZER, _STATE):
            _sync(aside / name)
        os.replace(aside, target)
        _sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a failed write as RuntimeError
        shutil.rmtree(aside, ignore_errors=True)
        reason = str(error).splitlines()[0] + ("" if isinstance(error, OSError) else "; is the disk full?")
        raise VlmError(f"the checkpoint {target} could not be written: {reason}; earlier ones are untouched") from error
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def amend_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Put `state` into the checkpoint of its step, in one move; where there is none, nothing is done.

    Raises VlmError if the disk is full or read-only; the checkpoint then stays as it was.
    """
    target = folder / f"step-{state['step']:08d}"
    aside = target / f".{_STATE}"
    if not target.is_dir():
        return
    try:
        aside.write_text(json.dumps(state))
        _sync(aside)
        os.replace(aside, target / _STATE)
        _sync(target)
    except OSError as error:
        raise VlmError(f"the checkpoint {target} could not be written: {error.strerror or error}") from error


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`; one that cannot be read is passed over with a warning."""
    import warnings

    for candidate in reversed(_folders(folder)):
        try:
            return _read(candidate)
        except Exception as error:
            warnings.warn(f"checkpoint {candidate} cannot be read ({error}); trying the one before", stacklevel=2)
    return None


def _read(folder: Path) -> Checkpoint:
    """A checkpoint all of whose files can be read; raises whatever their readers do where one cannot."""
    checkpoint = Checkpoint(folder, json.loads((folder / _STATE).read_text()))
    if checkpoint.step < 0 or not {"broken", "scaler"} <= checkpoint.state.keys():
        raise ValueError(f"{_STATE} lacks what a run goes on with")
    checkpoint.weights()
    checkpoint.optimizer()
    return checkpoint


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir()) if folder.is_dir() else []


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
