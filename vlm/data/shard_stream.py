"""Samples of shards in a shuffled order that depends on the seed and the epoch alone.

Shards are shuffled, and their samples pass through a shuffle buffer. The order is worked out over numbers of samples,
so it is the same for any number of processes and workers: of `parts` parts, each takes every parts-th place of it and
reads nothing of the others. Epoch and place are the whole state of a stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from vlm.data.images import BrokenImage, load_image
from vlm.data.parsing import BrokenRecord, Malformed
from vlm.data.records import Record
from vlm.data.webdataset_shards import ShardSample, read_sample, shard_samples
from vlm.errors import VlmError

_DRAWS = 4096  # random numbers made at once


@dataclass
class ShardStream:
    """Iterating gives (record, its pictures as upright RGB) to the end of the epoch; iterating again, the next epoch.

    shards: as `expand_shards` gives them. buffer: places of the shuffle buffer; 1 leaves the order within shards.
    process, processes, worker, workers: which part of the order this stream reads.
    epoch, position: where it stands; position counts the places of the whole order, all parts together.
    broken: what was skipped. Damage found in a shard's names is told to every part.
    """

    shards: list[Path]
    seed: int = 0
    buffer: int = 1000
    process: int = 0
    processes: int = 1
    worker: int = 0
    workers: int = 1
    epoch: int = 0
    position: int = 0
    broken: list[BrokenRecord] = field(default_factory=list)
    _samples: dict[int, list[ShardSample]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.shards or self.buffer < 1:
            raise VlmError(
                f"a stream needs shards and a buffer of at least 1, got {len(self.shards)} and {self.buffer}"
            )
        if not (0 <= self.process < self.processes and 0 <= self.worker < self.workers):
            raise VlmError(
                f"process {self.process} of {self.processes}, worker {self.worker} of {self.workers}: both count from 0"
            )

    @property
    def part(self) -> int:
        """Which places this stream takes: a process's do not depend on how many workers share them."""
        return self.worker * self.processes + self.process

    def state_dict(self) -> dict[str, int]:
        """Where this stream stands.

        With `position` set to how many places all parts together are done with, streams of another number of processes
        or workers go on as well.
        """
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from where `state` was taken."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def __iter__(self) -> Iterator[tuple[Record, tuple[Image.Image, ...]]]:
        parts = self.processes * self.workers
        began = self.position
        for place, (shard, number) in enumerate(self.order(self.epoch)):
            if place < began or place % parts != self.part:
                continue
            self.position = place + 1
            if (found := self._read(shard, number)) is not None:
                yield found
        self.epoch, self.position = self.epoch + 1, 0

    def order(self, epoch: int) -> Iterator[tuple[int, int]]:
        """(shard, sample in it) of every place of an epoch. Only names are read, shard by shard as they are needed."""
        random = _random(self.seed, epoch)
        keys = np.array([next(random) for _ in self.shards], dtype=np.uint64)
        waiting: list[tuple[int, int]] = []
        for shard in np.argsort(keys, kind="stable").tolist():
            for number in range(len(self._samples_of(shard))):
                waiting.append((shard, number))
                if len(waiting) == self.buffer:
                    yield _drawn(waiting, random)
        while waiting:
            yield _drawn(waiting, random)

    def _samples_of(self, shard: int) -> list[ShardSample]:
        if shard not in self._samples:
            self._samples[shard], broken = shard_samples(self.shards[shard])
            self.broken += broken
        return self._samples[shard]

    def _read(self, shard: int, number: int) -> tuple[Record, tuple[Image.Image, ...]] | None:
        sample = self._samples_of(shard)[number]
        try:
            record = read_sample(self.shards[shard], sample)
            return record, tuple(load_image(image) for image in record.images)
        except (Malformed, BrokenImage) as error:
            self.broken.append(BrokenRecord(f"{self.shards[shard]}: {sample.key}", str(error)))
            return None


def _random(seed: int, epoch: int) -> Iterator[int]:
    """Random 64-bit numbers; the raw output of PCG64 stays the same over versions of numpy."""
    generator = np.random.PCG64(np.random.SeedSequence(seed % 2**64, spawn_key=(epoch,)))
    while True:
        yield from generator.random_raw(_DRAWS).tolist()


def _drawn(waiting: list[tuple[int, int]], random: Iterator[int]) -> tuple[int, int]:
    """One of those that wait, taken out; the last takes its place."""
    index = next(random) % len(waiting)
    waiting[index], waiting[-1] = waiting[-1], waiting[index]
    return waiting.pop()
