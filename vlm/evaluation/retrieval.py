"""Retrieval by embeddings: recall at k and median rank both ways, streamed so that memory stays bounded.

TR (text retrieval) asks with a picture for its captions: the best-placed of them counts. IR (image retrieval) asks
with each caption for its picture. Similarity is the dot product. A rank is a count of candidates that score higher, so
nothing is sorted; what happens where candidates score the same as the right one is the tie rule's to say:

| tie rule | a candidate with the same score |
|---|---|
| `expected` (the default) | stands before the right one as often as not: the mean over all orders of those that tie |
| `optimistic` | stands behind the right one: a model that gives everything the same score is always right |
| `pessimistic` | stands before the right one: the same model is always wrong |

The field's own code (BLIP's `itm_eval`, CLIP_benchmark) takes ties as an unstable sort happens to leave them, so what
it answers lies anywhere between the last two; without ties all three rules equal it.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm.errors import VlmError, did_you_mean
from vlm.evaluation.named_scores import NamedScores

if TYPE_CHECKING:
    from torch import Tensor

TIE_RULES = ("expected", "optimistic", "pessimistic")
BLOCK = 1 << 24  # similarities held at once: 64 MB in float32

# (way, numbers of queries [R] and of candidates [U], their scores [R,U]) -> other scores; way is "TR" or "IR"
Rescore = Callable[[str, np.ndarray, np.ndarray, "Tensor"], "Tensor"]

_NO_RANK = np.inf  # of a query that could not be asked, or whose right answer is no candidate


@dataclass(frozen=True, eq=False)
class RetrievalScores(NamedScores):
    """Scores by name: `TR@1`, `IR@1`, ... and their sum `rsum` in per cent; median ranks (from 1) as `TR_median_rank`
    and `IR_median_rank`.

    recalls: for each of `TR@k` and `IR@k`, what every query got, 0 to 1: [M] pictures or [N] captions; NaN for
    pictures without captions, which ask nothing.
    contributions: the same, weighted so that their mean is the score (folds count alike, whatever their size).
    ranks: of `TR` and `IR`, the rank from 1 that every query gave its right candidate; NaN where none was asked.
    groups: of `TR` and `IR`, the fold of every query.
    top_texts [M,T], top_images [N,T]: the best candidates in order, -1 beyond their end; T is what was asked for.
    """

    scores: dict[str, float]
    recalls: dict[str, np.ndarray]
    contributions: dict[str, np.ndarray]
    ranks: dict[str, np.ndarray]
    groups: dict[str, np.ndarray]
    tie_rule: str
    folds: int
    top_texts: np.ndarray
    top_images: np.ndarray


@dataclass
class _Direction:
    """What every query of one direction found: ranks by counting, and its best candidates."""

    higher: np.ndarray  # [Q] candidates above the best right one; inf where there is none
    tied: np.ndarray  # [Q] wrong candidates that score the same as it
    right: np.ndarray  # [Q] right candidates that score the same as it, itself among them
    top: np.ndarray  # [Q, T]
    weight: np.ndarray = field(default_factory=lambda: np.empty(0))  # [Q]


def retrieval_recall(
    image_embeds: Any,
    text_embeds: Any,
    text_to_image: Any,
    ks: Sequence[int] = (1, 5, 10),
    block: int = BLOCK,
    tie_rule: str = "expected",
    folds: int = 1,
    present: Any = None,
    top: int = 0,
    rescore: Rescore | None = None,
) -> RetrievalScores:
    """Recall at each of `ks` and median ranks, text retrieval (TR) and image retrieval (IR).

    image_embeds: [M,E], or [M,Q,E] where a picture is several points and the nearest to a caption counts (BLIP-2);
    text_embeds: [N,E]; arrays or tensors, compared on the device where the pictures' tensor lies.
    text_to_image: [N] the picture of each caption; a picture may have any number of captions, none included.
    block: how many similarities are held at once (never less than one query's).
    folds: the pictures in so many parts of the same size, in their order, each searched alone; scores are the parts'
    mean. COCO 1K is folds=5 of the 5,000 pictures of the Karpathy test split.
    present: [M] False for pictures that could not be read: they are no candidates and count as wrong both ways.
    top: how many of the best candidates of each query to keep.
    rescore: gives every block of scores anew before it is ranked (`vlm.evaluation.reranking`).

    Raises VlmError on shapes that do not fit, numbers that are not finite, and an unknown tie rule.
    """
    if tie_rule not in TIE_RULES:
        raise VlmError(f"unknown tie rule {tie_rule!r}{did_you_mean(tie_rule, TIE_RULES)}")
    images, texts, owner, there = _checked(image_embeds, text_embeds, text_to_image, present)
    if not ks or min(ks) < 1 or block < 1 or top < 0:
        raise VlmError(f"ks and block must be at least 1 and top at least 0, got {list(ks)}, {block}, {top}")
    if folds < 1 or len(images) % folds:
        raise VlmError(f"{len(images)} pictures cannot be parted into {folds} folds of the same size")
    size = len(images) // folds
    parts = []
    text_results, image_results = _empty(len(images), top), _empty(len(texts), top)
    for fold in range(folds):
        pictures = np.arange(fold * size, (fold + 1) * size)
        captions = np.flatnonzero(owner // size == fold)
        parts.append((pictures, captions))
        if len(captions):
            results = text_results, image_results
            _search(images, texts, owner, there, pictures, captions, block, top, results, rescore)
    return _scores(text_results, image_results, parts, owner, tuple(ks), tie_rule)


def _checked(
    image_embeds: Any, text_embeds: Any, text_to_image: Any, present: Any
) -> tuple["Tensor", "Tensor", np.ndarray, np.ndarray]:
    import torch

    images, texts = (torch.as_tensor(embeds).detach() for embeds in (image_embeds, text_embeds))
    owner = np.asarray(torch.as_tensor(text_to_image).cpu())
    there = np.ones(len(images), dtype=bool) if present is None else np.asarray(present, dtype=bool)
    if images.ndim not in (2, 3) or texts.ndim != 2 or images.shape[-1] != texts.shape[1]:
        shapes = f"{list(images.shape)} and {list(texts.shape)}"
        raise VlmError(
            f"expected embeddings [M,E] or [M,Q,E] of pictures and [N,E] of captions of the same width, got {shapes}"
        )
    if not len(images) or not len(texts):
        raise VlmError(f"{len(images)} pictures and {len(texts)} captions: retrieval needs at least one of both")
    if owner.shape != (len(texts),) or there.shape != (len(images),):
        raise VlmError(
            f"text_to_image must name a picture for each of {len(texts)} captions and `present` hold {len(images)} "
            f"values, got shapes {list(owner.shape)} and {list(there.shape)}"
        )
    if owner.dtype.kind not in "iu" or owner.min() < 0 or owner.max() >= len(images):
        raise VlmError(f"text_to_image must hold numbers of pictures, 0 to {len(images) - 1}")
    wide = torch.promote_types(torch.promote_types(images.dtype, texts.dtype), torch.float32)  # at least float32
    images, texts = images.to(wide), texts.to(device=images.device, dtype=wide)
    for what, embeds, used in (("picture", images, there), ("caption", texts, np.ones(len(texts), dtype=bool))):
        if len(bad := np.flatnonzero(~embeds.flatten(1).isfinite().all(dim=1).cpu().numpy() & used)):
            raise VlmError(
                f"the embedding of {what} {bad[0]} (and {len(bad) - 1} more) holds numbers that are not finite"
            )
    return images, texts, owner.astype(np.int64), there


def _empty(queries: int, top: int) -> _Direction:
    """Nothing found yet, which is what queries that are never asked keep."""
    return _Direction(
        np.full(queries, _NO_RANK), np.zeros(queries), np.ones(queries), np.full((queries, top), -1), np.zeros(queries)
    )


def _search(
    images: "Tensor",
    texts: "Tensor",
    owner: np.ndarray,
    there: np.ndarray,
    pictures: np.ndarray,
    captions: np.ndarray,
    block: int,
    top: int,
    results: tuple[_Direction, _Direction],
    rescore: Rescore | None,
) -> None:
    """Both directions among some pictures and their captions."""
    shown = pictures[there[pictures]]
    if not len(shown):
        return
    place = np.full(len(images), -1)
    place[shown] = np.arange(len(shown))
    asked = place[owner[captions]] >= 0  # captions whose picture could be read
    pairs = place[owner[captions][asked]]  # [n] row of the picture of each such caption
    numbers = np.flatnonzero(asked)
    of_images = None if rescore is None else partial(rescore, "TR")
    of_texts = None if rescore is None else partial(rescore, "IR")
    _rank(images[shown], texts[captions], pairs, numbers, block, top, results[0], shown, captions, of_images)
    _rank(texts[captions], images[shown], numbers, pairs, block, top, results[1], captions, shown, of_texts)


def _rank(
    queries: "Tensor",
    candidates: "Tensor",
    pair_query: np.ndarray,
    pair_candidate: np.ndarray,
    block: int,
    top: int,
    found: _Direction,
    query_numbers: np.ndarray,
    candidate_numbers: np.ndarray,
    rescore: Callable[[np.ndarray, np.ndarray, "Tensor"], "Tensor"] | None,
) -> None:
    """Fill in `found` for every query that has a right candidate; `pair_*` [P] list which belong together.

    The right candidate's score comes out of the same product as its rivals': computed apart it could differ in the last
    bit and lose to itself. For the same reason equal candidates are compared once, and counted as often as they occur.
    """
    import torch

    device = queries.device
    unique, representative = _distinct(candidates)
    counts = np.bincount(representative)
    weights = None if len(unique) == len(representative) else torch.as_tensor(counts, device=device)
    kept = candidates[unique] if weights is not None else candidates  # [U, E]
    order = np.argsort(pair_query, kind="stable")
    pair_query, pair_column = pair_query[order], representative[pair_candidate[order]]
    rows = max(1, block // len(kept))
    for start in range(0, len(queries), rows):
        stop = min(start + rows, len(queries))
        low, high = np.searchsorted(pair_query, [start, stop])
        if low == high and not top:
            continue
        scores = similarities(queries[start:stop], kept)  # [R, U]
        if rescore is not None:
            scores = rescore(query_numbers[start:stop], candidate_numbers[unique], scores)
        if top:
            best = scores.topk(min(top, scores.shape[1]), dim=1).indices.cpu().numpy()
            found.top[query_numbers[start:stop], : best.shape[1]] = candidate_numbers[unique[best]]
        if low == high:
            continue
        row = torch.as_tensor(pair_query[low:high] - start, device=device)  # [p]
        own = scores[row, torch.as_tensor(pair_column[low:high], device=device)]  # [p]
        goal = torch.full((stop - start,), -torch.inf, dtype=scores.dtype, device=device)
        goal = goal.scatter_reduce(0, row, own, "amax")  # [R] the best right one
        right = torch.zeros(stop - start, dtype=torch.int64, device=device)
        right.scatter_add_(0, row, (own == goal[row]).long())
        above = _count(scores > goal[:, None], weights)
        same = _count(scores == goal[:, None], weights)
        asked = np.unique(pair_query[low:high]) - start
        into = query_numbers[start + asked]
        found.higher[into] = above.cpu().numpy()[asked]
        found.tied[into] = (same - right).cpu().numpy()[asked]
        found.right[into] = right.cpu().numpy()[asked]


def similarities(queries: "Tensor", candidates: "Tensor") -> "Tensor":
    """Dot products [R,U] of one block of queries [R,E] with all candidates [U,E]; the largest where one side is several
    points a row ([R,Q,E] or [U,Q,E]).
    """
    from vlm.objectives.query_itc import query_similarity

    if queries.ndim == 3:
        return query_similarity(queries, candidates)
    return query_similarity(candidates, queries).T if candidates.ndim == 3 else queries @ candidates.T


def _count(mask: "Tensor", weights: "Tensor | None") -> "Tensor":
    """How many candidates are marked [R,U] -> [R]; a candidate counts as often as it occurs."""
    import torch

    if weights is None:
        return mask.sum(dim=1)
    return torch.where(mask, weights.to(torch.int32), 0).sum(dim=1)


def _distinct(embeds: "Tensor") -> tuple[np.ndarray, np.ndarray]:
    """The first row of each group of equal rows [U], and the group of every row [N]."""
    groups: dict[bytes, int] = {}
    first: list[int] = []
    group = np.empty(len(embeds), dtype=np.int64)
    for number, row in enumerate(embeds.cpu().numpy() + 0.0):  # + 0.0: a negative zero is a zero
        digest = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
        group[number] = groups.setdefault(digest, len(groups))
        if group[number] == len(first):
            first.append(number)
    return np.array(first), group


def _scores(
    text_results: _Direction,
    image_results: _Direction,
    parts: list[tuple[np.ndarray, np.ndarray]],
    owner: np.ndarray,
    ks: tuple[int, ...],
    tie_rule: str,
) -> RetrievalScores:
    silent = np.bincount(owner, minlength=len(text_results.higher)) == 0  # pictures without captions
    scores: dict[str, float] = {}
    recalls: dict[str, np.ndarray] = {}
    contributions: dict[str, np.ndarray] = {}
    medians = {}
    every_rank: dict[str, np.ndarray] = {}
    groups: dict[str, np.ndarray] = {}
    for name, found, which in (("TR", text_results, 0), ("IR", image_results, 1)):
        asking = np.ones(len(found.higher), dtype=bool) if which else ~silent
        members = [part[which][asking[part[which]]] for part in parts]
        members = [numbers for numbers in members if len(numbers)]
        for numbers in members:
            found.weight[numbers] = asking.sum() / (len(members) * len(numbers))
        for k in ks:
            recall = np.where(asking, _recall(found, k, tie_rule), np.nan)
            recalls[f"{name}@{k}"] = recall
            contributions[f"{name}@{k}"] = recall * found.weight
            scores[f"{name}@{k}"] = 100 * float(np.mean(contributions[f"{name}@{k}"][asking]))
        ranks = 1 + _ranks(found, tie_rule)
        every_rank[name] = np.where(asking, ranks, np.nan)
        groups[name] = np.zeros(len(ranks), dtype=np.int64)
        for number, part in enumerate(parts):
            groups[name][part[which]] = number
        medians[f"{name}_median_rank"] = float(np.mean([np.median(ranks[numbers]) for numbers in members]))
    scores["rsum"] = sum(scores.values())
    scores |= medians
    return RetrievalScores(
        scores, recalls, contributions, every_rank, groups, tie_rule, len(parts), text_results.top, image_results.top
    )


def _ranks(found: _Direction, tie_rule: str) -> np.ndarray:
    """The rank from 0 of the best right candidate [Q]."""
    if tie_rule == "optimistic":
        return found.higher
    # Of n in random order, the first of c lies behind (n - c) / (c + 1) others on average.
    return found.higher + (found.tied if tie_rule == "pessimistic" else found.tied / (found.right + 1))


def _recall(found: _Direction, k: int, tie_rule: str) -> np.ndarray:
    """Whether, or under `expected` how likely, a right candidate is among the first k [Q]."""
    if tie_rule != "expected":
        return (_ranks(found, tie_rule) < k).astype(float)
    missed = np.ones(len(found.higher))  # that each of the places the tied ones share holds a wrong one
    everything = found.tied + found.right
    for place in range(k):
        shared = found.higher + place < k
        chance = np.clip(found.tied - place, 0, None) / np.maximum(everything - place, 1)
        missed = np.where(shared, missed * chance, missed)
    return np.where(found.higher < k, 1 - missed, 0.0)
