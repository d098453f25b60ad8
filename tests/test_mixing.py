"""The training order: every sample once an epoch, proportions as asked, a pure function of seed and place."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.mixing import CYCLE, MixtureOrder
from vlm.errors import VlmError

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)
SEEDS = st.integers(-5, 2**63)

# Written down once: an order that changes would silently change what a resumed run reads.
PLAIN_ORDER = [(1, 4), (1, 2), (1, 5), (0, 2), (0, 0), (1, 6), (0, 4), (0, 3)]
WEIGHTED_ORDER = [(0, 0), (1, 4), (1, 1), (0, 3), (1, 2), (0, 2)]


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, seed=SEEDS, batch_size=st.integers(1, 30))
def test_each_epoch_holds_every_sample_exactly_once(sizes: list[int], seed: int, batch_size: int) -> None:
    order = MixtureOrder(sizes, seed=seed)
    everything = {(source, index) for source, size in enumerate(sizes) for index in range(size)}
    steps = -(-3 * order.epoch_size // batch_size)
    seen = [sample for step in range(steps) for sample in order.batch(step, batch_size)]
    for epoch in range(3):
        part = seen[epoch * order.epoch_size : (epoch + 1) * order.epoch_size]
        assert len(part) == len(set(part)) == order.epoch_size
        assert set(part) == everything


@settings(max_examples=40, deadline=None)
@given(
    sizes=SIZES,
    seed=SEEDS,
    weighted=st.booleans(),
    step=st.integers(0, 10**6),
    batch_size=st.integers(1, 24),
)
def test_a_batch_depends_on_seed_and_step_alone(
    sizes: list[int], seed: int, weighted: bool, step: int, batch_size: int
) -> None:
    weights = [float(n + 1) for n in range(len(sizes))] if weighted else None
    used = MixtureOrder(sizes, weights, seed)
    for earlier in (0, 3, 1, step // 2):
        used.batch(earlier, batch_size)
    assert used.batch(step, batch_size) == MixtureOrder(sizes, weights, seed).batch(step, batch_size)


def test_the_order_does_not_depend_on_how_it_is_cut_into_batches() -> None:
    for weights in (None, [3.0, 1.0]):
        order = MixtureOrder([17, 90], weights, seed=5)
        small = [sample for step in range(60) for sample in order.batch(step, 4)]
        assert small == [sample for step in range(10) for sample in order.batch(step, 24)]


def test_epochs_and_seeds_differ_in_order() -> None:
    order = MixtureOrder([200], seed=1)
    first, second = order.batch(0, 200), order.batch(1, 200)
    assert first != second
    assert first != sorted(first)
    assert first != MixtureOrder([200], seed=2).batch(0, 200)


def test_the_order_stays_the_same_over_versions() -> None:
    assert MixtureOrder([5, 7], seed=0).batch(0, 8) == PLAIN_ORDER
    assert MixtureOrder([5, 7], [1.0, 1.0], seed=0).batch(CYCLE, 6) == WEIGHTED_ORDER


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 20), min_size=2, max_size=4),
    seed=SEEDS,
    start=st.integers(0, 2 * CYCLE),
    length=st.integers(1, 3000),
)
def test_weights_set_the_proportions_of_any_stretch(weights: list[float], seed: int, start: int, length: int) -> None:
    order = MixtureOrder([10 + n for n in range(len(weights))], weights, seed)
    counts = Counter(source for source, _ in order.places(start, start + length))
    for source, weight in enumerate(weights):
        assert abs(counts[source] - length * weight / sum(weights)) <= 4.5


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=3), seed=SEEDS)
def test_with_weights_each_source_shows_all_its_samples_before_any_comes_again(sizes: list[int], seed: int) -> None:
    order = MixtureOrder(sizes, [1.0, 7.0, 2.5][: len(sizes)], seed)
    stretch = order.places(0, 600)
    for source, size in enumerate(sizes):
        indices = [index for s, index in stretch if s == source]
        for first in range(0, len(indices) - size, size):
            assert sorted(indices[first : first + size]) == list(range(size))


def test_a_source_goes_on_where_the_last_cycle_left_it() -> None:
    order = MixtureOrder([1000, 3000], [1.0, 1.0], seed=3)
    stretch = [index for source, index in order.places(0, CYCLE + 4000) if source == 1]
    for first in range(0, len(stretch) - 3000, 3000):
        assert len(set(stretch[first : first + 3000])) == 3000


def test_a_tiny_weight_still_gets_a_place() -> None:
    order = MixtureOrder([90_000, 5], [1.0, 1e-12])
    assert Counter(source for source, _ in order.places(0, CYCLE))[1] == 1


def test_proportional_weights_are_no_weights() -> None:
    assert MixtureOrder([30, 10], [3.0, 1.0], 7).batch(2, 16) == MixtureOrder([30, 10], None, 7).batch(2, 16)


def test_a_late_step_is_reached_without_walking_there() -> None:
    batch = MixtureOrder([1000, 10], [1.0, 1.0]).batch(10**12, 32)
    assert len(batch) == 32
    assert {source for source, _ in batch} == {0, 1}


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([], None, "at least one sample"),
        ([3, 0], None, "at least one sample"),
        ([3, 4], [1.0], "as many weights"),
        ([3, 4], [1.0, 0.0], "above 0"),
        ([3, 4], [1.0, float("nan")], "finite"),
        ([3, 4], [1.0, -1.0], "above 0"),
    ],
)
def test_unfit_sizes_and_weights_are_refused(sizes: list[int], weights: list[float] | None, message: str) -> None:
    with pytest.raises(VlmError, match=message):
        MixtureOrder(sizes, weights)


def test_places_before_the_first_are_refused() -> None:
    with pytest.raises(ValueError, match="count from 0"):
        MixtureOrder([np.int64(4)]).batch(-1, 2)
