"""The task `matching`: does this caption describe this picture? Half of the captions do; the others are near misses.

For each of a picture's captions there is one wrong one: the captions of other pictures that the model's own embeddings
find nearest to it (the hard negatives of Li et al. 2021 (ALBEF), section 3.2, over the whole data set). A caption that
reads as one of the picture's own is never wrong.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import UnsupportedTask
from vlm.evaluation.matching_files import SAYS, read_pairs
from vlm.evaluation.reranking import Pairs, match_pairs
from vlm.evaluation.result import Sample
from vlm.evaluation.retrieval import BLOCK, similarities
from vlm.evaluation.retrieving import Embeddings, embed, listed
from vlm.evaluation.sharing import Asking
from vlm.evaluation.task import Job, Judged

METRICS = ("accuracy", "accuracy_right", "accuracy_wrong")


@dataclass(frozen=True)
class Judgements:
    """What a model says of pairs [P]: the picture's number, the caption, whether it is right, and whether it matches.

    paths, names, problems: of each picture [M], its file, the id of its first record, and why it could not be read.
    margins: logit of a match minus that of none, NaN for pictures that could not be read.
    """

    paths: list[str]
    names: list[str]
    problems: list[str | None]
    pictures: np.ndarray
    captions: list[str]
    right: np.ndarray
    margins: np.ndarray


def ask(model: Any, job: Job, asking: Asking) -> Judgements:
    """Match every picture with its captions and with as many of the nearest wrong ones."""
    if not hasattr(model, "match_each"):
        raise UnsupportedTask(f"{type(model).__name__} cannot match pictures with texts; Q-Former models can")
    plan = job.plan.model_copy(update={"rerank": 0})
    seen = embed(model, replace(job, plan=plan), asking)
    numbers, texts = _chosen(seen)
    pictures = np.array([picture for picture, _, _ in numbers])
    chosen = np.array([text for _, text, _ in numbers])
    captions = [texts[text] for text in chosen]
    readable = np.array([seen.problems[picture] is None for picture in pictures])
    margins = np.full(len(numbers), np.nan)
    if readable.any():
        import torch

        image, text = torch.from_numpy(pictures[readable]), torch.from_numpy(chosen[readable])
        pairs = Pairs()
        pairs.note(image, text)
        prompts = [job.plan.prompt.replace("{caption}", caption) for caption in texts]
        match_pairs(model, pairs, seen.paths, prompts, asking, lambda logits: logits[:, 1] - logits[:, 0])
        margins[readable] = pairs.logits(image, text).numpy()
    right = np.array([right for _, _, right in numbers])
    return Judgements(seen.paths, seen.names, seen.problems, pictures, captions, right, margins)


def read_judgements(path: Path, job: Job, partial: bool) -> tuple[Judgements, dict[str, int] | None]:
    """What a file says of pairs; see `vlm.evaluation.matching_files`."""
    pairs, passed = read_pairs(path, job.everything, job.records, partial)
    paths, names, _, _ = listed(job.records)
    problems: list[str | None] = [None] * len(paths)
    for pair in pairs:
        problems[pair.picture] = problems[pair.picture] or pair.problem
    found = Judgements(
        paths=paths,
        names=names,
        problems=problems,
        pictures=np.array([pair.picture for pair in pairs]),
        captions=[pair.caption for pair in pairs],
        right=np.array([pair.right for pair in pairs]),
        margins=np.array([np.nan if pair.margin is None else pair.margin for pair in pairs]),
    )
    return found, passed


def _chosen(seen: Embeddings) -> tuple[list[tuple[int, int, bool]], list[str]]:
    """(picture, distinct text, whether it is right) of all pairs, and the distinct texts."""
    import torch

    first: dict[int, int] = {}
    for place, number in enumerate(seen.distinct.tolist()):
        first.setdefault(number, place)
    texts = [seen.captions[first[number]] for number in range(len(first))]
    embeds = seen.texts[[first[number] for number in range(len(first))]]  # [U, E]
    own: list[list[int]] = [[] for _ in seen.paths]
    for picture, number in zip(seen.text_to_image.tolist(), seen.distinct.tolist(), strict=True):
        own[picture].append(number)
    found: list[tuple[int, int, bool]] = []
    rows = max(1, BLOCK // len(texts))
    for start in range(0, len(own), rows):
        scores = similarities(seen.images[start : start + rows], embeds)  # [R, U]
        for picture, row in enumerate(scores, start):
            row[torch.tensor(sorted(set(own[picture])))] = -torch.inf
            count = min(len(own[picture]), len(texts) - len(set(own[picture])))
            found += [(picture, number, True) for number in own[picture]]
            found += [(picture, number, False) for number in row.topk(count).indices.tolist()]
    return found, texts


def problems(outputs: Judgements) -> list[str | None]:
    """Why each picture could not be read, or None."""
    return outputs.problems


def judge(job: Job, outputs: Judgements, protocol: str) -> Judged:
    """The share of pairs that are judged rightly: of all, of the right ones and of the wrong ones.

    A picture that could not be read counts as judged wrongly.
    """
    says = outputs.margins > 0
    readable = ~np.isnan(outputs.margins)
    correct = readable & (says == outputs.right)
    turn = dict[tuple[int, bool], int]()
    samples = []
    for place, picture in enumerate(outputs.pictures.tolist()):
        right = bool(outputs.right[place])
        turn[picture, right] = turn.get((picture, right), 0) + 1
        samples.append(
            Sample(
                id=f"{outputs.names[picture]}:{'right' if right else 'wrong'}:{turn[picture, right]}",
                image=outputs.paths[picture],
                question=outputs.captions[place],
                prediction=SAYS[int(says[place])] if readable[place] else None,
                answers=[SAYS[right]],
                score=float(correct[place]),
                error=outputs.problems[picture],
            )
        )
    parts = {"accuracy": np.ones_like(outputs.right), "accuracy_right": outputs.right, "accuracy_wrong": ~outputs.right}
    contributions: dict[str, Any] = {
        name: [float(value) if counts else None for value, counts in zip(correct, part)] for name, part in parts.items()
    }
    scores = {
        name: job.diluted(100 * float(correct[part].mean()) if part.any() else 0.0, int(part.sum()))
        for name, part in parts.items()
    }
    return Judged(scores, samples, contributions)
