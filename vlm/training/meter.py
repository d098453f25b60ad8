"""Throughput, memory, and share of the machine's measured matrix-multiplication peak."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# The best that each (device, dtype) has shown.
_peaks: dict[tuple[torch.device, torch.dtype], float] = {}


def matmul_peak(device: torch.device, dtype: torch.dtype, tries: int = 3) -> float:
    """Floating-point operations per second of a large square matrix product on this machine.

    The best ever seen, after one more try (at first `tries`): what else ran on the machine during one measurement would
    make shares of its peak above 1.
    """
    size = 8192 if device.type == "cuda" else 1536
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(1 if (device, dtype) in _peaks else tries):
        _synchronize(device)
        start = time.perf_counter()
        a @ a
        _synchronize(device)
        found = 2 * size**3 / (time.perf_counter() - start)
        _peaks[device, dtype] = max(found, _peaks.get((device, dtype), 0.0))
    return _peaks[device, dtype]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the highest allocation on a GPU, else the process' highest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


class Meter:
    """Counts tokens and samples between two log lines."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.start = time.perf_counter()
        self.tokens = 0
        self.trained = 0
        self.samples = 0
        self.operations = 0.0

    def add(self, tokens: int, trained: int, samples: int, operations: float) -> None:
        """Count one step: tokens that went through the model, of which carried loss, samples, matrix operations."""
        self.operations += operations
        self.tokens += tokens
        self.trained += trained
        self.samples += samples

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Meanwhile no time passes: rates are those of steps."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.start += time.perf_counter() - begin

    def operations_per_second(self) -> float:
        """Matrix operations per second since the last reset."""
        return self.operations / max(time.perf_counter() - self.start, 1e-9)

    def rates(self) -> dict[str, float]:
        """Per second since the last reset."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        return {
            "tokens_per_s": round(self.tokens / seconds, 1),
            "trained_tokens_per_s": round(self.trained / seconds, 1),
            "samples_per_s": round(self.samples / seconds, 2),
        }
