"""The evaluator: records of a benchmark -> predictions of a model (or of a file) -> scores, interval, files."""

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm.data.records import Record
from vlm.errors import VlmError
from vlm.evaluation.baselines import blind_baselines
from vlm.evaluation.benchmark import Benchmark, differences, load_benchmark
from vlm.evaluation.error_bars import error_bars
from vlm.evaluation.predictions import match_predictions, matching_part, read_predictions
from vlm.evaluation.responses import Responses, identity_of, processes
from vlm.evaluation.result import EvaluationResult, Sample, write_result
from vlm.evaluation.sharing import Asking
from vlm.evaluation.task import Job, with_groups
from vlm.evaluation.tasks import TASKS, answer_scores
from vlm.versions import git_commit, versions


def evaluate(
    benchmark: str | Path | Benchmark,
    model: Any = None,
    predictions: str | Path | None = None,
    overrides: Sequence[str] = (),
    limit: int | None = None,
    output: str | Path | None = None,
    batch_size: int = 64,
    progress: bool = True,
    model_name: str | None = None,
    partial: bool = False,
    cache: bool = True,
) -> EvaluationResult:
    """Score a model, or a file of predictions, on a benchmark, and write results.json, samples.jsonl and report.html.

    benchmark: a shipped name, a YAML file, or a loaded benchmark; overrides: `KEY=VALUE` into it.
    model: a loaded model, or a name or run folder for `load_model`; model_name: what results call a loaded one.
    predictions: `[{question_id, answer}]`, `[{image_id, caption}]` or an earlier samples.jsonl (retrieval: a .npz, see
    `vlm.evaluation.retrieving.read_embeddings`), about exactly the data
    set's records; partial: score those that are there, the first of several.
    limit: only the first N records. batch_size: records asked at once; questions of one picture always go together.
    cache: keep a model's answers and take those it gave before to the same questions about the same pictures, so that a
    killed evaluation goes on; models without weights are asked anew. Under torchrun the questions are shared out, every
    process gets the whole result and the first one writes it.
    output: folder to write to; by default `eval/<benchmark>` in the run folder, else `eval-results/<benchmark>`.

    Samples that cannot be read count as wrong and are listed. Raises VlmError on anything the user can mend.
    """
    if (model is None) == (predictions is None):
        raise VlmError("give either a model or a file of predictions to evaluate")
    if limit is not None and limit < 1:
        raise VlmError(f"limit must be at least 1, got {limit}")
    if batch_size < 1:
        raise VlmError(f"batch_size must be at least 1, got {batch_size}")
    plan = benchmark if isinstance(benchmark, Benchmark) else load_benchmark(benchmark, list(overrides))
    task = TASKS[plan.task]
    named = isinstance(model, (str, Path))
    name = model_name or (str(predictions) if predictions is not None else name_of(model))
    folder = Path(output) if output is not None else default_output(str(model) if named else None, plan.name)
    began = time.monotonic()
    _make(folder)

    everything, unreadable = records_of(plan, need_pictures=predictions is None)
    for record in everything:
        task.check(record)
    total = len(everything) + len(unreadable)
    records = everything[:limit]
    room = len(unreadable) if limit is None else max(0, limit - len(records))
    unreadable = unreadable[:room]
    job = Job(plan, everything, records, len(unreadable))

    outputs: Any
    dropped: dict[str, int] | None = None
    if predictions is not None and task.read is not None:
        outputs, dropped = task.read(Path(predictions), job, partial)
        if partial:
            unreadable, job = [], replace(job, unreadable=0)
    elif predictions is not None:
        assert task.outputs_of is not None
        path = Path(predictions)
        given = read_predictions(path)
        if partial:
            records, dropped = matching_part(given, records)
            unreadable = []
            job = Job(plan, everything, records, 0)
        outputs = task.outputs_of(match_predictions(given, everything, records, str(path), partial))
    else:
        if named:
            from vlm.loading import load_model

            model = load_model(str(model))
        with progress_bar(f"{plan.name}", len(records), progress) as advance:
            outputs = asked(model, job, batch_size, advance, cache)
        problems = task.problems(outputs)
        if problems and all(problems):
            raise VlmError(
                f"{plan.name}: none of {len(problems)} records could be asked, the first because: {problems[0]}; "
                "is `dataset.images` right?"
            )
    settings = {
        **plan.model_dump(include={"dataset", "prompt", "protocol", "also", *task.keys}),
        "limit": limit,
        "records_in_data_set": total,
        "batch_size": batch_size,
        "predictions": None if predictions is None else str(predictions),
        "partial": dropped,
        "interval": "95 % bootstrap over pictures, 1000 resamples, seed 0",
    }
    result = _score(job, outputs, name, folder, unreadable, settings, began)
    if processes()[0] == 0:
        write_result(result)
    return result


