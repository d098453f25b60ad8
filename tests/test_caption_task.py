"""The task `caption`: models and official files of predictions, on annotations in COCO's and VQA's own layouts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import ORACLES
from PIL import Image
from typer.testing import CliRunner

from vlm.cli.eval import app
from vlm.errors import UnsupportedTask, VlmError
from vlm.evaluation import bootstrap_interval, caption_scores, evaluate
from vlm.evaluation.captioning import bleu_of_parts
from vlm.evaluation.intervals import Parts

CAPTIONS = {1: ["A red dog.", "a dog, red"], 2: ["Two cats sleep.", "cats on a bed"], 3: ["a green tree", "one tree"]}


class Describes:
    """Says the same of every picture, and keeps how it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], str | None, dict[str, Any]]] = []

    def caption(self, images: list[str], prompt: str | None = None, **decoding: Any) -> list[str]:
        from vlm.data.images import load_image

        self.calls.append((images, prompt, decoding))
        for image in images:
            load_image(image)
        return ["a red dog"] * len(images)


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    """Captions in COCO's layout, with pictures beside them."""
    images = [{"id": key, "file_name": f"{key}.png"} for key in CAPTIONS]
    rows = [
        {"image_id": key, "id": 10 * key + n, "caption": t} for key, ts in CAPTIONS.items() for n, t in enumerate(ts)
    ]
    for key in CAPTIONS:
        Image.new("RGB", (8, 8), (key * 40, 0, 0)).save(tmp_path / f"{key}.png")
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": rows}))
    return path


