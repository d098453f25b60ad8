"""Models that others published, by the `model_type` in their `config.json`: a hub id or a local folder."""

from collections.abc import Callable

import torch

from vlm.backbones.hf_loading import read_config
from vlm.errors import VlmError, did_you_mean
from vlm.models.published_blip2 import load_blip2
from vlm.models.published_dual_encoder import load_dual_encoder
from vlm.models.published_llava import load_llava
from vlm.models.tasks import TaskModel

# (hub id or local folder, device or None for the default, precision) -> the model, frozen and in eval mode.
Loader = Callable[[str, str | torch.device | None, str], TaskModel]

# `model_type` -> its loader. Another family is one more entry.
PUBLISHED: dict[str, Loader] = {
    "clip": load_dual_encoder,
    "siglip": load_dual_encoder,
    "blip-2": load_blip2,
    "instructblip": load_blip2,
    "llava": load_llava,
    "llava_llama": load_llava,
    "llava_mistral": load_llava,
    "llava_qwen2": load_llava,
    "llava_next": load_llava,
}


def load_published(reference: str, device: str | torch.device | None = None, precision: str = "auto") -> TaskModel:
    """The model of a hub id or local folder. Raises VlmError if there is none, or none of a known kind."""
    kind = str(read_config(reference).get("model_type", ""))
    if kind not in PUBLISHED:
        raise VlmError(f"{reference}: no model can be made of model_type {kind!r}{did_you_mean(kind, PUBLISHED)}")
    return PUBLISHED[kind](reference, device, precision)
