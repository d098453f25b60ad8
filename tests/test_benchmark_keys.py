"""A benchmark file may hold only keys that its task reads, with values the task knows."""

import json
from pathlib import Path

import pytest

from vlm.errors import VlmError
from vlm.evaluation import load_benchmark


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"task": "zero_shot", "baselines": "train"}, "zero_shot does not read the key 'baselines'"),
        ({"task": "retrieval", "templates": "cifar"}, "retrieval does not read the key 'templates'"),
        ({"task": "zero_shot", "prompt": "what?"}, "'prompt'; see `templates`"),
        ({"task": "zero_shot", "templates": "cifarr"}, "did you mean 'cifar'"),
        ({"task": "zero_shot", "templates": ["a photo"]}, "each with {}"),
        ({"task": "zero_shot", "templates": []}, "at least one template"),
        ({"task": "zero_shot", "classes": "imagenette"}, "did you mean 'imagenet'"),
        ({"task": "zero_shot", "classes": {}}, "at least one class"),
        ({"task": "zero_shot", "metric": "acc@2"}, "unknown metric 'acc@2'.*'acc@1'"),
        ({"task": "retrieval", "prompt": "a photo"}, "lacks {caption}"),
        ({"task": "retrieval", "metric": "rsum"}, "unknown metric 'rsum'"),
        ({"task": "retrieval", "protocol": "official"}, "unknown protocol 'official'"),
    ],
)
def test_a_key_that_does_not_fit_the_task_is_an_error(tmp_path: Path, content: dict, message: str) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(json.dumps({"name": "toy", "dataset": "toy", **content}))
    with pytest.raises(VlmError, match=message):
        load_benchmark(str(path))
