"""What a run shows on the screen: a summary, a progress bar, metrics, samples, warnings."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from vlm.models.freezing import named_trainable


class Reporter:
    """Prints for one process; a silent one prints nothing."""

    def __init__(self, silent: bool = False) -> None:
        self.console = Console(quiet=silent, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: Any = None

    def say(self, text: str) -> None:
        """One line, above the progress bar."""
        self.console.print(text, markup=False)

    def summary(self, model: nn.Module, folder: Path, samples: int, steps: int, device: str) -> None:
        """What trains, with parameter counts, and how long."""
        groups: dict[str, int] = {}
        for name, parameter in named_trainable(model):
            key = ".".join(name.split(".")[:2]) if ".lora." in name else name.split(".")[0]
            groups[key] = groups.get(key, 0) + parameter.numel()
        total = sum(p.numel() for p in model.parameters())
        parts = ", ".join(f"{name} {count:,}" for name, count in groups.items())
        self.say(f"training {sum(groups.values()):,} of {total:,} parameters ({parts}) on {device}")
        self.say(f"{samples:,} samples, {steps:,} steps -> {folder}")

    @contextmanager
    def bar(self, step: int, steps: int) -> Iterator[None]:
        """A progress bar while the loop runs; on something that is no terminal, metrics are printed as lines."""
        if self.console.quiet or not self.console.is_terminal:
            yield
            return
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as self._progress:
            self._task = self._progress.add_task("", total=steps, completed=step)
            yield
        self._progress = None

    def metrics(self, metrics: dict[str, Any], steps: int) -> None:
        """One logged step: to the bar or as a line."""
        text = (
            f"loss {metrics.get('loss', float('nan')):.4f}  {metrics['tokens_per_s']:.0f} tok/s  "
            f"{metrics['samples_per_s']:.1f} samples/s  {metrics['memory_gb']:.1f} GB  "
            f"{100 * metrics['peak_share']:.0f}% of peak"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=metrics["step"], description=text)
        else:
            self.say(f"step {metrics['step']}/{steps}  {text}")

    def sample(self, images: Sequence[str], asked: str, said: str, wanted: str) -> None:
        """What the model says to a training sample."""
        shown = ", ".join(Path(image).name for image in images)
        self.say(f"  [{shown}] {asked.strip()!r} -> {said!r} (wanted {wanted!r})")
