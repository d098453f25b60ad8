"""Shortcuts of the Q-Former's training step: cheap dropout, shared passes, constants without gradient, operations."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_qformer import SIZES, image_tokens, random_qformer, text_batch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vlm.bridges.dropout import add_dropped, attention_with_dropout, dropout
from vlm.bridges.qformer import QFormer
from vlm.bridges.qformer_heads import QFormerHeads
from vlm.bridges.qformer_layers import QFormerSizes
from vlm.data.pairs import pair_batch
from vlm.data.unique_rows import put_rows, take_rows
from vlm.model_spec import QFormerSpec
from vlm.models.qformer_model import QFormerModel
from vlm.models.qformer_operations import stage1_operations
from vlm.recipe import ObjectiveSpec
from vlm.training.task import Task


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    states = torch.ones(1000, 301, requires_grad=True)
    dropped = dropout(states, 0.1)
    kept = dropped != 0
    assert kept.double().mean().item() == pytest.approx(0.9, abs=2e-3)
    assert dropped[kept].unique().item() == pytest.approx(1 / 0.9, rel=1e-4)
    assert dropped.mean().item() == pytest.approx(1.0, abs=2e-3)
    # No pattern over rows or columns.
    assert kept.double().mean(0).std().item() == pytest.approx((0.09 / 1000) ** 0.5, rel=0.3)
    assert kept.double().mean(1).std().item() == pytest.approx((0.09 / 301) ** 0.5, rel=0.3)
    (gradient,) = torch.autograd.grad(dropped.sum(), states)
    torch.testing.assert_close(gradient, dropped.detach())


def test_dropout_follows_the_seed() -> None:
    states = torch.ones(50, 7)
    torch.manual_seed(3)
    first, second = dropout(states, 0.5), dropout(states, 0.5)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(states, 0.5))
    assert not torch.equal(first, second)
    assert torch.equal(dropout(states, 0.0), states)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout_on_a_residual_is_dropout_and_a_sum(dtype: torch.dtype) -> None:
    states, residual = (torch.randn(6, 5, dtype=dtype, requires_grad=True) for _ in range(2))
    torch.manual_seed(1)
    summed = add_dropped(residual, states, 0.3)
    torch.manual_seed(1)
    wanted = residual + dropout(states, 0.3)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-6  # one rounding less in one step
    torch.testing.assert_close(summed, wanted, atol=tolerance, rtol=tolerance)
    weight = torch.randn(6, 5, dtype=dtype)
    found, expected = (torch.autograd.grad((x * weight).sum(), (residual, states)) for x in (summed, wanted))
    torch.testing.assert_close(found, expected)


def test_attention_with_dropout_equals_the_plain_one_with_the_same_mask() -> None:
    """Forward and gradients against softmax, a mask and products written out, padding included."""
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    mask = torch.arange(7) < torch.tensor([7, 4])[:, None, None, None]
    torch.manual_seed(2)
    found = attention_with_dropout(q, k, v, mask, 0.25)
    torch.manual_seed(2)
    kept = dropout(torch.ones(6, 5, 7, dtype=torch.float64), 0.25).unflatten(0, (2, 3))
    scores = (q @ k.mT / 2).masked_fill(~mask, -torch.inf)
    wanted = (scores.softmax(-1) * kept) @ v
    torch.testing.assert_close(found, wanted)
    weight = torch.randn_like(found)
    gradients = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (found, wanted))
    torch.testing.assert_close(*gradients)


def test_attention_with_dropout_under_autocast() -> None:
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention_with_dropout(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, 0.1)
    found.float().sum().backward()
    assert found.dtype == torch.bfloat16
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_rows_at_different_places_and_their_gradients() -> None:
    values, places = torch.randn(5, 2, dtype=torch.float64, requires_grad=True), torch.tensor([3, 0, 4])
    assert torch.autograd.gradcheck(lambda x: take_rows(x, places), values)
    assert torch.autograd.gradcheck(lambda x: put_rows(x, torch.tensor([3, 0, 4, 6, 1]), 8), values)


@pytest.mark.parametrize("slots", [[0, 1, 2], [0, 0, 2, 1]])
def test_passes_apart_together_give_what_each_gives_alone(slots: list[int]) -> None:
    """Queries, contrast's texts and captions behind the queries in one pass, with gradients; a picture may have two."""
    bridge, lengths = random_qformer(), [4, 7, 2, 5][: len(slots)]
    texts, tokens = text_batch(*lengths), image_tokens()
    said = texts.with_first(1).without_last()

    def gradients(*outputs: Tensor) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)
        found = torch.autograd.grad(loss, list(bridge.parameters()), allow_unused=True)  # type: ignore[arg-type]
        return [x for x in found if x is not None]

    together = bridge.apart(bridge.image(tokens), texts, said, slots)
    queries = bridge.queries(bridge.image(tokens))
    alone = (queries.states, bridge.first_text_state(texts), bridge.causal(queries.select(slots), said))
    found = (together[0].states, *together[1:])
    torch.testing.assert_close(found, alone, atol=1e-10, rtol=0)
    torch.testing.assert_close(gradients(*found), gradients(*alone), atol=1e-9, rtol=0)
    for kept, wanted in zip(together[0].keys_values, queries.keys_values):
        torch.testing.assert_close(kept, wanted, atol=1e-10, rtol=0)


def test_constant_image_tokens_give_the_same_without_their_gradient() -> None:
    """The norm's weight moved into those of keys and values changes no state and no gradient."""
    bridge, tokens = random_qformer(), image_tokens()
    torch.nn.init.normal_(bridge.image_norm.weight)
    torch.nn.init.normal_(bridge.image_norm.bias)

    def outcome(tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        states = bridge.queries(bridge.image(tokens)).states
        learned = [p for name, p in bridge.named_parameters() if "text_ffn" not in name and "embeddings" not in name]
        return states, list(torch.autograd.grad(states.square().sum(), learned))

    torch.testing.assert_close(outcome(tokens), outcome(tokens.clone().requires_grad_()), atol=1e-9, rtol=1e-9)


class Encoder(nn.Module):
    num_tokens = 7


def stage_one(sizes: QFormerSizes) -> QFormerModel:
    spec = QFormerSpec.model_validate({"image_encoder": "timm:none", "text_length": 16, "match_length": 16})
    bridge, heads = QFormer(sizes), QFormerHeads(sizes.width, sizes.vocabulary, 8)
    return QFormerModel(spec, Encoder(), bridge, heads, SimpleNamespace(start=1, pad=0))  # type: ignore[arg-type]


def test_operations_of_a_step_are_those_that_torch_counts() -> None:
    """Within what is left out: projections into the joint space, the matching head, the contrast itself, padding."""
    sizes = replace(SIZES, width=48, ffn=160, vocabulary=400, dropout=0.1)
    model, count, length = stage_one(sizes), 6, 9
    ids = torch.randint(2, 400, (count, length))
    batch = pair_batch(ids, torch.ones_like(ids), [f"{i}" for i in range(count)], range(count))
    batch = replace(batch, image_inputs=image_tokens(count, torch.float32))
    task = Task(model, [ObjectiveSpec(name="itc"), ObjectiveSpec(name="itm"), ObjectiveSpec(name="lm")]).train()
    with FlopCounterMode(display=False) as counter:
        task(batch, task.counts([batch]))[0].backward()
    counted = stage1_operations(sizes, Encoder.num_tokens, count, count, batch.num_tokens)
    assert model.operations(batch) == counted
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)
