"""Tiny random LLaVAs in each layout they are published in."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import CLIP_MEAN, CLIP_STD, randomize, tiny_hf_image_model, tiny_sentencepiece_tokenizer

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 512}


def tiny_llava(folder: Path, text: str = "llama", vision: str = "clip", pad: bool = False) -> Path:
    """A LLaVA as transformers saves it: weights, tokeniser with `<image>`, processor."""
    import transformers as t

    folder = Path(folder)
    tokenizer = tiny_sentencepiece_tokenizer(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    ids = {"vocab_size": 640, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id}
    text_config = {"llama": t.LlamaConfig, "qwen2": t.Qwen2Config}[text](
        **TEXT, **ids, tie_word_embeddings=text == "qwen2"
    )
    vision_config = {"clip": t.CLIPVisionConfig, "siglip": t.SiglipVisionConfig}[vision](**VISION)
    config = t.LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
    )
    model = randomize(t.LlavaForConditionalGeneration(config))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, tokenizer.pad_token_id
    model.save_pretrained(folder)
    if vision == "clip":
        kind = t.LlavaImageProcessor if pad else t.CLIPImageProcessor
        size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
        images = kind(**size, image_mean=CLIP_MEAN, image_std=CLIP_STD, **({"do_pad": True} if pad else {}))
    else:
        images = t.SiglipImageProcessor(size={"height": 32, "width": 32})
    extra = {"patch_size": 8, "vision_feature_select_strategy": config.vision_feature_select_strategy}
    extra["num_additional_image_tokens"] = 1 if vision == "clip" else 0
    t.LlavaProcessor(image_processor=images, tokenizer=tokenizer, **extra).save_pretrained(folder)
    return folder


def _original_state(hf: Path) -> dict[str, torch.Tensor]:
    """The weights of a transformers LLaVA by the authors' keys."""
    import transformers as t

    state = t.LlavaForConditionalGeneration.from_pretrained(hf).state_dict()
    renamed = {}
    for key, tensor in state.items():
        key = key.replace("model.language_model.", "model.")
        key = key.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        key = key.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
        key = key.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")
        renamed[key] = tensor.clone()
    return renamed


