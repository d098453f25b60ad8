"""A trained LLaVA as a folder that transformers' `LlavaForConditionalGeneration` loads, LoRA merged."""

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm.backbones.image import build_image_encoder
from vlm.data.conversation import special_prefix
from vlm.data.records import IMAGE_PLACEHOLDER, Message
from vlm.data.templates import render, resolve_template
from vlm.data.transforms import ImageTransform
from vlm.errors import VlmError
from vlm.model_spec import ProjectionSpec, QFormerProjectionSpec
from vlm.models.generative import GenerativeModel

_SCALINGS = ("logit_scale", "logits_scaling", "final_logit_softcapping")
_VOCABULARY_BLOCK = 64  # a table that has to grow grows to a multiple, as llava-hf's do

# In front of a chat template: transformers gives a message's content as a list of parts.
_FLATTEN = (
    "{% set flat = namespace(messages=[]) %}{% for m in messages %}{% if m['content'] is string %}"
    "{% set text = m['content'] %}{% else %}{% set text %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endset %}"
    "{% endif %}{% set flat.messages = flat.messages + [{'role': m['role'], 'content': text}] %}{% endfor %}"
    "{% set messages = flat.messages %}"
)


def export_llava(model: Any, folder: Path, merge: bool = False) -> None:
    """Write weights, configuration, tokeniser with `<image>`, chat template and image processor to `folder`.

    merge: add LoRA to the weights it adapts; the model itself is changed by this.
    Rows that the embedding table gains for `<image>` are the mean of the others, so that none of them is ever the most
    likely token. Raises VlmError for what transformers' LLaVA cannot express, and if `folder` holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise VlmError(f"{folder} exists already: choose another folder")
    _check(model)
    language = _language_state(model.language_model.network, merge)
    tower = _whole_tower(model)
    network = model.language_model.network
    tokenizer = model.tokenizer
    vocabulary = _grown(len(network.get_input_embeddings().weight), len(tokenizer))
    config = _config(model, tower.config, vocabulary)
    state = {f"model.vision_tower.{key}": tensor for key, tensor in tower.state_dict().items()}
    state |= {f"model.language_model.{key}": tensor for key, tensor in language.items()}
    for index, name in ((0, "linear_1"), (2, "linear_2")):
        for key, tensor in model.bridge.layers[index].state_dict().items():
            state[f"model.multi_modal_projector.{name}.{key}"] = tensor
    state["lm_head.weight"] = network.get_output_embeddings().weight
    for key in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        state[key] = _with_rows(state[key], vocabulary)
    _write(config, state, model, folder)


def _check(model: Any) -> None:
    """Raises VlmError that names everything which transformers' LLaVA has no word for."""
    if not isinstance(model, GenerativeModel):
        raise VlmError(f"export: a {model.family} model is no LLaVA")
    if reasons := [*_encoder_problems(model), *_bridge_problems(model.spec.bridge), *_language_problems(model)]:
        raise VlmError(f"export: transformers' LLaVA cannot express {'; '.join(reasons)}")


def _encoder_problems(model: GenerativeModel) -> Iterator[str]:
    encoder, spec = model.image_encoder, model.spec.image_encoder
    config = getattr(getattr(encoder.tower, "model", None), "config", None)
    if not str(getattr(config, "model_type", "")).startswith(("clip", "siglip")):
        yield f"image_encoder.name: {spec.name} (only `hf:` CLIP and SigLIP)"
    elif config is not None and encoder.transform.size != (config.image_size, config.image_size):
        yield f"image_encoder.image_size: {spec.image_size} where the part has {config.image_size}"
    if spec.resize == "anyres":
        yield "image_encoder.resize: anyres (LLaVA-1.5 has no tiles)"
    if spec.layer == -1:
        yield "image_encoder.layer: -1, which has passed a norm here"


def _bridge_problems(spec: ProjectionSpec | QFormerProjectionSpec) -> Iterator[str]:
    if isinstance(spec, QFormerProjectionSpec):
        yield "bridge.type: qformer (only an mlp of depth 2)"
        return
    if spec.reduce != "none":
        yield f"bridge.reduce: {spec.reduce}"
    if spec.input_norm:
        yield "bridge.input_norm"
    if spec.type != "mlp" or spec.depth != 2:
        yield f"bridge.type: {spec.type}, depth: {spec.depth} (only an mlp of depth 2)"


def _language_problems(model: GenerativeModel) -> Iterator[str]:
    lm = model.language_model
    network: Any = lm.network
    if lm.is_encoder_decoder:
        yield "an encoder-decoder as language model"
        return
    if not hasattr(network.base_model, "embed_tokens"):
        yield f"{network.config.model_type} as language model (its embeddings go by another name)"
    if any(getattr(network.config, key, None) not in (None, 1.0) for key in _SCALINGS):
        yield "a language model that scales its logits"
    if getattr(network.get_output_embeddings(), "bias", None) is not None:
        yield "a vocabulary projection with a bias"
    if model.spec.template == "tokenizer":
        start = special_prefix(model.tokenizer)
        text, _ = render([Message("user", "a")], "tokenizer", model.tokenizer)
        if start and not text.startswith(str(model.tokenizer.bos_token)):
            yield "a chat template without the start token that the tokeniser adds to every text"


