"""The objective `itm`: hard negatives of the global batch, wherever they lie, and the loss on them."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlm.objectives.itm import NONE, draw_negatives, itm_loss, uniform_numbers
from vlm.objectives.objective import Loss, Pairs, ReadOuts
from vlm.objectives.processes import gather_with_gradient, num_processes, own_rows, process_sizes
from vlm.objectives.query_itc import query_similarity, same_picture
from vlm.recipe import ObjectiveSpec

Text = list[int]


@dataclass(frozen=True)
class HardNegatives:
    """What `match_loss` needs of this process's pairs.

    start: place of the first of them among all pairs of the step. images, texts: for each of them the place of its
    wrong image and wrong text, or NONE. weight: pairs of the step divided by the right and wrong pairs they make.
    known_texts, known_images: place -> token ids, and what the model takes of the picture, for every place drawn.
    """

    start: int
    images: list[int]
    texts: list[int]
    weight: float
    known_texts: dict[int, Text]
    known_images: dict[int, Tensor]


def find_negatives(model: Any, pairs: Pairs, batches: Sequence[Any], spec: ObjectiveSpec) -> HardNegatives | None:
    """Draw a wrong image for each text and a wrong text for each image, and fetch them from where they are.

    None, with a warning, where the whole step shows one picture only: nothing in it is wrong.
    """
    several = num_processes() > 1
    device = pairs.text.device
    sizes = process_sizes(len(pairs), device) if several else [len(pairs)]
    own = own_rows(sizes)
    images, texts = (gather_with_gradient(x.float(), sizes) if several else x for x in (pairs.image, pairs.text))
    belong = same_picture(len(pairs), own, pairs.together(spec), sizes, several, device)
    uniform = uniform_numbers(pairs.seed, pairs.places)
    scale = model.scale.detach()
    # Candidates stand in the order of the global batch, so that a number means the same one however it was split.
    places = pairs.places.to(device)
    order = (gather_with_gradient(places, sizes) if several else places).argsort()

    def draw(similarity: Tensor, numbers: Tensor) -> Tensor:
        drawn = draw_negatives((similarity * scale)[:, order], belong[:, order], numbers)
        return torch.where(drawn == NONE, NONE, order[drawn])

    with torch.no_grad():
        to_texts = draw(query_similarity(pairs.image, texts), uniform[:, 0])
        to_images = draw(query_similarity(images, pairs.text).T, uniform[:, 1])
    drawn = torch.stack([to_images, to_texts])
    wrong = (drawn != NONE).sum()
    if several:
        dist.all_reduce(wrong)
    if not wrong:
        warnings.warn("itm is off in this step: all its captions describe one picture", stacklevel=2)
        return None
    wrong_images, wrong_texts = drawn.tolist()
    known_texts, known_images = _fetch(batches, sizes, own.start, {*wrong_images, *wrong_texts} - {NONE})
    total = sum(sizes)
    weight = total / (total + int(wrong))
    return HardNegatives(own.start, wrong_images, wrong_texts, weight, known_texts, known_images)


def match_loss(read: ReadOuts, spec: ObjectiveSpec) -> Loss:
    """Cross-entropy over right and wrong pairs, twice as many wrong as right ones where every pair has negatives.

    A sum over pairs [b], each standing for its right pair and the wrong ones drawn for it.
    """
    negatives: HardNegatives | None = read.prepared["itm"]
    if negatives is None:
        zero = read("pairs")[1].sum() * 0.0
        return zero, {"itm_accuracy": zero.detach()}
    right, wrong = read.model.match_logits(read, negatives)
    loss, correct = itm_loss(right, wrong)
    return loss * negatives.weight, {"itm_accuracy": correct * negatives.weight}


def _fetch(
    batches: Sequence[Any], sizes: list[int], start: int, wanted: set[int]
) -> tuple[dict[int, Text], dict[int, Tensor]]:
    """Token ids and picture inputs of the places `wanted`, from this process's batches and from other processes."""
    texts: dict[int, Text] = {}
    images: dict[int, Tensor] = {}
    place = start
    for batch in batches:
        lengths = batch.mask.sum(1).tolist()
        for row, (ids, picture) in enumerate(zip(batch.ids.tolist(), batch.image_index.tolist())):
            texts[place] = ids[: lengths[row]]
            images[place] = batch.image_inputs[picture]
            place += 1
    if len(sizes) > 1:
        _exchange(texts, images, sizes, start, wanted)
    return {p: texts[p] for p in wanted}, {p: images[p] for p in wanted}


def _exchange(
    texts: dict[int, Text], images: dict[int, Tensor], sizes: list[int], start: int, wanted: set[int]
) -> None:
    """Add what other processes have of the places wanted here; each sends only what another one asked for."""
    asked: list[Any] = [None] * len(sizes)
    dist.all_gather_object(asked, sorted(wanted))
    everyone = set().union(*map(set, asked))
    said: list[Any] = [None] * len(sizes)
    own = {p: text for p, text in texts.items() if p in everyone}
    example = next(iter(images.values()), None)
    shape = None if example is None else (tuple(example.shape), example.dtype)
    dist.all_gather_object(said, (own, shape))
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    rank = dist.get_rank()
    for source, (theirs, form) in enumerate(said):
        others = {p for r, places in enumerate(asked) if r != source for p in places}
        sent = sorted(others & theirs.keys())
        if not sent:
            continue
        if source == rank:
            block = torch.stack([images[p] for p in sent]).contiguous()
        else:
            block = torch.empty(len(sent), *form[0], dtype=form[1], device=device)
        dist.broadcast(block, source)
        if source != rank:
            texts.update(theirs)
            images.update(zip(sent, block))
