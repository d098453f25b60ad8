"""`vlm-eval` with a real dual encoder: zero-shot classification and retrieval against naive computations."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dual_encoder_parts import published_name
from PIL import Image
from test_cifar import cifar10
from typer.testing import CliRunner

from vlm import load_model
from vlm.cli.eval import app
from vlm.data.formats import read_records
from vlm.data.images import load_image
from vlm.data.prompts import prompt_templates
from vlm.data.shard_writer import write_shards
from vlm.evaluation import load_benchmark
from vlm.paths import yaml_names

CLASSES = ["cat", "fire_engine", "blue_chair", "dog", "lamp", "tree", "drum"]


def image_folder(folder: Path) -> Path:
    """A folder of random pictures for each class, unequally many."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(2 + number % 3):
            picture = rng.integers(0, 256, (36, 44, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / name / f"{i}.png")
    return folder


def _folder(place: Path) -> dict[str, str]:
    return {"dataset.name": str(image_folder(place / "pictures")), "dataset.format": "image_folder"}


def _cifar(place: Path) -> dict[str, str]:
    cifar10(place / "cifar", rows=15, names=CLASSES)
    return {"dataset.name": str(place / "cifar"), "dataset.format": "cifar"}


def _shards(place: Path) -> dict[str, str]:
    records, _ = read_records("image_folder", image_folder(place / "pictures"), "test")
    write_shards(records, place / "shards", size=7)
    return {"dataset.name": str(place / "shards"), "dataset.format": "webdataset"}


def run(model: str, benchmark: Path, output: Path, *overrides: str) -> dict[str, Any]:
    """What `vlm-eval --json` prints."""
    words = [str(benchmark), "--model", model, "--output", str(output), "--json", "--batch-size", "4", *overrides]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    summary: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return summary


@pytest.mark.parametrize("source", [_folder, _cifar, _shards])
@pytest.mark.parametrize("kind", ["clip", "siglip", "vlm-test-vit"])
def test_zero_shot_equals_a_naive_computation(
    tiny_folder: Any, tmp_path: Path, kind: str, source: Callable[[Path], dict[str, str]]
) -> None:
    data = source(tmp_path)
    benchmark = tmp_path / "toy.yaml"
    toy = {"name": "toy", "dataset": {"name": data["dataset.name"], "format": data["dataset.format"]}}
    benchmark.write_text(json.dumps({**toy, "task": "zero_shot", "templates": "cifar"}))
    name = published_name(tiny_folder, kind)
    summary = run(name, benchmark, tmp_path / "out")

    model = load_model(name)
    records, _ = read_records(data["dataset.format"], Path(data["dataset.name"]), "test")
    labels = sorted({record.label for record in records})
    rows = []
    for label in labels:
        texts = [form.replace("{}", label.replace("_", " ")) for form in prompt_templates("cifar")]
        mean = model.encode_text(texts).mean(0)
        rows.append((mean / mean.norm()).numpy())
    pictures = np.stack([model.encode_image(load_image(record.images[0]))[0].numpy() for record in records])
    order = np.argsort(-(pictures @ np.stack(rows).T), axis=1)  # [N, C]
    right = np.array([labels.index(record.label) for record in records])
    hits = order == right[:, None]
    expected = {
        "acc@1": 100 * hits[:, 0].mean(),
        "acc@5": 100 * hits[:, :5].any(1).mean(),
        "mean_per_class_recall": 100 * np.mean([hits[right == n, 0].mean() for n in np.unique(right)]),
    }
    assert summary["metrics"] == pytest.approx(expected)
    assert len(labels) > 5  # else acc@5 would say nothing


def test_retrieval_equals_a_naive_computation(tiny_folder: Any, tmp_path: Path) -> None:
    records, _ = read_records("image_folder", image_folder(tmp_path / "pictures"), "test")
    lines = []
    for number, record in enumerate(records):  # ragged: one to three captions
        texts = [f"{record.label} number {number} {word}" for word in ("red", "blue", "on a chair")[: 1 + number % 3]]
        lines.append({"id": str(number), "image": str(record.images[0]), "captions": texts})
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    benchmark = tmp_path / "toy.yaml"
    dataset = {"name": str(file), "format": "captions_jsonl", "images": str(tmp_path)}
    benchmark.write_text(json.dumps({"name": "toy", "dataset": dataset, "task": "retrieval"}))
    name = published_name(tiny_folder, "clip")
    summary = run(name, benchmark, tmp_path / "out")

    model = load_model(name)
    images = model.encode_image([line["image"] for line in lines])
    texts = [text for line in lines for text in line["captions"]]
    owner = np.array([number for number, line in enumerate(lines) for _ in line["captions"]])
    scores = (images @ model.encode_text(texts).T).numpy()  # [M, N]
    for k in (1, 5, 10):
        found = [n in owner[np.argsort(-scores[n])[:k]] for n in range(len(lines))]
        assert summary["metrics"][f"TR@{k}"] == pytest.approx(100 * np.mean(found))
        found = [owner[c] in np.argsort(-scores[:, c])[:k] for c in range(len(texts))]
        assert summary["metrics"][f"IR@{k}"] == pytest.approx(100 * np.mean(found))
    parts = [summary["metrics"][f"{way}@{k}"] for way in ("TR", "IR") for k in (1, 5, 10)]
    assert summary["metrics"]["rsum"] == pytest.approx(sum(parts))


@pytest.mark.parametrize("name", ["imagenet_zero_shot", "cifar10", "cifar100", "coco_retrieval", "flickr30k_retrieval"])
def test_the_shipped_benchmarks_name_shipped_data(name: str) -> None:
    plan = load_benchmark(name)
    assert plan.dataset.name in yaml_names("datasets")
    assert plan.task == ("retrieval" if "retrieval" in name else "zero_shot")


def test_the_shipped_benchmark_runs_on_a_folder_of_synsets(
    tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_DATA", str(tmp_path))
    for synset in ("n01440764", "n02123045", "n03891251"):
        folder = tmp_path / "imagenet" / "val" / synset
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 40), (int(synset[-2:]), 100, 30)).save(folder / "a.png")
    name = published_name(tiny_folder, "vlm-test-vit")
    summary = run(name, Path("imagenet_zero_shot"), tmp_path / "out", "templates=simple")
    assert summary["count"] == 3
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    model = load_model(name)
    from vlm.data.prompts import class_names

    names = class_names("imagenet")
    texts = [f"a photo of a {text}." for text in names.values()]
    best = (model.encode_image(samples[0]["image"]) @ model.encode_text(texts).T)[0].argmax().item()
    assert names[samples[0]["prediction"]] == list(names.values())[best]
