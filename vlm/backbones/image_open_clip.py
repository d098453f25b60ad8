"""Image encoders from open_clip: the visual tower of a dual encoder."""

import logging
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from vlm.backbones.image_encoder import Tower
from vlm.backbones.image_timm import TimmTower
from vlm.backbones.layers import check_layer
from vlm.data.transforms import ImageTransform
from vlm.errors import VlmError, did_you_mean


class OpenClipViT(Tower):
    """open_clip's own vision transformer."""

    num_prefix_tokens = 1

    def __init__(self, visual: Any, layer: int, name: str) -> None:
        super().__init__()
        check_layer(f"open_clip:{name}", layer, len(visual.transformer.resblocks))
        self.last = layer == -1
        # CoCa's attentional pooler comes before its norm, which therefore does not fit the tokens.
        self.norm = self.last and visual.attn_pool is None
        if not self.last:
            visual.prune_intermediate_layers([layer], prune_norm=True, prune_head=True)
            visual.attn_pool = None
        self.visual = visual
        self.patch_grid = (int(visual.grid_size[0]), int(visual.grid_size[1]))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = self.visual.forward_intermediates(
            pixels,
            indices=[-1],
            normalize_intermediates=self.norm,
            intermediates_only=not self.last,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        tokens = torch.cat([output["image_intermediates_prefix"][0], output["image_intermediates"][0]], dim=1)
        pooled = output.get("image_features")
        return tokens, pooled if pooled is not None and pooled.ndim == 2 else None


class OpenClipResNet(Tower):
    """CLIP's modified ResNet."""

    def __init__(self, visual: nn.Module, layer: int, name: str) -> None:
        super().__init__()
        if layer != -1:
            raise VlmError(f"open_clip:{name} is a ResNet, which is read at layer -1 only")
        self.visual = visual

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = self.visual.forward_intermediates(pixels, indices=[-1])
        return output["image_intermediates"][0], output["image_features"]


def create_open_clip(reference: str, **options: Any) -> Any:
    """The open_clip model `ARCH/TAG`, `ARCH/FILE`, or `ARCH` with random weights. Raises VlmError on unknown names.

    A tag's QuickGELU is honoured whatever the architecture's name says; open_clip only warns and computes
    something else. A file says nothing of its preprocessing: what most of the architecture's tags have is taken.
    """
    import open_clip

    arch, tag = check_arch(reference)
    file = Path(tag).expanduser()
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if tag and not file.is_file():
        known = open_clip.get_pretrained_cfg(arch, tag)
        if not known:
            raise VlmError(f"open_clip has no weights {tag!r} for {arch}, nor is it a file{did_you_mean(tag, tags)}")
        wanted, given = bool(known.get("quick_gelu")), bool(open_clip.get_model_config(arch).get("quick_gelu"))
        if given and not wanted:
            raise VlmError(
                f"open_clip:{reference}: these weights were trained without QuickGELU; "
                f"use open_clip:{arch.removesuffix('-quickgelu')}/{tag}"
            )
        options["force_quick_gelu"] = wanted
    else:
        options["force_preprocess_cfg"] = _usual_preprocessing([open_clip.get_pretrained_cfg(arch, t) for t in tags])
    pretrained = (str(file) if file.is_file() else tag) if tag else None
    disabled = logging.root.manager.disable
    # It warns about random weights even where they are asked for, and says twice what it raises.
    logging.disable(max(disabled, logging.ERROR))
    try:
        model = open_clip.create_model(arch, pretrained=pretrained, pretrained_image=False, **options)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise VlmError(f"open_clip:{reference}: {' '.join(str(error).split())[:500]}") from error
    finally:
        logging.disable(disabled)
    if tag and getattr(model, "logit_bias", None) is not None and not model.logit_bias.any():
        # open_clip makes up a bias of zero.
        raise VlmError(f"open_clip:{reference}: the weights lack the key logit_bias, so they are not of {arch}")
    return model


def check_arch(reference: str) -> tuple[str, str]:
    """Architecture and tag of `ARCH/TAG`. Raises VlmError for an architecture open_clip does not know."""
    import open_clip

    arch, _, tag = reference.partition("/")
    if arch not in open_clip.list_models():
        raise VlmError(f"open_clip has no architecture {arch!r}{did_you_mean(arch, open_clip.list_models())}")
    return arch, tag


def _usual_preprocessing(known: list[dict[str, Any]]) -> dict[str, Any]:
    """What most of an architecture's published weights expect of a picture; {} where none are published."""
    keys = ("mean", "std", "interpolation", "resize_mode")
    kinds = Counter(tuple(config[key] for key in keys) for config in known)
    return dict(zip(keys, kinds.most_common(1)[0][0], strict=True)) if kinds else {}


def build_open_clip(reference: str, layer: int, image_size: int | None) -> tuple[Tower, ImageTransform]:
    """The visual tower of `ARCH/TAG`, with its projection as part of the pooled embedding."""
    return open_clip_image(create_open_clip(reference, force_image_size=image_size), reference, layer)


def open_clip_image(model: Any, reference: str, layer: int) -> tuple[Tower, ImageTransform]:
    """The visual tower of an open_clip model, and its transform."""
    return visual_tower(model.visual, layer, reference), open_clip_transform(model, reference)


def visual_tower(visual: Any, layer: int, name: str) -> Tower:
    """The `visual` of an open_clip model as a tower. Raises VlmError for a kind that is not supported."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, VisionTransformer):
        return OpenClipViT(visual, layer, name)
    if isinstance(visual, TimmModel):
        return TimmTower(visual.trunk, layer, name, head=visual.head)
    if isinstance(visual, ModifiedResNet):
        return OpenClipResNet(visual, layer, name)
    raise VlmError(f"open_clip:{name}: its visual tower {type(visual).__name__} is not supported")


def open_clip_transform(model: nn.Module, name: str) -> ImageTransform:
    """The evaluation transform in an open_clip model's own configuration, and open_clip's crops for training."""
    import open_clip

    config = open_clip.get_model_preprocess_cfg(model)
    modes = {"shortest": "shortest", "squash": "square"}
    if config["resize_mode"] not in modes:
        raise VlmError(f"open_clip:{name}: resize mode {config['resize_mode']!r} is not supported")
    size = config["size"]
    return ImageTransform(
        size=(size, size) if isinstance(size, int) else tuple(size),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        resize=modes[config["resize_mode"]],  # type: ignore[arg-type]
        train_scale=(0.9, 1.0),
        train_flip=0.0,
    )
