"""Operations and memory of a recipe's training step, by running it on tensors without values."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm.models.meta import build_on_meta, part_sizes, trained_sizes
from vlm.planning.fake import make_fake
from vlm.planning.memory import Held, held
from vlm.planning.parts import step_parts
from vlm.planning.step import Cost, run_step
from vlm.planning.workload import Workload
from vlm.recipe import Recipe
from vlm.training.memory import checkpoint_layers
from vlm.training.sharding import language_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

COMPARED = 4096  # pairs of a batch whose comparison is run; that of more is known from it


@dataclass(frozen=True)
class Measured:
    """A recipe's model and one of its micro-batches.

    flops: part -> (forward, backward) operations of a sample. working: most bytes alive in a micro-batch beside
    weights and optimiser; with gradients unless it adds to those that are there.
    """

    parameters: dict[str, int]
    trained: dict[str, int]
    held: Held
    flops: dict[str, tuple[float, float]]
    working: float


def encoder_is_frozen(model: nn.Module) -> bool:
    """Whether the image encoder's features could be kept."""
    return not any(p.requires_grad for p in model.get_submodule("image_encoder").parameters())


def measure(
    recipe: Recipe,
    work: Workload,
    precision: str,
    micro: int,
    mine: int,
    cached: bool,
    checkpointing: bool,
    shares: int = 1,
) -> Measured:
    """Run a micro-batch of `micro` samples of the `mine` that a process takes of each global batch.

    shares: into how many sharding cuts gradients; language models' layers are of the type that they are gathered in.
    Raises VlmError where layers cannot be checkpointed, or a part's configuration is not known.
    """
    model = build_on_meta(recipe.model, recipe.trainable, precision)
    parameters, trained, found = part_sizes(model), trained_sizes(model), held(model, precision)
    layers = language_layers(model) if shares > 1 else []
    for layer in layers if precision == "bf16" else []:
        layer.to(torch.bfloat16)
    names = tuple(spec.name for spec in recipe.objectives)
    compares = bool({"itc", "sigmoid_itc", "itm"} & set(names))
    accumulates = micro < mine
    mode = FakeTensorMode()
    make_fake(model, mode)
    model.train()
    if checkpointing:
        checkpoint_layers(model)
    with mode:
        if shares > 1:
            _share_gradients(layers, shares, new=not accumulates)
        elif accumulates:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
        whole = recipe.train.batch_size if compares and not accumulates else 0
        parts, inputs = step_parts(model, work.load(micro, whole), names, cached)
        cost = run_step(parts, inputs, DTYPES[precision], cache=not checkpointing)
        flops = _per_sample(cost, micro)
        working = float(cost.peak)
        if compares and accumulates:
            first, inputs = step_parts(model, work.load(micro), ("itc",), cached)
            again = run_step(first, inputs, DTYPES[precision], backward=False)
            embedding = sum(count for name, count in again.forward.items() if name != "contrast")
            flops["first pass"] = (embedding / micro, 0.0)
            contrast, peak = _contrast(model, work, recipe.train.batch_size, DTYPES[precision])
            if contrast is not None:
                flops["contrast"] = contrast
                working = max(working, peak)
    return Measured(parameters, trained, found, flops, working)


def _share_gradients(layers: list[nn.Module], shares: int, new: bool) -> None:
    """Let layers' gradients go when they are there, and if `new` leave one share of each."""
    kept = []

    def share(parameter: torch.Tensor) -> None:
        parameter.grad = None
        if new:
            kept.append(torch.empty(-(-parameter.numel() // shares)))

    for layer in layers:
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(share)


def _per_sample(cost: Cost, samples: int) -> dict[str, tuple[float, float]]:
    return {name: (cost.forward[name] / samples, cost.backward.get(name, 0) / samples) for name in cost.forward}


def _contrast(model: Any, work: Workload, batch: int, precision: torch.dtype) -> tuple[Any, float]:
    """Operations of a sample, and memory, of comparing a whole batch of a dual encoder at once."""
    parts, _ = step_parts(model, work.load(1), (), False)
    last = [part for part in parts if part.name == "contrast"]
    if not last:
        return None, 0.0
    # Every pair is compared, in blocks: operations grow with the square of the batch, memory with the batch.
    counted = min(batch, COMPARED)
    sides = {side: torch.zeros(counted, model.bridge.width, requires_grad=True) for side in ("image", "text")}
    cost = run_step(last, sides, precision)
    more = batch / counted**2
    return (cost.forward["contrast"] * more, cost.backward["contrast"] * more), float(cost.peak) * batch / counted
