"""Published LLaVA checkpoints taken apart: vision tower, projector, language model, with every key accounted for.

Layouts: transformers' (`model_type: llava`), and the authors': merged, LoRA beside its base, or the projector alone.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from vlm.backbones.checkpoint_files import MERGED, file_of, read_tensors, tensors_of
from vlm.backbones.checkpoint_parts import KeyTable, Part
from vlm.backbones.hf_loading import read_config
from vlm.errors import VlmError

# Language keys are those of transformers' causal model, vision keys those of its bare tower, bridge keys those of
# `vlm.bridges.projection.Projection`.
_KEYS = KeyTable(
    "LLaVA",
    (
        # transformers on disk, and in memory since version 5
        (r"(?:model\.)?language_model\.lm_head\.(.*)", "language", r"lm_head.\1"),
        (r"(?:model\.)?language_model\.model\.(.*)", "language", r"model.\1"),
        (r"model\.language_model\.(.*)", "language", r"model.\1"),
        (r"(?:model\.)?multi_modal_projector\.linear_1\.(.*)", "bridge", r"layers.0.\1"),
        (r"(?:model\.)?multi_modal_projector\.linear_2\.(.*)", "bridge", r"layers.2.\1"),
        # the authors' own
        (r"(?:model\.)?vision_tower\.vision_tower\.(?:vision_model\.)?(.*)", "vision", r"\1"),
        (r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.*)", "vision", r"\1"),
        (r"(?:model\.)?image_newline", "bridge", "newline"),  # LLaVA-1.6, both layouts
        (r"(?:model\.)?mm_projector\.(weight|bias)", "bridge", r"layers.0.\1"),
        (r"(?:model\.)?mm_projector\.(\d+\.(?:weight|bias))", "bridge", r"layers.\1"),
        (r"(model\.(?:embed_tokens|layers|norm)\..*|lm_head\..*)", "language", r"\1"),
    ),
    prefix="base_model.model.",
)
_ADAPTER = re.compile(r"(?:base_model\.model\.)?(?P<layer>.*)\.lora_(?P<side>A|B)(?:\.default)?\.weight")
_PROJECTOR = ("mm_projector.safetensors", "mm_projector.bin")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_BESIDE_ADAPTERS = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")


@dataclass(frozen=True)
class LlavaCheckpoint:
    """One checkpoint by the facts of its `config.json`.

    text_config, vision_config: transformers configurations; `vision_config` is None where the tower is another
    checkpoint, `tower`. layer: hidden state that is read, from the end. drop_cls: leave the CLS token out.
    projector: (type, depth). base: the language model beside which adapters or a projector lie, if they do.
    resize: LLaVA's `image_aspect_ratio`, None where the image preprocessor decides. pinpoints: (height, width) of
    LLaVA-1.6's grids of tiles, None without. prompts: what our own exports say of template and prompts.
    """

    reference: str
    text_config: Any
    vision_config: Any
    tower: str
    layer: int
    drop_cls: bool
    projector: tuple[Literal["linear", "mlp"], int]
    base: str | None
    resize: Literal["shortest", "square", "pad", "anyres"] | None
    prompts: dict[str, str]
    pinpoints: list[tuple[int, int]] | None = None

    def state(self, part: Part) -> dict[str, Tensor]:
        """The tensors of a part by the key that it has there; adapters are merged into the language model.

        Raises VlmError that names keys which belong nowhere.
        """
        if self.base is None:
            return _KEYS.part_of(tensors_of(self.reference, MERGED), part, self.reference)
        if part != "bridge":
            return self._with_adapters(_KEYS.part_of(tensors_of(self.base, MERGED), part, self.base), part)
        beside = tensors_of(self.reference, (*_BESIDE_ADAPTERS, *_PROJECTOR))
        return _KEYS.part_of(beside, part, self.reference)

    def _with_adapters(self, state: dict[str, Tensor], part: Part) -> dict[str, Tensor]:
        if part == "language" and file_of(self.reference, "adapter_config.json"):
            beside = tensors_of(self.reference, _BESIDE_ADAPTERS, optional=True)  # full embeddings or the like
            _merge_adapters(state, tensors_of(self.reference, _ADAPTERS), self.reference)
            state |= _KEYS.part_of(beside, part, self.reference)
        return state


def is_llava(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is that of a LLaVA, of whatever layout."""
    return str(config.get("model_type", "")).startswith("llava") or "mm_vision_tower" in config


