"""Answers of splits whose truth is kept secret, as the servers take them: EvalAI for VQA, COCO's for captions."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.data.records import Record
from vlm.errors import VlmError
from vlm.evaluation.benchmark import Benchmark, load_benchmark
from vlm.evaluation.responses import processes
from vlm.evaluation.runner import asked, default_output, name_of, progress_bar, records_of
from vlm.evaluation.task import Job, Prediction

# Task -> the keys of a row.
_KEYS = {"vqa": ("question_id", "answer"), "caption": ("image_id", "caption")}


def submit(
    benchmark: str | Path | Benchmark,
    model: Any,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    batch_size: int = 64,
    progress: bool = True,
    model_name: str | None = None,
    cache: bool = True,
) -> Path:
    """Ask a model about every record of a benchmark, with or without truth, and write the official results file.

    The file: `BENCHMARK_SPLIT_MODEL_results.json` with `[{question_id, answer}]`, or
    `captions_SPLIT_MODEL_results.json` with `[{image_id, caption}]`, whole or not at all.
    Raises VlmError for tasks without such files, and where a record or a picture cannot be read: servers refuse results
    that lack one.
    """
    from vlm.evaluation.result import replaced

    plan = benchmark if isinstance(benchmark, Benchmark) else load_benchmark(benchmark, list(overrides))
    if plan.task not in _KEYS:
        raise VlmError(f"{plan.name}: no server takes results of the task {plan.task}; known: {', '.join(_KEYS)}")
    named = isinstance(model, (str, Path))
    name = model_name or name_of(model)
    folder = Path(output) if output is not None else default_output(str(model) if named else None, plan.name)
    if named:
        from vlm.loading import load_model

        model = load_model(str(model))
    records, unreadable = records_of(plan, need_pictures=True)
    if unreadable:
        raise VlmError(f"{plan.name}: {len(unreadable)} records cannot be read, the first: {unreadable[0].error}")
    for record in records:
        if len(record.images) != 1 or (plan.task == "vqa" and not record.question):
            raise VlmError(f"record {record.id!r} is not about one picture, or asks nothing")
    with progress_bar(f"{plan.name}", len(records), progress) as advance:
        predictions = asked(model, Job(plan, records, records, 0), batch_size, advance, cache)
    if problems := [prediction.error for prediction in predictions if prediction.text is None]:
        raise VlmError(f"{plan.name}: {len(problems)} records could not be asked, the first because: {problems[0]}")
    safe = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(name).name).strip("-") or "model"
    start = "captions" if plan.task == "caption" else plan.name
    file = folder / f"{start}_{plan.dataset.split}_{safe}_results.json"
    if processes()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(file) as out:
            json.dump(rows(plan.task, records, predictions), out)
    return file


def rows(task: str, records: Sequence[Record], predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """What the server reads: numbers as ids where they are numbers."""
    key, value = _KEYS[task]
    return [
        {key: int(record.id) if record.id.isdecimal() else record.id, value: prediction.text}
        for record, prediction in zip(records, predictions, strict=True)
    ]
