"""Benchmarks scored while a model trains."""

from collections.abc import Iterator
from pathlib import Path

from vlm.models.tasks import TaskModel
from vlm.recipe import EvaluationSection


def check_benchmarks(section: EvaluationSection) -> None:
    """A misspelt benchmark is told before hours of training, not after. Raises VlmError."""
    from vlm.evaluation import load_benchmark

    for name in section.benchmarks:
        load_benchmark(name)


def scores_of(model: TaskModel, section: EvaluationSection, run: Path) -> Iterator[tuple[str, float]]:
    """Name and score of each benchmark, written to `run/eval`; the processes share the questions, all get the score."""
    from vlm.evaluation import evaluate

    for name in section.benchmarks:
        result = evaluate(
            name,
            model=model,
            model_name=str(run),
            limit=section.limit,
            output=run / "eval" / Path(name).stem,
            progress=False,
        )
        yield name, result.score