def _make(folder: Path) -> None:
    """The folder for the results, before the model is asked anything. Raises VlmError where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission to write")
    except OSError as error:
        text = f"{folder}: results cannot be written there: {error.strerror or error}; choose another output folder"
        raise VlmError(text) from error


def asked(model: Any, job: Job, batch_size: int, advance: Callable[[int], None], cache: bool) -> Any:
    """The outputs for all records: what is known already, what this process asks, and what others do."""
    identity = identity_of(model, job.plan) if cache else None
    kept = Responses(identity, processes()[0]) if identity is not None else None
    try:
        return TASKS[job.plan.task].ask(model, job, Asking(batch_size, advance, kept))
    finally:
        if kept:
            kept.close()


def default_output(model: str | None, benchmark: str) -> Path:
    """Where results go unless told: into the run folder that `model` is, else `eval-results` here."""
    if model is not None:
        folder = Path(model).expanduser()
        for run in (folder, folder.parent) if folder.name == "model" else (folder,):
            if (run / "recipe.yaml").is_file() or (run / "model" / "model.yaml").is_file():
                return run / "eval" / benchmark
    return Path("eval-results") / benchmark


def name_of(model: Any) -> str:
    if isinstance(model, (str, Path)):
        return str(model)
    name = getattr(model, "name", None)
    return name if isinstance(name, str) and name else type(model).__name__


def records_of(plan: Benchmark, need_pictures: bool) -> tuple[list[Record], list[Sample]]:
    """The data set's records, and samples for those its reader could not read."""
    from vlm.data.catalogue import load_dataset, load_spec

    data = plan.dataset
    # Annotations of yours are read as the data set's own are, unless the benchmark says otherwise.
    format = data.format or (load_spec(data.name)[0].format if data.annotations else None)
    loaded = load_dataset(
        data.annotations or data.name,
        data.split,
        format=format,
        images=data.images,
        questions=data.questions,
        need_pictures=need_pictures,
    )
    broken = [
        Sample(f"unreadable:{number}", None, None, None, [], 0.0, f"{entry.where}: {entry.reason}")
        for number, entry in enumerate(loaded.broken)
    ]
    records = list(loaded.records)
    if not records:
        raise VlmError(f"{plan.name}: split {data.split!r} of {data.name!r} has no records that can be read")
    return records, broken


def _baseline_scores(plan: Benchmark, records: Sequence[Record]) -> dict[str, float]:
    """Scores of the blind baselines in per cent, learned from the benchmark's training split."""
    from vlm.data.catalogue import load_dataset

    training = load_dataset(plan.dataset.name, str(plan.baselines)).records
    score = TASKS[plan.task].metrics[plan.metric].score
    assert score is not None
    guesses = blind_baselines(training, [record.question or "" for record in records])
    return {
        key: answer_scores(score(records, texts, plan.protocol), plan.metric, records).scores[plan.metric]
        for key, texts in guesses.items()
    }


def _score(
    job: Job,
    outputs: Any,
    name: str,
    folder: Path,
    unreadable: list[Sample],
    settings: dict[str, Any],
    began: float,
) -> EvaluationResult:
    """The outputs' scores by every protocol, beside the baselines'."""
    plan, task = job.plan, TASKS[job.plan.task]
    judged = {protocol: task.judge(job, outputs, protocol) for protocol in (plan.protocol, *plan.also)}
    headline = judged[plan.protocol]
    tables = {title: table for title, table in headline.tables.items() if table}
    samples = with_groups(headline) + unreadable
    bars = error_bars(judged, plan, [sample.id for sample in unreadable])
    return EvaluationResult(
        benchmark=plan.name,
        description=plan.description,
        model=name,
        task=plan.task,
        metric=plan.metric,
        protocol=plan.protocol,
        score=headline.scores[plan.metric],
        interval=bars.metrics[plan.metric],
        count=len(samples),
        scores={protocol: found.scores[plan.metric] for protocol, found in judged.items()},
        score_intervals=bars.protocols,
        metrics=headline.scores,
        intervals=bars.metrics,
        tables={title: table.scores for title, table in tables.items()},
        table_intervals=bars.tables,
        table_groups={title: table.by for title, table in tables.items()},
        baselines=_baseline_scores(plan, job.records) if plan.baselines else {},
        published=[
            entry.model_dump(include={"model", "score", "source"}) | {"differs": differences(plan, entry)}
            for entry in plan.published
        ],
        broken=[{"id": s.id, "image": s.image, "error": s.error} for s in samples if s.error],
        settings=settings,
        versions=versions(),
        git_commit=git_commit(),
        seconds=round(time.monotonic() - began, 3),
        output=folder,
        samples=samples,
    )


@contextmanager
def progress_bar(label: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where that is a terminal."""
    if not shown:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)
