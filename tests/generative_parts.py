"""Tiny generative models for tests: a random CLIP tower, a projection, a random language model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny_models import CHATML, tiny_hf_image_model, tiny_language_model

from vlm.model_spec import GenerativeSpec
from vlm.models.build import build_model
from vlm.models.generative import GenerativeModel


def generative_spec(tiny_folder: Callable[..., Path], kind: str = "llama", **options: Any) -> GenerativeSpec:
    """A specification over tiny folders; `options` go into the specification."""
    image = tiny_folder(tiny_hf_image_model, "clip")
    language = tiny_folder(_with_template, kind)
    content: dict[str, Any] = {
        "image_encoder": f"hf:{image}",
        "language_model": {"name": f"hf:{language}", **options.pop("language", {})},
        "bridge": {"type": "mlp", "match_embeddings": True, **options.pop("bridge", {})},
        "template": "compact",
        **options,
    }
    return GenerativeSpec.model_validate(content)


def _with_template(kind: str, folder: Path) -> Path:
    return tiny_language_model(kind, folder, chat_template=CHATML)


def generative_model(tiny_folder: Callable[..., Path], kind: str = "llama", **options: Any) -> GenerativeModel:
    """A tiny random generative model on the CPU, its bridge trainable."""
    return build_model(generative_spec(tiny_folder, kind, **options), ["bridge.*"], device="cpu", precision="fp32")


def pictures(folder: Path, count: int, size: int = 32, seed: int = 0) -> list[str]:
    """Paths of random pictures."""
    rng = np.random.default_rng(seed)
    paths = []
    for i in range(count):
        path = folder / f"picture-{seed}-{i}.png"
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    return paths
