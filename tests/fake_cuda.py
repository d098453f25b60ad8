"""Device mistakes caught without a GPU."""

import copy

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


def on_fake_cuda(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy whose parameters and buffers pretend to lie on a GPU; any tensor it forgot to register raises in use."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    fake = mode.from_tensor(tensor.detach())
                    with mode:
                        fake = fake.to("cuda")
                    is_parameter = tensors is part._parameters
                    tensors[key] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
    return module
