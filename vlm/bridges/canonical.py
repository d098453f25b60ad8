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
    count, means, products = _moments(pairs)
    if count < 2:
        raise VlmError(f"bridge.start: canonical: {count} training pairs have no correlation")
    covariance = {
        (a, b): products[a, b] / count - means[a][:, None] * means[b] for a, b in ((0, 0), (1, 1), (0, 1))
    }  # [D,D], [T,T], [D,T]
    most = min(covariance[0, 1].shape)
    if width > most:
        raise VlmError(f"bridge.start: canonical: gives at most {most} directions here; set bridge.width to no more")
    roots = [_inverse_root(covariance[side, side], ridge) for side in (0, 1)]
    left, correlations, right = torch.linalg.svd(roots[0] @ covariance[0, 1] @ roots[1], full_matrices=False)
    # A direction may as well point the other way; which one may not depend on rounding.
    largest = left.abs().argmax(0, keepdim=True)  # [1, E]
    signs = left.gather(0, largest).sign()[0]
    left, right = left * signs, right * signs[:, None]
    made = []
    for side, directions in enumerate((left, right.T)):
        weight = ((roots[side] @ directions) * correlations)[:, :width].T  # [E, D]
        length = ((weight @ covariance[side, side]) * weight).sum().sqrt().clamp(min=1e-12)
        weight = weight / length
        made.append(Affine(weight.float(), -(weight @ means[side]).float()))
    return made[0], made[1]


def _moments(
    pairs: Iterable[tuple[Tensor, Tensor]],
) -> tuple[int, dict[int, Tensor], dict[tuple[int, int], Tensor]]:
    """Number of pairs, mean of each side, sums of products of sides."""
    count = 0
    sums: dict[int, Tensor] = {}
    products: dict[tuple[int, int], Tensor] = {}
    for pair in pairs:
        sides = [features.double() for features in pair]
        count += len(sides[0])
        for side in (0, 1):
            sums[side] = sums.get(side, torch.zeros((), device=sides[side].device)) + sides[side].sum(0)
        for a, b in ((0, 0), (1, 1), (0, 1)):
            product = sides[a].T @ sides[b]
            products[a, b] = products[a, b].add_(product) if (a, b) in products else product
    return count, {side: total / max(count, 1) for side, total in sums.items()}, products


def _inverse_root(covariance: Tensor, ridge: float) -> Tensor:
    """(C + ridge mean(diag C) I)^-1/2 of a symmetric C [D,D]."""
    values, vectors = torch.linalg.eigh(covariance)
    mean = values.clamp(min=0).mean()
    values = (values.clamp(min=0) + ridge * mean).clamp(min=1e-12)
    return (vectors * values**-0.5) @ vectors.T
