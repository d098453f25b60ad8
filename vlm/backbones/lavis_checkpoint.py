"""LAVIS' checkpoints (`.pth`, nested under `model`) of BLIP-2 taken apart, with every key accounted for."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vlm.errors import VlmError

Family = Literal["opt", "t5", "llm"]

# Key of the EVA tower in LAVIS -> in transformers' BLIP-2. Its query and value biases are handled below.
_VISION = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.(.*)", r"embeddings.patch_embedding.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(.*)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"blocks\.(\d+)\.attn\.proj\.(.*)", r"encoder.layers.\1.self_attn.projection.\2"),
    (r"blocks\.(\d+)\.attn\.qkv\.weight", r"encoder.layers.\1.self_attn.qkv.weight"),
    (r"blocks\.(\d+)\.mlp\.(fc[12])\.(.*)", r"encoder.layers.\1.mlp.\2.\3"),
)
_BIASES = re.compile(r"blocks\.(\d+)\.attn\.([qv])_bias")
_LANGUAGE = re.compile(r"(opt|t5|llm)_(model|proj)\.(.*)")


@dataclass(frozen=True)
class LavisCheckpoint:
    """What a file holds.

    bridge: the Q-Former and what belongs to it, by LAVIS' keys. vision: the image encoder by transformers' keys, empty
    where it was frozen and so not written. language: the language model by transformers' keys, likewise. family: the
    kind of language model of the second stage; None in the first.
    """

    path: Path
    bridge: dict[str, Tensor]
    vision: dict[str, Tensor]
    language: dict[str, Tensor]
    family: Family | None

    @property
    def encoder_decoder(self) -> bool | None:
        """Whether its language model is one; None where it has none."""
        return None if self.family is None else self.family == "t5"

    @property
    def has_text(self) -> bool:
        """Whether the Q-Former reads texts."""
        return "Qformer.bert.embeddings.word_embeddings.weight" in self.bridge


def is_lavis(path: Path) -> bool:
    """Whether a path is a file that LAVIS may have written."""
    return path.suffix == ".pth" and path.is_file()


def read_lavis(path: Path) -> LavisCheckpoint:
    """The checkpoint in a file, read without running code. Raises VlmError for anything else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle.UnpicklingError, and whatever a torn file raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise VlmError(f"{path}: cannot be read as tensors alone: {reason}") from error
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise VlmError(f"{path}: is no checkpoint of LAVIS: expected tensors under the key `model`")
    bridge: dict[str, Tensor] = {}
    vision: dict[str, Tensor] = {}
    language: dict[str, Tensor] = {}
    families: set[Any] = set()
    for key, value in state.items():
        if found := _LANGUAGE.fullmatch(key):
            families.add(found[1])
        if found and found[2] == "model":
            language[found[3]] = value
        elif key.startswith("visual_encoder."):
            vision[key.removeprefix("visual_encoder.")] = value
        else:
            bridge[key] = value
    if "query_tokens" not in bridge:
        raise VlmError(f"{path}: holds no Q-Former (no key query_tokens)")
    if len(families) > 1:
        raise VlmError(f"{path}: holds keys of several language models: {', '.join(sorted(families))}")
    family = next(iter(families), None)
    return LavisCheckpoint(path, bridge, _vision(vision, path), language, family)


def _vision(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    biases: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if bias := _BIASES.fullmatch(key):
            biases.setdefault(bias[1], {})[bias[2]] = value
            continue
        for pattern, name in _VISION:
            if match := re.fullmatch(pattern, key):
                renamed[match.expand(name)] = value
                break
        else:
            raise VlmError(f"{path}: the image encoder's key visual_encoder.{key} is not one of EVA ViT-g")
    for layer, pair in biases.items():
        if pair.keys() != {"q", "v"}:
            raise VlmError(f"{path}: visual_encoder.blocks.{layer}.attn lacks one of q_bias and v_bias")
        joined = torch.cat([pair["q"], torch.zeros_like(pair["q"]), pair["v"]])  # keys have none
        renamed[f"encoder.layers.{layer}.self_attn.qkv.bias"] = joined
    return renamed
