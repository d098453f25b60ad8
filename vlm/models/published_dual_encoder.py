"""Published dual encoders (CLIP, SigLIP, SigLIP 2): one checkpoint as the specification of a model of ours."""

import torch

from vlm.model_spec import DualEncoderSpec, DualTowerSpec, ImageEncoderSpec, TextEncoderSpec
from vlm.models.build import build_model
from vlm.models.dual_encoder import DualEncoder


def load_dual_encoder(reference: str, device: str | torch.device | None = None, precision: str = "auto") -> DualEncoder:
    """CLIP or SigLIP in transformers' layout, from a hub id or local folder."""
    return build_published_dual_encoder(f"hf:{reference}", device, precision)


def build_published_dual_encoder(
    name: str, device: str | torch.device | None = None, precision: str = "auto"
) -> DualEncoder:
    """The dual encoder of `hf:ID_OR_FOLDER` or `open_clip:ARCH/TAG_OR_FILE`, frozen and in eval mode.

    Raises VlmError on an unknown name (with the nearest ones) and on keys that are missing or left over.
    """
    spec = DualEncoderSpec(
        image_encoder=ImageEncoderSpec(name=name),
        text_encoder=TextEncoderSpec(name=name),
        bridge=DualTowerSpec(image_projection="none", text_projection="none"),
    )
    model = build_model(spec, device=device, precision=precision)
    assert isinstance(model, DualEncoder)
    return model
