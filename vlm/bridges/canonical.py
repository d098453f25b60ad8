"""Linear projections of two sides into one space in closed form: canonical correlations with a ridge."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.errors import VlmError

DEFAULT_RIDGE = 0.5


@dataclass(frozen=True)
class Affine:
    """x -> weight x + bias. weight: [E,D]. bias: [E]. Both in fp32."""

    weight: Tensor
    bias: Tensor


def canonical_projections(pairs: Iterable[tuple[Tensor, Tensor]], width: int, ridge: float) -> tuple[Affine, Affine]:
    """Projections of images and texts on their first `width` canonical directions, each weighted by its correlation.

    pairs: image features [b,Di] and text features [b,Dt], row by row of one pair; gone through once, in fp64.
    ridge: added to each side's covariance, as a share of its mean variance (Vinod 1976); keeps directions that a small
    data set shows by chance from counting.
    Projected features have mean zero and a root mean square length of one on the pairs.
    Raises VlmError for more directions than the narrower side has, and for fewer than two pairs.
    """
    count, mean, covariance, images = _moments(pairs)
    if count < 2:
        raise VlmError(f"bridge.start: canonical: {count} training pairs have no correlation")
    sides = slice(None, images), slice(images, None)
    between = covariance[sides[0], sides[1]]  # [Di, Dt]
    if width > min(between.shape):
        most = min(between.shape)
        raise VlmError(f"bridge.start: canonical: gives at most {most} directions here; set bridge.width to no more")
    within = [covariance[side, side] for side in sides]  # [Di, Di], [Dt, Dt]
    roots = [_inverse_root(own, ridge) for own in within]
    left, correlations, right = torch.linalg.svd(roots[0] @ between @ roots[1], full_matrices=False)
    # A direction may as well point the other way; which one may not depend on rounding.
    largest = left.abs().argmax(0, keepdim=True)  # [1, E]
    signs = left.gather(0, largest).sign()[0]
    left, right = left * signs, right * signs[:, None]
    made = []
    for side, own, root, directions in zip(sides, within, roots, (left, right.T), strict=True):
        weight = ((root @ directions) * correlations)[:, :width].T  # [E, D]
        weight = weight / ((weight @ own) * weight).sum().sqrt().clamp(min=1e-12)
        made.append(Affine(weight.float(), -(weight @ mean[side]).float()))
    return made[0], made[1]


def _moments(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[int, Tensor, Tensor, int]:
    """Number of pairs, mean [Di+Dt] and covariance [Di+Dt,Di+Dt] of both sides in one row, and Di."""
    count = images = 0
    sums, products = torch.zeros(0), torch.zeros(0, 0)
    for image, text in pairs:
        joined = torch.cat([image, text], 1).to("cpu", torch.float64)  # [b, Di+Dt]; not every accelerator has fp64
        if not count:
            images, width = image.shape[1], joined.shape[1]
            sums, products = joined.new_zeros(width), joined.new_zeros(width, width)
        count += len(joined)
        sums += joined.sum(0)
        products.addmm_(joined.T, joined)
    mean = sums / max(count, 1)
    return count, mean, products / max(count, 1) - mean[:, None] * mean, images


def _inverse_root(covariance: Tensor, ridge: float) -> Tensor:
    """(C + ridge mean(diag C) I)^-1/2 of a symmetric C [D,D]."""
    values, vectors = torch.linalg.eigh(covariance)
    mean = values.clamp(min=0).mean()
    values = (values.clamp(min=0) + ridge * mean).clamp(min=1e-12)
    return (vectors * values**-0.5) @ vectors.T
