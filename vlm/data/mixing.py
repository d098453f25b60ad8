"""Which sample stands at which place of the training order: a pure function of sizes, weights, seed and place.

The order knows nothing of processes or micro-batches and has no state, so a run that is split otherwise, or resumed,
reads the same samples. Randomness is the raw output of PCG64 seeded through SeedSequence, which numpy keeps the same
over versions (its `permutation` it does not).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from vlm.data.shard_order import ShardOrder
from vlm.errors import VlmError

CYCLE = 1 << 16  # places in a cycle of a weighted mixture: weights are rounded to multiples of 1 / CYCLE

_ALL, _CYCLES, _SOURCE = 0, 1, 2  # streams of random numbers: all samples, cycles, and from _SOURCE on each source


@dataclass
class MixtureOrder:
    """The training order of samples from several sources.

    sizes: samples of each source. weights: relative sampling weights, > 0.
    shards: for each source None, or the samples of each of its shards: such a source is shuffled by shards and within a
    `buffer` (`vlm.data.shard_order`), since it is too large to be shuffled as a whole; it alternates with the others by
    weight, or else by size.
    Without weights (or with weights proportional to the sizes) each epoch holds every sample exactly once, in its own
    order. With weights, sources alternate in the given proportions (any stretch of the order is off by a few samples
    at most), and each source is walked through in permutations of its own, every sample once before any comes again.
    Raises VlmError for an empty source or unfit weights.
    """

    sizes: Sequence[int]
    weights: Sequence[float] | None = None
    seed: int = 0
    shards: Sequence[Sequence[int] | None] = ()
    buffer: int = 1
    _quotas: np.ndarray | None = field(init=False, repr=False, default=None)  # [S] places of a cycle; None: no weights
    _by_shards: dict[int, ShardOrder] = field(init=False, repr=False, default_factory=dict)
    _permutations: dict[int, tuple[int, np.ndarray]] = field(init=False, repr=False, default_factory=dict)
    _cycle: tuple[int, np.ndarray, np.ndarray] | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise VlmError(f"data mixture: every source needs at least one sample, sizes are {list(self.sizes)}")
        for source, sizes in enumerate(self.shards):
            if sizes is not None:
                self._by_shards[source] = ShardOrder(sizes, self.buffer, partial(self._of_source, source))
        if self.weights is None and not self._by_shards:
            return
        weights = np.asarray(self.sizes if self.weights is None else self.weights, dtype=np.float64)
        if weights.shape != (len(self.sizes),):
            raise VlmError(f"data mixture: {len(self.sizes)} sources need as many weights, got {weights.tolist()}")
        if not np.isfinite(weights).all() or weights.min() <= 0:
            raise VlmError(f"data mixture: weights must be finite and above 0, got {weights.tolist()}")
        if len(weights) > CYCLE:
            raise VlmError(f"data mixture: at most {CYCLE} weighted sources, got {len(weights)}")
        if self._by_shards or not np.allclose(
            weights / weights.sum(), np.asarray(self.sizes) / self.epoch_size, rtol=1e-9, atol=0
        ):
            self._quotas = _quotas(weights)

    @property
    def epoch_size(self) -> int:
        """Samples of an epoch: as many as all sources hold together, with weights too."""
        return int(sum(self.sizes))

    def batch(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """(source, index in it) of the samples of the batch of step `step` (from 0); may straddle an epoch's border."""
        return self.places(step * batch_size, (step + 1) * batch_size)

    def places(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(source, index in it) of the places `start` to `stop` (not included) of the endless order."""
        if start < 0:
            raise ValueError(f"places count from 0, got {start}")
        positions = np.arange(start, stop, dtype=np.int64)
        sources, indices = self._plain(positions) if self._quotas is None else self._weighted(positions)
        return list(zip(sources.tolist(), indices.tolist()))

    def _plain(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        offsets = np.concatenate([[0], np.cumsum(self.sizes)])
        samples = self._shuffled(_ALL, self.epoch_size, positions)
        sources = np.searchsorted(offsets, samples, side="right") - 1
        return sources, samples - offsets[sources]

    def _weighted(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert self._quotas is not None
        sources, occurrences = np.empty_like(positions), np.empty_like(positions)
        cycles, places = np.divmod(positions, CYCLE)
        for cycle in np.unique(cycles):
            here = cycles == cycle
            of_place, rank = self._cycle_at(int(cycle))
            sources[here] = of_place[places[here]]
            # How often each source came before is known without walking there: every cycle holds its quota.
            occurrences[here] = cycle * self._quotas[sources[here]] + rank[places[here]]
        indices = np.empty_like(positions)
        for source in np.unique(sources):
            here = sources == source
            if (by_shards := self._by_shards.get(int(source))) is not None:
                indices[here] = by_shards.at(occurrences[here])
            else:
                indices[here] = self._shuffled(_SOURCE + int(source), self.sizes[source], occurrences[here])
        return sources, indices

    def _cycle_at(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """The source at each place of a cycle [CYCLE], and how many times it came before in this cycle [CYCLE]."""
        assert self._quotas is not None
        if self._cycle is None or self._cycle[0] != cycle:
            sources = np.repeat(np.arange(len(self._quotas)), self._quotas)
            rank = np.arange(CYCLE) - np.repeat(np.cumsum(self._quotas) - self._quotas, self._quotas)
            jitter = (self._random(_CYCLES, cycle, CYCLE) >> np.uint64(11)) * 2.0**-53  # [0, 1)
            # The k-th of q samples of a source falls somewhere in the k-th of q equal parts of the cycle.
            order = np.argsort((rank + jitter) / self._quotas[sources], kind="stable")
            self._cycle = (cycle, sources[order], rank[order])
        return self._cycle[1], self._cycle[2]

    def _shuffled(self, stream: int, size: int, positions: np.ndarray) -> np.ndarray:
        """What stands at `positions` (ascending) of one permutation of `size` after the other."""
        epochs, places = np.divmod(positions, size)
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            kept = self._permutations.get(stream)
            if kept is None or kept[0] != epoch:
                order = np.argsort(self._random(stream, int(epoch), size), kind="stable")
                kept = self._permutations[stream] = (int(epoch), order)
            here = epochs == epoch
            result[here] = kept[1][places[here]]
        return result

    def _of_source(self, source: int, epoch: int, part: int, size: int) -> np.ndarray:
        return self._random(_SOURCE + source, epoch, size, part)

    def _random(self, stream: int, epoch: int, size: int, *part: int) -> np.ndarray:
        """`size` random 64-bit numbers."""
        sequence = np.random.SeedSequence(self.seed % 2**64, spawn_key=(stream, epoch, *part))
        return np.random.PCG64(sequence).random_raw(size)


def _quotas(weights: np.ndarray) -> np.ndarray:
    """`weights` as whole numbers that add up to CYCLE, each at least 1 (largest remainders)."""
    shares = weights / weights.sum() * (CYCLE - len(weights))  # one place each is set aside
    quotas = np.floor(shares).astype(np.int64)
    missing = CYCLE - len(weights) - int(quotas.sum())
    quotas[np.argsort(quotas - shares, kind="stable")[:missing]] += 1
    return quotas + 1
