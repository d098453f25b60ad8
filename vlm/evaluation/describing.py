"""The task `caption`: a picture is described, and the caption compared with those that people wrote."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm.data.records import Record
from vlm.errors import UnsupportedTask, VlmError
from vlm.evaluation.captioning import (
    BLEU,
    DEFAULT_METRICS,
    METRICS,
    TOKENIZERS,
    CaptionScores,
    bleu_of_parts,
    caption_scores,
)
from vlm.evaluation.intervals import Parts, mean_parts
from vlm.evaluation.result import Sample
from vlm.evaluation.sharing import PREDICTION, Asking, in_batches
from vlm.evaluation.tables import Table, members_of, table_of
from vlm.evaluation.task import Job, Judged, Prediction, without_broken

# NoCaps' domains (Agrawal et al. 2019), as its records name them in `meta`, in the order papers print them.
DOMAINS = ("in-domain", "near-domain", "out-domain")
HEADLINE = "CIDEr"


def check(record: Record) -> None:
    """Raises VlmError unless the record is about one picture and has captions to compare with."""
    if not record.captions:
        raise VlmError(f"record {record.id!r} has no caption to compare with: choose a split that has captions")
    if len(record.images) > 1:
        raise VlmError(f"record {record.id!r} has {len(record.images)} pictures; the task caption is about one")


def describe(model: Any, job: Job, asking: Asking) -> list[Prediction]:
    """`model.caption` of every record's picture, with the benchmark's prompt verbatim, or the model's own request."""
    if not hasattr(model, "caption"):
        raise UnsupportedTask(f"{type(model).__name__} cannot caption; Q-Former and generative models can")
    if lacking := next((record.id for record in job.records if not record.images), None):
        raise VlmError(f"record {lacking!r} names no picture: annotations without `file_name` serve --predictions")
    images = [record.images for record in job.records]
    plan = job.plan

    def call(batch: list[int]) -> list[Prediction]:
        return _described(model, [images[n][0] for n in batch], plan.prompt or None, plan.decoding)

    batches = list(in_batches([0] * len(images), asking.batch_size))
    return asking.share(batches, call, lambda batch: [(images[n], plan.prompt) for n in batch], PREDICTION)


def _described(model: Any, images: list[str], prompt: str | None, decoding: dict[str, Any]) -> list[Prediction]:
    texts, whole, problems = without_broken(lambda some: list(model.caption(some, prompt=prompt, **decoding)), images)
    if len(texts or []) != len(whole):
        raise VlmError(f"{type(model).__name__}.caption gave {len(texts or [])} captions of {len(whole)} pictures")
    said = dict(zip(whole, texts or [], strict=True))
    return [Prediction(None, problems[n]) if n in problems else Prediction(said[n]) for n in range(len(images))]


def judge(job: Job, predictions: list[Prediction], protocol: str) -> Judged:
    """All caption scores x100 with words by the protocol's tokeniser; a picture without a caption has an empty one.

    METEOR and SPICE, which run Java, are computed where one of them is the benchmark's metric. A sample's score is its
    own value of the metric, between 0 and 1 (CIDEr up to 10). Where records name a domain (NoCaps), each domain is
    scored as a corpus of its own.
    """
    metrics = [*DEFAULT_METRICS, *([job.plan.metric] if job.plan.metric not in DEFAULT_METRICS else [])]
    texts = [prediction.text or "" for prediction in predictions]
    found = caption_scores(texts, [record.captions for record in job.records], metrics, protocol)
    count = len(job.records)
    samples = [
        Sample(
            id=record.id,
            image=record.images[0] if record.images else None,
            question=None,
            prediction=prediction.text,
            answers=list(record.captions),
            score=scores[job.plan.metric],
            error=prediction.error,
        )
        for record, prediction, scores in zip(job.records, predictions, found.per_image.values(), strict=True)
    ]
    return Judged(
        scores={name: job.diluted(100 * score, count) for name, score in found.items()},
        samples=samples,
        contributions=_contributions(found),
        tables={f"{HEADLINE} by domain": _by_domain(job.records, found)},
    )


def _contributions(found: CaptionScores) -> dict[str, Parts]:
    """BLEU is a function of sums over the corpus, the rest are means (METEOR nearly: its own mean stands in)."""
    contributions: dict[str, Parts] = {}
    for name in found:
        if name in BLEU:
            order = BLEU.index(name)
            contributions[name] = Parts(found.bleu_parts, lambda sums, order=order: bleu_of_parts(sums)[..., order])  # type: ignore[misc]
        else:
            values = np.array([scores[name] for scores in found.per_image.values()])
            contributions[name] = mean_parts(values + (found[name] - values.mean()))
    return contributions


def _by_domain(records: Sequence[Record], found: CaptionScores) -> Table:
    """CIDEr x100 of the records of each domain alone, as a corpus of its own; empty where there are none."""
    groups = members_of([record.meta.get("domain") for record in records])
    parts = {}
    for domain in [*(d for d in DOMAINS if d in groups), *(d for d in groups if d not in DOMAINS)]:
        said = [found.words[number] for number in groups[domain]]
        told = [found.reference_words[number] for number in groups[domain]]
        alone = caption_scores(said, told, [HEADLINE], "whitespace").per_image.values()
        parts[domain] = (groups[domain], mean_parts([scores[HEADLINE] for scores in alone]))
    return table_of("domain", parts)


PROTOCOLS = TOKENIZERS
NAMES = (HEADLINE, *(name for name in METRICS if name != HEADLINE))
