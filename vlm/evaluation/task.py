"""What a task of the evaluator is: how a model is asked, and how what it says becomes scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vlm.data.records import Record
from vlm.evaluation.intervals import Medians, Parts
from vlm.evaluation.result import Sample
from vlm.evaluation.tables import Table

if TYPE_CHECKING:
    from vlm.evaluation.benchmark import Benchmark
    from vlm.evaluation.sharing import Asking


@dataclass(frozen=True)
class Prediction:
    """What a model said about one record; no text and an error where its picture could not be read.

    ranking: its best guesses in order, the text first among them; empty where it makes only one.
    """

    text: str | None
    error: str | None = None
    ranking: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """The records to score under a benchmark.

    everything: all that could be read, `records` the part of it that is scored. unreadable: how many more could not be
    read; they count as wrong.
    """

    plan: "Benchmark"
    everything: list[Record]
    records: list[Record]
    unreadable: int

    def diluted(self, score: float, asked: int) -> float:
        """A mean over `asked` samples once those that could not be read count as nothing."""
        return score * asked / (asked + self.unreadable)


@dataclass(frozen=True)
class Judged:
    """Scores by one protocol.

    scores: every metric; in per cent, but for ranks. contributions: for metrics with an interval, what each sample adds
    (their mean is the score / 100, before unreadable records dilute it), None where it has no part in the metric; or
    `Parts` or `Medians`, where the metric is no mean.
    tables: title -> scores of groups of samples.
    """

    scores: dict[str, float]
    samples: list[Sample]
    contributions: Mapping[str, "list[float | None] | Parts | Medians"]
    tables: dict[str, Table] = field(default_factory=dict)


def with_groups(judged: Judged) -> list[Sample]:
    """The samples, each with what the tables count it under: `question_type` -> `what color`."""
    groups: list[dict[str, str]] = [{} for _ in judged.samples]
    for table in judged.tables.values():
        for group, (members, _) in table.parts.items():
            for number in members:
                groups[number][table.by] = group
    return [replace(sample, groups=own) for sample, own in zip(judged.samples, groups, strict=True)]


@dataclass(frozen=True)
class Metric:
    """A score of a task. score: how a task that leaves it to the metric computes it; see `vlm.evaluation.tasks`."""

    score: Callable[..., Any] | None = None
    protocols: tuple[str, ...] = ("standard",)


@dataclass(frozen=True)
class Task:
    """One way to ask and judge a model.

    ask: (model, job, asking) -> outputs, the same in every process. What is asked goes through `asking.share`, so that
    it is shared and kept; pictures that cannot be read are errors in the outputs, not exceptions.
    judge: (job, outputs, protocol) -> scores of all metrics. Unreadable records dilute them.
    check: raises VlmError on a record that cannot serve the task.
    problems: outputs -> of each thing asked, why it could not be, or None.
    outputs_of: predictions of a file, one text per record -> outputs; a task without it has `read`.
    read: (file, job, partial) -> outputs, where they are no text, and of a partial file how much of it is missing,
    unknown and repeated.
    prompt: the default; prompt_fields: what a prompt must have a place for; own_prompt: without one the model's own
    is taken.
    keys: the benchmark's keys that only this task reads.
    noun: what is counted.
    """

    ask: "Callable[[Any, Job, Asking], Any]"
    judge: Callable[[Job, Any, str], Judged]
    check: Callable[[Record], None]
    metrics: dict[str, Metric]
    problems: Callable[[Any], Sequence[str | None]]
    outputs_of: Callable[[list[Prediction]], Any] | None = None
    read: Callable[[Path, Job, bool], tuple[Any, dict[str, int] | None]] | None = None
    prompt: str = ""
    prompt_fields: tuple[str, ...] = ()
    own_prompt: bool = False
    keys: tuple[str, ...] = ()
    noun: str = "samples"


Result = TypeVar("Result")


def without_broken(
    call: Callable[[list[str]], Result], images: Sequence[str]
) -> tuple[Result | None, list[int], dict[int, str]]:
    """`call` on those of `images` that can be read: its result, their numbers, and why each of the others cannot.

    Pictures are examined only after the call failed over one. What fails for another reason is raised.
    """
    from vlm.data.images import BrokenImage

    try:
        return (call(list(images)) if images else None), list(range(len(images))), {}
    except (BrokenImage, FileNotFoundError):
        problems = {path: problem for path in dict.fromkeys(images) if (problem := image_problem(path))}
        if not problems:
            raise
    whole = [number for number, path in enumerate(images) if path not in problems]
    result = call([images[number] for number in whole]) if whole else None
    return result, whole, {number: problems[path] for number, path in enumerate(images) if path in problems}


def image_problem(path: str) -> str | None:
    """Why a picture cannot be read, or None if it can."""
    from vlm.data.images import BrokenImage, load_image

    try:
        load_image(path)
    except (BrokenImage, OSError) as error:
        return str(error)
    return None
