"""Names of LAVIS' Q-Former checkpoints and ours, strictly in both directions."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vlm.errors import VlmError

# Ours -> LAVIS'; N stands for the number of a layer. A name ends in a dot where everything behind it stays.
_NAMES = {
    "bridge.query_tokens": "query_tokens",
    "bridge.image_norm.": "ln_vision.",
    "bridge.embeddings.words.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "bridge.embeddings.positions.weight": "Qformer.bert.embeddings.position_embeddings.weight",
    "bridge.norm.": "Qformer.bert.embeddings.LayerNorm.",
    "bridge.layers.N.self_attention.output.": "Qformer.bert.encoder.layer.N.attention.output.dense.",
    "bridge.layers.N.self_attention.norm.": "Qformer.bert.encoder.layer.N.attention.output.LayerNorm.",
    "bridge.layers.N.self_attention.": "Qformer.bert.encoder.layer.N.attention.self.",
    "bridge.layers.N.cross_attention.output.": "Qformer.bert.encoder.layer.N.crossattention.output.dense.",
    "bridge.layers.N.cross_attention.norm.": "Qformer.bert.encoder.layer.N.crossattention.output.LayerNorm.",
    "bridge.layers.N.cross_attention.": "Qformer.bert.encoder.layer.N.crossattention.self.",
    "bridge.layers.N.query_ffn.up.": "Qformer.bert.encoder.layer.N.intermediate_query.dense.",
    "bridge.layers.N.query_ffn.down.": "Qformer.bert.encoder.layer.N.output_query.dense.",
    "bridge.layers.N.query_ffn.norm.": "Qformer.bert.encoder.layer.N.output_query.LayerNorm.",
    "bridge.layers.N.text_ffn.up.": "Qformer.bert.encoder.layer.N.intermediate.dense.",
    "bridge.layers.N.text_ffn.down.": "Qformer.bert.encoder.layer.N.output.dense.",
    "bridge.layers.N.text_ffn.norm.": "Qformer.bert.encoder.layer.N.output.LayerNorm.",
    "bridge.language_projection.": "opt_proj.",
    "heads.vision_projection.": "vision_proj.",
    "heads.text_projection.": "text_proj.",
    "heads.temperature": "temp",
    "heads.match.": "itm_head.",
    "heads.words.dense.": "Qformer.cls.predictions.transform.dense.",
    "heads.words.norm.": "Qformer.cls.predictions.transform.LayerNorm.",
    "heads.words.bias": "Qformer.cls.predictions.bias",
}
# Tied in LAVIS, and saved twice: the copy -> the original.
_COPIES = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}
_POSITION_IDS = "Qformer.bert.embeddings.position_ids"  # 0, 1, 2, ...: carries nothing
_POSITIONS = "Qformer.bert.embeddings.position_embeddings.weight"


def from_lavis(state: Mapping[str, Tensor], where: str = "LAVIS checkpoint") -> dict[str, Tensor]:
    """Tensors of a LAVIS Q-Former by our names: `bridge.*`, and `heads.*` where the checkpoint has stage 1's heads.

    Every key must be known: take the image encoder's and the language model's out before.
    Raises VlmError that names a key we do not know, and for copies of tied weights that differ.
    """
    back = {theirs: ours for ours, theirs in _NAMES.items()}
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == _POSITION_IDS:
            continue
        if key in _COPIES:
            original = state.get(_COPIES[key])
            if original is None or not torch.equal(original, value):
                raise VlmError(f"{where}: {key} should be a copy of {_COPIES[key]}, to which it is tied")
            continue
        # One name for the layer to the language model, which LAVIS calls after the model's family.
        key = re.sub(r"^(t5|llm)_proj\.", "opt_proj.", key)
        result[_translate(key, back, where)] = value
    return result


def to_lavis(state: Mapping[str, Tensor], where: str = "Q-Former") -> dict[str, Tensor]:
    """The opposite of `from_lavis`, with the copies and the buffer that LAVIS saves."""
    result = {_translate(key, _NAMES, where): value for key, value in state.items()}
    for copy, original in _COPIES.items():
        if original in result and "Qformer.cls.predictions.bias" in result:
            result[copy] = result[original]
    if _POSITIONS in result:
        result[_POSITION_IDS] = torch.arange(len(result[_POSITIONS]))[None]
    return result


def _translate(key: str, names: Mapping[str, str], where: str) -> str:
    layer = re.search(r"\.layers?\.(\d+)\.", key)
    general = key if layer is None else f"{key[: layer.start(1)]}N{key[layer.end(1) :]}"
    # The longest name first: `attention.output.` before `attention.`.
    for name in sorted(names, key=len, reverse=True):
        if general == name or (name.endswith(".") and general.startswith(name)):
            translated = names[name] + general.removeprefix(name)
            return translated if layer is None else translated.replace(".N.", f".{layer[1]}.", 1)
    raise VlmError(f"{where}: no place for the key {key}")
