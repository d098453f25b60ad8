"""Batches of one modality, sorted by length: LLaVA-1.5's `group_by_modality_length`, as a function of seed and step."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlm.data.mixing import MixtureOrder

WINDOW = 256  # batches of an epoch that are regrouped among themselves; at most one of them holds both modalities
_STREAM = 0x6772  # of random numbers, apart from those that mix the sources

Pair = tuple[int, int]  # (source, index in it)


@dataclass
class GroupedOrder:
    """The batches of an endless order, regrouped so that each shows pictures in all of its samples or in none.

    Each run of at most WINDOW batches of an epoch is regrouped by itself: its samples stay the same, so every sample is
    seen as often as before. Text alone costs no image encoder, and samples of one length waste no padding
    (Liu et al. 2023, arXiv:2310.03744, section 4.1: a quarter faster, the same result).

    shows_pictures, length: of a sample; within a batch the longest come first, so that micro-batches and processes get
    samples of like length.
    """

    order: MixtureOrder
    batch_size: int
    shows_pictures: Callable[[Pair], bool]
    length: Callable[[Pair], int]
    seed: int
    _kept: tuple[range, list[list[Pair]]] | None = None

    def batch(self, step: int) -> list[Pair]:
        """The samples of `step`; any step can be asked for."""
        if self._kept is None or step not in self._kept[0]:
            window = self.window(step)
            self._kept = (window, self._regrouped(window))
        return self._kept[1][step - self._kept[0].start]

    def window(self, step: int) -> range:
        """The steps that are regrouped together with `step`: of one epoch, so that it still shows every sample."""
        epoch = step * self.batch_size // self.order.epoch_size
        first, last = (-(-e * self.order.epoch_size // self.batch_size) for e in (epoch, epoch + 1))
        start = first + (step - first) // WINDOW * WINDOW
        return range(start, min(start + WINDOW, last))

    def _regrouped(self, window: range) -> list[list[Pair]]:
        size = self.batch_size
        pairs = self.order.places(window.start * size, window.stop * size)
        kinds: tuple[list[Pair], list[Pair]] = ([], [])
        for pair in pairs:
            kinds[self.shows_pictures(pair)].append(pair)
        whole = [kind[i : i + size] for kind in kinds for i in range(0, len(kind) - len(kind) % size, size)]
        if rest := [pair for kind in kinds for pair in kind[len(kind) - len(kind) % size :]]:
            whole.append(rest)  # what both leave over is one batch, for the window holds whole batches
        # Raw output, as in vlm.data.mixing: the same numbers whatever numpy's version.
        sequence = np.random.SeedSequence(self.seed % 2**64, spawn_key=(_STREAM, window.start))
        keys = np.random.PCG64(sequence).random_raw(len(whole))
        batches = [whole[i] for i in np.argsort(keys, kind="stable")]
        return [sorted(batch, key=self.length, reverse=True) for batch in batches]
