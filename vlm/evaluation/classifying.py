"""The task `zero_shot`: a picture is given the class whose prompts it resembles most."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm.data.prompts import CLASS_NAMES, class_names, prompt_templates
from vlm.data.records import Record
from vlm.errors import UnsupportedTask, VlmError, did_you_mean
from vlm.evaluation.intervals import mean_parts
from vlm.evaluation.result import Sample
from vlm.evaluation.sharing import PREDICTION, Asking, in_batches
from vlm.evaluation.tables import members_of, table_of
from vlm.evaluation.task import Job, Judged, Prediction, without_broken
from vlm.evaluation.zero_shot import scores_of_ranks

METRICS = ("acc@1", "acc@5", "mean_per_class_recall")
GUESSES = 5  # kept of each picture


def check(record: Record) -> None:
    """Raises VlmError unless the record is one picture with a label."""
    if not record.label:
        raise VlmError(f"record {record.id!r} has no label: zero-shot classification needs a data set with classes")
    if len(record.images) != 1:
        raise VlmError(f"record {record.id!r} has {len(record.images)} pictures; the task zero_shot is about one")


def candidates(job: Job) -> dict[str, str]:
    """Label -> class name of every class to choose from, in order.

    By the benchmark's `classes`: a table's name, a mapping, or (none) the labels that occur in the whole data set,
    sorted, underscores read as spaces. Raises VlmError for a label that has no name, and for fewer than one class.
    """
    labels = sorted({str(record.label) for record in job.everything})
    wanted = job.plan.classes
    if wanted is None:
        return {label: label.replace("_", " ") for label in labels}
    names = class_names(wanted) if isinstance(wanted, str) else dict(wanted)
    if strange := [label for label in labels if label not in names]:
        example = f"{strange[0]!r}{did_you_mean(strange[0], names)}"
        table = f"the table {wanted!r}" if isinstance(wanted, str) else "`classes`"
        raise VlmError(
            f"{job.plan.name}: {len(strange)} labels of the data set are not in {table}, the first: {example}; "
            f"give `classes` as a mapping from label to name, or one of {', '.join(CLASS_NAMES)}"
        )
    return names


def classify_pictures(model: Any, job: Job, asking: Asking) -> list[Prediction]:
    """The first guesses of `model.classify` for every picture, as labels of the data set.

    Classes of the same name (ImageNet has two such pairs) are asked for once and share their score. With
    `class_prompts`, the prompts listed there take the place of the templates for their classes: every class becomes the
    mean of its prompts' unit-length embeddings, at unit length again, as `classify` does it with templates.
    """
    names = candidates(job)
    labels = list(names)
    unique = list(dict.fromkeys(names.values()))
    column = {name: number for number, name in enumerate(unique)}
    columns = np.array([column[names[label]] for label in labels])  # [C] into [U]
    templates = prompt_templates(job.plan.templates)
    if job.plan.class_prompts:
        prompts = _own_prompts(job, names, unique)
        classifier = _classifier(model, [prompts.get(name) or _filled(templates, name) for name in unique])
    elif not hasattr(model, "classify"):
        raise UnsupportedTask(f"{type(model).__name__} cannot classify; dual encoders can")

    def scores_of(images: list[str]) -> np.ndarray:
        if job.plan.class_prompts:
            scores = _array(model.encode_image(images)) @ classifier.T  # [B, U], of a Q-Former [B, Q, U]
            return scores.max(axis=1) if scores.ndim == 3 else scores
        return _array(model.classify(images, unique, templates=templates))  # [B, U]

    def call(batch: list[int]) -> list[Prediction]:
        table, whole, problems = without_broken(scores_of, [images[n][0] for n in batch])
        guesses = {}
        if table is not None:
            if table.shape != (len(whole), len(unique)):
                shapes = f"{list(table.shape)} for {len(whole)} pictures and {len(unique)} classes"
                raise VlmError(f"{type(model).__name__} gave scores of shape {shapes}")
            if np.isnan(table).any():
                raise VlmError(f"{type(model).__name__} gave scores that are not numbers")
            best = np.argsort(-table[:, columns], axis=1, kind="stable")[:, :GUESSES]  # [B, 5]
            guesses = {n: tuple(labels[c] for c in row) for n, row in zip(whole, best.tolist(), strict=True)}
        return [
            Prediction(None, problems[n]) if n in problems else Prediction(guesses[n][0], ranking=guesses[n])
            for n in range(len(batch))
        ]

    images = [record.images for record in job.records]
    choice = json.dumps([list(names.items()), templates, job.plan.class_prompts])
    batches = list(in_batches([0] * len(images), asking.batch_size))
    return asking.share(batches, call, lambda batch: [(images[n], choice) for n in batch], PREDICTION)


def judge(job: Job, predictions: list[Prediction], protocol: str) -> Judged:
    """Accuracy among the first 1 and 5 guesses and mean recall per class, and the recall of each class.

    acc@5 is left out where predictions from a file hold one guess each.
    """
    names = candidates(job)
    count = len(job.records)
    labels = [str(record.label) for record in job.records]
    ranks = [_rank(label, prediction) for label, prediction in zip(labels, predictions, strict=True)]
    found = scores_of_ranks(ranks, labels)
    guessed = [prediction for prediction in predictions if prediction.text is not None]
    several = all(prediction.ranking for prediction in guessed)
    metrics = [name for name in METRICS if several or name != "acc@5"]
    if job.plan.metric not in metrics:
        raise VlmError(f"{job.plan.metric} needs several guesses a picture, and the predictions hold one")
    samples = [
        Sample(
            id=record.id,
            image=record.images[0],
            question=None,
            prediction=None if prediction.text is None else prediction.text,
            answers=[label],
            score=float(rank < (5 if job.plan.metric == "acc@5" else 1)),
            error=prediction.error,
            ranking=list(prediction.ranking),
        )
        for record, label, prediction, rank in zip(job.records, labels, predictions, ranks, strict=True)
    ]
    members = members_of(labels)
    first = [float(rank < 1) for rank in ranks]
    recall = {label: mean_parts([first[n] for n in members[label]]) for label in names if label in members}
    by_class = {_shown(label, names): (members[label], parts) for label, parts in recall.items()}
    return Judged(
        scores={name: job.diluted(found[name], count) for name in metrics},
        samples=samples,
        contributions={name: found.contributions[name].tolist() for name in metrics},
        tables={"per_class_recall": table_of("class", by_class)},
    )


def _shown(label: str, names: dict[str, str]) -> str:
    return label if label == names[label] else f"{label} ({names[label]})"


def _rank(label: str, prediction: Prediction) -> float:
    guesses = prediction.ranking or ((prediction.text,) if prediction.text is not None else ())
    return guesses.index(label) if label in guesses else np.inf


def _own_prompts(job: Job, names: dict[str, str], unique: Sequence[str]) -> dict[str, list[str]]:
    """Class name -> its own prompts. The benchmark may name a class by label or by class name."""
    found = {}
    for key, prompts in job.plan.class_prompts.items():
        name = names.get(key, key)
        if name not in unique:
            raise VlmError(f"{job.plan.name}: class_prompts: no class {key!r}{did_you_mean(key, [*names, *unique])}")
        if not prompts:
            raise VlmError(f"{job.plan.name}: class_prompts: no prompts for {key!r}")
        found[name] = _filled(prompts, name)
    return found


def _filled(templates: Sequence[str], name: str) -> list[str]:
    return [template.replace("{}", name) for template in templates]


def _classifier(model: Any, prompts: list[list[str]]) -> np.ndarray:
    """One unit-length row [U,E] per class: the mean of its prompts' embeddings."""
    if not hasattr(model, "encode_image") or not hasattr(model, "encode_text"):
        raise UnsupportedTask(f"{type(model).__name__} cannot embed texts and pictures; dual encoders can")
    rows = []
    for texts in prompts:
        embeds = _array(model.encode_text(texts))  # [P, E]
        mean = (embeds / np.linalg.norm(embeds, axis=1, keepdims=True)).mean(axis=0)
        rows.append(mean / np.linalg.norm(mean))
    return np.stack(rows)


def _array(values: Any) -> np.ndarray:
    """A tensor of any kind, or an array, as float64."""
    return np.asarray(values.detach().double().cpu() if hasattr(values, "detach") else values, dtype=float)
