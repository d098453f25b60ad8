"""Published BLIP-2 and InstructBLIP: one checkpoint as the specification of a model of ours, its bridge's weights."""

from typing import Any

import torch
from torch import Tensor

from vlm.backbones.blip2_checkpoint import Blip2Checkpoint, read_blip2
from vlm.bridges.qformer_keys import from_lavis
from vlm.errors import VlmError
from vlm.model_spec import (
    GenerativeSpec,
    ImageEncoderSpec,
    LanguageModelSpec,
    QFormerBridgeSpec,
    QFormerProjectionSpec,
    QFormerSpec,
)
from vlm.models.build import build_model
from vlm.models.freezing import load_trained_state
from vlm.models.generative import GenerativeModel
from vlm.models.qformer_model import QFormerModel

# How the authors asked: (question, caption).
_PROMPTS = {
    "decoder": ("<image>Question: {question} Answer:", "<image>a photo of"),
    "t5": ("<image>Question: {question} Short answer:", "<image>a photo of"),
    "instruction": ("<image>Question: {question} Short answer:", "<image>A short image caption."),
}


def load_blip2(
    reference: str, device: str | torch.device | None = None, precision: str = "auto"
) -> GenerativeModel | QFormerModel:
    """BLIP-2 (generative or image-text retrieval) or InstructBLIP in transformers' layout, a hub id or local folder.

    Frozen and in eval mode. A retrieval model cannot caption: the head that says words is not published, nor is the
    temperature, which stays at .07. Raises VlmError on keys that are missing or left over.
    """
    checkpoint = read_blip2(reference)
    model = build_model(blip2_spec(checkpoint), device=device, precision=precision)
    if checkpoint.retrieval:
        model.has_word_head = False
        return model
    load_trained_state(model, projection(checkpoint), where=reference, partial=True)
    return model


def projection(checkpoint: Blip2Checkpoint) -> dict[str, Tensor]:
    """The linear layer to the language model by our names. Raises VlmError if it is missing."""
    found = {key: value for key, value in bridge_state(checkpoint).items() if ".language_projection." in key}
    if lacking := {"weight", "bias"} - {key.rpartition(".")[2] for key in found}:
        raise VlmError(f"{checkpoint.reference}: lacks language_projection.{min(lacking)}")
    return found


def bridge_state(checkpoint: Blip2Checkpoint) -> dict[str, Tensor]:
    """The Q-Former with all that belongs to it by our names."""
    return from_lavis(checkpoint.state("bridge"), checkpoint.reference)


def blip2_spec(checkpoint: Blip2Checkpoint) -> GenerativeSpec | QFormerSpec:
    """The model that a checkpoint describes; its parts are taken out of the checkpoint by its own name."""
    name = f"hf:{checkpoint.reference}"
    image_encoder = ImageEncoderSpec(name=name, layer=-1, drop_cls=False)
    parts: dict[str, Any] = {
        "init": name,
        "num_queries": checkpoint.num_queries,
        "cross_attention_every": checkpoint.qformer_config.cross_attention_frequency,
        "dropout": checkpoint.qformer_config.hidden_dropout_prob,
    }
    if checkpoint.retrieval:
        bridge = QFormerBridgeSpec(**parts, embed_width=checkpoint.embed_width)
        longest = checkpoint.qformer_config.max_position_embeddings
        lengths = {"text_length": min(32, longest), "match_length": min(35, longest)}
        return QFormerSpec(image_encoder=image_encoder, bridge=bridge, **lengths)
    is_t5 = checkpoint.text_config.is_encoder_decoder
    kind = "instruction" if checkpoint.instruction else "t5" if is_t5 else "decoder"
    question, caption = _PROMPTS[kind]
    return GenerativeSpec(
        image_encoder=image_encoder,
        bridge=QFormerProjectionSpec(**parts, instruction=checkpoint.instruction),
        language_model=LanguageModelSpec(name=name),
        template="blip2_t5" if is_t5 else "instructblip" if checkpoint.instruction else "blip2_opt",
        question_prompt=question,
        caption_prompt=caption,
    )
