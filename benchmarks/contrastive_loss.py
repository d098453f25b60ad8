"""Loss and backward pass of CLIP's and SigLIP's loss over 4k, 8k and 16k pairs of width 512, against open_clip's."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import Case, Step, main
from torch import Tensor

from vlm.objectives.itc import itc_loss, sigmoid_itc_loss

WIDTH = 512


def inputs(pairs: int, scale: float) -> list[Tensor]:
    """Unit-length embeddings of both sides, the scale and the bias, all with gradient."""
    generator = torch.Generator().manual_seed(0)
    sides = [F.normalize(torch.randn(pairs, WIDTH, generator=generator), dim=-1) for _ in range(2)]
    return [t.requires_grad_() for t in (*sides, torch.tensor(scale), torch.tensor(-10.0))]


def step(loss: Callable[..., Tensor], leaves: list[Tensor]) -> Step:
    """Value and gradients of a loss; the leaves get no `.grad`, so every step is alike."""

    def run() -> list[Tensor]:
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    return run


def case(pairs: int, theirs: str) -> Case:
    """CLIP's loss at its final scale of 100, or SigLIP's at its initial scale of 10 and bias of -10."""
    clip = theirs == "ClipLoss"
    loss = itc_loss if clip else sigmoid_itc_loss
    large = pairs >= 16384

    def leaves() -> list[Tensor]:
        return inputs(pairs, 100.0)[:3] if clip else inputs(pairs, 10.0)

    def peer() -> Callable[..., Tensor]:
        import open_clip.loss  # only where it is measured: it takes seconds to import

        made: Callable[..., Tensor] = getattr(open_clip.loss, theirs)()
        return made

    return Case(
        ours=lambda: step(lambda *given: loss(*given) / pairs, leaves()),
        theirs=lambda: step(peer(), leaves()),
        peer=f"open_clip {theirs}",
        amount=pairs,
        unit="pairs",
        repeats=2 if large else 3,
        speed_target=1.3 if large else None,
        memory_target=1 / 8 if large else None,
        measure_memory=True,
        check=same,
    )


def same(ours: Any, theirs: Any) -> None:
    """Both sides' values and gradients agree to single precision."""
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


if __name__ == "__main__":
    main(
        {
            f"{theirs} {pairs // 1024}k pairs": case(pairs, theirs)
            for pairs in (4096, 8192, 16384)
            for theirs in ("ClipLoss", "SigLipLoss")
        },
        ["open_clip_torch"],
    )
