"""Every shipped recipe's model at full width, with fewer layers, runs forward on a GPU that is not there."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm import load_recipe
from vlm.models.meta import build_on_meta
from vlm.paths import yaml_names
from vlm.planning.fake import make_fake
from vlm.planning.parts import context_of, step_parts
from vlm.planning.step import Part
from vlm.planning.workload import Load
from vlm.recipe import Recipe


@pytest.fixture(autouse=True)
def autocast() -> Iterator[None]:
    """As in training on a GPU; `torch.autocast` itself does nothing where there is none."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)


def _model(recipe: Recipe) -> torch.nn.Module:
    return build_on_meta(recipe.model, recipe.trainable, "bf16", depth=2)


def _load(model: torch.nn.Module) -> Load:
    return Load(samples=2, pictures=2, rows=2, text_tokens=context_of(model) or 16, labels=8)


def _forward(parts: list[Part], values: dict[str, Tensor]) -> None:
    for part in parts:
        values |= zip(part.writes, part.run(*(values[name] for name in part.reads)))


@pytest.mark.parametrize("name", yaml_names("recipes"))
def test_no_tensor_of_a_shipped_recipe_is_on_the_wrong_device(name: str) -> None:
    """FakeTensorMode raises where tensors of two devices meet."""
    recipe = load_recipe(name)
    model = _model(recipe)
    mode = FakeTensorMode()
    make_fake(model, mode, "cuda")
    model.train()
    objectives = tuple(spec.name for spec in recipe.objectives)
    with mode:
        parts, values = step_parts(model, _load(model), objectives, cached=False)
        _forward(parts, values)
    assert {value.device.type for value in values.values()} == {"cuda"}
    assert values["loss"].shape == ()
    assert values["loss"].dtype == torch.float32


def test_a_tensor_on_the_wrong_device_is_found() -> None:
    recipe = load_recipe("llava15_pretrain")
    model = _model(recipe)
    mode = FakeTensorMode()
    make_fake(model, mode, "cuda")
    model.bridge = make_fake(_model(recipe).bridge, mode, "cpu")
    with mode, pytest.raises(RuntimeError, match=r"[Dd]evice"):
        _forward(*step_parts(model, _load(model), ("lm",), cached=False))
