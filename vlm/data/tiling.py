"""Pictures of any shape as tiles of an image encoder's size (AnyRes: LLaVA-1.6, Liu et al. 2024).

A picture becomes itself, squashed to one tile, and tiles of a larger copy: scaled without distortion into the best of
a few grids, with black bars. The tokens of all tiles form one plane, of which the bars are cut off and every row ends
in a newline token; they follow the tokens of the squashed picture.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from vlm.data.images import ImageLike, load_image
from vlm.data.transforms import ImageTransform
from vlm.errors import VlmError

# Grids of LLaVA-1.6 as (rows, columns) of tiles.
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


@dataclass(frozen=True)
class TiledPicture:
    """pixels: [1+R*C,3,H,W], the whole picture first, then its tiles row by row. size: its own (height, width)."""

    pixels: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class TiledPictures:
    """Several: pixels [P,3,H,W] of all, one behind the other, and the (height, width) of each."""

    pixels: Tensor
    sizes: tuple[tuple[int, int], ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TiledPictures":
        """The same on another device."""
        return TiledPictures(self.pixels.to(device, non_blocking=non_blocking), self.sizes)


def stack_pictures(pictures: Sequence[Tensor | TiledPicture]) -> Tensor | TiledPictures:
    """Pictures as one batch: tensors [...] of one shape stacked, tiled ones joined."""
    tiled = [picture for picture in pictures if isinstance(picture, TiledPicture)]
    if tiled:
        return TiledPictures(torch.cat([p.pixels for p in tiled]), tuple(p.size for p in tiled))
    return torch.stack([picture for picture in pictures if isinstance(picture, Tensor)])


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut, and how many tokens they become.

    transform: of one tile. pinpoints: sizes (height, width) in pixels that a picture may be scaled into, multiples of
    the tile's. grid: tokens of a tile (rows, columns) as they enter the language model.
    """

    transform: ImageTransform
    pinpoints: tuple[tuple[int, int], ...]
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        for height, width in self.pinpoints:
            if height % self.transform.size[0] or width % self.transform.size[1]:
                tile = " x ".join(map(str, self.transform.size))
                raise VlmError(f"image_encoder.grid_pinpoints: {height} x {width} is no multiple of a tile's {tile}")

    def tiles(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tiles that a picture of `size` (height, width) is cut into."""
        height, width = best_resolution(size, self.pinpoints)
        return height // self.transform.size[0], width // self.transform.size[1]

    def count(self, image: ImageLike) -> int:
        """Tokens of a picture, newline tokens included."""
        picture = load_image(image)
        rows, columns = self._kept((picture.height, picture.width))
        return self.grid[0] * self.grid[1] + len(rows) * (len(columns) + 1)

    def cut(self, image: ImageLike) -> TiledPicture:
        """A picture and its tiles as the image encoder takes them. Raises BrokenImage for one that cannot be read."""
        picture = load_image(image)
        size = picture.height, picture.width
        height, width = best_resolution(size, self.pinpoints)
        scale = min(width / size[1], height / size[0])
        inner = min(math.ceil(size[0] * scale), height), min(math.ceil(size[1] * scale), width)
        whole = Image.new("RGB", (width, height))
        resized = F.resize(picture, list(inner), self.transform._mode)
        whole.paste(resized, ((width - inner[1]) // 2, (height - inner[0]) // 2))
        tile = self.transform.size
        boxes = [(x, y, x + tile[1], y + tile[0]) for y in range(0, height, tile[0]) for x in range(0, width, tile[1])]
        pixels = [self.transform.eval(part) for part in (picture, *(whole.crop(box) for box in boxes))]
        return TiledPicture(torch.stack(pixels), size)

    def split(self, tokens: Tensor, sizes: Sequence[tuple[int, int]], newline: Tensor) -> list[Tensor]:
        """Projected tokens [P,N,D] of the tiles of pictures of `sizes` as one sequence [n,D] for each picture."""
        counts = [1 + math.prod(self.tiles(size)) for size in sizes]
        return [self._joined(part, size, newline) for part, size in zip(tokens.split(counts), sizes)]

    def _joined(self, tokens: Tensor, size: tuple[int, int], newline: Tensor) -> Tensor:
        (down, across), (rows, columns) = self.tiles(size), self.grid
        plane = tokens[1:].unflatten(0, (down, across)).unflatten(2, (rows, columns))  # [R,C,r,c,D]
        plane = plane.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)  # [R*r,C*c,D]
        kept_rows, kept_columns = self._kept(size)
        plane = plane[kept_rows.start : kept_rows.stop, kept_columns.start : kept_columns.stop]
        ends = newline.to(plane.dtype).expand(len(plane), 1, -1)
        return torch.cat([tokens[0], torch.cat([plane, ends], dim=1).flatten(0, 1)])

    def _kept(self, size: tuple[int, int]) -> tuple[range, range]:
        """Rows and columns of the plane of all tiles' tokens that show the picture, not its bars."""
        (down, across), (rows, columns) = self.tiles(size), self.grid
        height, width = down * rows, across * columns
        if size[1] / size[0] > width / height:
            bar = (height - int(round(size[0] * (width / size[1]), 7))) // 2
            return range(bar, height - bar), range(width)
        bar = (width - int(round(size[1] * (height / size[0]), 7))) // 2
        return range(height), range(bar, width - bar)


def build_tiling(
    transform: ImageTransform, pinpoints: Sequence[tuple[int, int]] | None, grid: tuple[int, int] | None
) -> Tiling:
    """How `transform`'s tiles are cut and joined; by default into LLaVA-1.6's grids. Raises VlmError without a grid."""
    if grid is None:
        raise VlmError("image_encoder.resize: anyres: these image tokens form no grid (set drop_cls: true)")
    height, width = transform.size
    default = [(rows * height, columns * width) for rows, columns in GRIDS]
    return Tiling(transform, tuple(pinpoints or default), grid)


def best_resolution(size: tuple[int, int], pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) that shows most pixels of a picture of `size`, and among these wastes fewest."""

    def shown_and_wasted(target: tuple[int, int]) -> tuple[int, int]:
        scale = min(target[1] / size[1], target[0] / size[0])
        shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return shown, shown - target[0] * target[1]

    return max(pinpoints, key=shown_and_wasted)  # the first of equals
