"""How each task asks a model and judges what it says. A new task or metric is one entry in `TASKS`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.data.records import Record
from vlm.errors import UnsupportedTask, VlmError
from vlm.evaluation.vqa import PROTOCOLS, VqaScores, vqa_accuracy


@dataclass(frozen=True)
class Prediction:
    """What a model said about one record; no text and an error where its picture could not be read."""

    text: str | None
    error: str | None = None


@dataclass(frozen=True)
class Metric:
    """`score(records, texts, protocol)`: a text of None is wrong."""

    score: Callable[[Sequence[Record], Sequence[str | None], str], VqaScores]
    protocols: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """`predict(model, records, prompt, decoding, batch_size, advance)` gives one Prediction per record, in order.

    check: raises VlmError on a record that cannot serve the task.
    prompt_fields: what a prompt must have a place for.
    advance: called with the number of records done since the last call.
    """

    predict: Callable[..., list[Prediction]]
    check: Callable[[Record], None]
    prompt_fields: tuple[str, ...]
    metrics: dict[str, Metric]


def answer_questions(
    model: Any,
    records: Sequence[Record],
    prompt: str,
    decoding: dict[str, Any],
    batch_size: int,
    advance: Callable[[int], None],
) -> list[Prediction]:
    """Ask `model.answer` every record's question, all questions of a picture in one call (it shares their work)."""
    if not hasattr(model, "answer"):
        raise UnsupportedTask(f"{type(model).__name__} cannot answer questions; generative models can")
    predictions: list[Prediction] = [Prediction(None)] * len(records)
    for chunk in whole_pictures(records, batch_size):
        questions = [prompt.replace("{question}", records[index].question or "") for index in chunk]
        images = [records[index].images[0] for index in chunk]
        for index, prediction in zip(chunk, _answer(model, images, questions, decoding), strict=True):
            predictions[index] = prediction
        advance(len(chunk))
    return predictions


def whole_pictures(records: Sequence[Record], size: int) -> Iterator[list[int]]:
    """Indices of records in chunks of up to `size` that never split a picture; a chunk holds at least one picture."""
    pictures: dict[tuple[str, ...], list[int]] = {}
    for index, record in enumerate(records):
        pictures.setdefault(record.images, []).append(index)
    chunk: list[int] = []
    for members in pictures.values():
        if chunk and len(chunk) + len(members) > size:
            yield chunk
            chunk = []
        chunk = chunk + members
    if chunk:
        yield chunk


def _answer(model: Any, images: list[str], questions: list[str], decoding: dict[str, Any]) -> list[Prediction]:
    """One call; where pictures of it turn out broken, a second one without them."""
    from vlm.data.images import BrokenImage

    try:
        texts = list(model.answer(images, questions, **decoding)) if images else []
    except (BrokenImage, FileNotFoundError):
        problems = {path: problem for path in dict.fromkeys(images) if (problem := _problem(path))}
        if not problems:
            raise
        keep = [index for index, path in enumerate(images) if path not in problems]
        whole = _answer(model, [images[index] for index in keep], [questions[index] for index in keep], decoding)
        answered = dict(zip(keep, whole, strict=True))
        return [answered.get(index) or Prediction(None, problems[path]) for index, path in enumerate(images)]
    if len(texts) != len(questions):
        raise VlmError(f"{type(model).__name__}.answer gave {len(texts)} answers to {len(questions)} questions")
    return [Prediction(text) for text in texts]


def _problem(path: str) -> str | None:
    """Why a picture cannot be read, or None if it can."""
    from vlm.data.images import BrokenImage, load_image

    try:
        load_image(path)
    except (BrokenImage, OSError) as error:
        return str(error)
    return None


def _check_vqa(record: Record) -> None:
    if not record.question or not record.answers:
        lacks = "question" if not record.question else "answers to compare with"
        raise VlmError(f"record {record.id!r} has no {lacks}: choose a split for VQA that is labelled")
    if len(record.images) != 1:
        raise VlmError(f"record {record.id!r} has {len(record.images)} pictures; the task vqa asks about one")


def _score_vqa(records: Sequence[Record], texts: Sequence[str | None], protocol: str) -> VqaScores:
    return vqa_accuracy(
        texts,
        [record.answers for record in records],
        protocol,
        question_types=[record.meta.get("question_type") for record in records],
        answer_types=[record.meta.get("answer_type") for record in records],
    )


TASKS = {
    "vqa": Task(
        predict=answer_questions,
        check=_check_vqa,
        prompt_fields=("question",),
        metrics={"accuracy": Metric(_score_vqa, PROTOCOLS)},
    ),
}
