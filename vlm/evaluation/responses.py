"""What a model said, kept on disk as it says it: a killed evaluation goes on, and nothing is asked twice.

One file for each model, weights, way of asking and decoding: `VLM_CACHE/responses/HASH.RANK.jsonl`, a line for each
answer, appended and flushed as a batch is done. A line that a kill cut off is ignored.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, TextIO

from vlm.data.records import Record
from vlm.data.references import picture_bytes
from vlm.errors import VlmError
from vlm.evaluation.benchmark import Benchmark
from vlm.evaluation.task import Prediction
from vlm.paths import cache_dir


class Responses:
    """The answers of one model asked in one way; `rank` parts the files of several processes."""

    def __init__(self, identity: dict[str, Any], rank: int = 0) -> None:
        text = json.dumps(identity, sort_keys=True, default=str)
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        folder = cache_dir() / "responses"
        self.file = folder / f"{key}.{rank}.jsonl"
        self._said: dict[str, str] = {}
        for file in sorted(folder.glob(f"{key}.*.jsonl")):
            for line in file.read_text(encoding="utf-8").split("\n"):
                self._take(line)
        self._open: TextIO | None = None

    def _take(self, line: str) -> None:
        try:
            row = json.loads(line)
            self._said[str(row["sample"])] = str(row["text"])
        except (ValueError, KeyError, TypeError):
            return  # cut off by a kill

    def get(self, sample: str | None) -> Prediction | None:
        """What was said about a sample, or None."""
        return None if sample is None or sample not in self._said else Prediction(self._said[sample])

    def add(self, samples: Sequence[str | None], predictions: Sequence[Prediction]) -> None:
        """Keep answers, on disk when this returns. What could not be asked is not kept."""
        rows = [
            json.dumps({"sample": sample, "text": prediction.text})
            for sample, prediction in zip(samples, predictions, strict=True)
            if sample is not None and prediction.text is not None
        ]
        if not rows:
            return
        if self._open is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # A line break first: the last line may have been cut off.
            self._open = self.file.open("a", encoding="utf-8")
            self._open.write("\n")
        self._open.write("\n".join(rows) + "\n")
        self._open.flush()

    def close(self) -> None:
        """Close the file."""
        if self._open is not None:
            self._open.close()


def identity_of(model: Any, plan: Benchmark) -> dict[str, Any] | None:
    """What answers depend on besides the sample; None for a model without weights to know it by."""
    weights = _weights_hash(model)
    if weights is None:
        return None
    from vlm.evaluation.result import versions

    return {
        "model": type(model).__qualname__,
        "description": getattr(model, "spec", None),
        "weights": weights,
        "task": plan.task,
        "decoding": plan.decoding,
        "versions": versions(),
    }


def sample_key(record: Record, prompt: str) -> str | None:
    """A picture's content and what is asked about it; None where the picture cannot be read."""
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass"))
    try:
        for image in record.images:
            digest.update(hashlib.sha256(picture_bytes(image)).digest())
    except (OSError, VlmError):
        return None
    return digest.hexdigest()


def _weights_hash(model: Any) -> str | None:
    """A hash over every weight's name, shape and bytes."""
    if not callable(getattr(model, "state_dict", None)):
        return None
    import torch

    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def processes() -> tuple[int, int]:
    """(rank, number of processes), as torchrun and accelerate set them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def gathered(own: dict[int, Prediction]) -> dict[int, Prediction]:
    """The answers of all processes, in each of them."""
    if processes()[1] == 1:
        return own
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {number: prediction for part in parts for number, prediction in part.items()}
