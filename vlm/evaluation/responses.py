"""What a model said, kept on disk as it says it: a killed evaluation goes on, and nothing is asked twice.

One file for each model, weights, way of asking and decoding: `VLM_CACHE/responses/HASH.RANK.jsonl`, a line for each
batch of answers, appended and flushed as it is done. A line that a kill cut off is ignored, so that a batch is kept
whole or not at all.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from vlm.paths import cache_dir

if TYPE_CHECKING:
    from vlm.evaluation.benchmark import Benchmark

Row = dict[str, Any]
Value = TypeVar("Value")


class Responses:
    """The answers of one model asked in one way; `rank` parts the files of several processes."""

    def __init__(self, identity: dict[str, Any], rank: int = 0) -> None:
        text = json.dumps(identity, sort_keys=True, default=str)
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        folder = cache_dir() / "responses"
        self.file = folder / f"{key}.{rank}.jsonl"
        self._said: dict[str, Row] = {}
        for file in sorted(folder.glob(f"{key}.*.jsonl")):
            with file.open(encoding="utf-8", errors="replace", newline="\n") as lines:
                for line in lines:
                    self._take(line)
        self._open: TextIO | None = None

    def _take(self, line: str) -> None:
        try:
            batch = json.loads(line)["said"]
            if all(isinstance(key, str) and isinstance(row, dict) for key, row in batch):
                self._said.update(batch)
        except (ValueError, KeyError, TypeError):
            return  # cut off by a kill

    def get(self, key: str | None) -> Row | None:
        """What was said about a sample, or None."""
        return None if key is None else self._said.get(key)

    def add(self, said: Sequence[tuple[str, Row]]) -> None:
        """Keep the answers of a batch; they are in the file when this returns."""
        if not said:
            return
        if self._open is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # A line break first: the last line may have been cut off.
            self._open = self.file.open("a", encoding="utf-8")
            self._open.write("\n")
        self._open.write(json.dumps({"said": said}) + "\n")
        self._open.flush()

    def close(self) -> None:
        """Close the file."""
        if self._open is not None:
            self._open.close()


def identity_of(model: Any, plan: "Benchmark") -> dict[str, Any] | None:
    """What answers depend on besides the sample; None for a model without weights to know it by."""
    weights = _weights_hash(model)
    if weights is None:
        return None
    from vlm.versions import versions

    return {
        "model": type(model).__qualname__,
        "description": getattr(model, "spec", None),
        "weights": weights,
        "task": plan.task,
        "decoding": plan.decoding,
        "versions": versions(),
    }


def _weights_hash(model: Any) -> str | None:
    """A hash over every weight's name, shape and bytes."""
    if not callable(getattr(model, "named_parameters", None)):
        return None
    import torch

    digest = hashlib.sha256()
    # Not of `state_dict`, which puts weights that training has gathered back into their shards.
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        held = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # numpy pins memory that shards free
        digest.update(held.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def processes() -> tuple[int, int]:
    """(rank, number of processes), as torchrun and accelerate set them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def gathered(own: dict[int, Value]) -> dict[int, Value]:
    """The answers of all processes, in each of them."""
    if processes()[1] == 1:
        return own
    import torch.distributed as dist

    if not dist.is_initialized():
        # The first to be done waits for the slowest, however long that takes.
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {number: value for part in parts for number, value in part.items()}
