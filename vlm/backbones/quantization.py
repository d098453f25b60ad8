"""Frozen language models in 4 or 8 bits, by bitsandbytes on CUDA."""

import importlib.util
from typing import Any

import torch

from vlm.errors import VlmError


def quantization_options(kind: str, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` that load a network quantized; {} for `none`.

    `4bit` is NF4 with quantized constants (QLoRA, Dettmers et al. 2023), `8bit` is LLM.int8() (Dettmers et al. 2022).
    dtype: of the arithmetic. Raises VlmError where there is no CUDA device or no bitsandbytes.
    """
    if kind == "none":
        return {}
    where = f"language_model.quantization: {kind}"
    if not torch.cuda.is_available():
        raise VlmError(f"{where}: {name!r} can be quantized on a CUDA device only, and none is visible; set it to none")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise VlmError(f"{where}: needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}
