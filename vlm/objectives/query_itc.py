"""Image-text contrast where an image is several points, one a query: its similarity to a text is the best of them.

Li et al. 2023 (BLIP-2), section 3.1. Only which query was best is kept for the backward pass, so memory grows with the
similarities [N,M], not with the queries' [N,Q,M].
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.errors import VlmError
from vlm.objectives.processes import gather_with_gradient, logsumexp_over_processes, own_rows, process_sizes

_BLOCK = 1 << 24  # products of queries and texts held at once: 64 MB in fp32


def query_similarity(image: Tensor, text: Tensor, block: int = _BLOCK) -> Tensor:
    """Cosines [N,M]: the largest over the queries of image [N,Q,E] with text [M,E], both of unit length.

    block: products of queries and texts computed at a time. Differentiable once; where queries tie, the first counts.
    """
    similarity: Tensor = _Largest.apply(image, text, max(1, block // max(1, image.shape[1] * len(text))))
    return similarity


def query_itc_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    picture_ids: Tensor | None = None,
    smoothing: float = 0.0,
    across_processes: bool = False,
) -> Tensor:
    """Sum over pairs of the cross-entropy of finding the text of an image and the image of a text, their mean.

    image: unit length [b,Q,E]. text: unit length [b,E]; row i of both belong together. scale: factor on the cosine.
    picture_ids: integers [b]; an image and a text with the same number belong together as well, and the target is
    uniform over them. smoothing: share of the target that is spread over the whole batch.
    across_processes: the batch is that of all processes; each gets a share, with gradients of the sum of all shares.
    Divide by the pairs of the global batch for BLIP-2's loss. In fp32 at least. Raises VlmError on shapes that do not
    fit.
    """
    if image.ndim != 3 or len(image) != len(text) or image.shape[2:] != text.shape[1:]:
        shapes = f"{list(image.shape)} and {list(text.shape)}"
        raise VlmError(f"contrastive loss: expected embeddings [B,Q,E] of images and [B,E] of texts, got {shapes}")
    dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    with torch.autocast(image.device.type, enabled=False):
        image, text = image.to(dtype), text.to(dtype)
        sizes = process_sizes(len(image), image.device) if across_processes else [len(image)]
        texts = gather_with_gradient(text, sizes) if across_processes else text
        logits = query_similarity(image, texts) * scale  # [b, B]
        own = own_rows(sizes)
        together = same_picture(len(image), own, picture_ids, sizes, across_processes, image.device)
        target = together.to(dtype) / together.sum(1, keepdim=True)
        target = (1 - smoothing) * target + smoothing / len(texts)
        # The target of texts is the same matrix: those that belong together are as many seen from either side.
        columns = logits.logsumexp(0)
        if across_processes:
            columns = logsumexp_over_processes(columns)
        return (logits.logsumexp(1).sum() + columns[own].sum()) / 2 - (logits * target).sum()


def same_picture(
    count: int,
    own: slice,
    picture_ids: Tensor | None,
    sizes: list[int],
    across_processes: bool,
    device: torch.device,
) -> Tensor:
    """True where an own pair [b] is about the same picture as one of the global batch [B]: [b,B]."""
    if picture_ids is None:
        return torch.eye(sum(sizes), dtype=torch.bool, device=device)[own]
    if picture_ids.shape != (count,) or picture_ids.is_floating_point():
        raise VlmError(f"picture ids are integers [{count}], got {picture_ids.dtype} {list(picture_ids.shape)}")
    mine = picture_ids.to(device)
    every = gather_with_gradient(mine, sizes) if across_processes else mine
    return mine[:, None] == every


class _Largest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, rows: int) -> Tensor:
        values, best = [], []
        for part in image.split(rows):
            largest = (part.flatten(0, 1) @ text.T).unflatten(0, part.shape[:2]).max(1)  # [r, M]
            values.append(largest.values)
            best.append(largest.indices)
        ctx.save_for_backward(image, text, *best)
        ctx.rows = rows
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        image, text, *best = ctx.saved_tensors
        of_image, of_text = [], torch.zeros_like(text)
        for part, piece, indices in zip(image.split(ctx.rows), gradient.split(ctx.rows), best):
            spread = piece.new_zeros(*part.shape[:2], len(text)).scatter_(1, indices[:, None], piece[:, None])
            flat = spread.flatten(0, 1)  # [r * Q, M]
            of_image.append((flat @ text).unflatten(0, part.shape[:2]))
            of_text.addmm_(flat.T, part.flatten(0, 1))
        return torch.cat(of_image), of_text, None
