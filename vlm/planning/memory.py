"""What one GPU has to hold in training, with and without each lever."""

from dataclasses import dataclass

from torch import Tensor, nn

from vlm.training.sharding import stays_whole

OPTIMISER_BYTES, GRADIENT_BYTES = 8, 4  # AdamW's two moments and the gradient of a trained parameter, all in fp32
NF4_BYTES = 0.516  # of a weight in 4 bits, with the scales of its blocks (Dettmers et al. 2023)


@dataclass(frozen=True)
class Held:
    """Bytes of a model that stay all along. language: those of frozen language model weights that 4 bits could hold.

    apart: weights that sharding leaves whole. layer: the largest layer's, which sharding gathers one after the other.
    rest: those in no such layer, gathered while a step lasts. trained: number of trained parameters.
    """

    weights: int
    trained: int
    language: int
    language_parameters: int
    apart: int
    layer: int
    rest: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. activations: what the backward pass needs, and work space; buffers: of communication."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def held(model: nn.Module) -> Held:
    """What a model holds, wherever its tensors lie."""
    own = _unique(model)
    language = getattr(model, "language_model", None)
    frozen = [p for p in _unique(language) if not _learns(p) and p.ndim == 2] if language is not None else []
    apart = _bytes(list(stays_whole(model)))
    layers = [_bytes(_unique(layer)) for layer in _layers(language)] if language is not None else []
    return Held(
        weights=_bytes(own),
        trained=sum(t.numel() for t in own if _learns(t)),
        language=_bytes(frozen),
        language_parameters=sum(t.numel() for t in frozen),
        apart=apart,
        layer=max(layers, default=0),
        rest=_bytes([t for t in own if isinstance(t, nn.Parameter)]) - apart - sum(layers),
    )


def memory(
    found: Held,
    working: float,
    accumulates: bool,
    processes: int = 1,
    sharded: bool = False,
    four_bits: bool = False,
) -> Memory:
    """Bytes on one GPU.

    working: most bytes alive in a micro-batch, with gradients unless it `accumulates` into those that are there.
    """
    shares = processes if sharded else 1
    weights = found.weights - found.apart
    apart = float(found.apart)
    if four_bits:
        weights = weights - found.language + int(found.language_parameters * NF4_BYTES)
    gradients = found.trained * GRADIENT_BYTES / shares
    optimizer = found.trained * OPTIMISER_BYTES / shares
    # The gradients of a first micro-batch come while its activations go.
    activations = working if accumulates else max(working - found.trained * GRADIENT_BYTES, 0.0)
    stepping = gradients if sharded else 0.0  # AdamW, which is fused where tensors are whole
    buffers = 0.0
    if sharded:
        buffers = 2.0 * found.layer + max(found.rest, 0)
    elif processes > 1:
        buffers = float(found.trained * GRADIENT_BYTES)
    return Memory(weights / shares + apart, gradients, optimizer, max(activations, stepping), buffers)


def _learns(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def _unique(module: nn.Module) -> list[Tensor]:
    return list({id(t): t for t in [*module.parameters(), *module.buffers()]}.values())


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _layers(module: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]
