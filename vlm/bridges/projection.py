"""The projection bridge: image tokens, fewer of them if asked, to the language model's width."""

import math

import torch
from torch import Tensor, nn

from vlm.errors import VlmError
from vlm.model_spec import ProjectionSpec


class Projection(nn.Module):
    """Linear layer or MLP with GELU over image tokens, after an optional reduction of their number.

    Sources: linear, LLaVA (Liu et al. 2023, section 4.1); two-layer GELU MLP, LLaVA-1.5 (Liu et al. 2023, section 3.2);
    pixel shuffle, Idefics3 (Laurencon et al. 2024, section 3.1).

    width_in, width_out: D of image tokens and of the language model. num_tokens: image tokens that come in.
    grid: their (rows, columns), which `pool` and `pixel_shuffle` need. tiles: whether pictures come as tiles, whose
    rows of tokens end in a learned one, `newline` [D] (LLaVA-1.6). grid_out: (rows, columns) of what leaves.
    """

    def __init__(
        self,
        spec: ProjectionSpec,
        width_in: int,
        width_out: int,
        num_tokens: int,
        grid: tuple[int, int] | None = None,
        tiles: bool = False,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.grid = grid
        if spec.reduce != "none" and grid is None:
            raise VlmError(f"bridge.reduce: {spec.reduce}: these image tokens form no grid (set drop_cls: true)")
        self.num_tokens, width = _reduced(spec, num_tokens, width_in, grid)
        self.grid_out = _grid_out(spec, grid)
        self.norm = nn.LayerNorm(width) if spec.input_norm else nn.Identity()
        widths = [width, *[width_out] * (1 if spec.type == "linear" else spec.depth)]
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(zip(widths[:-1], widths[1:])):
            layers += [nn.GELU()] if index else []
            layers.append(nn.Linear(before, after))
        self.layers = nn.Sequential(*layers)
        self.newline = nn.Parameter(torch.randn(width_out) * width_out**-0.5) if tiles else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Image tokens [B,N,D_in] to [B,num_tokens,D_out]."""
        if self.spec.reduce == "pool":
            tokens = _pool(tokens, self.grid, self.num_tokens)
        elif self.spec.reduce == "pixel_shuffle":
            tokens = pixel_shuffle(tokens, self.grid, self.spec.factor)
        return self.layers(self.norm(tokens.to(self.layers[0].weight.dtype)))

    @torch.no_grad()
    def match_scale(self, embeddings: Tensor) -> None:
        """Scale the last layer so that outputs start at the RMS of token embeddings [V,D].

        Image tokens far smaller or larger than words start training in a region the language model never saw.
        """
        target = embeddings.float().pow(2).mean().sqrt()
        width = self.layers[0].in_features
        probe = torch.randn(
            256, int(width), generator=torch.Generator().manual_seed(0), dtype=torch.float32
        )  # unit-variance tokens, as a layer norm gives
        last = self.layers[-1]
        output = self.layers.float()(probe.to(last.weight.device))
        last.weight.mul_(target / output.pow(2).mean().sqrt())
        last.bias.zero_()
        if self.newline is not None:
            self.newline.mul_(target / self.newline.pow(2).mean().sqrt())


def _reduced(spec: ProjectionSpec, num_tokens: int, width: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """(tokens, width) after the reduction."""
    if spec.reduce == "none" or grid is None:
        return num_tokens, width
    rows, columns = grid
    if spec.reduce == "pool":
        count = spec.tokens or 0
        side = math.isqrt(count)
        if side * side != count or side > min(grid):
            raise VlmError(f"bridge.tokens: {count}: expected a square number of at most {rows} x {columns} tokens")
        return count, width
    if rows % spec.factor or columns % spec.factor:
        raise VlmError(f"bridge.factor: {spec.factor} does not divide the {rows} x {columns} image tokens")
    return num_tokens // spec.factor**2, width * spec.factor**2


def _grid_out(spec: ProjectionSpec, grid: tuple[int, int] | None) -> tuple[int, int] | None:
    if grid is None or spec.reduce == "none":
        return grid
    if spec.reduce == "pool":
        return math.isqrt(spec.tokens or 0), math.isqrt(spec.tokens or 0)
    return grid[0] // spec.factor, grid[1] // spec.factor


def _pool(tokens: Tensor, grid: tuple[int, int] | None, count: int) -> Tensor:
    """Average [B,h*w,D] over a square grid of `count` cells: [B,count,D]."""
    assert grid is not None
    side = math.isqrt(count)
    planes = tokens.transpose(1, 2).unflatten(2, grid)  # [B,D,h,w]
    return nn.functional.adaptive_avg_pool2d(planes, side).flatten(2).transpose(1, 2)


def pixel_shuffle(tokens: Tensor, grid: tuple[int, int] | None, factor: int) -> Tensor:
    """Each factor x factor block of tokens side by side in one: [B,h*w,D] to [B,h*w/f^2,D*f^2]."""
    assert grid is not None
    rows, columns = grid
    batch, _, width = tokens.shape
    blocks = tokens.reshape(batch, rows // factor, factor, columns // factor, factor, width)
    blocks = blocks.permute(0, 1, 3, 2, 4, 5)  # [B, h/f, w/f, f, f, D]
    return blocks.reshape(batch, (rows // factor) * (columns // factor), factor * factor * width)
