"""An image encoder and a text encoder together: where both are of one published dual encoder, it is read as a whole."""

from dataclasses import dataclass

from vlm.backbones.hf_loading import load_config, read_scalars
from vlm.backbones.image import build_image_encoder
from vlm.backbones.image_encoder import ImageEncoder
from vlm.backbones.image_open_clip import create_open_clip, open_clip_image
from vlm.backbones.joined_layers import join_text_layers
from vlm.backbones.names import parse_part_name
from vlm.backbones.text import TextEncoder, build_text_encoder, open_clip_text
from vlm.errors import VlmError
from vlm.model_spec import ImageEncoderSpec, TextEncoderSpec

# `model_type` of a published dual encoder -> the scalars that belong to neither tower.
_SCALARS = {"clip": ("logit_scale",), "siglip": ("logit_scale", "logit_bias")}


@dataclass(frozen=True)
class Pair:
    """logits: logarithm of the scale and the bias (or None) of the dual encoder both come from; None if of none."""

    image: ImageEncoder
    text: TextEncoder
    logits: tuple[float, float | None] | None = None


def build_pair(image: ImageEncoderSpec, text: TextEncoderSpec) -> Pair:
    """Both frozen encoders, on the CPU in the checkpoint's float type.

    Raises VlmError as `build_image_encoder` and `build_text_encoder` do, and for a published dual encoder that lacks a
    key which neither of its towers needs alone.
    """
    if image.name != text.name:
        encoder = build_image_encoder(image, image.resize)
        own = build_text_encoder(text.name)
        tower = join_text_layers(own.tower, text.pool_layers, text.name)
        return Pair(encoder, own if tower is own.tower else own.with_tower(tower))
    if image.pool_layers or text.pool_layers:
        raise VlmError(f"{text.name}: pool_layers: a published dual encoder has embeddings of its own; leave it out")
    part = parse_part_name(text.name)
    if part.source == "open_clip":
        options = {"force_image_size": image.image_size, "force_custom_text": True, "pretrained_text": False}
        model = create_open_clip(part.reference, **options)
        tower, transform = open_clip_image(model, part.reference, image.layer)
        if image.resize is not None:
            transform = transform.with_resize(image.resize)
        encoder = ImageEncoder(text.name, tower, transform, image.layer, image.drop_cls)
        scale, bias = model.logit_scale.detach(), getattr(model, "logit_bias", None)
        trained = "/" in part.reference
        logits = (float(scale), None if bias is None else float(bias.detach())) if trained else None
        return Pair(encoder, open_clip_text(model, part.reference), logits)
    pair = Pair(build_image_encoder(image, image.resize), build_text_encoder(text.name))
    kind = load_config(part.reference).model_type if part.source == "hf" else None
    if kind not in _SCALARS:
        return pair
    # An image tower alone may lack its projection; without it there is no joint space.
    if kind == "clip" and image.layer == -1 and getattr(pair.image.tower, "projection", None) is None:
        raise VlmError(f"{text.name}: the checkpoint lacks the key visual_projection.weight")
    found = read_scalars(part.reference, _SCALARS[kind])
    return Pair(pair.image, pair.text, (found["logit_scale"], found.get("logit_bias")))
