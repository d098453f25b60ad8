"""What GPUs hold and how fast they multiply matrices, by their makers' data sheets."""

from dataclasses import dataclass

from vlm.errors import VlmError, did_you_mean


@dataclass(frozen=True)
class Gpu:
    """memory: bytes. half, single: dense floating-point operations per second in bf16 (before Ampere: fp16), with sums
    in fp32, and in fp32 without TF32."""

    memory: float
    half: float
    single: float


GPUS: dict[str, Gpu] = {
    "b200": Gpu(180e9, 2250e12, 75e12),
    "h200": Gpu(141e9, 989e12, 67e12),
    "h100": Gpu(80e9, 989e12, 67e12),
    "a100": Gpu(80e9, 312e12, 19.5e12),
    "a100-40gb": Gpu(40e9, 312e12, 19.5e12),
    "a6000": Gpu(48e9, 155e12, 38.7e12),
    "l40s": Gpu(48e9, 362e12, 91.6e12),
    "l4": Gpu(24e9, 121e12, 30.3e12),
    "a10": Gpu(24e9, 125e12, 31.2e12),
    "v100": Gpu(32e9, 125e12, 15.7e12),
    "t4": Gpu(16e9, 65e12, 8.1e12),
    "rtx5090": Gpu(32e9, 209.5e12, 104.8e12),
    "rtx4090": Gpu(24e9, 165.2e12, 82.6e12),
    "rtx3090": Gpu(24e9, 71e12, 35.6e12),
}
USABLE = 0.93  # of the memory: the driver, the context and holes between blocks take the rest


def find_gpu(name: str) -> Gpu:
    """The GPU of that name. Raises VlmError with the nearest known names."""
    key = name.lower().replace("_", "-").replace(" ", "")
    if key not in GPUS:
        raise VlmError(f"--gpu: unknown GPU {name!r}{did_you_mean(key, GPUS)}")
    return GPUS[key]
