"""The task `retrieval`: find the captions of a picture and the picture of a caption, by embeddings.

Every picture and every distinct caption is encoded once. Captions of records that show the same picture are its
captions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm.data.records import Record
from vlm.errors import UnsupportedTask, VlmError
from vlm.evaluation.intervals import Parts
from vlm.evaluation.result import Sample
from vlm.evaluation.retrieval import TIE_RULES, RetrievalScores, retrieval_recall
from vlm.evaluation.task import Advance, Job, Judged, without_broken

if TYPE_CHECKING:
    from torch import Tensor

KS = (1, 5, 10)
METRICS = tuple(f"{way}@{k}" for way in ("TR", "IR") for k in KS)
FOLDS = 5
# The tie rule; `-5fold`: the mean over five parts of the pictures, COCO 1K where there are 5,000.
PROTOCOLS = (*TIE_RULES, *(f"{rule}-{FOLDS}fold" for rule in TIE_RULES))
_SHOWN = 5  # candidates kept of each query


@dataclass(frozen=True)
class Embeddings:
    """What a model made of the pictures [M] and captions [N] of the records.

    names: id of the first record of each picture. images: unit length [M,E], rows of broken pictures are zero.
    problems: [M] why a picture could not be read, or None.
    """

    paths: list[str]
    names: list[str]
    captions: list[str]
    text_to_image: np.ndarray
    images: "Tensor"
    texts: "Tensor"
    problems: list[str | None]


def check(record: Record) -> None:
    """Raises VlmError unless the record is one picture with captions."""
    if not record.captions:
        raise VlmError(f"record {record.id!r} has no caption: retrieval needs a data set with captions")
    if len(record.images) != 1:
        raise VlmError(f"record {record.id!r} has {len(record.images)} pictures; the task retrieval is about one")


def problems(outputs: Embeddings) -> list[str | None]:
    """Why each picture could not be read, or None."""
    return outputs.problems


def embed(model: Any, job: Job, batch_size: int, advance: Advance) -> Embeddings:
    """Encode every picture of the records once, and every distinct caption once."""
    import torch

    if not hasattr(model, "encode_image") or not hasattr(model, "encode_text"):
        raise UnsupportedTask(f"{type(model).__name__} cannot embed texts and pictures; dual encoders can")
    numbers: dict[str, int] = {}
    names: list[str] = []
    captions: list[str] = []
    owner: list[int] = []
    for record in job.records:
        picture = numbers.setdefault(record.images[0], len(numbers))
        if picture == len(names):
            names.append(record.id)
        captions += record.captions
        owner += [picture] * len(record.captions)
    paths = list(numbers)
    shown = np.bincount([numbers[record.images[0]] for record in job.records])  # records of each picture

    wrong: list[str | None] = [None] * len(paths)
    rows: dict[int, Tensor] = {}
    for start in range(0, len(paths), batch_size):
        chunk = paths[start : start + batch_size]
        embeds, whole, broken = without_broken(lambda some: _rows(model, "encode_image", some), chunk)
        if embeds is not None:
            rows.update({start + number: row for number, row in zip(whole, embeds, strict=True)})
        for number, problem in broken.items():
            wrong[start + number] = problem
        advance(int(shown[start : start + batch_size].sum()))
    prompts = {text: job.plan.prompt.replace("{caption}", text) for text in dict.fromkeys(captions)}
    distinct = list(dict.fromkeys(prompts.values()))
    texts = torch.cat(
        [_rows(model, "encode_text", distinct[i : i + batch_size]) for i in range(0, len(distinct), batch_size)]
    )
    place = {text: number for number, text in enumerate(distinct)}
    images = torch.stack([rows[n] if n in rows else torch.zeros_like(texts[0]) for n in range(len(paths))])
    return Embeddings(
        paths=paths,
        names=names,
        captions=captions,
        text_to_image=np.array(owner),
        images=images,
        texts=texts[[place[prompts[caption]] for caption in captions]],
        problems=wrong,
    )


def _rows(model: Any, method: str, inputs: list[str]) -> "Tensor":
    """Embeddings [B,E] on the CPU, at least float32."""
    import torch

    embeds = torch.as_tensor(getattr(model, method)(inputs)).detach().cpu()
    if embeds.ndim != 2 or len(embeds) != len(inputs):
        shape = f"{list(embeds.shape)} for {len(inputs)} inputs"
        raise VlmError(f"{type(model).__name__}.{method} gave embeddings of shape {shape}; retrieval needs [B,E]")
    return embeds.to(torch.promote_types(embeds.dtype, torch.float32))


def judge(job: Job, outputs: Embeddings, protocol: str) -> Judged:
    """Recall both ways; one sample for each picture that asks and one for each caption.

    A record that could not be read counts as one more wrong picture and one more wrong caption.
    """
    rule, _, folds = protocol.partition("-")
    found = retrieval_recall(
        outputs.images,
        outputs.texts,
        outputs.text_to_image,
        ks=KS,
        tie_rule=rule,
        folds=FOLDS if folds else 1,
        present=[problem is None for problem in outputs.problems],
        top=_SHOWN,
    )
    asked = {"TR": len(outputs.paths), "IR": len(outputs.captions)}
    scores = {name: job.diluted(found[name], asked[name[:2]]) for name in METRICS}
    scores["rsum"] = sum(scores.values())
    scores |= {name: found[name] for name in ("TR_median_rank", "IR_median_rank")}
    _, _, k = job.plan.metric.partition("@")
    samples = _samples(outputs, found, k)
    contributions: dict[str, list[float | None] | Parts] = {}
    shares: list[list[float | None]] = []
    for name in METRICS:
        mine: list[float | None] = found.contributions[name].tolist()
        pictures, captions = asked["TR"], asked["IR"]
        shares.append([*mine, *[None] * captions] if name[:2] == "TR" else [*[None] * pictures, *mine])
        contributions[name] = shares[-1]
    contributions["rsum"] = _sum_of_means(shares)
    return Judged(scores, samples, contributions)


def _sum_of_means(shares: list[list[float | None]]) -> Parts:
    """The sum of several means, each over the samples that have a part in it."""
    table = np.array(shares, dtype=float).T  # [N, K] nan where a sample has no part
    has = ~np.isnan(table)
    rows = np.concatenate([np.where(has, table, 0.0), has], axis=1)
    count = len(shares)
    return Parts(rows, lambda sums: (sums[:, :count] / np.maximum(sums[:, count:], 1)).sum(axis=1))


def _samples(outputs: Embeddings, found: RetrievalScores, k: str) -> list[Sample]:
    captions_of: dict[int, list[str]] = {}
    for caption, picture in zip(outputs.captions, outputs.text_to_image.tolist(), strict=True):
        captions_of.setdefault(picture, []).append(caption)

    def picture_name(number: int) -> str:
        return f"{captions_of[number][0]} [{outputs.names[number]}]"

    samples = []
    for number, (path, name, problem) in enumerate(zip(outputs.paths, outputs.names, outputs.problems, strict=True)):
        best = [] if problem else _named(found.top_texts[number], lambda n: outputs.captions[n])
        samples.append(
            Sample(
                id=f"{name}:TR",
                image=path,
                question=None,
                prediction=best[0] if best else None,
                answers=captions_of[number],
                score=float(found.recalls[f"TR@{k}"][number]),
                error=problem,
                ranking=best,
            )
        )
    turn: dict[int, int] = {}
    for number, (caption, picture) in enumerate(zip(outputs.captions, outputs.text_to_image.tolist(), strict=True)):
        turn[picture] = turn.get(picture, 0) + 1
        problem = outputs.problems[picture]
        best = [] if problem else _named(found.top_images[number], picture_name)
        samples.append(
            Sample(
                id=f"{outputs.names[picture]}:IR:{turn[picture]}",
                image=outputs.paths[picture],
                question=caption,
                prediction=best[0] if best else None,
                answers=[picture_name(picture)],
                score=float(found.recalls[f"IR@{k}"][number]),
                error=problem,
                ranking=best,
            )
        )
    return samples


def _named(numbers: Sequence[int] | np.ndarray, name: Callable[[int], str]) -> list[str]:
    return [name(int(number)) for number in numbers if number >= 0]
