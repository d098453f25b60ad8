"""Fully sharded training (FSDP, Zhao et al. 2023): each process keeps its share of weights, gradients and optimiser."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from vlm.errors import VlmError
from vlm.recipe import Recipe
from vlm.training.memory import transformer_layers
from vlm.training.task import Task


def shard_task(task: Task, recipe: Recipe, world: int, device: torch.device, precision: str) -> None:
    """Shard a task's model in place: the language model, trained or frozen, layer by layer, and else what learns.

    Beside language models a step gathers all that learns at once: objectives that compare the whole batch read it in
    several passes. Frozen encoders stay whole: one of images runs where a batch shows some, and shards need all
    processes to run the same layers. So do single numbers (logit scale, temperature), see `average_whole_gradients`.
    In bf16 language models' layers are gathered as bf16; their gradients are added up, and shards kept, in fp32.
    Raises VlmError where sharding cannot work, naming the key.
    """
    _check(recipe, world, device, precision)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for parameter in task.parameters():  # weights of a convolution may lie channels last, which shards cannot
        parameter.data = parameter.data.contiguous()
    mesh = init_device_mesh(device.type, (world,))
    for layer in language_layers(task.model):
        fully_shard(layer, mesh=mesh, mp_policy=_gathered_as(precision))
        layer.register_forward_pre_hook(_with_gradient, with_kwargs=True, prepend=True)
    fully_shard(task, mesh=mesh, ignored_params=set(stays_whole(task.model)))
    register_fsdp_forward_method(task, "first_pass")


@contextmanager
def gathered(task: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Let every process hold the whole of a sharded model meanwhile, so that each can run it, or not, as it likes.

    For all processes together; without gradients. What has no shards stays as it is. In bf16 it runs under autocast, as
    in training: layers are gathered as bf16, and the rest is not.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in task.modules() if isinstance(module, FSDPModule)]
    # The hooks would gather again, and note each layer's turn for the next backward pass, which all have to agree on.
    hooks = [(part, part._forward_pre_hooks, part._forward_hooks) for part in parts]
    for part in parts:
        part.unshard()
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    mixed = bool(parts) and precision == "bf16"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            yield
    finally:
        for part, before, after in hooks:
            part._forward_pre_hooks, part._forward_hooks = before, after
            part.reshard()


def language_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that sharding gathers one after the other."""
    return transformer_layers(getattr(model, "language_model", nn.Module()))


def stays_whole(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that every process keeps whole where a model is sharded."""
    towers = [getattr(model, name) for name in ("image_encoder", "text_encoder") if hasattr(model, name)]
    frozen = [p for tower in towers for p in tower.parameters() if not any(q.requires_grad for q in tower.parameters())]
    return [*frozen, *(p for p in model.parameters() if p.ndim == 0)]


def average_whole_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average over processes the gradients of what learns and lies in no shards, as is done for shards."""
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient)
            parameter.grad = gradient / dist.get_world_size()


def _gathered_as(precision: str) -> Any:
    """The policy of layers: the type that autocast would cast them to, half of what is sent and held; inputs stay."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if precision != "bf16":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _with_gradient(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Let a layer's input ask for a gradient: where it does not, as in text alone, the layer's gradients are reduced
    later than on processes that show pictures, and they would wait for each other's."""

    def asking(value: Any) -> Any:
        wanting = isinstance(value, torch.Tensor) and value.is_floating_point() and not value.requires_grad
        return value.detach().requires_grad_() if wanting else value

    if not torch.is_grad_enabled():
        return arguments, options
    key = "hidden_states"
    options = {**options, key: asking(options[key])} if key in options else options
    return (asking(arguments[0]), *arguments[1:]) if arguments else arguments, options


def _check(recipe: Recipe, world: int, device: torch.device, precision: str) -> None:
    language: Any = getattr(recipe.model, "language_model", None)
    refused = {
        "one process has nothing to share it with: start it with torchrun or accelerate launch": world == 1,
        "quantized weights cannot be sharded; set language_model.quantization to none": getattr(
            language, "quantization", "none"
        )
        != "none",
        "train.precision=fp16 has no loss scaling here; use bf16": precision == "fp16",
        f"{device.type} devices cannot share tensors": device.type not in ("cuda", "cpu"),
        f"train.batch_size={recipe.train.batch_size} leaves some of {world} processes without a sample": (
            recipe.train.batch_size < world
        ),
    }
    for reason, holds in refused.items():
        if holds:
            raise VlmError(f"train.fsdp: {reason}")
