"""Training samples that stay in their shards until they are used: only how many each shard holds is known before."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from vlm.data.parsing import Malformed
from vlm.data.records import Record
from vlm.data.references import inside
from vlm.data.samples import Sample
from vlm.data.webdataset_shards import read_sample, shard_samples
from vlm.errors import VlmError

SIZES = "sizes.json"  # beside the shards: name -> number of samples, as `vlm data shard` and others write it


@dataclass(frozen=True, slots=True)
class Unread:
    """A sample that still lies in its shard. `read` gives it; raises VlmError if it says nothing that can be read.

    draw: a random number that chooses, where a record makes several samples.
    """

    samples: "ShardedSamples"
    index: int
    draw: int = 0

    @property
    def id(self) -> str:
        """The shard and the number of the sample in it, from 1."""
        shard, number = self.samples.place(self.index)
        return f"{self.samples.shards[shard]}: sample {number + 1}"

    def read(self) -> Sample:
        """The sample itself."""
        choices = self.samples.choices(self.index)
        return choices[self.draw % len(choices)]


@dataclass
class ShardedSamples(Sequence[Sample]):
    """The samples of shards, read when they are asked for: one a record, so that a place tells what lies there.

    shards, sizes: the archives, and how many records each holds. make: a record's samples; where it makes several (of a
    picture with several captions), an index gives the first and `Unread` draws one.
    """

    shards: Sequence[Path]
    sizes: Sequence[int]
    make: Callable[[Record], list[Sample]]

    def __post_init__(self) -> None:
        self._ends = np.cumsum(np.asarray(self.sizes, dtype=np.int64))

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: Any) -> Any:
        """The sample of a number, or those of a slice. Raises VlmError if it says nothing that can be read."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self.choices(index)[0]

    def choices(self, index: int) -> list[Sample]:
        """The samples of one record, at least one. Raises VlmError if it says nothing that can be read."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number_of_shard, number = self.place(index)
        shard = self.shards[number_of_shard]
        found, _ = shard_samples(shard)
        if number >= len(found):
            counted = self.sizes[number_of_shard]
            raise VlmError(f"{shard}: holds {len(found)} samples where {counted} were counted; was it cut?")
        try:
            samples = self.make(read_sample(shard, found[number]))
        except Malformed as error:
            raise VlmError(f"{found[number].key}: {error}") from error
        if not samples:
            raise VlmError(f"{found[number].key}: nothing to train on")
        return samples

    def place(self, index: int) -> tuple[int, int]:
        """The number of the shard, and of the sample in it."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard] - self.sizes[shard])

    def pictures(self) -> Iterator[str]:
        """References to all pictures, by the names in the shards alone."""
        for shard, size in zip(self.shards, self.sizes):
            for sample in shard_samples(shard)[0][:size]:
                yield from (inside(shard, name) for name in sample.pictures)


def shard_sizes(shards: Sequence[Path], limit: int | None = None, log: Callable[[str], None] = print) -> list[int]:
    """How many samples each shard holds, all together at most `limit`.

    Taken from `sizes.json` beside the shard, else from the `SHARD_stats.json` that img2dataset writes, else counted,
    which reads every shard once. Raises VlmError if a shard cannot be read, or none holds a sample.
    """
    told: dict[Path, dict[str, Any]] = {}
    sizes = []
    counted = False
    left = limit
    for shard in shards:
        if left == 0:
            sizes.append(0)
            continue
        if shard.parent not in told:
            told[shard.parent] = _mapping(shard.parent / SIZES)
        size = _count(told[shard.parent], shard.name)
        if size is None:
            size = _count(_mapping(shard.with_name(f"{shard.stem}_stats.json")), "successes")
        if size is None:
            if not counted:
                log(f"counting the samples of shards, for want of {shard.parent / SIZES}")
                counted = True
            size = len(shard_samples(shard)[0])
        sizes.append(size if left is None else min(size, left))
        left = None if left is None else left - sizes[-1]
    if not sum(sizes):
        raise VlmError(f"no samples in {len(shards)} shards, the first: {shards[0]}")
    return sizes


def _mapping(file: Path) -> dict[str, Any]:
    """What a JSON file holds by name; nothing where it is missing or something else."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _count(content: dict[str, Any], key: str) -> int | None:
    """A number of samples, if one stands there."""
    value = content.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
