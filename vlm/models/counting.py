"""How much a model computes."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def operations_per_token(network: nn.Module, embeddings: nn.Module) -> float:
    """Matrix operations of forward and backward for one token through a language model's layers.

    Two per weight forward, two for the gradient of its input, two more where the weight itself learns. The embedding
    table and the vocabulary projection are left out: the first multiplies nothing, the second runs at labels only.
    """
    outside = {id(p) for p in embeddings.parameters()}
    head = network.get_output_embeddings()
    outside |= {id(p) for p in head.parameters()} if head is not None else set()
    weights = [p for p in network.parameters() if p.ndim > 1 and id(p) not in outside]
    return float(sum(p.numel() * (6 if p.requires_grad else 4) for p in weights))


def forward_operations(module: nn.Module, *inputs: Tensor) -> float:
    """Operations of a module's forward pass on inputs of these shapes, sharded or not; nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    device = next(module.parameters()).device
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter, torch.no_grad():
        sharded = {name: p for name, p in module.named_parameters() if isinstance(p, DTensor)}
        whole = {name: torch.empty(p.shape, dtype=p.dtype, device=device) for name, p in sharded.items()}
        given = tuple(torch.empty(value.shape, dtype=value.dtype, device=device) for value in inputs)
        # Not tied: a module that stands in two places would be put back as it was only in one.
        torch.func.functional_call(module, whole, given, tie_weights=False)
    return float(counter.get_total_flops())
