"""Arguments of generation are checked before anything is generated: a mistake names the argument."""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from vlm.errors import VlmError, did_you_mean


def check_generation(arguments: Mapping[str, Any]) -> None:
    """Raises VlmError if transformers' `generate` does not know an argument, or does not take its value."""
    from transformers import GenerationConfig

    config, others = _known()
    for name in arguments:
        if name not in config | others:
            raise VlmError(f"generation: unknown argument {name!r}{did_you_mean(name, config | others)}")
    for name in ("max_new_tokens", "num_beams"):
        value = arguments.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise VlmError(f"generation: {name} must be a whole number from 1 on, got {value!r}")
    temperature = arguments.get("temperature")
    if temperature is not None and not (isinstance(temperature, (int, float)) and temperature > 0):
        raise VlmError(f"generation: temperature must be a number above 0, got {temperature!r}")
    try:
        GenerationConfig(**{name: value for name, value in arguments.items() if name in config})
    except (ValueError, TypeError) as error:
        raise VlmError(f"generation: {str(error).strip().splitlines()[0]}") from error


@cache
def _known() -> tuple[frozenset[str], frozenset[str]]:
    """What a GenerationConfig holds, and what `generate` takes beside it."""
    from transformers import GenerationConfig, GenerationMixin

    parameters = inspect.signature(GenerationMixin.generate).parameters.values()
    others = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"self", "inputs", "generation_config"}
    return frozenset(GenerationConfig().to_dict()), frozenset(others)
