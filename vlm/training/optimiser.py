"""AdamW with parameter groups, and the learning rate over time."""

import math
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm.errors import VlmError, did_you_mean
from vlm.models.freezing import named_trainable
from vlm.models.sharded import whole
from vlm.recipe import OptimizerSection, ScheduleSection


def build_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.AdamW:
    """AdamW over what trains: no decay on norms, biases and other vectors; learning rates by name pattern.

    Raises VlmError if a pattern of `optimizer.groups` matches nothing.
    """
    named = list(named_trainable(model))
    for pattern in section.groups:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            hint = did_you_mean(pattern, (name for name, _ in named))
            raise VlmError(f"optimizer.groups: {pattern!r} matches nothing that trains{hint}")
    depth = 1 + max((int(found[1]) for name, _ in named if (found := _IMAGE_LAYER.match(name))), default=-1)
    if section.image_layer_decay != 1 and not depth:
        raise VlmError("optimizer.image_layer_decay: no layer of the image encoder learns: name it in `trainable`")
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        lr = next((value for pattern, value in section.groups.items() if fnmatchcase(name, pattern)), section.lr)
        lr *= section.image_layer_decay ** layers_behind(name, depth)
        decay = section.weight_decay if parameter.ndim > 1 else 0.0
        alone = parameter.ndim == 0  # never in shards: one update cannot have both
        groups.setdefault((lr, decay, alone), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda item: item[0][0] != section.lr)  # the first one's rate is logged
    return torch.optim.AdamW(
        [{"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay} for (lr, decay, _), members in ordered],
        betas=section.betas,
        eps=section.eps,
        # The update as one kernel, and without copies: adapters are hundreds of small tensors.
        fused=all(parameter.device.type in ("cpu", "cuda") for _, parameter in named),
    )


# A layer of an image encoder, by the names that timm, open_clip and transformers give their lists of layers.
_IMAGE_LAYER = re.compile(r"image_encoder\.(?:.*\.)?(?:blocks|layers?|resblocks|stages)\.(\d+)\.")
_EMBEDDING = re.compile(r"embed|cls_token|reg_token|pos_|conv1|ln_pre|pre_layrnorm|stem")


def layers_behind(name: str, depth: int) -> int:
    """How many layers of an image encoder of `depth` layers stand behind a parameter; 0 for one of another part.

    The heads of the model count as one layer behind all, so the last has one and the embeddings all and one (Bao et al.
    2021, BEiT; as BLIP-2's code counts).
    """
    if not name.startswith("image_encoder."):
        return 0
    if found := _IMAGE_LAYER.match(name):
        return depth - int(found[1])
    return depth + 1 if _EMBEDDING.search(name) else 1


def schedule_factor(section: ScheduleSection, step: int, steps: int) -> float:
    """The share of the base learning rate at `step` of `steps` (both counted from 0).

    Linear warm-up from `warmup_start` to 1, then cosine, linear or constant down to `min_lr`.
    """
    warmup = section.warmup if section.warmup >= 1 else section.warmup * steps
    if step < warmup:
        return section.warmup_start + (1 - section.warmup_start) * (step + 1) / math.ceil(warmup)
    progress = min(1.0, (step - warmup) / max(1.0, steps - warmup))
    shape = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[section.name]
    return section.min_lr + (1 - section.min_lr) * shape


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group to `factor` of its base learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients together: NaN or infinite where one of them is; of shards, of the whole gradient."""
    norms = [
        whole(torch.nn.utils.get_total_norm([p.grad for p in members if p.grad is not None]))
        for members in _by_layout(parameters)
    ]
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale gradients, whose norm is `norm`, down to the norm `limit`."""
    for members in _by_layout(parameters):
        torch.nn.utils.clip_grads_with_norm_(members, limit, norm)


def _by_layout(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in shards apart from whole ones: torch does not compute with both at once."""
    members: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        members.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    return list(members.values())
