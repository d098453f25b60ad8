"""Configurations of published parts, kept in the package: sizes are known without weights and without a network."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlm.backbones.hf_loading import read_config
from vlm.errors import VlmError, did_you_mean

_FOLDER = Path(__file__).parent / "configs"  # OWNER--NAME.json: what a model's size depends on, as the hub has it


@lru_cache(maxsize=1)
def known_names() -> tuple[str, ...]:
    """Hub ids whose configuration is in the package."""
    return tuple(sorted(path.stem.replace("--", "/") for path in _FOLDER.glob("*.json")))


def find_config(reference: str) -> Any:
    """The transformers configuration of a local folder, of a known hub id, or else of the hub.

    Raises VlmError with the nearest known ids if there is none.
    """
    from transformers import CONFIG_MAPPING

    if not Path(reference).expanduser().is_dir() and reference in known_names():
        raw = json.loads((_FOLDER / f"{reference.replace('/', '--')}.json").read_text(encoding="utf-8"))
    else:
        try:
            raw = read_config(str(Path(reference).expanduser()))
        except VlmError as error:
            hint = did_you_mean(reference, known_names())
            raise VlmError(f"{error}; sizes of {len(known_names())} models are known offline{hint}") from error
    kind = raw.pop("model_type", "")
    if kind not in CONFIG_MAPPING:
        raise VlmError(f"{reference}: transformers knows no model_type {kind!r}")
    return CONFIG_MAPPING[kind](**raw)
