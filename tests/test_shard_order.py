"""The order of samples in shards: every sample once an epoch, blocks of whole shards, known at any place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.mixing import CYCLE, MixtureOrder
from vlm.errors import VlmError

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any)

# Written down once: an order that changes would silently change what a resumed run reads.
WRITTEN_DOWN = [6, 1, 0, 4, 5, 3, 2, 7, 8]


def order_of(sizes: list[int], seed: int = 0, buffer: int = 10) -> MixtureOrder:
    return MixtureOrder([sum(sizes)], seed=seed, shards=[sizes], buffer=buffer)


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, seed=st.integers(-5, 2**63), buffer=st.integers(1, 80), batch_size=st.integers(1, 30))
def test_each_epoch_holds_every_sample_exactly_once(sizes: list[int], seed: int, buffer: int, batch_size: int) -> None:
    order = order_of(sizes, seed, buffer)
    size = sum(sizes)
    seen = [index for step in range(-(-3 * size // batch_size)) for _, index in order.batch(step, batch_size)]
    for epoch in range(3):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, buffer=st.integers(1, 80), step=st.integers(0, 10**6), batch_size=st.integers(1, 24))
def test_a_batch_depends_on_seed_and_step_alone(sizes: list[int], buffer: int, step: int, batch_size: int) -> None:
    used = order_of(sizes, 3, buffer)
    for earlier in (0, 3, 1, step // 2):
        used.batch(earlier, batch_size)
    assert used.batch(step, batch_size) == order_of(sizes, 3, buffer).batch(step, batch_size)


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, buffer=st.integers(1, 80), processes=st.integers(1, 5))
def test_processes_share_the_order_without_overlap_or_loss(sizes: list[int], buffer: int, processes: int) -> None:
    size = sum(sizes)
    whole = order_of(sizes, 1, buffer).places(0, size)
    parts = [order_of(sizes, 1, buffer).places(0, size)[rank::processes] for rank in range(processes)]
    assert sorted(sample for part in parts for sample in part) == sorted(whole)


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, buffer=st.integers(1, 80), seed=st.integers(0, 100))
def test_only_the_shards_of_one_block_are_open_at_a_time(sizes: list[int], buffer: int, seed: int) -> None:
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    indices = [index for _, index in order_of(sizes, seed, buffer).places(0, sum(sizes))]
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(int(shard_of[index]), []).append(place)
    for own in places.values():  # a shard's samples lie within one block, which ends with the shard that fills it
        assert max(own) - min(own) < buffer + max(sizes)


def test_shards_and_samples_are_shuffled_anew_each_epoch() -> None:
    order = order_of([100] * 10, buffer=200)
    first, second = ([i for _, i in order.places(1000 * e, 1000 * (e + 1))] for e in range(2))
    assert first != second
    assert [i // 100 for i in first[::200]] != [i // 100 for i in second[::200]]
    assert len({i // 100 for i in first[:50]}) == 2  # two shards fill the buffer
    assert first != [i for _, i in order_of([100] * 10, seed=1, buffer=200).places(0, 1000)]


def test_the_order_stays_the_same_over_versions() -> None:
    assert [i for _, i in order_of([3, 4, 2], buffer=5).places(0, 9)] == WRITTEN_DOWN


def test_four_hundred_million_samples_are_ordered_at_once_and_anywhere() -> None:
    order = order_of([10_000] * 41_455, buffer=50_000)
    batch = [index for _, index in order.batch(10_000_000, 32)]
    assert len({index // 10_000 for index in batch}) <= 5
    assert len(set(batch)) == 32


def test_shards_alternate_with_other_sources_by_size_or_weight() -> None:
    sizes = [[60, 40], None]
    by_size = MixtureOrder([100, 300], seed=2, shards=sizes, buffer=50)
    sources = [source for source, _ in by_size.places(0, 4000)]
    assert abs(sources.count(0) - 1000) <= 5
    weighted = MixtureOrder([100, 300], [1.0, 1.0], seed=2, shards=sizes, buffer=50).places(CYCLE - 500, CYCLE + 500)
    own = [index for source, index in weighted if source == 0]
    assert abs(len(own) - 500) <= 5
    for source, size in ((0, 100), (1, 300)):
        walked = [index for s, index in by_size.places(0, 4000) if s == source]
        for first in range(0, len(walked) - size, size):
            assert sorted(walked[first : first + size]) == list(range(size))


def test_shards_without_a_sample_are_refused() -> None:
    with pytest.raises(VlmError, match="at least one sample"):
        order_of([0, 0])