def _original_config(hf: Path, tower: str, **more: Any) -> dict[str, Any]:
    text = json.loads((hf / "config.json").read_text())["text_config"]
    mm = {"mm_vision_tower": tower, "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 32, "use_mm_proj": True}
    mm |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad"}
    mm |= {"mm_use_im_start_end": False, "tune_mm_mlp_adapter": False}
    return {**text, **mm, "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], **more}


def original_llava(hf: Path, folder: Path, layout: str, pickled: bool = False, with_tower: bool = True) -> Path:
    """The LLaVA in `hf` in the authors' layout. layout: `merged`, `projector` or `lora`.

    The adapters are random: `lora_delta` gives what they add.
    """
    folder = Path(folder)
    tower = tiny_hf_image_model("clip_vision", folder / "tower")
    state = _original_state(hf)
    if not with_tower or layout != "merged":
        vision = {k.split("vision_tower.vision_tower.")[1]: v for k, v in state.items() if "vision_tower" in k}
        save_file(vision, tower / "model.safetensors", metadata={"format": "pt"})
        state = {k: v for k, v in state.items() if "vision_tower" not in k}
    target = folder / layout
    target.mkdir()
    bridge = {k: v for k, v in state.items() if "mm_projector" in k}
    config = _original_config(hf, "../tower")
    if layout == "merged":
        _save(state, target / ("pytorch_model.bin" if pickled else "model.safetensors"))
        tiny_sentencepiece_tokenizer(target)
    else:
        base = folder / "base"
        base.mkdir()
        tiny_sentencepiece_tokenizer(base)
        plain = json.loads((hf / "config.json").read_text())["text_config"]
        (base / "config.json").write_text(json.dumps({**plain, "architectures": ["LlamaForCausalLM"]}))
        _save({k: v for k, v in state.items() if "mm_projector" not in k}, base / "model.safetensors")
        config["_name_or_path"] = "../base"
    if layout == "projector":
        _save(bridge, target / ("mm_projector.bin" if pickled else "mm_projector.safetensors"))
    if layout == "lora":
        name = "non_lora_trainables.bin" if pickled else "non_lora_trainables.safetensors"
        _save({f"base_model.model.{k}": v for k, v in bridge.items()}, target / name)
        adapters = {}
        for layer, (a, b) in lora_matrices().items():
            adapters[f"base_model.model.{layer}.lora_A.weight"] = a
            adapters[f"base_model.model.{layer}.lora_B.weight"] = b
        _save(adapters, target / ("adapter_model.bin" if pickled else "adapter_model.safetensors"))
        adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "../base"}
        (target / "adapter_config.json").write_text(json.dumps(adapter))
    (target / "config.json").write_text(json.dumps(config))
    return target


def lora_matrices() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> (A, B) of rank 2."""
    generator = torch.Generator().manual_seed(7)
    layers = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")]
    widths = {"q_proj": 32, "up_proj": 64}
    return {
        layer: (
            torch.randn(2, 32, generator=generator) / 4,
            torch.randn(widths[layer.rsplit(".", 1)[1]], 2, generator=generator) / 4,
        )
        for layer in layers
    }


def _save(state: dict[str, torch.Tensor], file: Path) -> None:
    state = {key: tensor.contiguous() for key, tensor in state.items()}
    if file.suffix == ".bin":
        torch.save(state, file)
    else:
        save_file(state, file, metadata={"format": "pt"})


# (height, width) as in LLaVA-1.6, for tiles of 32 pixels.
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def tiny_llava_next(folder: Path, text: str = "llama", vision: str = "clip") -> Path:
    """A LLaVA-1.6 as transformers saves it: weights, tokeniser with `<image>`, processor on Pillow."""
    import transformers as t

    tiny_llava(folder, text, vision)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llava_next", "image_grid_pinpoints": PINPOINTS}
    config = t.LlavaNextConfig.from_dict(config)
    model = randomize(t.LlavaNextForConditionalGeneration(config))
    model.model.image_newline.data.mul_(5)
    pad = config.text_config.pad_token_id
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, pad
    model.save_pretrained(folder)
    clip = vision == "clip"
    size = {"shortest_edge": 32} if clip else {"height": 32, "width": 32}
    images = t.LlavaNextImageProcessorPil(
        size=size,
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=PINPOINTS,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    tokenizer = t.AutoTokenizer.from_pretrained(folder)
    extra = {"patch_size": 8, "vision_feature_select_strategy": config.vision_feature_select_strategy}
    extra["num_additional_image_tokens"] = 1 if clip else 0
    t.LlavaNextProcessor(image_processor=images, tokenizer=tokenizer, **extra).save_pretrained(folder)
    return folder


def original_llava_next(hf: Path, folder: Path) -> Path:
    """The LLaVA-1.6 in `hf` in the authors' merged layout."""
    import transformers as t

    state = t.LlavaNextForConditionalGeneration.from_pretrained(hf).state_dict()
    keys = {
        "model.language_model.": "model.",
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.multi_modal_projector.linear_1": "model.mm_projector.0",
        "model.multi_modal_projector.linear_2": "model.mm_projector.2",
    }
    renamed = {}
    for key, tensor in state.items():
        for ours, theirs in keys.items():
            key = key.replace(ours, theirs)
        renamed[key] = tensor.clone()
    tiny_hf_image_model("clip_vision", folder / "tower")
    target = folder / "merged"
    target.mkdir()
    _save(renamed, target / "model.safetensors")
    tiny_sentencepiece_tokenizer(target)
    anyres = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    anyres["image_grid_pinpoints"] = [[width, height] for height, width in PINPOINTS]
    (target / "config.json").write_text(json.dumps(_original_config(hf, "../tower", **anyres)))
    return target
