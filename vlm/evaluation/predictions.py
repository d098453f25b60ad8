"""Existing predictions, as a list in JSON or a row a line.

| row | written by |
|---|---|
| `{question_id, answer}` | the official VQA results file, EvalAI's |
| `{image_id, caption}` | the COCO caption server's results file |
| `{id, prediction}` | samples.jsonl of an earlier evaluation |
"""

import json
from pathlib import Path
from typing import Any

from vlm.data.records import Record
from vlm.errors import VlmError
from vlm.evaluation.task import Prediction
from vlm.evaluation.vqa import check_same_ids


def read_predictions(path: Path) -> list[tuple[str, Prediction]]:
    """(id, prediction) of every row, in order; see the module for what a row may be.

    Raises VlmError that names the file and the row.
    """
    return [_entry(row, f"{path}: row {number}") for number, row in enumerate(read_rows(path), start=1)]


def match_predictions(
    predictions: list[tuple[str, Prediction]],
    everything: list[Record],
    chosen: list[Record],
    where: str,
    partial: bool = False,
) -> list[Prediction]:
    """The predictions for the `chosen` records; the file must hold exactly those, or exactly the whole data set's.

    Raises VlmError that counts and names missing, unknown and repeated ids, unless `partial`.
    """
    by_id = dict(reversed(predictions))  # the first of several
    ids = [record.id for record in chosen]
    if not partial and (set(ids) != by_id.keys() or len(by_id) != len(predictions)):
        check_same_ids([key for key, _ in predictions], [record.id for record in everything], where, "record")
    return [by_id[key] for key in ids]


def matching_part(
    predictions: list[tuple[str, Prediction]], records: list[Record]
) -> tuple[list[Record], dict[str, int]]:
    """The records that predictions are about, and how many ids are missing, unknown and repeated."""
    given = {key for key, _ in predictions}
    known = {record.id for record in records}
    found = [record for record in records if record.id in given]
    if not found:
        raise VlmError(f"none of {len(given):,} predictions is about one of the {len(records):,} records")
    counts = {"missing": len(records) - len(found), "unknown": len(given - known)}
    return found, counts | {"repeated": len(predictions) - len(given)}


def read_rows(path: Path) -> list[Any]:
    """The rows of a list in JSON, or of a file with one a line. Raises VlmError that names file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise VlmError(f"{path}: predictions cannot be read: {error}") from error
    if text.lstrip().startswith("["):
        try:
            rows: list[Any] = json.loads(text)
        except json.JSONDecodeError as error:
            raise VlmError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
        except RecursionError as error:
            raise VlmError(f"{path}: not a list of rows: nested without end") from error
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
    wanted = "expected {question_id, answer}, {image_id, caption} or {id, prediction} (samples.jsonl)"
    if not isinstance(row, dict):
        raise VlmError(f"{where}: {wanted}, found {type(row).__name__}")
    if "id" in row and "prediction" in row:
        key, text = row["id"], row["prediction"]
    elif "question_id" in row and "answer" in row:
        key, text = row["question_id"], row["answer"]
    elif "image_id" in row and "caption" in row:
        key, text = row["image_id"], row["caption"]
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
