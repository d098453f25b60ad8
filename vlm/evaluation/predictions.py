"""Existing predictions: the official VQA results file, or the samples.jsonl of an earlier evaluation."""

import json
from pathlib import Path
from typing import Any

from vlm.data.records import Record
from vlm.errors import VlmError
from vlm.evaluation.task import Prediction
from vlm.evaluation.vqa import check_same_ids


def read_predictions(path: Path) -> dict[str, Prediction]:
    """Question id -> prediction, from `[{question_id, answer}]` (what EvalAI takes) or lines of `{id, prediction}`.

    Raises VlmError that names the file and the row.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VlmError(f"{path}: predictions cannot be read: {error}") from error
    rows = _rows(text, path)
    predictions: dict[str, Prediction] = {}
    repeated = 0
    for number, row in enumerate(rows, start=1):
        key, prediction = _entry(row, f"{path}: row {number}")
        repeated += key in predictions
        predictions[key] = prediction
    if repeated:
        raise VlmError(f"{path}: {repeated} question ids occur more than once; give one prediction per question")
    return predictions


def match_predictions(
    predictions: dict[str, Prediction], everything: list[Record], chosen: list[Record], where: str
) -> list[Prediction]:
    """The predictions for the `chosen` records; the file must hold exactly those, or exactly the whole data set's.

    Raises VlmError that counts and names missing and unknown ids.
    """
    ids = [record.id for record in chosen]
    if set(ids) != predictions.keys():
        check_same_ids(list(predictions), [record.id for record in everything], where)
    return [predictions[key] for key in ids]


def _rows(text: str, path: Path) -> list[Any]:
    if text.lstrip().startswith("["):
        try:
            rows: list[Any] = json.loads(text)
        except json.JSONDecodeError as error:
            raise VlmError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
        return rows
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise VlmError(f"{path}:{number}: not JSON: {error.msg}") from error
    return rows


def _entry(row: Any, where: str) -> tuple[str, Prediction]:
    wanted = "expected {question_id, answer} (official results) or {id, prediction} (samples.jsonl)"
    if not isinstance(row, dict):
        raise VlmError(f"{where}: {wanted}, found {type(row).__name__}")
    if "id" in row and "prediction" in row:
        key, text = row["id"], row["prediction"]
    elif "question_id" in row and "answer" in row:
        key, text = row["question_id"], row["answer"]
    else:
        raise VlmError(f"{where}: {wanted}, found keys {', '.join(map(repr, row)) or 'none'}")
    if text is None:
        return str(key), Prediction(None, str(row.get("error") or "no prediction"))
    if not isinstance(text, str):
        raise VlmError(f"{where}: the answer must be text, found {text!r}")
    ranking = row.get("ranking", [])
    if not isinstance(ranking, list) or not all(isinstance(guess, str) for guess in ranking):
        raise VlmError(f"{where}: `ranking` must be a list of texts, found {ranking!r}")
    return str(key), Prediction(text, ranking=tuple(ranking))