def read_llava(reference: str) -> LlavaCheckpoint:
    """The checkpoint of a hub id or local folder. Raises VlmError for what LLaVA-1.0, 1.5 and 1.6 do not have."""
    config = read_config(reference)
    kind = str(config.get("model_type", ""))
    if "mm_vision_tower" in config:
        return _original(reference, config)
    if kind not in ("llava", "llava_next"):
        raise VlmError(f"{reference}: model_type {kind!r} is not LLaVA-1.0, 1.5 or 1.6")
    return _transformers(reference, config)


def _transformers(reference: str, raw: dict[str, Any]) -> LlavaCheckpoint:
    from transformers import LlavaConfig, LlavaNextConfig

    tiles = raw.get("model_type") == "llava_next"
    config: Any = (LlavaNextConfig if tiles else LlavaConfig).from_dict(raw)
    for key, wanted in (("projector_hidden_act", "gelu"), ("multimodal_projector_bias", True)):
        if getattr(config, key) != wanted:
            raise VlmError(f"{reference}: {key}: {getattr(config, key)!r} is not supported, only {wanted!r}")
    layer, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(layer, int):
        raise VlmError(f"{reference}: vision_feature_layer: {layer}: several layers side by side are not supported")
    layer = layer if layer < 0 else layer - depth - 1
    drop = config.vision_feature_select_strategy == "default"
    vision = config.vision_config.model_type
    if layer == -1:
        raise VlmError(f"{reference}: vision_feature_layer: the last one without its norm is not supported")
    if drop and "siglip" in vision:
        raise VlmError(
            f"{reference}: `vision_feature_select_strategy: default` drops a patch of SigLIP, not a CLS token"
        )
    prompts = {key: str(value) for key, value in raw.get("vlm", {}).items()}
    pinpoints = [(int(height), int(width)) for height, width in config.image_grid_pinpoints] if tiles else None
    return LlavaCheckpoint(
        reference=reference,
        text_config=config.text_config,
        vision_config=config.vision_config,
        tower=reference,
        layer=layer,
        drop_cls=drop,
        projector=("mlp", 2),
        base=None,
        resize="anyres" if tiles else None,
        prompts=prompts,
        pinpoints=pinpoints,
    )


def _original(reference: str, raw: dict[str, Any]) -> LlavaCheckpoint:
    from transformers import CONFIG_MAPPING

    kind = {"llava_llama": "llama", "llava": "llama"}.get(str(raw["model_type"]), str(raw["model_type"])[6:])
    if kind not in ("llama", "mistral", "qwen2"):
        raise VlmError(f"{reference}: model_type {raw['model_type']!r}: no LLaVA over {kind or 'that'!r} is supported")
    if raw.get("mm_use_im_start_end") or raw.get("mm_use_im_patch_token"):
        raise VlmError(f"{reference}: marks around the picture (mm_use_im_start_end) are not supported")
    name = str(raw.get("mm_projector_type", "linear"))
    mlp = re.fullmatch(r"mlp(\d+)x_gelu", name)
    if not mlp and name != "linear":
        raise VlmError(f"{reference}: mm_projector_type: {name!r} is not supported, only linear and mlpNx_gelu")
    text = {k: v for k, v in raw.items() if not k.startswith(("mm_", "tune_mm_", "image_")) and k != "model_type"}
    resize: dict[str, Literal["pad", "square", "anyres"]] = {"pad": "pad", "square": "square", "anyres": "anyres"}
    aspect = str(raw.get("image_aspect_ratio"))
    if aspect.startswith("anyres") and (aspect != "anyres" or raw.get("mm_patch_merge_type") != "spatial_unpad"):
        kinds = f"{aspect}, mm_patch_merge_type: {raw.get('mm_patch_merge_type')}"
        raise VlmError(f"{reference}: image_aspect_ratio: {kinds}: only anyres with spatial_unpad is supported")
    return LlavaCheckpoint(
        reference=reference,
        text_config=CONFIG_MAPPING[kind](**text),
        vision_config=None,
        tower=_resolved(str(raw["mm_vision_tower"]), reference),
        layer=int(raw.get("mm_vision_select_layer", -2)),
        drop_cls=raw.get("mm_vision_select_feature", "patch") == "patch",
        projector=("mlp", int(mlp[1])) if mlp else ("linear", 2),
        base=_base(reference, raw),
        resize=resize.get(aspect),
        prompts={},
        pinpoints=_original_pinpoints(reference, raw) if aspect == "anyres" else None,
    )


