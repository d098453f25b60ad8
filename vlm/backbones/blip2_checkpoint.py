"""Published BLIP-2 and InstructBLIP checkpoints in transformers' layout taken apart: vision tower, bridge (the Q-Former
with what belongs to it) and language model, with every key accounted for.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlm.backbones.checkpoint_files import MERGED, tensors_of
from vlm.backbones.checkpoint_parts import KeyTable, Part
from vlm.backbones.hf_loading import read_config
from vlm.errors import VlmError

# `model_type` of a whole checkpoint.
KINDS = ("blip-2", "instructblip")

# Language keys are those of transformers' causal or encoder-decoder model, vision keys those of its bare tower, bridge
# keys those of LAVIS (`vlm.bridges.qformer_keys`).
_KEYS = KeyTable(
    "BLIP-2",
    (
        (r"vision_model\.post_layernorm\.(.*)", "bridge", r"ln_vision.\1"),
        (r"vision_model\.(.*)", "vision", r"\1"),
        (r"language_model\.(.*)", "language", r"\1"),
        (r"(query_tokens|itm_head\..*)", "bridge", r"\1"),
        (r"qformer\.(?:embeddings\.)?layernorm\.(.*)", "bridge", r"Qformer.bert.embeddings.LayerNorm.\1"),
        (r"(?:qformer\.)?embeddings\.((?:word|position)_embeddings\..*)", "bridge", r"Qformer.bert.embeddings.\1"),
        (
            r"qformer\.encoder\.layer\.(\d+)\.(attention|crossattention)\.attention\.(.*)",
            "bridge",
            r"Qformer.bert.encoder.layer.\1.\2.self.\3",
        ),
        (r"qformer\.encoder\.layer\.(.*)", "bridge", r"Qformer.bert.encoder.layer.\1"),
        (r"language_projection\.(.*)", "bridge", r"llm_proj.\1"),
        (r"vision_projection\.(.*)", "bridge", r"vision_proj.\1"),
        (r"text_projection\.(.*)", "bridge", r"text_proj.\1"),
    ),
)


@dataclass(frozen=True)
class Blip2Checkpoint:
    """One checkpoint by the facts of its `config.json`.

    text_config, vision_config, qformer_config: transformers configurations. retrieval: image-text retrieval (BLIP-2's
    first stage, without the head that writes captions) rather than a language model. instruction: the Q-Former reads
    the instruction as well (InstructBLIP).
    """

    reference: str
    text_config: Any
    vision_config: Any
    qformer_config: Any
    num_queries: int
    embed_width: int
    retrieval: bool
    instruction: bool
    base: str | None = None

    @property
    def tower(self) -> str:
        """Where the image preprocessor lies."""
        return self.reference

    @property
    def has_text(self) -> bool:
        """Whether the Q-Former reads texts."""
        return self.retrieval or self.instruction

    def state(self, part: Part) -> dict[str, Tensor]:
        """The tensors of a part by the key that it has there. Raises VlmError that names keys which belong nowhere."""
        return _KEYS.part_of(tensors_of(self.reference, MERGED), part, self.reference)


def is_blip2(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is that of a whole BLIP-2 or InstructBLIP."""
    return config.get("model_type") in KINDS


def read_blip2(reference: str) -> Blip2Checkpoint:
    """The checkpoint of a hub id or local folder. Raises VlmError for what is no BLIP-2 or InstructBLIP."""
    from transformers import Blip2Config, InstructBlipConfig

    raw = read_config(reference)
    kind = str(raw.get("model_type", ""))
    if not is_blip2(raw):
        raise VlmError(f"{reference}: model_type {kind!r} is not BLIP-2 or InstructBLIP")
    config: Any = (InstructBlipConfig if kind == "instructblip" else Blip2Config).from_dict(raw)
    qformer = config.qformer_config
    for key, wanted in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-12)):
        if getattr(qformer, key) != wanted:
            raise VlmError(f"{reference}: qformer_config.{key}: {getattr(qformer, key)!r} is not supported: {wanted!r}")
    retrieval = any("ImageTextRetrieval" in name for name in raw.get("architectures") or [])
    told = raw.get("use_decoder_only_language_model")
    if told is not None and not retrieval and bool(told) == bool(config.text_config.is_encoder_decoder):
        is_t5 = config.text_config.is_encoder_decoder
        raise VlmError(
            f"{reference}: use_decoder_only_language_model: {str(told).lower()}, but its language model is a "
            f"{config.text_config.model_type!r}, which is {'an encoder-decoder' if is_t5 else 'decoder-only'}"
        )
    return Blip2Checkpoint(
        reference,
        config.text_config,
        config.vision_config,
        qformer,
        int(config.num_query_tokens),
        int(getattr(config, "image_text_hidden_size", 256)),
        retrieval,
        kind == "instructblip",
    )
