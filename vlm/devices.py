"""The one place that decides where a model runs and in which precision."""

import os

import torch

from vlm.errors import VlmError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, else CUDA, else Apple's MPS, else the CPU. Raises VlmError if it is not there."""
    if device is not None:
        try:
            chosen = torch.device(device)
        except RuntimeError as error:
            raise VlmError(f"device {str(device)!r}: expected cpu, cuda, cuda:N or mps") from error
        seen = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        if not 0 <= (chosen.index or 0) < seen.get(chosen.type, 1):  # torch wraps numbers above 127 around
            there = f"{seen[chosen.type] or 'no'} {chosen.type} device"
            raise VlmError(f"device {str(device)!r} was asked for, but {there} is visible")
        return chosen
    if torch.cuda.is_available():
        # Of several processes on one machine each has a device of its own, as torchrun numbers them.
        own = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())) % torch.cuda.device_count()
        return torch.device("cuda", own)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def pick_precision(precision: str = "auto", device: torch.device | None = None) -> str:
    """`auto` resolved: bf16 on CUDA that has it, fp16 on older CUDA and on MPS, fp32 on a CPU.

    A CPU gets fp32 even though torch accepts bf16 there: without native instructions it is ten times slower.
    """
    if precision != "auto":
        if precision not in _DTYPES:
            raise VlmError(f"precision {precision!r}: expected auto, {', '.join(_DTYPES)}")
        return precision
    kind = (device or pick_device()).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "fp16" if kind == "mps" else "fp32"


def storage_dtype(precision: str = "auto", device: torch.device | None = None) -> torch.dtype:
    """The type frozen weights are stored in."""
    return _DTYPES[pick_precision(precision, device)]
