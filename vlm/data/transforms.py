"""From a picture to the pixels an image encoder expects: its own evaluation transform, and one for training."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from vlm.errors import VlmError, did_you_mean

Resize = Literal["shortest", "square", "pad", "anyres"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


@dataclass(frozen=True)
class ImageTransform:
    """How one image encoder wants its pictures: size, resizing, crop and normalisation.

    size: (height, width) of the result, in pixels.
    resize: `shortest`: shorter edge to size / crop_pct, then the centre (CLIP, timm); `square`: both edges to
        size / crop_pct whatever the shape, then the centre (SigLIP); `pad`: first a square with bars of the mean
        colour, then as `square` (LLaVA-1.5); `anyres`: as `square`, for `vlm.data.tiling` adds what that loses.
    crop_rounding: an odd margin is halved by `round` as in torchvision (timm, open_clip) or `floor` (transformers).
    train_scale, train_ratio, train_flip: share of the area and aspect ratio of the training crop, and how often it is
        mirrored (BLIP-2: .5 to 1, 3/4 to 4/3, half of the time).
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Interpolation = "bicubic"
    resize: Resize = "shortest"
    crop_pct: float = 1.0
    crop_rounding: Literal["round", "floor"] = "round"
    train_scale: tuple[float, float] = (0.5, 1.0)
    train_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    train_flip: float = 0.5

    def __post_init__(self) -> None:
        for key, allowed in (("resize", get_args(Resize)), ("interpolation", get_args(Interpolation))):
            if getattr(self, key) not in allowed:
                hint = did_you_mean(str(getattr(self, key)), allowed)
                raise VlmError(f"image transform: unknown {key} {getattr(self, key)!r}{hint}")

    def eval(self, image: Image.Image) -> torch.Tensor:
        """The picture as the encoder was trained to see it: [3, H, W] float32, always the same."""
        image = _rgb(image)
        if self.resize == "pad":
            image = _pad_to_square(image, tuple(int(255 * m) for m in self.mean))
        return self._normalise(self._centre(self._resized(image)))

    def train(self, image: Image.Image, generator: torch.Generator) -> torch.Tensor:
        """A random crop of the picture, resized and perhaps mirrored: [3, H, W] float32; `generator` decides alone."""
        image = _rgb(image)
        top, left, height, width = random_crop_box(
            (image.height, image.width), self.train_scale, self.train_ratio, generator
        )
        image = F.resized_crop(image, top, left, height, width, list(self.size), self._mode)
        if torch.rand(1, generator=generator).item() < self.train_flip:
            image = F.hflip(image)
        return self._normalise(image)

    def with_size(self, size: int) -> "ImageTransform":
        """The same transform for `size` x `size` pixels."""
        return replace(self, size=(size, size))

    def with_resize(self, resize: str) -> "ImageTransform":
        """The same transform with another way of resizing; `square` and `pad` then show the whole picture."""
        crop_pct = self.crop_pct if resize == self.resize or resize == "shortest" else 1.0
        return replace(self, resize=resize, crop_pct=crop_pct)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `model.yaml` and the keys of caches; `from_dict` reads them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ImageTransform":
        """The transform that `to_dict` described. Raises VlmError on an unknown key."""
        for key in values:
            if key not in cls.__dataclass_fields__:
                raise VlmError(f"image transform: unknown key {key!r}{did_you_mean(key, cls.__dataclass_fields__)}")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)

    @property
    def _mode(self) -> InterpolationMode:
        return InterpolationMode(self.interpolation)

    def _resized(self, image: Image.Image) -> Image.Image:
        height, width = (math.floor(edge / self.crop_pct) for edge in self.size)
        if self.resize != "shortest":
            return F.resize(image, [height, width], self._mode)
        if height == width:
            return F.resize(image, [height], self._mode)
        ratio = min(image.height / height, image.width / width)
        return F.resize(image, [round(image.height / ratio), round(image.width / ratio)], self._mode)

    def _centre(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        if self.crop_rounding == "round":
            return F.center_crop(image, [height, width])
        return F.crop(image, (image.height - height) // 2, (image.width - width) // 2, height, width)

    def _normalise(self, image: Image.Image) -> torch.Tensor:
        """8-bit pixels looked up in a table of what torchvision makes of each value: the same bits in a third of the
        time, and outside of Python's lock, so that threads do not wait for each other."""
        pixels = np.asarray(image)  # [H, W, 3]
        out = np.empty((3, image.height, image.width), np.float32)
        for channel, table in enumerate(self._normalised):
            np.take(table, pixels[..., channel], out=out[channel], mode="clip")  # any other mode copies `out`
        return torch.from_numpy(out)

    @cached_property
    def _normalised(self) -> np.ndarray:
        """[3, 256]: what becomes of each value of each channel."""
        ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)  # [1, 256, 3]
        return F.normalize(F.to_tensor(ramp), list(self.mean), list(self.std))[:, 0].numpy()


def random_crop_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random part of a picture of `size` (height, width).

    Area uniform in `scale`, aspect ratio log-uniform in `ratio`, ten tries, else the largest central part of an allowed
    ratio (Szegedy et al. 2015). Draws the same numbers in the same order as torchvision, but from `generator`: torch's
    global state, which threads share, stays as it is.
    """
    height, width = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*scale, generator=generator).item()
        aspect = torch.exp(torch.empty(1).uniform_(low, high, generator=generator)).item()
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(torch.randint(0, height - crop_height + 1, (1,), generator=generator))
            left = int(torch.randint(0, width - crop_width + 1, (1,), generator=generator))
            return top, left, crop_height, crop_width
    crop_width = min(width, max(1, round(height * ratio[1])))
    crop_height = min(height, max(1, round(width / ratio[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square of its longer edge (LLaVA-1.5: centred by integer division)."""
    edge = max(image.size)
    if image.width == image.height:
        return image
    square = Image.new("RGB", (edge, edge), colour)
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return square
