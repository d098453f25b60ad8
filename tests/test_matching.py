"""Hard negatives and the losses of the Q-Former's first stage, as pure functions."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.errors import VlmError
from vlm.objectives.itm import NONE, Negatives, draw_negatives, itm_loss, uniform_numbers
from vlm.objectives.query_itc import query_itc_loss, query_similarity


def points(count: int = 6, queries: int = 4, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    image = F.normalize(torch.randn(count, queries, width, generator=generator, dtype=torch.float64), dim=-1)
    text = F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=-1)
    return image.requires_grad_(), text.requires_grad_()


@pytest.mark.parametrize("block", [1, 30, 1 << 20])
def test_similarity_in_blocks_equals_the_plain_one(block: int) -> None:
    """Values and gradients, of torch's own maximum over all products."""
    image, text = points()
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.autograd.grad((query_similarity(image, text, block) * weight).sum(), (image, text))
    plain = torch.einsum("nqe,me->nmq", image, text).amax(-1)
    torch.testing.assert_close(query_similarity(image, text, block), plain)
    for ours, theirs in zip(found, torch.autograd.grad((plain * weight).sum(), (image, text))):
        torch.testing.assert_close(ours, theirs)


def test_contrast_equals_torchs_smoothed_cross_entropy() -> None:
    image, text = points()
    logits = torch.einsum("nqe,me->nmq", image, text).amax(-1) / 0.07
    target = torch.arange(6)
    wanted = sum(F.cross_entropy(side, target, label_smoothing=0.1) for side in (logits, logits.T)) / 2
    torch.testing.assert_close(query_itc_loss(image, text, 1 / 0.07, smoothing=0.1) / 6, wanted)
    ids = torch.tensor([4, 4, 9, 1, 9, 9])
    belong = (ids[:, None] == ids).double()
    soft = 0.9 * belong / belong.sum(1, keepdim=True) + 0.1 / 6
    wanted = -((logits.log_softmax(1) + logits.T.log_softmax(1)) * soft).sum() / 2
    torch.testing.assert_close(query_itc_loss(image, text, 1 / 0.07, ids, 0.1), wanted)


def test_a_batch_of_one_contrasts_to_zero() -> None:
    image, text = points(1)
    assert query_itc_loss(image, text, 10.0, smoothing=0.1).item() == pytest.approx(0, abs=1e-12)


def test_shapes_that_do_not_fit() -> None:
    image, text = points()
    with pytest.raises(VlmError, match=r"\[B,Q,E\]"):
        query_itc_loss(image[:, 0], text, 1.0)
    with pytest.raises(VlmError, match="picture ids"):
        query_itc_loss(image, text, 1.0, torch.zeros(5, dtype=torch.long))


# --- negatives --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(0, 100))
def test_what_belongs_is_never_drawn(ids: list[int], seed: int) -> None:
    """Not even where one picture's captions fill the batch, or the similarity is of another world."""
    pictures = torch.tensor(ids)
    belong = pictures[:, None] == pictures
    logits = torch.randn(len(ids), len(ids), generator=torch.Generator().manual_seed(seed)) * 50
    uniform = uniform_numbers(seed, torch.arange(len(ids)))[:, 0]
    drawn = draw_negatives(logits, belong, uniform)
    for row, place in enumerate(drawn.tolist()):
        if belong[row].all():
            assert place == NONE
        else:
            assert not belong[row, place]
    for extreme in (0.0, math.nextafter(1, 0)):
        edge = draw_negatives(logits, belong, torch.full((len(ids),), extreme))
        assert all(place == NONE or not belong[row, place] for row, place in enumerate(edge.tolist()))


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    belong = torch.tensor([[True, False, False, False]])
    numbers = uniform_numbers(0, torch.arange(20000))[:, 1]
    drawn = draw_negatives(logits.expand(20000, -1), belong.expand(20000, -1), numbers)
    wanted = torch.tensor([0.0, *torch.tensor([1.0, 2.0, 0.0]).softmax(0)])
    torch.testing.assert_close(drawn.bincount(minlength=4) / 20000, wanted, atol=0.015, rtol=0)


def test_random_numbers_depend_on_seed_and_place_alone() -> None:
    """A part of the batch gets the numbers that the whole gives it."""
    whole = uniform_numbers(7, torch.arange(10))
    assert torch.equal(uniform_numbers(7, torch.tensor([8, 2])), whole[[8, 2]])
    assert not torch.equal(uniform_numbers(8, torch.arange(10)), whole)
    assert whole.min() >= 0
    assert whole.max() < 1


def test_nan_similarity_is_left_to_the_loss() -> None:
    """Features of a half-precision encoder that overflowed must not crash the draw."""
    belong = torch.eye(3, dtype=torch.bool)
    drawn = draw_negatives(torch.full((3, 3), math.nan), belong, torch.tensor([0.1, 0.5, 0.9]))
    assert all(0 <= place < 3 and place != row for row, place in enumerate(drawn.tolist()))


def test_a_constant_predictor_scores_as_the_field_knows_it() -> None:
    """Two thirds of the pairs are wrong: the best constant gives .637."""
    odds = torch.tensor([[2.0, 1.0]]).log()
    loss, correct = itm_loss(odds.expand(5, -1), odds.expand(10, -1))
    assert loss.item() / 15 == pytest.approx(0.6365, abs=1e-4)
    assert correct.item() == 10
    nothing, _ = itm_loss(torch.zeros(1, 2), torch.zeros(0, 2))
    assert nothing.item() == pytest.approx(math.log(2))
    assert Negatives(torch.tensor([1, NONE]), torch.tensor([NONE, NONE])).count().item() == 1
