"""Fully sharded training (FSDP, Zhao et al. 2023): each process keeps its share of weights, gradients and optimiser."""

from typing import Any

import torch
from torch import nn

from vlm.errors import VlmError
from vlm.recipe import Recipe
from vlm.training.task import Task


def shard_task(task: Task, recipe: Recipe, world: int, device: torch.device, precision: str) -> None:
    """Shard a task's model in place; what trains and what is frozen alike, layer by layer of the language model.

    A frozen image encoder stays whole: it runs where a batch shows pictures, and shards need all processes to run the
    same layers. Raises VlmError where sharding cannot work, naming the key.
    """
    _check(task, recipe, world, device, precision)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    mesh = init_device_mesh(device.type, (world,))
    encoder: nn.Module = task.model.image_encoder
    learns = any(p.requires_grad for p in encoder.parameters())
    apart = set() if learns else set(encoder.parameters())
    for module in task.model.language_model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, mesh=mesh)
            module.register_forward_pre_hook(_with_gradient, with_kwargs=True, prepend=True)
    fully_shard(task, mesh=mesh, ignored_params=apart)


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


def _check(task: Task, recipe: Recipe, world: int, device: torch.device, precision: str) -> None:
    model: Any = task.model
    language: Any = getattr(recipe.model, "language_model", None)
    refused = {
        "one process has nothing to share it with: start it with torchrun or accelerate launch": world == 1,
        f"a {model.family} model is not sharded, only one with a language model": language is None
        or not hasattr(model, "language_model"),
        "objectives that compare the whole batch need the whole model": task.needs_pairs,
        "quantized weights cannot be sharded; set language_model.quantization to none": getattr(
            language, "quantization", "none"
        )
        != "none",
        "train.precision=fp16 has no loss scaling here; use bf16": precision == "fp16",
        f"{device.type} devices cannot share tensors": device.type not in ("cuda", "cpu"),
        f"train.batch_size={recipe.train.batch_size} leaves some of {world} processes without a sample": (
            recipe.train.batch_size < world
        ),
        "evaluation.benchmarks and train.sample_every need the whole model on one device: set them to [] and 0, and "
        "score the run afterwards": bool(recipe.evaluation.benchmarks or recipe.train.sample_every),
    }
    for reason, holds in refused.items():
        if holds:
            raise VlmError(f"train.fsdp: {reason}")
