"""Tensors without values: a step can be run for its operations and its memory where neither would fit."""

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def make_fake(model: nn.Module, mode: FakeTensorMode, device: str = "cpu") -> nn.Module:
    """The same model, built on the meta device, with parameters and buffers that pretend to lie on `device`."""
    made: dict[int, Tensor] = {}  # tied parameters stay tied

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            value: Tensor = FakeTensor(mode, tensor.detach(), device)
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            made[id(tensor)] = value
        return made[id(tensor)]

    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    store[name] = fake(tensor)
    return model
