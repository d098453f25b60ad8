"""Two evaluations of one benchmark, sample by sample: is the difference more than chance?"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import VlmError
from vlm.evaluation.intervals import bootstrap, mean_parts
from vlm.evaluation.vqa import check_same_ids


@dataclass(frozen=True)
class Comparison:
    """Means of the samples' scores x100 of A and B, and B - A with its 95 % interval.

    p: two-sided, how often resamples of whole pictures put the difference on the other side of 0. better, worse, same:
    samples on which B scores so.
    """

    benchmark: str
    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    p: float
    better: int
    worse: int
    same: int

    def summary(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"interval": list(self.interval)}


def compare(run_a: str | Path, run_b: str | Path, benchmark: str, resamples: int = 10_000) -> Comparison:
    """Paired bootstrap over pictures (Efron and Tibshirani 1993, chapter 16) of two evaluations.

    run_a, run_b: run folders that hold eval/BENCHMARK, or folders of results. The same pictures are drawn for both.
    Raises VlmError where one is missing, or they are about other samples.
    """
    first, second = _samples(run_a, benchmark), _samples(run_b, benchmark)
    check_same_ids(list(second), list(first), f"{run_b}", "sample")
    a = np.array([float(row["score"]) for row in first.values()])
    b = np.array([float(second[key]["score"]) for key in first])
    clusters = [str(row.get("image") or key) for key, row in first.items()]
    drawn = bootstrap(mean_parts((b - a).tolist()), clusters, resamples=resamples)
    low, high = np.quantile(drawn, [0.025, 0.975])
    p = min(1.0, 2 * min(float((drawn <= 0).mean()), float((drawn >= 0).mean())))
    return Comparison(
        benchmark=benchmark,
        a=100 * float(a.mean()),
        b=100 * float(b.mean()),
        difference=100 * float((b - a).mean()),
        interval=(100 * float(low), 100 * float(high)),
        p=p,
        better=int((b > a).sum()),
        worse=int((b < a).sum()),
        same=int((b == a).sum()),
    )


def _samples(run: str | Path, benchmark: str) -> dict[str, dict[str, Any]]:
    folder = Path(run).expanduser()
    places = [folder / "eval" / benchmark, folder / benchmark, folder]
    file = next((place / "samples.jsonl" for place in places if (place / "samples.jsonl").is_file()), None)
    if file is None:
        raise VlmError(f"{folder}: no samples.jsonl of {benchmark}; run: vlm-eval {benchmark} --model {folder}")
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                found[str(row["id"])] = row
                float(row["score"])
            except (ValueError, KeyError, TypeError) as error:
                raise VlmError(f"{file}:{number}: not a sample with id and score: {error}") from error
    if not found:
        raise VlmError(f"{file}: no samples")
    return found