def _original_pinpoints(reference: str, raw: dict[str, Any]) -> list[tuple[int, int]]:
    """The authors write (width, height)."""
    found = raw.get("image_grid_pinpoints")
    found = json.loads(found) if isinstance(found, str) and found.startswith("[") else found
    if not isinstance(found, list):
        raise VlmError(f"{reference}: image_grid_pinpoints: {found!r} is no list of sizes")
    return [(int(height), int(width)) for width, height in found]


def _base(reference: str, raw: dict[str, Any]) -> str | None:
    """The language model that adapters or a projector belong to; None if all weights are here."""
    if path := file_of(reference, "adapter_config.json"):
        name = json.loads(path.read_text()).get("base_model_name_or_path")
    elif any(file_of(reference, file) for file in MERGED):
        return None
    else:
        name = raw.get("_name_or_path")
    if not name:
        raise VlmError(f"{reference}: names no base model; give it as `_name_or_path` in its config.json")
    return _resolved(str(name), reference)


def _resolved(name: str, beside: str) -> str:
    """A folder named relative to the checkpoint's own, or the name as it is."""
    near = Path(beside).expanduser() / name
    return str(near) if near.is_dir() else name


def _merge_adapters(state: dict[str, Tensor], tensors: Iterator[tuple[str, Tensor]], reference: str) -> None:
    """Add B A alpha / rank to each weight that has adapters (Hu et al. 2021, section 4.1), in fp32."""
    path = file_of(reference, "adapter_config.json")
    config = json.loads(path.read_text()) if path else {}
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
        if config.get(key):
            raise VlmError(f"{reference}: adapter_config.json: {key} is not supported")
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors:
        match = _ADAPTER.fullmatch(key)
        if match is None or f"{match['layer']}.weight" not in state:
            raise VlmError(f"{reference}: the language model has no place for the adapter {key}")
        pairs.setdefault(match["layer"], {})[match["side"]] = tensor.float()
    rank = float(config["r"])
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    for layer, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise VlmError(f"{reference}: the adapter of {layer} lacks one of its two matrices")
        weight = state[f"{layer}.weight"]
        state[f"{layer}.weight"] = (weight.float() + scale * pair["B"] @ pair["A"]).to(weight.dtype)


def read_projector(folder: Path) -> dict[str, Tensor] | None:
    """The projector in a LLaVA folder, or in the file `mm_projector.bin` itself; None if there is none.

    By logical name: `bridge.layers.0.weight`.
    """
    if folder.is_file():
        tensors = read_tensors(folder)
    elif name := next((n for n in (*_PROJECTOR, *_BESIDE_ADAPTERS, *MERGED) if (folder / n).is_file()), None):
        tensors = tensors_of(str(folder), (name,))
    else:
        return None
    return {f"bridge.{key}": tensor for key, tensor in _KEYS.part_of(tensors, "bridge", str(folder)).items()} or None
