"""What an evaluation found, and the files that keep it."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class Sample:
    """One question: what was asked, said and right; `score` between 0 and 1; `error` where nothing could be asked.

    ranking: the best guesses in order, where the task makes several. groups: what tables count it under, such as
    `question_type` -> `what color`.
    """

    id: str
    image: str | None
    question: str | None
    prediction: str | None
    answers: list[str]
    score: float
    error: str | None
    ranking: list[str] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationResult:
    """One benchmark's result; scores and intervals in per cent (median ranks are ranks).

    score, interval: of `metric` by `protocol`, the interval by bootstrap over pictures (95 %).
    scores, score_intervals: of `metric` by every protocol asked for. metrics, intervals: of every metric of the task by
    `protocol`.
    tables, table_intervals: of groups: title -> group -> score. table_groups: title -> what parts its groups
    (`question_type`), the key of `Sample.groups`.
    baselines: by `protocol`; keys of `vlm.evaluation.baselines.BASELINES`.
    published: others' scores: model, score, source, and `differs`: their settings that are not ours.
    broken: samples that could not be asked (they count as wrong), each with id, image and error.
    settings: everything the score depends on besides the model.
    output: where the files lie.
    """

    benchmark: str
    description: str
    model: str
    task: str
    metric: str
    protocol: str
    score: float
    interval: tuple[float, float]
    count: int
    scores: dict[str, float]
    score_intervals: dict[str, tuple[float, float]]
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    tables: dict[str, dict[str, float]]
    table_intervals: dict[str, dict[str, tuple[float, float]]]
    table_groups: dict[str, str]
    baselines: dict[str, float]
    published: list[dict[str, Any]]
    broken: list[dict[str, Any]]
    settings: dict[str, Any]
    versions: dict[str, str]
    git_commit: str | None
    seconds: float
    output: Path
    samples: list[Sample]

    @property
    def notes(self) -> list[str]:
        """What stands in place of scores that are no numbers, which JSON cannot hold."""
        return [
            f"{name} is {'infinite: half of the queries or more find no right candidate' if value > 0 else value}"
            for name, value in self.metrics.items()
            if not math.isfinite(value)
        ]

    def summary(self) -> dict[str, Any]:
        """What results.json holds: everything but the samples; null for what is infinite, which `notes` names."""
        content = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "samples"}
        found: dict[str, Any] = _as_json(content | {"notes": self.notes})
        return found


def _as_json(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _as_json(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_as_json(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return str(content) if isinstance(content, Path) else content


def write_result(result: EvaluationResult) -> None:
    """Write results.json, samples.jsonl and report.html into `result.output`, each whole or not at all."""
    from vlm.evaluation.report import render_report

    result.output.mkdir(parents=True, exist_ok=True)
    with replaced(result.output / "samples.jsonl") as file:
        for sample in result.samples:
            row = {key: value for key, value in asdict(sample).items() if value or key not in ("ranking", "groups")}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    with replaced(result.output / "report.html") as file:
        file.write(render_report(result))
    with replaced(result.output / "results.json") as file:
        json.dump(result.summary(), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


@contextmanager
def replaced(path: Path) -> Iterator[TextIO]:
    """Write aside, then rename, so that a file is never half-written."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # A half surrogate in somebody's text becomes its escape, which JSON reads back as it was.
        with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
