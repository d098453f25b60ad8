"""Tiny dual encoders for tests, and a tiny recipe that trains one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from generative_parts import pictures
from tiny_models import tiny_bert, tiny_hf_image_model
from training_parts import STEADY_EPS

from vlm.recipe import Recipe

NAMES = ["red circle", "blue square", "a cat", "a dog on grass", "green", "tree", "the sun", "moon", "a boat", "fish"]


def captions(folder: Path, count: int = 10, twice: int = 2) -> Path:
    """A JSONL file of `count` pictures with a caption each, the first `twice` of them with a second one."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"id": str(i), "image": Path(path).name, "captions": [NAMES[i], f"another {NAMES[i]}"][: 2 if i < twice else 1]}
        for i, path in enumerate(pictures(folder, count))
    ]
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def dual_spec(tiny_folder: Callable[..., Path], **options: Any) -> dict[str, Any]:
    """A specification over tiny folders; `options` go into the specification."""
    return {
        "type": "dual_encoder",
        "image_encoder": f"hf:{tiny_folder(tiny_hf_image_model, 'clip')}",
        "text_encoder": f"hf:{tiny_folder(tiny_bert)}",
        "bridge": {"width": 8, **options.pop("bridge", {})},
        **options,
    }


def dual_recipe(tiny_folder: Callable[..., Path], file: Path, output: Path, **options: Any) -> Recipe:
    """A dual encoder that learns from captions; `options` override sections."""
    content: dict[str, Any] = {
        "model": dual_spec(tiny_folder, **options.pop("model", {})),
        "objectives": ["itc"],
        "data": {"train": [{"dataset": str(file), "format": "captions_jsonl"}], **options.pop("data", {})},
        "optimizer": {"lr": 1e-2, "eps": STEADY_EPS},
        "train": {"batch_size": 6, "steps": 6, "log_every": 1, "checkpoint_every": 3, **options.pop("train", {})},
        "output": str(output),
        **options,
    }
    return Recipe.model_validate(content)
