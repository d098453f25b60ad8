"""The order of a source too large to shuffle as a whole: shards are shuffled, and samples within a few of them.

The shards of an epoch, shuffled, are cut into blocks of whole shards that hold at least `buffer` samples, and each
block is shuffled. So what stands at any place is known from the sizes of the shards alone, without walking there, and
only the shards of one block are read at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

_KEPT = 2  # blocks whose permutation is kept: a batch may straddle two


@dataclass(frozen=True)
class _Epoch:
    """shards: [S] in their order. ends: [S] samples up to and with each. starts: [K + 1] first sample of each block."""

    shards: np.ndarray
    ends: np.ndarray
    starts: np.ndarray


@dataclass
class ShardOrder:
    """Samples of shards, shuffled anew every epoch.

    sizes: samples of each shard. buffer: samples that are shuffled together, rounded up to whole shards.
    random: (epoch, part, count) -> `count` random 64-bit numbers, always the same.
    """

    sizes: Sequence[int]
    buffer: int
    random: Callable[[int, int, int], np.ndarray]
    _epoch: tuple[int, _Epoch] | None = field(init=False, repr=False, default=None)
    _blocks: dict[tuple[int, int], np.ndarray] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._sizes = np.asarray(self.sizes, dtype=np.int64)
        self._offsets = np.cumsum(self._sizes) - self._sizes  # [S] first sample of each shard, unshuffled
        self._size = int(self._sizes.sum())

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Numbers of the samples, counted through the shards as given, at `positions` (ascending) of the order."""
        epochs, places = np.divmod(positions, self._size)
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            plan = self._plan(int(epoch))
            blocks = np.searchsorted(plan.starts, places, side="right") - 1
            for block in np.unique(blocks[epochs == epoch]):
                here = (epochs == epoch) & (blocks == block)
                start = plan.starts[block]
                shuffled = self._permutation(int(epoch), int(block), int(plan.starts[block + 1] - start))
                samples = start + shuffled[places[here] - start]  # in the order of this epoch's shards
                slots = np.searchsorted(plan.ends, samples, side="right")
                shards = plan.shards[slots]
                result[here] = self._offsets[shards] + samples - (plan.ends[slots] - self._sizes[shards])
        return result

    def _plan(self, epoch: int) -> _Epoch:
        if self._epoch is None or self._epoch[0] != epoch:
            shards = np.argsort(self.random(epoch, 0, len(self._sizes)), kind="stable")
            ends = np.cumsum(self._sizes[shards])
            starts = [0]
            for end in ends.tolist():
                if end - starts[-1] >= self.buffer:
                    starts.append(end)
            if starts[-1] != self._size:
                starts.append(self._size)
            self._epoch = (epoch, _Epoch(shards, ends, np.array(starts)))
        return self._epoch[1]

    def _permutation(self, epoch: int, block: int, size: int) -> np.ndarray:
        key = (epoch, block)
        if key not in self._blocks:
            while len(self._blocks) >= _KEPT:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[key] = np.argsort(self.random(epoch, block + 1, size), kind="stable")
        return self._blocks[key]
