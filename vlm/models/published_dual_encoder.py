"""Published dual encoders (CLIP, SigLIP, SigLIP 2): one checkpoint as the specification of a model of ours."""

import torch

from vlm.backbones.hf_loading import load_config
from vlm.backbones.image_open_clip import check_arch
from vlm.backbones.names import parse_part_name
from vlm.errors import VlmError, did_you_mean
from vlm.model_spec import DualEncoderSpec, DualTowerSpec, ImageEncoderSpec, TextEncoderSpec
from vlm.models.build import build_model
from vlm.models.dual_encoder import DualEncoder


def load_dual_encoder(reference: str, device: str | torch.device | None = None, precision: str = "auto") -> DualEncoder:
    """CLIP or SigLIP in transformers' layout, from a hub id or local folder, frozen and in eval mode."""
    return build_published(f"hf:{reference}", device, precision)


def load_open_clip(reference: str, device: str | torch.device | None = None, precision: str = "auto") -> DualEncoder:
    """The dual encoder `ARCH/TAG_OR_FILE` of open_clip, frozen and in eval mode."""
    import open_clip

    arch, tag = check_arch(reference)
    if not tag:
        hint = did_you_mean("", open_clip.list_pretrained_tags_by_model(arch))
        raise VlmError(f"open_clip:{arch} names no weights; give open_clip:{arch}/TAG or open_clip:{arch}/FILE{hint}")
    return build_published(f"open_clip:{reference}", device, precision)


def build_published(name: str, device: str | torch.device | None = None, precision: str = "auto") -> DualEncoder:
    """The model of `published_spec(name)`.

    Raises VlmError on an unknown name (with the nearest ones) and on keys that are missing or left over.
    """
    model = build_model(published_spec(name), device=device, precision=precision)
    assert isinstance(model, DualEncoder)
    return model


def published_spec(name: str) -> DualEncoderSpec:
    """What a recipe says to go on from `hf:ID_OR_FOLDER` or `open_clip:ARCH/TAG_OR_FILE`.

    The towers end in the joint space, so nothing is projected; the logits start where training left them.
    """
    part = parse_part_name(name, ("hf", "open_clip"))
    if part.source == "open_clip":
        import open_clip

        sigmoid = open_clip.get_model_config(check_arch(part.reference)[0]).get("init_logit_bias") is not None
    else:
        sigmoid = load_config(part.reference).model_type == "siglip"
    return DualEncoderSpec(
        image_encoder=ImageEncoderSpec(name=name),
        text_encoder=TextEncoderSpec(name=name),
        bridge=DualTowerSpec(
            image_projection="none",
            text_projection="none",
            logits="sigmoid" if sigmoid else "softmax",
            logit_scale="published",
        ),
    )
