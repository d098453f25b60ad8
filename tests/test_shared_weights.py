"""Gradients of weights with several uses in a step equal torch's own, whatever else uses the weight."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.bridges.shared_weights import Embedding, Linear, linear

WORDS, WIDTH = 11, 6
IDS = torch.tensor([[1, 3, 3], [0, 1, 10]])
Net = Callable[[nn.Module, nn.Module], Tensor]


def _layers(shared: bool) -> tuple[nn.Module, nn.Module]:
    generator = torch.Generator().manual_seed(0)
    table, layer = (Embedding(WORDS, WIDTH), Linear(WIDTH, WIDTH)) if shared else _plain()
    for weight in [*table.parameters(), *layer.parameters()]:
        nn.init.normal_(weight, generator=generator)
    return table.double(), layer.double()


def _plain() -> tuple[nn.Module, nn.Module]:
    return nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)


def _once(table: nn.Module, layer: nn.Module) -> Tensor:
    return layer(table(IDS)).square().sum()


def _three_times(table: nn.Module, layer: nn.Module) -> Tensor:
    return layer(layer(table(IDS))).square().sum() + layer(table(IDS[:1])).exp().mean()


def _tied_head(table: nn.Module, layer: nn.Module) -> Tensor:
    states = layer(table(IDS)) + table(IDS.flip(1))
    head = linear if isinstance(layer, Linear) else F.linear
    return head(states, table.weight, None).logsumexp(-1).sum()


def _weight_in_a_product_of_its_own(table: nn.Module, layer: nn.Module) -> Tensor:
    first = layer(table(IDS))
    between = F.linear(first, layer.weight * 2) + table.weight[3]
    return (layer(between) * table(IDS)).sum()


@pytest.mark.parametrize("net", [_once, _three_times, _tied_head, _weight_in_a_product_of_its_own])
def test_gradients_equal_those_of_plain_layers(net: Net) -> None:
    found, wanted = (_gradients(net, shared) for shared in (True, False))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def _gradients(net: Net, shared: bool) -> list[Tensor]:
    layers = _layers(shared)
    net(*layers).backward()
    return [p.grad for layer in layers for p in layer.parameters() if p.grad is not None]


def test_a_second_backward_pass_adds_to_the_gradient_once() -> None:
    table, layer = _layers(True)
    loss = _three_times(table, layer)
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in (table.weight, layer.weight)]
    loss.backward()
    _three_times(table, layer).backward()
    for weight, once in zip((table.weight, layer.weight), first):
        torch.testing.assert_close(weight.grad, once * 3)


def test_a_hook_sees_the_whole_gradient_once_and_its_change_counts() -> None:
    table, layer = _layers(True)
    seen: list[Tensor] = []
    layer.weight.register_hook(lambda gradient: seen.append(gradient.clone()) or gradient * 2)
    _three_times(table, layer).backward()
    assert len(seen) == 1
    torch.testing.assert_close(layer.weight.grad, seen[0] * 2)
    wanted = _layers(False)
    _three_times(*wanted).backward()
    torch.testing.assert_close(seen[0], wanted[1].weight.grad)


def test_gradients_that_are_asked_for_by_name_are_whole_and_leave_none_behind() -> None:
    table, layer = _layers(True)
    (found,) = torch.autograd.grad(_three_times(table, layer), [layer.weight])
    wanted = _layers(False)
    torch.testing.assert_close(found, torch.autograd.grad(_three_times(*wanted), [wanted[1].weight])[0])
    assert layer.weight.grad is None
    assert table.weight.grad is None


def test_a_frozen_weight_gets_no_gradient_and_passes_it_on() -> None:
    table, layer = _layers(True)
    layer.requires_grad_(False)
    _three_times(table, layer).backward()
    assert layer.weight.grad is None
    wanted = _layers(False)
    _three_times(*wanted).backward()
    torch.testing.assert_close(table.weight.grad, wanted[0].weight.grad)


def test_only_the_bias_learns_where_the_weight_is_frozen() -> None:
    table, layer = _layers(True)
    layer.weight.requires_grad_(False)
    table.requires_grad_(False)
    _three_times(table, layer).backward()
    wanted = _layers(False)
    _three_times(*wanted).backward()
    torch.testing.assert_close(layer.bias.grad, wanted[1].bias.grad)
