"""The tasks `zero_shot` and `retrieval` from benchmark file to report, with a model that sees colours only."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from vlm.data.images import load_image
from vlm.data.parsing import BrokenRecord
from vlm.data.prompts import class_names, prompt_templates
from vlm.data.records import Record
from vlm.errors import UnsupportedTask, VlmError
from vlm.evaluation import evaluate
from vlm.evaluation.report import render_report
from vlm.evaluation.retrieval import retrieval_recall
from vlm.evaluation.zero_shot import zero_shot_scores

COLOURS = ("red", "lime", "blue", "yellow")


class Colours:
    """A dual encoder: a picture's mean colour, a text's last colour word; counts what it encodes."""

    def __init__(self) -> None:
        self.images: list[str] = []
        self.texts: list[str] = []
        self.calls: list[tuple[list[str], list[str]]] = []

    def encode_image(self, images: list[str]) -> torch.Tensor:
        pixels = [np.asarray(load_image(image), dtype=np.float32).mean((0, 1)) for image in images]
        self.images += images
        return torch.nn.functional.normalize(torch.tensor(np.array(pixels)) + 1e-3, dim=1)

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        self.texts += texts
        colours = []
        for text in texts:
            known = [word for word in text.replace(".", " ").split() if word in COLOURS]
            colours.append(ImageColor.getrgb(known[-1]) if known else (1, 1, 1))
        return torch.nn.functional.normalize(torch.tensor(colours, dtype=torch.float32) + 1e-3, dim=1)

    def classify(self, images: list[str], labels: list[str], templates: list[str] | None = None) -> torch.Tensor:
        assert templates
        self.calls.append((list(labels), list(templates)))
        assert len(set(labels)) == len(labels)
        texts = self.encode_text([templates[0].replace("{}", label) for label in labels])
        return (100 * self.encode_image(images) @ texts.T).softmax(1)


@dataclass
class Data:
    records: list[Record]
    broken: list[BrokenRecord] = field(default_factory=list)


def use(monkeypatch: pytest.MonkeyPatch, data: Data) -> None:
    monkeypatch.setattr("vlm.data.catalogue.load_dataset", lambda name, split, **options: data)


def paint(folder: Path, name: str, colour: str) -> str:
    path = folder / name
    Image.new("RGB", (8, 8), colour).save(path)
    return str(path)


@pytest.fixture
def classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    """Six pictures of three classes; one red picture is labelled blue."""
    monkeypatch.chdir(tmp_path)
    shown = [("red", "red")] * 3 + [("lime", "lime"), ("blue", "blue"), ("red", "blue")]
    data = Data([Record(str(n), (paint(tmp_path, f"{n}.png", c),), label=label) for n, (c, label) in enumerate(shown)])
    use(monkeypatch, data)
    return data


@pytest.fixture
def captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    """Four pictures with one or two captions; `yellow` is described as blue."""
    monkeypatch.chdir(tmp_path)
    texts = {"red": ("all red", "red"), "lime": ("lime",), "blue": ("blue", "quite blue"), "yellow": ("blue",)}
    data = Data([Record(c, (paint(tmp_path, f"{c}.png", c),), captions=t) for c, t in texts.items()])
    use(monkeypatch, data)
    return data


def benchmark(tmp_path: Path, **content: Any) -> str:
    path = tmp_path / "toy.yaml"
    path.write_text(json.dumps({"name": "toy", "dataset": "toy", **content}))
    return str(path)


def samples_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


# --- the metric ---


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 8))
def test_zero_shot_scores_are_those_of_a_plain_count(seed: int, n: int, c: int) -> None:
    rng = np.random.default_rng(seed)
    table, labels = rng.integers(0, 4, (n, c)), rng.integers(0, c, n)
    found = zero_shot_scores(torch.tensor(table, dtype=torch.float32), labels)
    order = np.argsort(-table, axis=1, kind="stable")
    hits = order == labels[:, None]
    assert found["acc@1"] == pytest.approx(100 * hits[:, :1].any(1).mean())
    assert found["acc@5"] == pytest.approx(100 * hits[:, :5].any(1).mean())
    recalls = [hits[labels == label, 0].mean() for label in np.unique(labels)]
    assert found["mean_per_class_recall"] == pytest.approx(100 * np.mean(recalls))
    for name, values in found.contributions.items():
        assert found[name] == pytest.approx(100 * values.mean())


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.ones((2, 3)), [0], r"\[2, 3\] and \[1\]"),
        (np.ones(3), [0, 1, 2], r"\[3\]"),
        (np.ones((0, 3)), [], "N labels"),
        (np.ones((1, 3)), [3], "0 to 2"),
        (np.ones((1, 3)), [-1], "0 to 2"),
        (np.full((1, 3), np.nan), [0], "picture 0"),
    ],
)
def test_what_cannot_be_scored_is_an_error(scores: np.ndarray, labels: list[int], message: str) -> None:
    with pytest.raises(VlmError, match=message):
        zero_shot_scores(scores, labels)


# --- prompts ---


def test_the_published_templates_are_there() -> None:
    assert len(prompt_templates("imagenet")) == 80
    assert prompt_templates("imagenet")[0] == "a bad photo of a {}."
    cifar = prompt_templates("cifar")
    assert len(set(cifar)) == 18
    assert cifar[0] == "a photo of a {}."
    assert cifar[-1] == "a photo of the big {}."
    for name in ("imagenet", "cifar", "simple", "name"):
        assert all(template.count("{}") == 1 for template in prompt_templates(name))
    assert prompt_templates("see a {}") == ["see a {}"]
    names = class_names("imagenet")
    assert len(names) == 1000
    assert (names["n01440764"], names["n15075141"]) == ("tench", "toilet paper")
    for wrong, message in (("imagnet", "did you mean 'imagenet'"), ([], "empty"), (["a photo"], "has no {}")):
        with pytest.raises(VlmError, match=message):
            prompt_templates(wrong)
    with pytest.raises(VlmError, match="did you mean 'imagenet'"):
        class_names("imagenett")


# --- zero_shot ---


def test_zero_shot_is_scored_and_written(classes: Data, tmp_path: Path) -> None:
    model = Colours()
    name = benchmark(tmp_path, task="zero_shot", templates="cifar")
    result = evaluate(name, model, output=tmp_path / "out", batch_size=4, progress=False)
    assert (result.metric, result.protocol) == ("acc@1", "standard")
    assert result.score == pytest.approx(100 * 5 / 6)
    assert result.metrics == {
        "acc@1": pytest.approx(100 * 5 / 6),
        "acc@5": pytest.approx(100),
        "mean_per_class_recall": pytest.approx(100 * 2.5 / 3),
    }
    assert result.tables["per_class_recall"] == {"blue": 50, "lime": 100, "red": 100}
    assert model.calls == [(["blue", "lime", "red"], prompt_templates("cifar"))] * 2
    assert len(model.images) == 6
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    for key in ("score", "count", "interval", "settings", "versions", "git_commit"):
        assert key in written
    assert written["settings"]["templates"] == "cifar"
    assert "decoding" not in written["settings"]
    rows = samples_of(tmp_path / "out")
    assert rows[5]["prediction"] == "red"
    assert rows[5]["answers"] == ["blue"]
    assert sorted(rows[5]["ranking"]) == ["blue", "lime", "red"]
    html = render_report(result)
    assert html.count('class="q wrong"') == 1
    assert html.count('src="data:image/') == 6
    assert "6 pictures" in html
    # Its own samples give the same scores again; a file with one guess each has no acc@5.
    again = evaluate(name, predictions=tmp_path / "out" / "samples.jsonl", output=tmp_path / "b", progress=False)
    assert again.metrics == result.metrics
    one = tmp_path / "one.json"
    one.write_text(json.dumps([{"question_id": row["id"], "answer": row["prediction"]} for row in rows]))
    assert set(evaluate(name, predictions=one, progress=False).metrics) == {"acc@1", "mean_per_class_recall"}
    with pytest.raises(VlmError, match=r"acc@5 needs several guesses"):
        evaluate(name, predictions=one, overrides=["metric=acc@5"], progress=False)


def test_broken_pictures_and_records_count_as_wrong_and_are_listed(classes: Data, tmp_path: Path) -> None:
    Path(classes.records[0].images[0]).write_bytes(b"no picture")
    classes.broken.append(BrokenRecord("there", "no class"))
    result = evaluate(benchmark(tmp_path, task="zero_shot"), Colours(), progress=False)
    assert result.count == 7
    assert result.score == pytest.approx(100 * 4 / 7)
    assert [entry["id"] for entry in result.broken] == ["0", "unreadable:0"]
    for record in classes.records:
        Path(record.images[0]).unlink()
    with pytest.raises(VlmError, match="none of 6 records could be asked"):
        evaluate(benchmark(tmp_path, task="zero_shot"), Colours(), progress=False)


def test_every_class_of_the_data_set_is_a_candidate_under_a_limit(classes: Data, tmp_path: Path) -> None:
    model = Colours()
    assert evaluate(benchmark(tmp_path, task="zero_shot"), model, limit=1, progress=False).count == 1
    assert model.calls[0][0] == ["blue", "lime", "red"]


def test_classes_get_the_names_that_the_benchmark_says(classes: Data, tmp_path: Path) -> None:
    model = Colours()
    names = {"red": "lime", "lime": "blue", "blue": "blue", "nobody": "yellow"}  # two classes share a name
    result = evaluate(benchmark(tmp_path, task="zero_shot", classes=names), model, progress=False)
    assert model.calls[0][0] == ["lime", "blue", "yellow"]
    # Red pictures look like yellow, lime ones like `lime` (label red); blue goes to the first of its two classes.
    assert [sample.prediction for sample in result.samples] == ["nobody"] * 3 + ["red", "lime", "nobody"]
    with pytest.raises(VlmError, match=r"2 labels .* not in `classes`, the first: 'blue'"):
        evaluate(benchmark(tmp_path, task="zero_shot", classes={"red": "red"}), model, progress=False)
    with pytest.raises(VlmError, match="not in the table 'imagenet'"):
        evaluate(benchmark(tmp_path, task="zero_shot", classes="imagenet"), model, progress=False)


def test_a_class_may_have_prompts_of_its_own(classes: Data, tmp_path: Path) -> None:
    model = Colours()
    prompts = {"red": ["blue", "blue thing"], "blue": ["a red {}", "red"]}
    # "a red blue" says blue last, so blue is half red.
    result = evaluate(benchmark(tmp_path, task="zero_shot", class_prompts=prompts), model, progress=False)
    assert model.texts == ["a red blue", "red", "a photo of a lime.", "blue", "blue thing"]
    assert [sample.prediction for sample in result.samples] == ["blue"] * 3 + ["lime", "red", "blue"]
    with pytest.raises(VlmError, match="no class 'rde'; did you mean 'red'"):
        evaluate(benchmark(tmp_path, task="zero_shot", class_prompts={"rde": ["x"]}), model, progress=False)


def test_records_and_models_that_cannot_serve_are_errors(
    classes: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zero_shot, retrieval = benchmark(tmp_path, task="zero_shot"), str(tmp_path / "r.yaml")
    Path(retrieval).write_text("{name: r, dataset: r, task: retrieval}")
    with pytest.raises(UnsupportedTask, match="cannot classify"):
        evaluate(zero_shot, object(), progress=False)
    with pytest.raises(VlmError, match="'0' has no caption"):
        evaluate(retrieval, Colours(), progress=False)
    use(monkeypatch, Data([Record("1", classes.records[0].images, captions=("red",))]))
    with pytest.raises(VlmError, match="'1' has no label"):
        evaluate(zero_shot, Colours(), progress=False)
    with pytest.raises(UnsupportedTask, match="cannot embed"):
        evaluate(retrieval, object(), progress=False)


def test_embeddings_in_a_file_are_scored_as_a_models_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    captions = [("a", "b"), ("c",), ("d", "e", "f"), ("g",)]
    use(monkeypatch, Data([Record(str(n), (f"{n}.jpg",), captions=told) for n, told in enumerate(captions)]))
    name = benchmark(tmp_path, task="retrieval")
    owner = np.repeat(range(4), [2, 1, 3, 1])
    images, texts = rng.normal(size=(4, 5)), rng.normal(size=(7, 5))
    file = tmp_path / "embeddings.npz"
    np.savez(file, image_embeds=images, text_embeds=texts, text_to_image=owner)
    found = evaluate(name, predictions=file, progress=False)
    expected = retrieval_recall(images, texts, owner)
    for metric in ("TR@1", "IR@5", "rsum", "TR_median_rank"):
        assert found.metrics[metric] == pytest.approx(expected[metric])
        low, high = found.intervals[metric]
        assert low <= found.metrics[metric] <= high
    first = evaluate(name, predictions=file, limit=2, progress=False)
    assert first.metrics["IR@1"] == pytest.approx(retrieval_recall(images[:2], texts[:3], owner[:3])["IR@1"])
    with pytest.raises(VlmError, match="not --partial"):
        evaluate(name, predictions=file, partial=True, progress=False)
    for content, message in (
        ({"image_embeds": images[:3], "text_embeds": texts}, "3 pictures and 7 captions, but the data set has 4 and 7"),
        ({"image_embeds": images, "text_embeds": texts, "text_to_image": owner[::-1]}, "another order"),
        ({"image_embeds": images}, "expected a .npz with image_embeds and text_embeds"),
    ):
        np.savez(file, **content)
        with pytest.raises(VlmError, match=message):
            evaluate(name, predictions=file, progress=False)


def test_a_model_that_gives_no_numbers_is_an_error(classes: Data, tmp_path: Path) -> None:
    class Nan(Colours):
        def classify(self, images: list[str], labels: list[str], templates: Any = None) -> torch.Tensor:
            return torch.full((len(images), len(labels)), torch.nan)

    class Short(Colours):
        def classify(self, images: list[str], labels: list[str], templates: Any = None) -> torch.Tensor:
            return torch.ones(1, 1)

    with pytest.raises(VlmError, match="not numbers"):
        evaluate(benchmark(tmp_path, task="zero_shot"), Nan(), progress=False)
    with pytest.raises(VlmError, match=r"shape \[1, 1\] for 6 pictures and 3 classes"):
        evaluate(benchmark(tmp_path, task="zero_shot"), Short(), progress=False)


# --- retrieval ---


def test_retrieval_is_scored_both_ways_and_written(captions: Data, tmp_path: Path) -> None:
    model = Colours()
    name = benchmark(tmp_path, task="retrieval", metric="IR@1", also=["optimistic", "pessimistic"])
    result = evaluate(name, model, output=tmp_path / "out", batch_size=3, progress=False)
    # Of six captions, "blue" on the yellow picture finds the blue one.
    assert result.score == result.metrics["IR@1"] == pytest.approx(100 * 5 / 6)
    # The two captions of the blue picture tie with the one of the yellow picture, which itself finds them first.
    assert result.metrics["TR@1"] == pytest.approx(100 * (1 + 1 + 2 / 3 + 0) / 4)
    assert result.metrics["TR@10"] == result.metrics["IR@10"] == 100
    assert result.metrics["IR_median_rank"] == 1
    total = sum(result.metrics[f"{way}@{k}"] for way in ("TR", "IR") for k in (1, 5, 10))
    assert result.metrics["rsum"] == pytest.approx(total)
    assert list(result.scores) == ["expected", "optimistic", "pessimistic"]
    assert sorted(result.intervals) == sorted(result.metrics)
    assert result.intervals["IR_median_rank"] == (1, 2)  # draws of the yellow picture alone find another first
    assert result.intervals["rsum"][0] <= result.metrics["rsum"] <= result.intervals["rsum"][1]
    assert len(model.images) == 4  # once each
    assert sorted(model.texts) == ["all red", "blue", "lime", "quite blue", "red"]  # distinct ones, once each
    rows = samples_of(tmp_path / "out")
    assert len(rows) == result.count == 4 + 6
    assert [row["id"] for row in rows[4:7]] == ["red:IR:1", "red:IR:2", "lime:IR:1"]
    assert rows[9]["question"] == "blue"
    assert rows[9]["prediction"] == "blue [blue]"
    assert rows[9]["answers"] == ["blue [yellow]"]
    assert rows[9]["score"] == 0
    html = render_report(result)
    assert "10 queries" in html
    assert html.count('src="data:image/') == 4


def test_a_broken_picture_is_wrong_both_ways(captions: Data, tmp_path: Path) -> None:
    Path(captions.records[0].images[0]).unlink()
    captions.broken.append(BrokenRecord("there", "no caption"))
    name = benchmark(tmp_path, task="retrieval")
    result = evaluate(name, Colours(), progress=False)
    assert result.metric == "TR@1"
    assert result.score == pytest.approx(100 * (1 + 2 / 3) / 5)
    assert result.metrics["IR@1"] == pytest.approx(100 * 3 / 7)
    assert {entry["id"] for entry in result.broken} == {"red:TR", "red:IR:1", "red:IR:2", "unreadable:0"}
    assert result.interval[0] <= result.score <= result.interval[1]


def test_records_that_show_the_same_picture_are_one_picture(captions: Data, tmp_path: Path) -> None:
    first = captions.records[0]
    captions.records.append(Record("again", first.images, captions=("so red",)))
    model = Colours()
    result = evaluate(benchmark(tmp_path, task="retrieval"), model, progress=False)
    assert len(model.images) == 4
    assert "red:IR:3" in [sample.id for sample in result.samples]


def test_captions_can_be_put_into_a_prompt_and_folds_chosen(captions: Data, tmp_path: Path) -> None:
    model = Colours()
    name = benchmark(tmp_path, task="retrieval", prompt="a photo of {caption}")
    evaluate(name, model, progress=False)
    assert "a photo of all red" in model.texts
    with pytest.raises(VlmError, match="4 pictures cannot be parted into 5 folds"):
        evaluate(name, model, overrides=["protocol=expected-5fold"], progress=False)


def test_embeddings_of_another_shape_are_an_error(captions: Data, tmp_path: Path) -> None:
    class Queries(Colours):
        def encode_image(self, images: list[str]) -> torch.Tensor:
            return torch.ones(len(images), 2, 2, 3)

    with pytest.raises(VlmError, match=r"encode_image gave embeddings of shape \[4, 2, 2, 3\]"):
        evaluate(benchmark(tmp_path, task="retrieval"), Queries(), progress=False)
