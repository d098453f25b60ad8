"""Parameters that lie in shards over processes (FSDP), read and written as whole tensors."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor; where it lies in shards, all processes have to ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """`value`, which every process has, laid out as `like` is."""
    if not isinstance(like, DTensor):
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`state_dict` with whole tensors, the same with and without shards."""
    state = optimizer.state_dict()
    entries = {
        index: {key: whole(value) if isinstance(value, Tensor) else value for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `whole_optimizer_state` gave, into an optimiser of whole or of sharded parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        index: {
            key: spread_like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for key, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})
