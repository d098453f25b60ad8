"""What a benchmark's YAML file may say: data set, task, prompt, decoding, metric and protocol, published numbers."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from vlm.errors import did_you_mean
from vlm.evaluation.tasks import TASKS
from vlm.paths import find_yaml, read_yaml
from vlm.schema import Strict, apply_overrides, validate


class BenchmarkData(Strict):
    """The records to score: a data set by name or YAML file, and its split.

    annotations: a file or folder of yours in place of the data set's own; format, images: how to read it, and where
    its pictures are.
    """

    name: str
    split: str = "test"
    format: str | None = None
    images: str | None = None
    annotations: str | None = None


class Published(Strict):
    """A score that somebody published, with the place to check it."""

    model: str
    score: float
    source: str


class Benchmark(Strict):
    """One benchmark.

    prompt: what the model is asked; `{question}` stands for the record's question.
    decoding: generation arguments, passed on to the model as they are.
    protocol: how the headline score is computed; also: further protocols reported beside it.
    baselines: the training split that the blind baselines learn from; none without it.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    dataset: BenchmarkData
    task: str = "vqa"
    prompt: str = "{question}"
    decoding: dict[str, Any] = Field(default={})
    metric: str = "accuracy"
    protocol: str = "official"
    also: list[str] = Field(default=[])
    baselines: str | None = None
    published: list[Published] = Field(default=[])

    @field_validator("dataset", mode="before")
    @classmethod
    def _name_only(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str) -> str:
        if value not in TASKS:
            raise ValueError(f"unknown task{did_you_mean(value, TASKS)}")
        return value

    @model_validator(mode="after")
    def _fits_the_task(self) -> "Benchmark":
        task = TASKS[self.task]
        if self.metric not in task.metrics:
            raise ValueError(
                f"unknown metric {self.metric!r} of task {self.task}{did_you_mean(self.metric, task.metrics)}"
            )
        protocols = task.metrics[self.metric].protocols
        for protocol in (self.protocol, *self.also):
            if protocol not in protocols:
                raise ValueError(f"unknown protocol {protocol!r} of {self.metric}{did_you_mean(protocol, protocols)}")
        if missing := [field for field in task.prompt_fields if f"{{{field}}}" not in self.prompt]:
            raise ValueError(f"the prompt {self.prompt!r} of task {self.task} lacks {{{missing[0]}}}")
        return self


def load_benchmark(name: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Benchmark:
    """The benchmark in a file, or the shipped one of that name, with `KEY=VALUE` overrides applied.

    Raises VlmError that names the file and the key, with the nearest known key where one is unknown.
    """
    path = find_yaml("eval", str(name))
    return validate(Benchmark, apply_overrides(read_yaml(path), list(overrides)), where=str(path))
