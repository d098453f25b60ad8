"""The table of tasks, and the task `vqa`. A new task or metric is one entry in `TASKS`."""

import re
from collections.abc import Sequence
from typing import Any

from vlm.data.records import Record
from vlm.errors import UnsupportedTask, VlmError
from vlm.evaluation import classifying, describing, matching, retrieving
from vlm.evaluation.answers import AnswerScores, Scorer, mean_tables, score_aokvqa, score_gqa
from vlm.evaluation.choices import listed, score_choices, score_circular, score_scienceqa
from vlm.evaluation.lemmas import score_lemmas
from vlm.evaluation.result import Sample
from vlm.evaluation.sharing import PREDICTION, Asking, in_batches
from vlm.evaluation.task import Job, Judged, Metric, Prediction, Task, without_broken
from vlm.evaluation.vqa import PROTOCOLS, VqaScores, vqa_accuracy
from vlm.evaluation.yes_no import MME_METRICS, POPE_METRICS, score_mme, score_pope

__all__ = ["TASKS", "Metric", "Prediction", "Task", "answer_questions"]


def answer_questions(model: Any, job: Job, asking: Asking) -> list[Prediction]:
    """Ask `model.answer` every record's question, all questions of a picture in one call (it shares their work)."""
    if not hasattr(model, "answer"):
        raise UnsupportedTask(f"{type(model).__name__} cannot answer questions; generative models can")
    questions = [filled_prompt(job.plan.prompt, record) for record in job.records]
    images = [record.images for record in job.records]
    if "{ocr}" in job.plan.prompt and not any("ocr_tokens" in record.meta for record in job.records):
        raise VlmError(f"{job.plan.name}: the prompt asks for {{ocr}}, and no record says what text its picture holds")

    def call(batch: list[int]) -> list[Prediction]:
        return _answer(model, [images[n][0] for n in batch], [questions[n] for n in batch], job.plan.decoding)

    batches = list(in_batches(list(map(len, questions)), asking.batch_size, images))
    return asking.share(batches, call, lambda batch: [(images[n], questions[n]) for n in batch], PREDICTION)


def filled_prompt(prompt: str, record: Record) -> str:
    """A prompt about a record: `{question}`, `{choices}` one a line (`A. first`), `{hint}` with a line break behind,
    `{ocr}` the words that a reader of text found in the picture (TextVQA), parted by commas as LLaVA gives them."""
    hint = str(record.meta.get("hint") or "").strip()
    values = {
        "question": record.question or "",
        "choices": listed(record),
        "hint": f"{hint}\n" if hint else "",
        "ocr": ", ".join(map(str, record.meta.get("ocr_tokens") or ())),
    }
    return re.sub(r"\{(question|choices|hint|ocr)\}", lambda match: values[match[1]], prompt)


def _answer(model: Any, images: list[str], questions: list[str], decoding: dict[str, Any]) -> list[Prediction]:
    """One call; where pictures of it turn out broken, a second one without them."""
    asked: list[str] = []

    def call(pictures: list[str]) -> list[str]:
        # The second call is of the pictures of the first that can be read, in their order.
        readable = set(pictures)
        asked[:] = [text for image, text in zip(images, questions, strict=True) if image in readable]
        return list(model.answer(pictures, asked, **decoding))

    texts, whole, problems = without_broken(call, images)
    if len(texts or []) != len(whole):
        raise VlmError(f"{type(model).__name__}.answer gave {len(texts or [])} answers to {len(whole)} questions")
    answered = dict(zip(whole, texts or [], strict=True))
    return [
        Prediction(None, problems[index]) if index in problems else Prediction(answered[index])
        for index in range(len(images))
    ]


def _check_vqa(record: Record) -> None:
    if not record.question or not record.answers:
        lacks = "question" if not record.question else "answers to compare with"
        raise VlmError(f"record {record.id!r} has no {lacks}: choose a split for VQA that is labelled")
    if len(record.images) != 1:
        raise VlmError(f"record {record.id!r} has {len(record.images)} pictures; the task vqa asks about one")