def run(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_model_is_asked_with_prompt_and_decoding_and_scored_as_papers_print_it(
    annotations: Path, tmp_path: Path
) -> None:
    model = Describes()
    overrides = [f"dataset.annotations={annotations}", "prompt=a photo of", "decoding.num_beams=2"]
    result = evaluate("coco_captions", model, overrides=overrides, batch_size=2, output=tmp_path / "out")
    expected = caption_scores(["a red dog"] * 3, list(CAPTIONS.values()))
    assert result.metrics == {name: pytest.approx(100 * value) for name, value in expected.items()}
    assert result.score == result.metrics["CIDEr"]
    assert result.intervals.keys() == result.metrics.keys()
    for name, (low, high) in result.intervals.items():
        assert low <= result.metrics[name] <= high, name
    assert [len(images) for images, _, _ in model.calls] == [2, 1]
    assert model.calls[0][1] == "a photo of"
    assert model.calls[0][2]["num_beams"] == 2
    assert [sample.score for sample in result.samples] == [expected.per_image[n]["CIDEr"] for n in range(3)]
    assert "CIDEr" in (tmp_path / "out" / "report.html").read_text()
    evaluate("coco_captions", model, overrides=overrides[:1], output=tmp_path / "out")
    assert model.calls[-1][1] is None


def test_a_picture_missing_on_disk_has_an_empty_caption_and_is_listed(annotations: Path, tmp_path: Path) -> None:
    (tmp_path / "2.png").unlink()
    overrides = [f"dataset.annotations={annotations}"]
    result = evaluate("coco_captions", Describes(), overrides=overrides, output=tmp_path / "out")
    assert [entry["id"] for entry in result.broken] == ["2"]
    expected = caption_scores(["a red dog", "", "a red dog"], list(CAPTIONS.values()))
    assert result.score == pytest.approx(100 * expected["CIDEr"])
    with pytest.raises(UnsupportedTask, match="cannot caption"):
        evaluate("coco_captions", object(), overrides=overrides, output=tmp_path / "out")


def test_cocos_results_file_is_scored_without_pictures(annotations: Path, tmp_path: Path) -> None:
    for picture in tmp_path.glob("*.png"):
        picture.unlink()
    results = tmp_path / "results.json"
    said = {1: "a red dog\u2028on grass", 2: "", 3: "<script>alert(1)</script> tree"}
    results.write_text(json.dumps([{"image_id": key, "caption": text} for key, text in said.items()]))
    out = tmp_path / "out"
    found = run(
        "coco_captions", "--predictions", str(results), f"dataset.annotations={annotations}", "--output", str(out)
    )
    expected = caption_scores(said, CAPTIONS)
    assert found["metrics"] == {name: pytest.approx(100 * value) for name, value in expected.items()}
    report = (out / "report.html").read_text()
    assert "<script>alert" not in report
    assert "&lt;script&gt;alert(1)" in report
    again = run(
        "coco_captions", "--predictions", str(out / "samples.jsonl"), f"dataset.annotations={annotations}", "--output",
        str(tmp_path / "again"),
    )  # fmt: skip
    assert again["metrics"] == found["metrics"]


def test_ids_that_do_not_match_are_refused_unless_partial(annotations: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    rows = [(1, "a red dog"), (1, "nothing"), (2, "two cats"), (9, "a boat")]
    results.write_text(json.dumps([{"image_id": key, "caption": text} for key, text in rows]))
    arguments = ["coco_captions", "--predictions", str(results), f"dataset.annotations={annotations}"]
    arguments += ["--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "1 missing (3); 1 unknown (9); 1 given more than once (1)" in done.stderr
    found = run(*arguments, "--partial")
    assert found["settings"]["partial"] == {"missing": 1, "unknown": 1, "repeated": 1}
    assert found["count"] == 2
    expected = caption_scores(["a red dog", "two cats"], [CAPTIONS[1], CAPTIONS[2]])
    assert found["score"] == pytest.approx(100 * expected["CIDEr"])
    assert "predictions are missing for 1 of 3" in (tmp_path / "out" / "report.html").read_text()
    results.write_text('[{"image_id": 9, "caption": "a boat"}]')
    with pytest.raises(VlmError, match="none of 1 predictions"):
        evaluate(arguments[0], predictions=results, overrides=[arguments[3]], partial=True)
    for bad in (3, ["a"], {"text": "a"}):
        results.write_text(json.dumps([{"image_id": 1, "caption": bad}]))
        with pytest.raises(VlmError, match="row 1: the answer must be text"):
            evaluate(arguments[0], predictions=results, overrides=[arguments[3]], partial=True)


def test_the_domains_of_nocaps_are_scored_each_alone(annotations: Path, tmp_path: Path) -> None:
    from vlm.data.records import Record
    from vlm.evaluation import load_benchmark
    from vlm.evaluation.describing import judge
    from vlm.evaluation.task import Job, Prediction

    domains = {1: "near-domain", 2: "in-domain", 3: "near-domain"}
    records = [Record(str(k), captions=tuple(ts), meta={"domain": domains[k]}) for k, ts in CAPTIONS.items()]
    job = Job(load_benchmark("coco_captions"), records, records, 0)
    judged = judge(job, [Prediction("a red dog"), Prediction("two cats"), Prediction("a tree")], "ptb")
    near = caption_scores(["a red dog", "a tree"], [CAPTIONS[1], CAPTIONS[3]])
    assert judged.tables["CIDEr by domain"] == {"in-domain": 0, "near-domain": pytest.approx(100 * near["CIDEr"])}
    assert list(judged.tables["CIDEr by domain"]) == ["in-domain", "near-domain"]


def test_the_interval_of_a_function_of_sums_is_that_of_the_corpus_score() -> None:
    rng = np.random.default_rng(3)
    parts = np.concatenate([rng.integers(1, 5, (300, 4)), np.full((300, 4), 8), np.full((300, 2), 9)], axis=1)
    low, high = bootstrap_interval(Parts(parts.astype(float), lambda sums: bleu_of_parts(sums)[..., 0]), range(300))
    precision = parts[:, 0] / 8  # BLEU-1 of captions of equal length is a mean
    assert (low, high) == pytest.approx(bootstrap_interval(precision, range(300)), abs=1e-6)


@pytest.mark.skipif(not ORACLES.is_dir(), reason=f"no oracles at {ORACLES}; set VLM_ORACLES")
def test_the_command_gives_the_official_scores(tmp_path: Path) -> None:
    """As a process of its own, on files outside a data folder that is not there."""

    def run(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "vlm.cli.eval", *arguments, "--json"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "VLM_DATA": str(tmp_path / "none")}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    for bundle in sorted((ORACLES / "captions").iterdir()):
        expected = json.loads((bundle / "expected.json").read_text())["corpus"]
        arguments = ["--predictions", str(bundle / "results.json"), f"dataset.annotations={bundle / 'captions.json'}"]
        found = run("coco_captions", *arguments, "--output", str(tmp_path / bundle.name))
        for name in ("CIDEr", "ROUGE_L"):
            assert found["metrics"][name.replace("_", "-")] == pytest.approx(100 * expected[name], abs=0.05)
    for bundle in sorted((ORACLES / "vqa").iterdir()):
        for results, protocols in json.loads((bundle / "expected.json").read_text()).items():
            for protocol, expected in protocols.items():
                files = [f"dataset.{kind}={bundle / kind}.json" for kind in ("questions", "annotations")]
                arguments = ["--predictions", str(bundle / f"results_{results}.json"), *files, f"protocol={protocol}"]
                found = run("vqav2", *arguments, "--output", str(tmp_path / bundle.name))
                assert round(found["score"], 2) == expected["overall"]
                for title, key in (("per_question_type", "perQuestionType"), ("per_answer_type", "perAnswerType")):
                    if key in expected:
                        assert {name: round(v, 2) for name, v in found["tables"][title].items()} == expected[key]


def test_the_report_says_where_a_setting_differs_from_the_papers(annotations: Path, tmp_path: Path) -> None:
    overrides = [f"dataset.annotations={annotations}", "prompt=a photo of", "decoding.num_beams=1"]
    result = evaluate("coco_captions", Describes(), overrides=overrides, output=tmp_path / "out")
    differs = {entry["model"]: entry["differs"] for entry in result.published}
    assert differs["BLIP-2 ViT-g OPT-2.7B, fine-tuned"] == ["decoding.num_beams: theirs 5, here 1"]
    assert "decoding.num_beams: theirs 5, here 1" in (tmp_path / "out" / "report.html").read_text()
