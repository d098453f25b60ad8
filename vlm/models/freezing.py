"""What trains and what is frozen: one list of name patterns decides.

Frozen means eval mode, no gradient, and never written to a checkpoint.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from vlm.errors import VlmError, did_you_mean
from vlm.models.sharded import spread_like, whole

_LORA = re.compile(r"^(?P<owner>.*?)\.(?:network\.)?(?P<layer>.*)\.lora_(?P<side>A|B)\.default\.(?P<kind>weight|bias)$")


def logical_name(name: str) -> str:
    """The name by which recipes and files know a parameter.

    Adapters lie under one prefix: `language_model.network.model.layers.0.self_attn.q_proj.lora_A.default.weight`
    is `language_model.lora.model.layers.0.self_attn.q_proj.A.weight`.
    """
    if match := _LORA.match(name):
        owner, layer, side, kind = match.group("owner", "layer", "side", "kind")
        return f"{owner.split('.')[0]}.lora.{layer.removeprefix('network.')}.{side}.{kind}"
    return name.replace(".base_layer.", ".")


def named_trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Logical names and parameters of what trains."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield logical_name(name), parameter


def freeze_all_but(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let the parameters whose logical names match a pattern train, in fp32, and freeze all others.

    Raises VlmError if a pattern matches nothing.
    """
    names = {logical_name(name): parameter for name, parameter in model.named_parameters()}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = {".".join(n.split(".")[:depth]) + ".*" for n in names for depth in (1, 2)}
            raise VlmError(f"trainable: {pattern!r} matches no parameter{did_you_mean(pattern, known)}")
    for name, parameter in names.items():
        trains = any(fnmatchcase(name, pattern) for pattern in patterns)
        if trains and not parameter.is_floating_point():
            raise VlmError(f"trainable: {name} is quantized and cannot learn: train LoRA, or set quantization: none")
        parameter.requires_grad_(trains)
        if trains:
            # Small updates to a half-precision weight round to nothing.
            parameter.data = parameter.data.float()


def set_mode(model: nn.Module, training: bool) -> None:
    """Train mode for the modules that train, eval mode for all others (`nn.Module.train` switches everything)."""
    for module in model.modules():
        module.training = False
    if not training:
        return
    for name, module in model.named_modules():
        parameters = list(module.parameters())
        whole = bool(parameters) and all(p.requires_grad for p in parameters)
        if whole or ".lora_dropout" in name:
            for inner in module.modules():
                inner.training = True


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters by logical name, on the CPU, and those of `keep_frozen`."""
    kept: frozenset[str] = getattr(model, "kept", frozenset())
    named = {logical_name(name): parameter for name, parameter in model.named_parameters()}
    own = {name: parameter for name, parameter in named.items() if parameter.requires_grad or name in kept}
    return {name: whole(parameter.detach()).cpu().contiguous() for name, parameter in own.items()}


def keep_frozen(model: Any, names: Iterable[str]) -> None:
    """Write these parameters with the trained ones: frozen, but not as their part's own name would load them."""
    frozen = {logical_name(name) for name, parameter in model.named_parameters() if not parameter.requires_grad}
    model.kept = frozenset(frozen & set(names))


@torch.no_grad()
def load_trained_state(model: nn.Module, state: dict[str, Tensor], where: str, partial: bool = False) -> list[str]:
    """Copy trained parameters into a model by logical name; returns names the model trains that `state` lacks.

    Every tensor of `state` must fit, and unless `partial`, every trained parameter must be there.
    Raises VlmError that names the keys otherwise.
    """
    parameters = {logical_name(name): parameter for name, parameter in model.named_parameters()}
    unknown = sorted(set(state) - set(parameters))
    if unknown:
        raise VlmError(f"{where}: the model has no place for {some_names(unknown)}")
    wrong = [n for n, value in state.items() if value.shape != parameters[n].shape]
    if wrong:
        shapes = f"{tuple(state[wrong[0]].shape)} there, {tuple(parameters[wrong[0]].shape)} in the model"
        raise VlmError(f"{where}: shapes differ for {some_names(wrong)} ({shapes})")
    missing = sorted({name for name, _ in named_trainable(model)} - set(state))
    if missing and not partial:
        raise VlmError(f"{where}: lacks {some_names(missing)}")
    for name, value in state.items():
        parameters[name].copy_(spread_like(value, parameters[name]))
    return missing


def some_names(names: list[str]) -> str:
    """The first few of many names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
