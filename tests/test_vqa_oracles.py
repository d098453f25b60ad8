"""Our VQA accuracy against what the field's own code answers, over every bundle found."""

import json
from pathlib import Path
from typing import Any

import pytest
from oracles import ORACLES

from vlm.evaluation import vqa

_OWN = Path(__file__).parent / "data" / "vqa_crafted"
_SHARED = ORACLES / "vqa"
_SHARED_BUNDLES = sorted(p for p in _SHARED.iterdir() if p.is_dir()) if _SHARED.is_dir() else []
_BUNDLES = [_OWN, *_SHARED_BUNDLES]


def bundles_with(file: str) -> pytest.MarkDecorator:
    """Run a test for every bundle that holds that file; our own holds all, so that there is one."""
    found = [bundle for bundle in _BUNDLES if (bundle / file).is_file()]
    return pytest.mark.parametrize("bundle", found, ids=lambda bundle: f"{bundle.parent.name}-{bundle.name}")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    return {kind: round(value, 2) for kind, value in scores.items()}


def test_shared_oracles_are_found() -> None:
    if not _SHARED.is_dir():
        pytest.skip(f"no oracle bundles at {_SHARED}; set VLM_ORACLES to their folder")
    assert _SHARED_BUNDLES


@pytest.mark.parametrize("bundle", _BUNDLES, ids=lambda bundle: f"{bundle.parent.name}-{bundle.name}")
def test_scores_equal_those_of_the_official_code(bundle: Path) -> None:
    annotations = _read(bundle / "annotations.json")["annotations"]
    expected = _read(bundle / "expected.json")
    assert expected
    for run, protocols in expected.items():
        results = {row["question_id"]: row["answer"] for row in _read(bundle / f"results_{run}.json")}
        for protocol, wanted in protocols.items():
            scores = vqa.vqa_accuracy(results, annotations, protocol)
            assert round(scores.accuracy, 2) == wanted["overall"], (run, protocol)
            # lmms and EvalAI have no scores per type; a bundle may leave them out.
            for ours, key in ((scores.per_question_type, "perQuestionType"), (scores.per_answer_type, "perAnswerType")):
                if key in wanted:
                    assert _rounded(ours) == wanted[key], (run, protocol, key)


@bundles_with("items.json")
def test_every_item_scores_as_in_the_official_code(bundle: Path) -> None:
    items = _read(bundle / "items.json")
    predictions = [item["prediction"] for item in items]
    for protocol in items[0]["expected"]:
        scores = vqa.vqa_accuracy(predictions, [item["answers"] for item in items], protocol)
        for item, score in zip(items, scores.per_sample, strict=True):
            assert score == pytest.approx(item["expected"][protocol]), (protocol, item)
    for item in items:
        if "norm_official" in item:
            assert vqa.normalise(item["prediction"]) == item["norm_official"], item
            assert vqa.normalise_evalai(item["prediction"]) == item["norm_evalai"], item


@bundles_with("normalisation_table.json")
def test_every_stage_of_the_normalisation_is_the_official_one(bundle: Path) -> None:
    for row in _read(bundle / "normalisation_table.json"):
        text = vqa.clean(row["input"])
        ours = {
            "strip": text,
            "processPunctuation": vqa.strip_punctuation(text),
            "processDigitArticle": vqa.strip_articles(text),
            "both": vqa.normalise(row["input"]),
            "evalai": vqa.normalise_evalai(row["input"]),
        }
        assert ours == {key: row[key] for key in ours}, row["input"]


@bundles_with("official_tables.json")
def test_word_tables_are_the_official_ones(bundle: Path) -> None:
    tables = _read(bundle / "official_tables.json")
    assert tables["contractions"] == vqa.CONTRACTIONS
    assert tables["numbers"] == vqa.NUMBERS
    assert set(tables["articles"]) == vqa.ARTICLES
    assert tuple(tables["punct"]) == vqa.PUNCTUATION
