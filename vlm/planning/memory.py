"""What one GPU has to hold in training, with and without each lever."""

from dataclasses import dataclass

from torch import Tensor, nn

from vlm.training.sharding import language_layers, stays_whole

OPTIMISER_BYTES, GRADIENT_BYTES = 8, 4  # AdamW's two moments and the gradient of a trained parameter, all in fp32
NF4_BYTES = 0.516  # of a weight in 4 bits, with the scales of its blocks (Dettmers et al. 2023)


@dataclass(frozen=True)
class Held:
    """Bytes of a model that stay all along. language: those of frozen language model weights that 4 bits could hold.

    apart: weights that sharding leaves whole. layer: the largest layer's, as sharding gathers them one after the other,
    and layer_gradients what its gradients take till they are shared. rest, rest_gradients: the same of what is in no
    such layer, which is gathered while a step lasts. trained: number of trained parameters.
    """

    weights: int
    trained: int
    language: int
    language_parameters: int
    apart: int
    layer: int
    layer_gradients: int
    rest: int
    rest_gradients: int


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


def held(model: nn.Module, precision: str) -> Held:
    """What a model holds, wherever its tensors lie."""
    own = _unique(model)
    language = getattr(model, "language_model", None)
    frozen = [p for p in _unique(language) if not _learns(p) and p.ndim == 2] if language is not None else []
    whole = list(stays_whole(model))
    layers = [_unique(layer) for layer in language_layers(model)]
    inside = {id(t) for t in (*whole, *(t for layer in layers for t in layer))}
    rest = [t for t in own if isinstance(t, nn.Parameter) and id(t) not in inside]
    size = 2 if precision == "bf16" else 4  # as `shard_task` gathers layers
    largest = max(layers, key=_bytes, default=[])
    return Held(
        weights=_bytes(own),
        trained=_learning(own),
        language=_bytes(frozen),
        language_parameters=sum(t.numel() for t in frozen),
        apart=_bytes(whole),
        layer=sum(t.numel() for t in largest) * size,
        layer_gradients=_learning(largest) * (size + GRADIENT_BYTES),  # as computed, and as sent
        rest=_bytes(rest),
        rest_gradients=_learning(rest) * 2 * GRADIENT_BYTES,
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

    working: most bytes alive in a micro-batch, with gradients or a share of them unless it `accumulates` into what is
    there.
    """
    shares = processes if sharded else 1
    weights = found.weights - found.apart
    apart = float(found.apart)
    if four_bits:
        weights = weights - found.language + int(found.language_parameters * NF4_BYTES)
    gradients = found.trained * GRADIENT_BYTES / shares
    optimizer = found.trained * OPTIMISER_BYTES / shares
    # The gradients of a first micro-batch come while its activations go.
    activations = working if accumulates else max(working - gradients, 0.0)
    buffers = 0.0
    if sharded:
        activations = max(activations, found.rest_gradients)
        buffers = 2.0 * found.layer + found.layer_gradients + found.rest
    elif processes > 1:
        buffers = float(found.trained * GRADIENT_BYTES)
    return Memory(weights / shares + apart, gradients, optimizer, activations, buffers)


def _learns(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def _learning(tensors: list[Tensor]) -> int:
    return sum(t.numel() for t in tensors if _learns(t))


def _unique(module: nn.Module) -> list[Tensor]:
    return list({id(t): t for t in [*module.parameters(), *module.buffers()]}.values())


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
