"""Image-text contrast over the whole global batch: softmax (CLIP) and sigmoid (SigLIP).

Both losses are a sum over *all* pairs, which is streamed, minus a term that only looks at the pairs which belong
together. That term is linear in the similarities, so sums of embeddings by group give it without the matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.errors import VlmError
from vlm.objectives.processes import gather_with_gradient, logsumexp_over_processes, own_rows, process_sizes
from vlm.objectives.similarity import default_block, streamed_logsumexp, streamed_softplus


def itc_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    smoothing: float = 0.0,
    block: int | None = None,
    across_processes: bool = False,
) -> Tensor:
    """Sum over pairs of the cross-entropy of finding the text of an image and the image of a text, their mean.

    Radford et al. 2021, figure 3; divide by the number of pairs of the global batch for CLIP's loss.
    image, text: unit-length embeddings [B,E], row i of one belongs to row i of the other. scale: factor on the
    cosine (not its logarithm). image_ids, text_ids: integers [B]; an image and a text with the same number belong
    together as well, and the target is uniform over them (one of the two given: it holds for both).
    smoothing: share of the target that is spread over the whole batch. block: rows and columns computed at a time.
    across_processes: the batch is that of all processes, each with its own rows, as many as it likes. Each gets a
    share; the sum of all shares is the loss, and gradients are those of that sum.
    In fp32 at least. Raises VlmError on shapes that do not fit and on an image or text that belongs to nothing.
    """
    batch = _Batch.of(image, text, scale, image_ids, text_ids, across_processes)
    with torch.autocast(image.device.type, enabled=False):
        rows, columns = streamed_logsumexp(batch.image, batch.texts, batch.scale, block or default_block(image.device))
        if across_processes:
            columns = logsumexp_over_processes(columns)
        # Targets of rows are divided by the texts of an image, those of columns by the images of a text.
        target = batch.positives() * ((1 - smoothing) * batch.shares()[:, None])
        if smoothing:
            target = target + batch.texts.sum(0) * (smoothing / len(batch.texts))
        matched = (batch.image * target).sum() * batch.scale
        return (rows.sum() + columns[batch.own].sum()) / 2 - matched


def sigmoid_itc_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    block: int | None = None,
    across_processes: bool = False,
) -> Tensor:
    """Sum over all image-text pairs of -log sigmoid(label * (scale * cosine + bias)), label 1 or -1.

    Zhai et al. 2023, algorithm 1; divide by the number of pairs of the global batch for SigLIP's loss. Arguments as
    for `itc_loss`: with ids, every image and text of the same number have label 1.
    """
    batch = _Batch.of(image, text, scale, image_ids, text_ids, across_processes)
    offset = torch.as_tensor(bias, dtype=batch.image.dtype, device=image.device)
    with torch.autocast(image.device.type, enabled=False):
        # -log sigmoid(x) = softplus(x) - x and -log sigmoid(-x) = softplus(x).
        every = streamed_softplus(batch.image, batch.texts, batch.scale, offset, block or default_block(image.device))
        return every - (batch.image * batch.positives()).sum() * batch.scale - batch.num_positives().sum() * offset


@dataclass(frozen=True)
class _Batch:
    """image: this process's [b,E]. text: its own [b,E]. texts: all [B,E]. own: where its rows lie among all.

    groups: (number of each own image's group [b], of every image's [B], of every text's [B], how many there are), or
    None where only row i and row i belong together.
    """

    image: Tensor
    text: Tensor
    texts: Tensor
    scale: Tensor
    own: slice
    groups: tuple[Tensor, Tensor, Tensor, int] | None

    @classmethod
    def of(
        cls,
        image: Tensor,
        text: Tensor,
        scale: Tensor | float,
        image_ids: Tensor | None,
        text_ids: Tensor | None,
        across_processes: bool,
    ) -> "_Batch":
        if image.ndim != 2 or image.shape != text.shape:
            shapes = f"{list(image.shape)} and {list(text.shape)}"
            raise VlmError(f"contrastive loss: expected embeddings [B,E] of images and of texts, got {shapes}")
        dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
        image, text = image.to(dtype), text.to(dtype)
        factor = torch.as_tensor(scale, device=image.device).to(dtype)
        sizes = process_sizes(len(image), image.device) if across_processes else [len(image)]
        texts = gather_with_gradient(text, sizes) if across_processes else text
        groups = None
        if image_ids is not None or text_ids is not None:
            ids = [image_ids if image_ids is not None else text_ids, text_ids if text_ids is not None else image_ids]
            groups = _groups([_checked(i, image) for i in ids], sizes, across_processes)
        return cls(image, text, texts, factor, own_rows(sizes), groups)

    def positives(self) -> Tensor:
        """Sum [b,E] of the texts that belong to each image."""
        if self.groups is None:
            return self.text
        mine, _, of_texts, count = self.groups
        sums = self.texts.new_zeros(count, self.texts.shape[1]).index_add(0, of_texts, self.texts)  # [G, E]
        return sums[mine]

    def num_positives(self) -> Tensor:
        """How many texts [b] belong to each image."""
        if self.groups is None:
            return self.image.new_ones(len(self.image))
        mine, _, of_texts, count = self.groups
        return of_texts.bincount(minlength=count)[mine].to(self.image.dtype)

    def shares(self) -> Tensor:
        """Mean [b] of 1 / texts that belong to an image and 1 / images that belong to those texts."""
        if self.groups is None:
            return self.image.new_ones(len(self.image))
        mine, of_images, _, count = self.groups
        siblings = of_images.bincount(minlength=count)[mine].to(self.image.dtype)
        return (1 / self.num_positives() + 1 / siblings) / 2


def _checked(ids: Tensor | None, image: Tensor) -> Tensor:
    assert ids is not None
    if ids.shape != (len(image),) or ids.is_floating_point():
        raise VlmError(
            f"contrastive loss: ids are integers [{len(image)}], one a row, got {ids.dtype} {list(ids.shape)}"
        )
    return ids.to(image.device)


def _groups(ids: list[Tensor], sizes: list[int], across_processes: bool) -> tuple[Tensor, Tensor, Tensor, int]:
    """Ids of the own images and texts as the groups of `_Batch`."""
    images, texts = (gather_with_gradient(i, sizes) for i in ids) if across_processes else ids
    names, numbers = torch.cat([images, texts]).unique(return_inverse=True)
    of_images, of_texts = numbers.split(len(images))
    for one, other, what in ((of_images, of_texts, "image"), (of_texts, of_images, "text")):
        alone = other.bincount(minlength=len(names))[one] == 0
        if alone.any():
            name = names[one[alone][0]].item()
            raise VlmError(f"contrastive loss: nothing in the batch belongs to the {what} with id {name}")
    return of_images[own_rows(sizes)], of_images, of_texts, len(names)