def _vision_config(model: GenerativeModel) -> Any:
    return model.image_encoder.tower.model.config


def _language_state(network: Any, merge: bool) -> dict[str, Tensor]:
    """The bare language model's tensors by its own keys, LoRA merged."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    if adapted and not merge:
        raise VlmError("export: this run has LoRA, which a LLaVA folder has no place for: say --merge")
    for module in adapted:
        module.merge()
    state = network.base_model.state_dict()
    return {k.replace(".base_layer.", "."): v for k, v in state.items() if ".lora_" not in k}


def _whole_tower(model: GenerativeModel) -> nn.Module:
    """The vision tower with the layers that were cut off at load, and what was trained of the others."""
    spec = model.spec.image_encoder.model_copy(update={"layer": -1})
    whole: Any = build_image_encoder(spec).tower
    own = model.image_encoder.tower.model.state_dict()
    state = {key: own.get(key, tensor) for key, tensor in whole.model.state_dict().items()}
    whole.model.load_state_dict(state)
    return whole.model.to(model.image_encoder.dtype)


def _grown(rows: int, needed: int) -> int:
    return rows if needed <= rows else -(-needed // _VOCABULARY_BLOCK) * _VOCABULARY_BLOCK


def _with_rows(table: Tensor, rows: int) -> Tensor:
    """A table [V,D] with rows up to `rows`, each the mean of those there."""
    more = table.detach().float().mean(0, keepdim=True).to(table.dtype).expand(rows - len(table), -1)
    return torch.cat([table.detach(), more])


def _config(model: GenerativeModel, vision: Any, vocabulary: int) -> Any:
    from transformers import LlavaConfig

    spec = model.spec
    text = model.language_model.network.config.to_dict() | {"vocab_size": vocabulary}
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text,
        image_token_index=model.language_model.image_token_id,
        image_seq_length=model.image_tokens,
        vision_feature_layer=spec.image_encoder.layer,
        vision_feature_select_strategy=_strategy(model),
        tie_word_embeddings=bool(text.get("tie_word_embeddings")),
    )
    # What `load_model` needs to ask as this model was trained to be asked.
    config.vlm = {key: getattr(spec, key) for key in ("template", "question_prompt", "caption_prompt")}
    config.architectures = ["LlavaForConditionalGeneration"]
    return config


def _strategy(model: GenerativeModel) -> str:
    dropped = model.image_encoder.tower.num_prefix_tokens - model.image_encoder.num_prefix_tokens
    return "default" if dropped else "full"


def _write(config: Any, state: dict[str, Tensor], model: GenerativeModel, folder: Path) -> None:
    """Everything aside, then in place at once."""
    from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

    with torch.device("meta"):
        network = LlavaForConditionalGeneration(config)
    network.load_state_dict({k: v.detach().cpu().contiguous() for k, v in state.items()}, assign=True)
    network.tie_weights()
    stops = model.prompts.stops.get("eos_token_id", model.language_model.stop_ids)
    network.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=model.tokenizer.pad_token_id)
    tokenizer: Any = model.tokenizer
    template = _FLATTEN + resolve_template(model.spec.template, tokenizer).replace("\r", "")
    vision = _vision_config(model)
    processor = LlavaProcessor(
        image_processor=_image_processor(model.image_encoder.transform),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=_strategy(model),
        num_additional_image_tokens=model.image_encoder.tower.num_prefix_tokens,
        image_token=IMAGE_PLACEHOLDER,
        chat_template=template,
    )
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        network.save_pretrained(aside)
        processor.save_pretrained(aside)
        if folder.is_dir():
            folder.rmdir()
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _image_processor(transform: ImageTransform) -> Any:
    """transformers' processor that makes the same pixels."""
    from PIL.Image import Resampling
    from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

    height, width = (math.floor(edge / transform.crop_pct) for edge in transform.size)
    if height != width or transform.size[0] != transform.size[1]:
        raise VlmError("export: pictures that are no squares cannot be expressed")
    whole = {"size": {"height": height, "width": width}} if transform.resize == "square" else None
    options: dict[str, Any] = {
        **(whole or {"size": {"shortest_edge": height}}),
        "do_center_crop": True,
        "crop_size": {"height": transform.size[0], "width": transform.size[1]},
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
        "resample": int(Resampling[transform.interpolation.upper()]),
    }
    if transform.resize == "pad":
        return LlavaImageProcessorPil(**options, do_pad=True)
    return CLIPImageProcessorPil(**options)
