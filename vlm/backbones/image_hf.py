"""Image encoders from transformers: a table of families says where each keeps its layers."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Resampling
from torch import nn

from vlm.backbones.hf_loading import load_config, load_strictly
from vlm.backbones.image_encoder import Tower
from vlm.backbones.layers import check_layer
from vlm.backbones.whole_checkpoint import read_whole
from vlm.data.transforms import ImageTransform
from vlm.errors import VlmError, did_you_mean

_OTHER_TOWER = (r"(clip\.|siglip\.)?text_(model|projection)\b.*", r"(clip\.|siglip\.)?logit_(scale|bias)")


@dataclass(frozen=True)
class Family:
    """How one family of transformers vision models is built, cut and read.

    model: class name in transformers. inner: the attribute that holds the tower, "" for the model itself; the rest is
    relative to it. layers: its list of layers. norm: the final norm. head: what pools, where it can be dropped.
    projection: of the outer model, from the pooled output to the joint space.
    prefix: tokens in front of the patches, registers aside. norm_tokens: the model applies its norm to the pooled token
    only, so the tokens still need it (CLIP). interpolates: forward takes `interpolate_pos_encoding`.
    bare: the final norm is not the tower's but belongs to what reads it, so no token has passed it (BLIP-2).
    unused, optional: keys that a checkpoint may have left over, or lack.
    """

    model: str
    layers: str
    norm: str
    prefix: int = 0
    inner: str = ""
    head: str | None = None
    projection: str | None = None
    norm_tokens: bool = False
    interpolates: bool = False
    bare: bool = False
    unused: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


_CLASSIFIER = (r"classifier\..*", r"(.*\.)?mask_token")
_CLIP = Family(
    "CLIPVisionModelWithProjection",
    "encoder.layers",
    "post_layernorm",
    prefix=1,
    inner="vision_model",
    projection="visual_projection",
    norm_tokens=True,
    interpolates=True,
    unused=_OTHER_TOWER,
    optional=(r"visual_projection\.weight",),
)
_SIGLIP = Family(
    "SiglipVisionModel", "encoder.layers", "post_layernorm", head="head", interpolates=True, unused=_OTHER_TOWER
)
_BLIP2 = {"prefix": 1, "interpolates": True, "bare": True, "optional": (r"post_layernorm\..*",)}
_DINO = {"prefix": 1, "unused": _CLASSIFIER, "optional": (r".*mask_token",)}

# What `model_type` in a configuration means.
FAMILIES: dict[str, Family] = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "vit": Family(
        "ViTModel",
        "layers",
        "layernorm",
        prefix=1,
        head="pooler",
        interpolates=True,
        unused=_CLASSIFIER,
        optional=(r"pooler\..*",),
    ),
    "dinov2": Family("Dinov2Model", "encoder.layer", "layernorm", **_DINO),  # type: ignore[arg-type]
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", "encoder.layer", "layernorm", **_DINO),  # type: ignore[arg-type]
    "blip_2_vision_model": Family("Blip2VisionModel", "encoder.layers", "post_layernorm", **_BLIP2),  # type: ignore[arg-type]
    "instructblip_vision_model": Family("InstructBlipVisionModel", "encoder.layers", "post_layernorm", **_BLIP2),  # type: ignore[arg-type]
    "convnext": Family("ConvNextModel", "encoder.stages", "layernorm", unused=_CLASSIFIER),
    "convnextv2": Family("ConvNextV2Model", "encoder.stages", "layernorm", unused=_CLASSIFIER),
}


class HfTower(Tower):
    """A transformers vision model, cut behind the layer that is read; `lacking` names keys its checkpoint left out."""

    def __init__(self, model: Any, family: Family, layer: int, size: tuple[int, int], lacking: set[str]) -> None:
        super().__init__()
        self.last = layer == -1
        tower = model.get_submodule(family.inner)
        config = tower.config
        layers = tower.get_submodule(family.layers)
        check_layer(f"hf:{model.config.name_or_path}", layer, len(layers))
        if not self.last:
            del layers[len(layers) + layer + 1 :]
        self.bare = family.bare
        if not self.last or family.bare:
            tower.set_submodule(family.norm, nn.Identity())
        if family.head and not self._keeps(family.head, lacking):
            setattr(tower, family.head, None)
            if hasattr(tower, "use_head"):
                tower.use_head = False
        keeps_projection = family.projection and self._keeps(family.projection, lacking)
        self.projection = model.get_submodule(family.projection) if keeps_projection else None
        self.norm = tower.get_submodule(family.norm) if self.last and family.norm_tokens else None
        self.model = tower
        self.arguments: dict[str, bool] = {}
        if hasattr(config, "patch_size") and not hasattr(config, "num_stages"):  # a vision transformer
            patch = _pair(config.patch_size)
            self.patch_grid = (size[0] // patch[0], size[1] // patch[1])
            self.num_prefix_tokens = family.prefix + int(getattr(config, "num_register_tokens", 0))
            if family.interpolates and size != _pair(config.image_size):
                self.arguments["interpolate_pos_encoding"] = True

    def _keeps(self, part: str, lacking: set[str]) -> bool:
        return self.last and not any(key.startswith(part + ".") for key in lacking)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = self.model(pixels, **self.arguments)
        features = output.last_hidden_state
        if self.norm is not None:
            features = self.norm(features)
        if not self.last or self.bare:
            return features, None
        pooled = output.pooler_output
        if pooled is None and self.num_prefix_tokens:
            pooled = features[:, 0]
        return features, pooled if self.projection is None else self.projection(pooled)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def build_hf(reference: str, layer: int, image_size: int | None) -> tuple[Tower, ImageTransform]:
    """The vision tower of a hub id or local folder; also out of a whole CLIP, SigLIP, LLaVA or BLIP-2."""
    import transformers

    options: dict[str, Any] = {}
    if checkpoint := read_whole(reference):
        options["state_dict"] = checkpoint.state("vision")
        if not options["state_dict"]:  # it lies beside its language model
            return build_hf(checkpoint.tower, layer, image_size)
        config = checkpoint.vision_config or load_config(checkpoint.tower)
        options["config"] = config = getattr(config, "vision_config", config)
    else:
        config = load_config(reference)
    if config.model_type not in FAMILIES:
        hint = did_you_mean(config.model_type, FAMILIES)
        raise VlmError(f"hf:{reference}: no image encoder can be made of a {config.model_type!r} model{hint}")
    family = FAMILIES[config.model_type]
    if options:
        inner = f"{family.inner}." if family.inner else ""
        options["state_dict"] = {inner + key: tensor for key, tensor in options["state_dict"].items()}
    model, lacking = load_strictly(
        getattr(transformers, family.model), reference, family.unused, family.optional, **options
    )
    transform = hf_transform(checkpoint.tower if checkpoint else reference)
    own = getattr(model.config, "image_size", None)
    if image_size is not None:
        transform = transform.with_size(image_size)
    elif family.interpolates and own is not None and _pair(own) != transform.size:
        raise VlmError(
            f"hf:{reference}: its preprocessor makes {transform.size[0]} pixels but the model reads {own}; "
            "set `image_size`"
        )
    return HfTower(model, family, layer, transform.size, lacking), transform


def hf_transform(reference: str) -> ImageTransform:
    """The evaluation transform that `preprocessor_config.json` describes, computed on Pillow images."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(reference, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise VlmError(
            f"hf:{reference}: its image preprocessor cannot be read: {str(error).splitlines()[0]}"
        ) from error
    size, crop = processor.size, getattr(processor, "crop_size", None) or {}
    shortest = size.get("shortest_edge")
    scaled = (shortest, shortest) if shortest else (size.get("height"), size.get("width"))
    if not all(scaled):
        raise VlmError(f"hf:{reference}: resizing to {dict(size)} is not supported")
    final, resize, crop_pct = scaled, "shortest" if shortest else "square", 1.0
    if getattr(processor, "crop_pct", None):  # ConvNeXt: its size is that of the crop, and from 384 on it squashes
        resize, crop_pct = ("shortest", processor.crop_pct) if shortest < 384 else ("square", 1.0)
    elif getattr(processor, "do_center_crop", None) and crop:
        final = (crop.get("height"), crop.get("width"))
        crop_pct = _crop_pct(final[0], scaled[0])
    elif shortest:
        raise VlmError(f"hf:{reference}: pictures of different shapes (no centre crop) are not supported")
    if type(processor).__name__.startswith("LlavaImageProcessor") and processor.do_pad:
        resize = "pad"
    return ImageTransform(
        size=(int(final[0]), int(final[1])),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        interpolation=Resampling(int(processor.resample)).name.lower(),  # type: ignore[arg-type]
        resize=resize,  # type: ignore[arg-type]
        crop_pct=crop_pct,
        crop_rounding="floor",
    )


def _crop_pct(crop: int, scaled: int) -> float:
    """crop / scaled, nudged so that floor(crop / it) gives `scaled` back in floating point."""
    share = crop / scaled
    while math.floor(crop / share) < scaled:
        share = math.nextafter(share, 0.0)
    return share
