"""What a benchmark's YAML file may say: data set, task, prompt, decoding, metric and protocol, published numbers."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from vlm.data.prompts import CLASS_NAMES, TEMPLATE_SETS
from vlm.errors import did_you_mean
from vlm.evaluation.tasks import TASKS
from vlm.paths import find_yaml, read_yaml
from vlm.schema import Strict, apply_overrides, validate


class BenchmarkData(Strict):
    """The records to score: a data set by name or YAML file, and its split.

    annotations: a file or folder of yours in place of the data set's own; format, images, questions: how to read it,
    where its pictures are, and the file of questions where it holds the answers alone (VQA).
    """

    name: str
    split: str = "test"
    format: str | None = None
    images: str | None = None
    annotations: str | None = None
    questions: str | None = None


class Published(Strict):
    """A score that somebody published, with the place to check it.

    settings: what they set of this benchmark's keys, dotted (`prompt`, `decoding.num_beams`, `dataset.split`); where
    ours differ the report says so.
    """

    model: str
    score: float
    source: str
    settings: dict[str, Any] = Field(default={})


class Benchmark(Strict):
    """One benchmark. Prompt, metric and protocol that are left out are the task's first or own.

    prompt: what the model is asked (vqa; `{question}` stands for the record's question), or what it encodes of a
    caption (retrieval; `{caption}`).
    decoding: generation arguments, passed on to the model as they are (vqa).
    classes: what prompts call the classes (zero_shot): a table's name (`vlm.data.prompts.CLASS_NAMES`) or label ->
    name; by default the labels themselves, underscores read as spaces.
    templates: prompts with `{}` for the class name: a set's name (`TEMPLATE_SETS`), or a list.
    class_prompts: class -> prompts of its own in place of the templates.
    rerank: of each query so many nearest by embedding are ranked again by a model that can match (retrieval); 0: none.
    protocol: how the headline score is computed; also: further protocols reported beside it.
    baselines: the training split that the blind baselines learn from (vqa); none without it.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    dataset: BenchmarkData
    task: str = "vqa"
    prompt: str = ""
    decoding: dict[str, Any] = Field(default={})
    classes: str | dict[str, str] | None = None
    templates: str | list[str] = "simple"
    class_prompts: dict[str, list[str]] = Field(default={})
    rerank: int = Field(default=128, ge=0)
    metric: str = ""
    protocol: str = ""
    also: list[str] = Field(default=[])
    baselines: str | None = None
    published: list[Published] = Field(default=[])

    @field_validator("dataset", mode="before")
    @classmethod
    def _name_only(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _what_the_task_takes_by_default(cls, data: Any) -> Any:
        task = TASKS.get(str(data.get("task", "vqa"))) if isinstance(data, dict) else None
        if task is None:
            return data
        filled = dict(data)
        filled["prompt"] = data.get("prompt") or task.prompt
        filled["metric"] = metric = data.get("metric") or next(iter(task.metrics))
        if metric in task.metrics:
            filled["protocol"] = data.get("protocol") or task.metrics[metric].protocols[0]
        return filled

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str) -> str:
        if value not in TASKS:
            raise ValueError(f"unknown task{did_you_mean(value, TASKS)}")
        return value

    @field_validator("templates")
    @classmethod
    def _known_templates(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, str) and "{}" not in value and value not in TEMPLATE_SETS:
            raise ValueError(f"unknown prompt templates{did_you_mean(value, TEMPLATE_SETS)}")
        if not isinstance(value, str) and (not value or any("{}" not in template for template in value)):
            raise ValueError("expected at least one template, each with {} for the class name")
        return value

    @field_validator("classes")
    @classmethod
    def _known_classes(cls, value: str | dict[str, str] | None) -> str | dict[str, str] | None:
        if isinstance(value, str) and value not in CLASS_NAMES:
            raise ValueError(f"unknown table of class names{did_you_mean(value, CLASS_NAMES)}")
        if isinstance(value, dict) and not (value and all(name.strip() for name in value.values())):
            raise ValueError("expected at least one class, each with a name")
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
        for key in sorted({key for other in TASKS.values() for key in other.keys} - set(task.keys)):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"task {self.task} does not read the key {key!r}")
        if self.prompt and not (task.prompt or task.own_prompt):
            raise ValueError(f"task {self.task} does not read the key 'prompt'; see `templates`")
        if missing := [field for field in task.prompt_fields if f"{{{field}}}" not in self.prompt]:
            raise ValueError(f"the prompt {self.prompt!r} of task {self.task} lacks {{{missing[0]}}}")
        return self


def differences(plan: Benchmark, entry: Published) -> list[str]:
    """Where our settings are not those of a published score, each as `key: theirs X, here Y`."""
    found = []
    for key, theirs in entry.settings.items():
        ours: Any = plan.model_dump()
        for part in key.split("."):
            ours = ours.get(part) if isinstance(ours, dict) else None
        if ours != theirs:
            found.append(f"{key}: theirs {theirs!r}, here {ours!r}")
    return found


def load_benchmark(name: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Benchmark:
    """The benchmark in a file, or the shipped one of that name, with `KEY=VALUE` overrides applied.

    Raises VlmError that names the file and the key, with the nearest known key where one is unknown.
    """
    path = find_yaml("eval", str(name))
    return validate(Benchmark, apply_overrides(read_yaml(path), list(overrides)), where=str(path))
