"""The loop, optimiser groups, checkpoints: `train` does what `vlm-train` does."""

from vlm.training.loop import TrainResult, train

__all__ = ["TrainResult", "train"]