# Protocol -> how it scores. Those of `vlm.evaluation.vqa` are the soft accuracy; adding one is one entry here.
SCORERS: dict[str, Scorer] = {
    "gqa": score_gqa,
    "aokvqa": score_aokvqa,
    "lavis-okvqa": score_lemmas,
    "scienceqa": score_scienceqa,
    "choices": score_choices,
    "circular": score_circular,
    "pope": score_pope,
    "mme": score_mme,
}


def _score_answers(records: Sequence[Record], texts: Sequence[str | None], protocol: str) -> VqaScores | AnswerScores:
    if protocol in SCORERS:
        return SCORERS[protocol](records, texts)
    return vqa_accuracy(texts, [record.answers for record in records], protocol)


def _judge_vqa(job: Job, predictions: list[Prediction], protocol: str) -> Judged:
    score = TASKS["vqa"].metrics[job.plan.metric].score
    assert score is not None
    texts = [prediction.text for prediction in predictions]
    found = answer_scores(score(job.records, texts, protocol), job.plan.metric, job.records)
    samples = [
        Sample(
            id=record.id,
            image=record.images[0],
            question=record.question,
            prediction=prediction.text,
            answers=list(record.answers),
            score=value,
            error=prediction.error,
        )
        for record, prediction, value in zip(job.records, predictions, found.per_sample, strict=True)
    ]
    return Judged(
        scores={name: job.diluted(value, len(samples)) for name, value in found.scores.items()},
        samples=samples,
        contributions=found.contributions,
        tables=found.tables,
    )


def answer_scores(found: VqaScores | AnswerScores, metric: str, records: Sequence[Record]) -> AnswerScores:
    """Scores of one number a question as those of a metric."""
    if isinstance(found, AnswerScores):
        return found
    tables = mean_tables(records, found.per_sample, "question_type", "answer_type")
    return AnswerScores(found.per_sample, {metric: found.accuracy}, {metric: [*found.per_sample]}, tables)


def _errors(predictions: list[Prediction]) -> list[str | None]:
    return [prediction.error for prediction in predictions]


TASKS: dict[str, Task] = {
    "vqa": Task(
        ask=answer_questions,
        judge=_judge_vqa,
        check=_check_vqa,
        metrics={
            "accuracy": Metric(_score_answers, (*PROTOCOLS, *SCORERS)),
            **{name: Metric(_score_answers, ("pope",)) for name in POPE_METRICS if name != "accuracy"},
            **{name: Metric(_score_answers, ("mme",)) for name in MME_METRICS if name != "accuracy"},
        },
        problems=_errors,
        outputs_of=list,
        prompt="{question}",
        prompt_fields=("question",),
        keys=("decoding", "baselines"),
        noun="questions",
    ),
    "caption": Task(
        ask=describing.describe,
        judge=describing.judge,
        check=describing.check,
        metrics={name: Metric(protocols=describing.PROTOCOLS) for name in describing.NAMES},
        problems=_errors,
        outputs_of=list,
        own_prompt=True,
        keys=("decoding",),
        noun="pictures",
    ),
    "zero_shot": Task(
        ask=classifying.classify_pictures,
        judge=classifying.judge,
        check=classifying.check,
        metrics={name: Metric() for name in classifying.METRICS},
        problems=_errors,
        outputs_of=list,
        keys=("classes", "templates", "class_prompts"),
        noun="pictures",
    ),
    "retrieval": Task(
        ask=retrieving.embed,
        judge=retrieving.judge,
        check=retrieving.check,
        metrics={name: Metric(protocols=retrieving.PROTOCOLS) for name in retrieving.METRICS},
        problems=retrieving.problems,
        read=retrieving.read_embeddings,
        prompt="{caption}",
        prompt_fields=("caption",),
        keys=("rerank",),
        noun="queries",
    ),
    "matching": Task(
        ask=matching.ask,
        judge=matching.judge,
        check=retrieving.check,
        metrics={name: Metric() for name in matching.METRICS},
        problems=matching.problems,
        read=matching.read_judgements,
        prompt="{caption}",
        prompt_fields=("caption",),
        noun="pairs",
    ),
}
