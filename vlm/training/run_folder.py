"""The run folder: resolved recipe, metrics, checkpoints, model, evaluations."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from vlm.errors import VlmError
from vlm.paths import read_yaml
from vlm.recipe import Recipe
from vlm.schema import validate
from vlm.versions import git_commit, versions


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.best = self.path / "best"

    @property
    def is_started(self) -> bool:
        """Whether a run trained here before; one that failed before its first step left nothing to go on with."""
        return self.recipe.is_file() and any(p.exists() for p in (self.metrics, self.checkpoints, self.model))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Make the folder and keep other runs out of it; of several processes of one run, the first does.

        Raises VlmError if another run is at work there.
        """
        from filelock import FileLock, Timeout

        if os.environ.get("RANK", "0") != "0":
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=0)
        except Timeout as error:
            text = f"another process trains in {self.path}: wait for it, or choose another output=FOLDER"
            raise VlmError(text) from error
        except OSError as error:
            raise VlmError(f"{self.path} cannot be written: {error.strerror or error}") from error
        try:
            yield
        finally:
            lock.release()

    def start(self, recipe: Recipe, resume: bool) -> None:
        """Make the folder and write the resolved recipe with versions, command and seed.

        Raises VlmError if the folder holds a run and `resume` is off, or holds a run of another recipe.
        """
        if self.is_started:
            if not resume:
                raise VlmError(f"{self.path} holds a run already: go on with --resume, or choose another output=FOLDER")
            before = validate(Recipe, read_yaml(self.recipe), where=str(self.recipe))
            if changed := _differences(before.model_dump(mode="json"), recipe.model_dump(mode="json")):
                raise VlmError(f"{self.path} holds a run of another recipe; these keys differ: {', '.join(changed)}")
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            header = [f"# command: {' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}", f"# seed: {recipe.train.seed}"]
            header += [f"# {name}: {number}" for name, number in versions().items()]
            header += [f"# git commit: {commit}"] if (commit := git_commit()) else []
            content = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
            aside = self.recipe.with_suffix(".tmp")
            aside.write_text("\n".join([*header, content]), encoding="utf-8")
            aside.replace(self.recipe)
        except OSError as error:
            raise VlmError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def forget_metrics_after(self, step: int, scored: int) -> None:
        """Drop metrics of steps that a resumed run does again, and lines that a kill tore or that are none.

        scored: the last step whose scores are complete; later ones' are asked for again.
        """
        if not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                if entry["step"] <= (scored if any(key.startswith("eval/") for key in entry) else step):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        aside = self.metrics.with_suffix(".tmp")
        aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        aside.replace(self.metrics)

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _differences(before: Any, after: Any, key: str = "") -> list[str]:
    """Dotted names of values that differ; where the run lies does not count."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted(set(before) | set(after))
        return [d for n in names for d in _differences(before.get(n), after.get(n), f"{key}.{n}" if key else n)]
    return [key] if before != after and key != "output" else []
