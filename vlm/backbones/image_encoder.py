"""What every image encoder is: pixels in, tokens and perhaps one pooled embedding out."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlm.data.transforms import ImageTransform
from vlm.errors import VlmError

_SAMPLES = 4096  # values of each tensor that enter the fingerprint


@dataclass
class ImageFeatures:
    """tokens: [B, N, D]. pooled: [B, P], or None where the encoder has no embedding of the whole picture."""

    tokens: torch.Tensor
    pooled: torch.Tensor | None = None


class Tower(nn.Module):
    """One library's vision model, cut behind the layer that is read.

    forward(pixels [B, 3, H, W]) returns (features, pooled [B, P] or None), where features is [B, prefix + N, D], or
    [B, D, h, w] from a convolutional network.
    num_prefix_tokens: CLS and register tokens in front of the patches.
    patch_grid: (h, w) of the patch tokens; None for feature maps, which show it.
    """

    num_prefix_tokens: int = 0
    patch_grid: tuple[int, int] | None = None

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise NotImplementedError


class ImageEncoder(nn.Module):
    """A vision model behind one protocol; frozen when built (no gradient, eval mode, channels_last).

    name: the part's name. width: D. num_tokens: N, prefix tokens included. grid: (h, w) when N = h * w, else None.
    num_prefix_tokens: prefix tokens among the N (0 with drop_cls). pooled_width: P, or None. transform: how pictures
    become pixels.
    """

    def __init__(
        self,
        name: str,
        tower: Tower,
        transform: ImageTransform,
        layer: int,
        drop_cls: bool,
        pool_layers: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.transform = transform
        self.tower = tower
        self.layer = layer
        self.drop_cls = drop_cls
        self.pool_layers = pool_layers
        self.num_prefix_tokens = 0 if drop_cls else tower.num_prefix_tokens
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)
        with torch.no_grad():
            try:
                features, pooled = tower(torch.zeros(1, 3, *transform.size, dtype=self.dtype))
            except RuntimeError as error:  # a size the model was not made for, or that memory has no room for
                height, width = transform.size
                why = str(error).partition("\n")[0]
                raise VlmError(f"image encoder {name!r} cannot take pictures of {height} x {width}: {why}") from error
        grid = (features.shape[2], features.shape[3]) if features.ndim == 4 else tower.patch_grid
        self.grid: tuple[int, int] | None = None if self.num_prefix_tokens else grid
        tokens = self._select(features)
        self.num_tokens: int = tokens.shape[1]
        self.width: int = tokens.shape[2]
        self.pooled_width: int | None = None if pooled is None else pooled.shape[-1]

    def forward(self, pixels: torch.Tensor) -> ImageFeatures:
        """Pixels [B, 3, H, W] as `transform` makes them, in any float type, to tokens [B, N, D] and pooled [B, P]."""
        return in_pieces(lambda piece: self.read(self.tower, piece), pixels)

    def read(self, tower: Callable[[torch.Tensor], Any], pixels: torch.Tensor) -> ImageFeatures:
        """`forward` with something else in the tower's place that gives the same, such as its compiled form."""
        pixels = pixels.to(self.dtype).contiguous(memory_format=torch.channels_last)
        features, pooled = tower(pixels)
        return ImageFeatures(self._select(features), pooled)

    def _select(self, features: torch.Tensor) -> torch.Tensor:
        if features.ndim == 4:
            features = features.flatten(2).transpose(1, 2)  # [B, D, h, w] -> [B, h * w, D]
        return features[:, self.tower.num_prefix_tokens :] if self.drop_cls else features

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Training mode only where something learns: a frozen encoder keeps dropout off and its batch statistics."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    @property
    def dtype(self) -> torch.dtype:
        """The weights' float type, which pixels are cast to."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def options(self) -> dict[str, Any]:
        """Whatever besides the weights decides the features."""
        return {
            "name": self.name,
            "layer": self.layer,
            "drop_cls": self.drop_cls,
            "transform": self.transform.to_dict(),
            **({"pool_layers": sorted(self.pool_layers)} if self.pool_layers else {}),
        }

    def fingerprint(self) -> str:
        """16 hex digits that change with the name, the options or the weights: the key of the feature cache."""
        return fingerprint_of(self.tower, self.options())


def in_pieces(encode: Callable[[torch.Tensor], ImageFeatures], pixels: torch.Tensor) -> ImageFeatures:
    """`encode(pixels)`; on a CPU without gradients a few pictures at a time, whose activations stay in the cache and
    need no fresh memory (at batches of 64, a ViT-S/16 is 1.25 times as fast and EfficientNet-Lite0 1.8 times)."""
    size = 2 * torch.get_num_threads()
    if torch.is_grad_enabled() or pixels.device.type != "cpu" or len(pixels) <= size:
        return encode(pixels)
    pieces = [encode(piece) for piece in pixels.split(size)]
    pooled = [piece.pooled for piece in pieces if piece.pooled is not None]
    return ImageFeatures(torch.cat([piece.tokens for piece in pieces]), torch.cat(pooled) if pooled else None)


def fingerprint_of(module: nn.Module, options: dict[str, Any]) -> str:
    """16 hex digits of a module's state and its options; of large tensors, evenly spaced values and both ends."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        if flat.numel() > _SAMPLES:
            step = flat.numel() // _SAMPLES
            flat = torch.cat([flat[::step], flat[-1:]])
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
