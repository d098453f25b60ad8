"""Published LLaVA: one checkpoint as the specification of a model of ours, its projector as the bridge's weights."""

from typing import Any

import torch

from vlm.backbones.language import load_tokenizer
from vlm.backbones.llava_checkpoint import LlavaCheckpoint, read_llava
from vlm.errors import VlmError
from vlm.model_spec import GenerativeSpec, ImageEncoderSpec, LanguageModelSpec, ProjectionSpec
from vlm.models.build import build_model
from vlm.models.freezing import load_trained_state
from vlm.models.generative import GenerativeModel

# How LLaVA was asked for captions in its instruction data.
_CAPTION_PROMPT = "<image>\nProvide a one-sentence caption for the provided image."


def load_llava(reference: str, device: str | torch.device | None = None, precision: str = "auto") -> GenerativeModel:
    """LLaVA-1.0, 1.5 or 1.6 from a hub id or local folder, frozen and in eval mode.

    Transformers' layout, or the authors': merged, LoRA beside its base, or the projector beside its language model.
    The template is Vicuna's for Llama, else the tokeniser's own; one of our exports names it.
    Raises VlmError on keys that are missing or left over.
    """
    checkpoint = read_llava(reference)
    model = build_model(llava_spec(checkpoint), device=device, precision=precision)
    state = {f"bridge.{key}": tensor for key, tensor in checkpoint.state("bridge").items()}
    wanted = {f"bridge.{key}" for key in model.bridge.state_dict()}
    if missing := sorted(wanted - set(state)):
        raise VlmError(f"{reference}: the projector lacks {', '.join(missing)}")
    load_trained_state(model, state, where=reference, partial=True)
    return model


def llava_spec(checkpoint: LlavaCheckpoint) -> GenerativeSpec:
    """The model that a checkpoint describes; its parts are taken out of the checkpoint by its own name."""
    name = f"hf:{checkpoint.reference}"
    kind, depth = checkpoint.projector
    prompts: dict[str, Any] = {"caption_prompt": _CAPTION_PROMPT, **checkpoint.prompts}
    if "template" not in prompts:
        prompts["template"] = _template(checkpoint)
    return GenerativeSpec(
        image_encoder=ImageEncoderSpec(
            name=name,
            layer=checkpoint.layer,
            drop_cls=checkpoint.drop_cls,
            resize=checkpoint.resize,
            grid_pinpoints=checkpoint.pinpoints,
        ),
        bridge=ProjectionSpec(type=kind, depth=depth),
        language_model=LanguageModelSpec(name=name),
        **prompts,
    )


def _template(checkpoint: LlavaCheckpoint) -> str:
    if checkpoint.text_config.model_type == "llama":
        return "vicuna_v1"
    tokenizer = load_tokenizer(checkpoint.base or checkpoint.reference, checkpoint.reference)
    return "tokenizer" if tokenizer.chat_template else "chatml"
