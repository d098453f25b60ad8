"""The task `retrieval`: find the captions of a picture and the picture of a caption, by embeddings; a model that can
match ranks the nearest again.

Every picture and every distinct caption is encoded once. Captions of records that show the same picture are its
captions. With `rerank: k`, the k nearest of each query by embedding (in its own fold) are scored by matching logit +
cosine, and stand before all others; pictures are looked at once more for that.
"""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm.data.records import Record
from vlm.errors import UnsupportedTask, VlmError
from vlm.evaluation.intervals import Medians, Parts
from vlm.evaluation.reranking import Pairs, match_pairs, rescored
from vlm.evaluation.result import Sample
from vlm.evaluation.retrieval import BLOCK, TIE_RULES, Rescore, RetrievalScores, retrieval_recall
from vlm.evaluation.sharing import EMBEDDING, Asking, in_batches
from vlm.evaluation.task import Job, Judged, without_broken

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

    names: id of the first record of each picture. images: unit length [M,E], of a Q-Former [M,Q,E]; rows of broken
    pictures are zero. problems: [M] why a picture could not be read, or None. distinct: [N] the same number for
    captions of the same text. pairs: the nearest, by number of picture and of text, and whether they match; None
    without re-ranking.
    """

    paths: list[str]
    names: list[str]
    captions: list[str]
    text_to_image: np.ndarray
    images: "Tensor"
    texts: "Tensor"
    problems: list[str | None]
    distinct: np.ndarray
    pairs: Pairs | None = None

    def recall(self, protocol: str, rescore: Rescore | None = None, top: int = 0) -> RetrievalScores:
        """Recall by a protocol."""
        rule, _, folds = protocol.partition("-")
        present = [problem is None for problem in self.problems]
        folds_of = FOLDS if folds else 1
        owner = self.text_to_image
        return retrieval_recall(self.images, self.texts, owner, KS, BLOCK, rule, folds_of, present, top, rescore)


def check(record: Record) -> None:
    """Raises VlmError unless the record is one picture with captions."""
    if not record.captions:
        raise VlmError(f"record {record.id!r} has no caption: retrieval needs a data set with captions")
    if len(record.images) != 1:
        raise VlmError(f"record {record.id!r} has {len(record.images)} pictures; the task retrieval is about one")


def problems(outputs: Embeddings) -> list[str | None]:
    """Why each picture could not be read, or None."""
    return outputs.problems


def embed(model: Any, job: Job, asking: Asking) -> Embeddings:
    """Encode every picture of the records once, and every distinct caption once, captions of like length together;
    match the nearest."""
    import torch

    if not hasattr(model, "encode_image") or not hasattr(model, "encode_text"):
        raise UnsupportedTask(f"{type(model).__name__} cannot embed texts and pictures; dual encoders can")
    paths, names, captions, owner = listed(job.records)
    numbers = {path: number for number, path in enumerate(paths)}
    shown = np.bincount([numbers[record.images[0]] for record in job.records])  # records of each picture

    def see(batch: list[int]) -> list[np.ndarray | str]:
        rows, whole, broken = without_broken(lambda some: _rows(model, "encode_image", some), [paths[n] for n in batch])
        embeds = dict(zip(whole, rows if rows is not None else []))
        return [broken[n] if n in broken else embeds[n] for n in range(len(batch))]

    prompts = {text: job.plan.prompt.replace("{caption}", text) for text in dict.fromkeys(captions)}
    distinct = list(dict.fromkeys(prompts.values()))
    seen = asking.share(
        list(in_batches([0] * len(paths), asking.batch_size)),
        see,
        lambda batch: [((paths[n],), "encode_image") for n in batch],
        EMBEDDING,
        lambda n: int(shown[n]),
    )
    read = asking.share(
        list(in_batches(list(map(len, distinct)), asking.batch_size)),
        lambda batch: list(_rows(model, "encode_text", [distinct[n] for n in batch])),
        lambda batch: [((), f"encode_text {distinct[n]}") for n in batch],
        EMBEDDING,
        lambda n: 0,
    )
    texts = np.stack([row for row in read if not isinstance(row, str)])
    place = {text: number for number, text in enumerate(distinct)}
    whole = next((row for row in seen if not isinstance(row, str)), None)
    nothing = np.zeros_like(texts[0] if whole is None else whole)
    images = np.stack([nothing if isinstance(row, str) else row for row in seen])
    numbers_of_texts = np.array([place[prompts[caption]] for caption in captions])
    found = Embeddings(
        paths=paths,
        names=names,
        captions=captions,
        text_to_image=owner,
        images=torch.from_numpy(images),
        texts=torch.from_numpy(texts[numbers_of_texts]),
        problems=[row if isinstance(row, str) else None for row in seen],
        distinct=numbers_of_texts,
    )
    if not job.plan.rerank or not hasattr(model, "match_each") or whole is None:
        return found
    return replace(found, pairs=_matched(model, job, found, distinct, asking))


def listed(records: Sequence[Record]) -> tuple[list[str], list[str], list[str], np.ndarray]:
    """Pictures [M], the id of the first record of each, captions [N], and the picture of each caption."""
    numbers: dict[str, int] = {}
    names: list[str] = []
    captions: list[str] = []
    owner: list[int] = []
    for record in records:
        picture = numbers.setdefault(record.images[0], len(numbers))
        if picture == len(names):
            names.append(record.id)
        captions += record.captions
        owner += [picture] * len(record.captions)
    return list(numbers), names, captions, np.array(owner)


def read_embeddings(path: Path, job: Job, partial: bool) -> tuple[Embeddings, None]:
    """Embeddings that somebody made of all the records' pictures and captions, in their order: a NumPy .npz with
    `image_embeds` [M,E] and `text_embeds` [N,E], and `text_to_image` [N] where it wants to be checked.

    A picture of several records counts where it comes first. Raises VlmError for a file that holds others.
    """
    import torch

    if partial:
        raise VlmError(f"{job.plan.name}: embeddings are scored as a whole, not --partial")
    try:
        with np.load(path, allow_pickle=False) as content:
            images, texts = content["image_embeds"], content["text_embeds"]
            owner_told = content.get("text_to_image")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise VlmError(f"{path}: expected a .npz with image_embeds and text_embeds: {error}") from error
    paths, _, captions, owner = listed(job.everything)
    if images.shape[:1] != (len(paths),) or texts.shape[:1] != (len(captions),):
        raise VlmError(
            f"{path}: embeddings of {len(images)} pictures and {len(texts)} captions, but the data set has "
            f"{len(paths)} and {len(captions)}"
        )
    if owner_told is not None and not np.array_equal(owner_told, owner):
        raise VlmError(f"{path}: its text_to_image is not the data set's: the captions stand in another order")
    paths, names, captions, owner = listed(job.records)  # the first of them, under a limit
    place = {text: number for number, text in enumerate(dict.fromkeys(captions))}
    found = Embeddings(
        paths=paths,
        names=names,
        captions=captions,
        text_to_image=owner,
        images=torch.from_numpy(images[: len(paths)]),
        texts=torch.from_numpy(texts[: len(captions)]),
        problems=[None] * len(paths),
        distinct=np.array([place[caption] for caption in captions]),
    )
    return found, None


def _matched(model: Any, job: Job, found: Embeddings, texts: list[str], asking: Asking) -> Pairs:
    """The matching logits of all pairs that a protocol of the benchmark will ask for."""
    pairs = Pairs()
    for folds in {protocol.partition("-")[2] for protocol in (job.plan.protocol, *job.plan.also)}:
        protocol = f"{TIE_RULES[0]}-{folds}" if folds else TIE_RULES[0]
        found.recall(protocol, _again(found, job.plan.rerank, pairs.note), top=1)
    match_pairs(model, pairs, found.paths, texts, asking)
    return pairs


def _again(found: Embeddings, k: int, logits: Callable[["Tensor", "Tensor"], "Tensor"]) -> Rescore:
    """Scores a block of similarities anew by what `logits` says of pictures and distinct texts."""
    import torch

    def rescore(way: str, queries: np.ndarray, candidates: np.ndarray, scores: "Tensor") -> "Tensor":
        images, captions = (queries, candidates) if way == "TR" else (candidates, queries)
        image, text = torch.from_numpy(images), torch.from_numpy(found.distinct[captions])

        def of(rows: "Tensor", columns: "Tensor") -> "Tensor":
            rows, columns = rows.cpu(), columns.cpu()
            return logits(image[rows], text[columns]) if way == "TR" else logits(image[columns], text[rows])

        return rescored(scores, k, of)

    return rescore


def _rows(model: Any, method: str, inputs: list[str]) -> np.ndarray:
    """Embeddings [B,E], or [B,Q,E] of pictures, on the CPU, at least float32."""
    import torch

    embeds = torch.as_tensor(getattr(model, method)(inputs)).detach().cpu()
    if embeds.ndim not in ((2, 3) if method == "encode_image" else (2,)) or len(embeds) != len(inputs):
        shape = f"{list(embeds.shape)} for {len(inputs)} inputs"
        raise VlmError(
            f"{type(model).__name__}.{method} gave embeddings of shape {shape}; retrieval needs [B,E], or of "
            "pictures [B,Q,E]"
        )
    array: np.ndarray = embeds.to(torch.promote_types(embeds.dtype, torch.float32)).numpy()
    return array


def judge(job: Job, outputs: Embeddings, protocol: str) -> Judged:
    """Recall both ways; one sample for each picture that asks and one for each caption.

    Where the nearest were ranked again, recall before that as well: `ITC_TR@1` and so on. A record that could not be
    read counts as one more wrong picture and one more wrong caption.
    """
    near = None if outputs.pairs is None else _again(outputs, job.plan.rerank, outputs.pairs.logits)
    found = outputs.recall(protocol, near, top=_SHOWN)
    asked = {"TR": len(outputs.paths), "IR": len(outputs.captions)}
    scores = {name: job.diluted(found[name], asked[name[:2]]) for name in METRICS}
    scores["rsum"] = sum(scores.values())
    scores |= {name: found[name] for name in ("TR_median_rank", "IR_median_rank")}
    contributions: dict[str, list[float | None] | Parts | Medians] = {}

    def shares_of(scores_of: RetrievalScores, name: str) -> list[float | None]:
        mine: list[float | None] = scores_of.contributions[name].tolist()
        return [*mine, *[None] * asked["IR"]] if name[:2] == "TR" else [*[None] * asked["TR"], *mine]

    if near is not None:
        before = outputs.recall(protocol)
        scores |= {f"ITC_{name}": job.diluted(before[name], asked[name[:2]]) for name in METRICS}
        contributions |= {f"ITC_{name}": shares_of(before, name) for name in METRICS}
    _, _, k = job.plan.metric.partition("@")
    samples = _samples(outputs, found, k)
    shares = {name: shares_of(found, name) for name in METRICS}
    contributions |= shares
    contributions["rsum"] = _sum_of_means(list(shares.values()))
    for way, count_before, count_after in (("TR", 0, asked["IR"]), ("IR", asked["TR"], 0)):
        values = np.pad(found.ranks[way], (count_before, count_after), constant_values=np.nan)
        contributions[f"{way}_median_rank"] = Medians(values, np.pad(found.groups[way], (count_before, count_after)))
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
