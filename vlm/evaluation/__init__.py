"""Benchmarks: the runner, the metrics by their official protocols, baselines, intervals and the report."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Resolved on first use: a metric does not pay for the runner's imports.
_PUBLIC = {
    "Benchmark": "vlm.evaluation.benchmark",
    "CaptionScores": "vlm.evaluation.captioning",
    "EvaluationResult": "vlm.evaluation.runner",
    "RetrievalScores": "vlm.evaluation.retrieval",
    "VqaScores": "vlm.evaluation.vqa",
    "ZeroShotScores": "vlm.evaluation.zero_shot",
    "bootstrap_interval": "vlm.evaluation.intervals",
    "caption_scores": "vlm.evaluation.captioning",
    "evaluate": "vlm.evaluation.runner",
    "load_benchmark": "vlm.evaluation.benchmark",
    "retrieval_recall": "vlm.evaluation.retrieval",
    "vqa_accuracy": "vlm.evaluation.vqa",
    "zero_shot_scores": "vlm.evaluation.zero_shot",
}
__all__ = [
    "Benchmark",
    "CaptionScores",
    "EvaluationResult",
    "RetrievalScores",
    "VqaScores",
    "ZeroShotScores",
    "bootstrap_interval",
    "caption_scores",
    "evaluate",
    "load_benchmark",
    "retrieval_recall",
    "vqa_accuracy",
    "zero_shot_scores",
]

if TYPE_CHECKING:
    from vlm.evaluation.benchmark import Benchmark, load_benchmark
    from vlm.evaluation.captioning import CaptionScores, caption_scores
    from vlm.evaluation.intervals import bootstrap_interval
    from vlm.evaluation.retrieval import RetrievalScores, retrieval_recall
    from vlm.evaluation.runner import EvaluationResult, evaluate
    from vlm.evaluation.vqa import VqaScores, vqa_accuracy
    from vlm.evaluation.zero_shot import ZeroShotScores, zero_shot_scores


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'vlm.evaluation' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
