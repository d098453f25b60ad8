"""Image encoders by name: one builder a source."""

from collections.abc import Callable

from vlm.backbones.image_encoder import ImageEncoder, ImageFeatures, Tower
from vlm.backbones.image_hf import build_hf
from vlm.backbones.image_open_clip import build_open_clip
from vlm.backbones.image_timm import build_starter, build_timm
from vlm.backbones.joined_layers import join_image_layers
from vlm.backbones.names import parse_part_name
from vlm.data.transforms import ImageTransform
from vlm.model_spec import ImageEncoderSpec

__all__ = ["IMAGE_SOURCES", "ImageEncoder", "ImageFeatures", "Tower", "build_image_encoder"]

# What stands behind `SOURCE:` -> (reference, layer, image_size) -> tower, its evaluation transform.
IMAGE_SOURCES: dict[str, Callable[[str, int, int | None], tuple[Tower, ImageTransform]]] = {
    "timm": build_timm,
    "open_clip": build_open_clip,
    "hf": build_hf,
    "starter": build_starter,
}


def build_image_encoder(spec: ImageEncoderSpec, resize: str | None = None) -> ImageEncoder:
    """The frozen image encoder that `spec` names, on the CPU in the checkpoint's float type.

    `timm:NAME_OR_FOLDER`, `open_clip:ARCH/TAG_OR_FILE` (no tag: random weights), `hf:ID_OR_FOLDER`,
    `starter:efficientnet_lite0`. Layers behind `spec.layer` are dropped. Tokens of layer -1 have passed the model's
    final norm, earlier ones have not. The pooled embedding is the model's own (with its projection where the
    checkpoint has one), or of `spec.pool_layers`, and None for an earlier layer.
    resize: overrides the transform's way of resizing (`shortest`, `square`, `pad`).
    Raises VlmError on an unknown name (with the nearest ones), a layer the model lacks, or a key that is missing or
    left over.
    """
    part = parse_part_name(spec.name, tuple(IMAGE_SOURCES))
    tower, transform = IMAGE_SOURCES[part.source](part.reference, spec.layer, spec.image_size)
    if resize is not None:
        transform = transform.with_resize(resize)
    tower = join_image_layers(tower, spec.pool_layers, spec.name)
    return ImageEncoder(spec.name, tower, transform, spec.layer, spec.drop_cls, spec.pool_layers)
