"""Retrieval in two steps: the nearest by embedding, scored again by a model that looks at both.

Li et al. 2023 (BLIP-2), section 4.4: the first k by the contrastive similarity, re-ranked by matching. Every query of
both directions has its list; a pair that stands in two of them is scored once, and each picture is looked at once.
"""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm.errors import VlmError

if TYPE_CHECKING:
    from torch import Tensor

    from vlm.evaluation.sharing import Asking

OUTSIDE = -100.0  # score of what is not among the nearest
_PICTURES = 32  # pictures that a model looks at before the next ones


def rescored(scores: "Tensor", k: int, logits: Callable[["Tensor", "Tensor"], "Tensor"]) -> "Tensor":
    """Scores of candidates [Q,U] in two steps: similarity + matching logit of the k nearest, OUTSIDE for all others.

    logits(rows, columns): of the pairs at these places [Q,k].
    """
    import torch

    near = scores.topk(min(k, scores.shape[1]), 1)
    rows = torch.arange(len(scores), device=scores.device)[:, None].expand_as(near.indices)
    fresh = near.values + logits(rows, near.indices).to(scores)
    return torch.full_like(scores, OUTSIDE).scatter(1, near.indices, fresh)


def rerank(
    similarity: "Tensor", score: Callable[[int, list[int]], "Tensor"], k: int = 128
) -> tuple["Tensor", "Tensor"]:
    """Scores of texts for each image [M,N] and of images for each text [N,M] in two steps.

    similarity: cosine of M images and N texts. score(image, texts): matching logits of one image with several texts.
    k: candidates of each query that are scored again: their logit plus cosine; all others get OUTSIDE.
    """
    pairs = Pairs()
    rescored(similarity, k, pairs.note)
    rescored(similarity.T, k, lambda rows, columns: pairs.note(columns, rows))
    for image, texts in pairs.by_image():
        pairs.tell(image, texts, score(image, texts))
    of_images = rescored(similarity, k, pairs.logits)
    return of_images, rescored(similarity.T, k, lambda rows, columns: pairs.logits(columns, rows))


class Pairs:
    """Pairs of a picture and a text that are to be matched, each once, and their logits."""

    def __init__(self) -> None:
        self._noted: list[np.ndarray] = []
        self._keys = np.empty(0, dtype=np.int64)  # image << 32 | text, ascending
        self._logits = np.empty(0, dtype=np.float32)

    def note(self, images: "Tensor", texts: "Tensor") -> "Tensor":
        """Note pairs of any shape; returns a zero in place of their logits."""
        self._noted.append(np.unique(_keys(images, texts)))
        return images.new_zeros(())

    def by_image(self) -> list[tuple[int, list[int]]]:
        """Each image of a pair with all its texts, in order."""
        if self._noted:
            self._keys = np.unique(np.concatenate([self._keys, *self._noted]))
            self._logits, self._noted = np.full(len(self._keys), np.nan, dtype=np.float32), []
        images = self._keys >> 32
        ends = np.flatnonzero(np.diff(images)) + 1
        groups = np.split(self._keys, ends) if len(self._keys) else []
        return [(int(group[0] >> 32), (group & 0xFFFFFFFF).tolist()) for group in groups]

    def tell(self, image: int, texts: Sequence[int], logits: "Tensor") -> None:
        """Keep the logits of one image with texts."""
        places = np.searchsorted(self._keys, (image << 32) | np.asarray(texts, dtype=np.int64))
        self._logits[places] = logits.detach().float().cpu().numpy()

    def logits(self, images: "Tensor", texts: "Tensor") -> "Tensor":
        """The logits of pairs that were told, in their shape. Raises VlmError for one that is no number."""
        import torch

        keys = _keys(images, texts)
        places = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        found = np.where(self._keys[places] == keys, self._logits[places], np.float32(np.nan))
        if len(bad := np.argwhere(~np.isfinite(found))):
            place = tuple(bad[0])
            pair = f"image {int(keys[place] >> 32)} and text {int(keys[place] & 0xFFFFFFFF)}"
            raise VlmError(f"the matching logit of {pair} is not finite (and {len(bad) - 1} more)")
        return torch.from_numpy(found).to(images.device)


def match_pairs(
    model: Any,
    pairs: Pairs,
    images: Sequence[str],
    texts: Sequence[str],
    asking: "Asking",
    value: Callable[["Tensor"], "Tensor"] = lambda logits: logits[:, 1],
) -> None:
    """Ask `model.match_each` about all noted pairs of pictures and texts, by number, shared among processes.

    value: what is kept of the logits (no match, match) [P,2] of a picture with its texts: [P].
    """
    import torch

    from vlm.evaluation.sharing import EMBEDDING, in_batches

    groups = pairs.by_image()

    def match(batch: list[int]) -> list[np.ndarray | str]:
        part = [groups[n] for n in batch]
        logits = model.match_each([images[image] for image, _ in part], texts, [wanted for _, wanted in part])
        return [value(row).detach().float().cpu().numpy() for row in logits]

    def requests(batch: list[int]) -> list[tuple[tuple[str, ...], str]]:
        wanted = [(images[image], [texts[n] for n in numbers]) for image, numbers in (groups[n] for n in batch)]
        return [((image,), f"match_each {json.dumps(asked)}") for image, asked in wanted]

    batches = list(in_batches([0] * len(groups), _PICTURES))
    for (image, wanted), row in zip(groups, asking.share(batches, match, requests, EMBEDDING, lambda n: 0)):
        pairs.tell(image, wanted, torch.as_tensor(row))


def _keys(images: "Tensor", texts: "Tensor") -> np.ndarray:
    keys: np.ndarray = ((images.long() << 32) | texts.long()).cpu().numpy()
    return keys
