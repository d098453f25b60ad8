"""Image-text pairs as tensors: what a dual encoder or a Q-Former learns from."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairBatch:
    """Texts with a picture each; a picture that several texts describe is there once.

    ids, mask: token ids and 1 where there is one, int64 [b,T]; empty where `text_features` [b,...] are given instead.
    images: the unique pictures. image_index: [b], which of them each text describes. picture_ids: int64 [b], equal
    where texts describe the same picture, on every process. text_ids: the same of equal texts. places: int64 [b], each
    pair's place in the global batch.
    image_inputs: pixels [U,3,H,W] or cached features of the unique pictures, once `with_images` has run.
    """

    ids: Tensor
    mask: Tensor
    images: list[str]
    image_index: Tensor
    picture_ids: Tensor
    text_ids: Tensor
    places: Tensor
    text_features: Tensor | None = None
    image_inputs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.picture_ids)

    @property
    def num_tokens(self) -> int:
        """Text tokens that are no padding."""
        return int(self.mask.sum())

    @property
    def num_labels(self) -> int:
        """Pairs: what carries loss."""
        return len(self)

    @property
    def num_targets(self) -> int:
        """Tokens that a model which writes the texts has to predict: all but the first of each."""
        return self.num_tokens - len(self)

    def with_images(self, load: Callable[[list[str]], Tensor]) -> "PairBatch":
        """This batch with the tensors of its pictures, loaded by `load(images)`."""
        return self if not self.images else replace(self, image_inputs=load(self.images))

    def to(self, device: torch.device | str) -> "PairBatch":
        """This batch on `device`."""
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def pair_batch(
    ids: Tensor,
    mask: Tensor,
    pictures: Sequence[str],
    places: Sequence[int],
    text_features: Tensor | None = None,
) -> PairBatch:
    """Texts (ids and mask [b,T], or features [b,...]) with the path of each one's picture and its place."""
    unique = list(dict.fromkeys(pictures))
    number = {path: i for i, path in enumerate(unique)}
    if text_features is None:
        texts = [row[:length].numpy().tobytes() for row, length in zip(ids.cpu(), mask.sum(-1).tolist())]
    else:
        texts = [row.contiguous().view(torch.uint8).numpy().tobytes() for row in text_features.cpu()]
    return PairBatch(
        ids=ids,
        mask=mask,
        images=unique,
        image_index=torch.tensor([number[path] for path in pictures], dtype=torch.long),
        picture_ids=_numbers([path.encode(errors="surrogateescape") for path in pictures]),
        text_ids=_numbers(texts),
        places=torch.tensor(list(places), dtype=torch.long),
        text_features=text_features,
    )


def _numbers(contents: Sequence[bytes]) -> Tensor:
    """Of each a number that is the same for the same content on every process, int64."""
    digests = [hashlib.blake2b(content, digest_size=8).digest() for content in contents]
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests], dtype=torch.long)
