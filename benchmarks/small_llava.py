"""A small LLaVA on both sides: a random ViT-B/32, SmolLM2-135M, and transformers' model of the same weights."""

import json
import shutil
from pathlib import Path
from typing import Any

from harness import ROOT

FOLDER = ROOT / "runs" / "small_llava"
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def tower(image_tokens: int) -> Path:
    """A random CLIP ViT-B/32 whose pictures become `image_tokens`, a square number: kept under `runs/`."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    folder = FOLDER / f"vit-{image_tokens}"
    if not (folder / "preprocessor_config.json").is_file():
        edge = 32 * int(image_tokens**0.5)
        torch.manual_seed(0)
        CLIPVisionModel(CLIPVisionConfig(image_size=edge, patch_size=32)).save_pretrained(folder)
        processor = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": edge},
            "crop_size": {"height": edge, "width": edge},
            "do_center_crop": True,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "resample": 3,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def specification(image_tokens: int, lora: bool = False, **options: Any) -> dict[str, Any]:
    """Our model: LLaVA-1.5's way over these parts."""
    adapters = {"lora": {"rank": 16, "alpha": 32, "targets": "all-linear"}} if lora else {}
    return {
        "type": "generative",
        "image_encoder": {"name": f"hf:{tower(image_tokens)}", "layer": -2},
        "bridge": {"type": "mlp", "depth": 2, "match_embeddings": True},
        "language_model": {"name": "starter:smollm2-135m", **adapters},
        "template": "compact",
        **options,
    }


def fill_bridge(model: Any) -> Any:
    """`model` with a bridge whose weights do not depend on what else was drawn at random while it was built."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.bridge.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    return model


def exported(model: Any, name: str) -> Path:
    """`model` as transformers' LlavaForConditionalGeneration loads it."""
    from vlm.models.export_llava import export_llava

    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    export_llava(model, folder, merge=True)
    return folder
