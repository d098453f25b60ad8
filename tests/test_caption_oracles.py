"""Our caption scores and tokenisation against what the field's own code answers, over every bundle found."""

import gzip
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from oracles import ORACLES

from vlm.evaluation.captioning import DEFAULT_METRICS, CaptionScores, caption_scores
from vlm.evaluation.coco_java import java_ptb_tokenize
from vlm.evaluation.ptb import PUNCTUATION, ptb_tokenize

_CAPTIONS = ORACLES / "captions"
_BUNDLES = sorted(p for p in _CAPTIONS.iterdir() if p.is_dir()) if _CAPTIONS.is_dir() else []
bundles = pytest.mark.parametrize("bundle", _BUNDLES, ids=[b.name for b in _BUNDLES])

HAS_JAVA = importlib.util.find_spec("pycocoevalcap") is not None and shutil.which("java") is not None
needs_java = pytest.mark.skipif(not HAS_JAVA, reason='needs Java and pip install "vlm[coco-java]"')


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _ours(name: str) -> str:
    return name.replace("Bleu_", "BLEU-").replace("ROUGE_L", "ROUGE-L")


def _raw(bundle: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    references: dict[str, list[str]] = {}
    for row in _read(bundle / "captions.json")["annotations"]:
        references.setdefault(str(row["image_id"]), []).append(row["caption"])
    return {str(row["image_id"]): row["caption"] for row in _read(bundle / "results.json")}, references


def _check(found: CaptionScores, expected: dict[str, Any], tolerance: float) -> None:
    for name, value in expected["corpus"].items():
        if _ours(name) in found:
            assert found[_ours(name)] == pytest.approx(value, abs=tolerance), name
    assert found.per_image.keys() == expected["per_image"].keys()
    for key, scores in expected["per_image"].items():
        for name, value in scores.items():
            if _ours(name) in found:
                assert found.per_image[key][_ours(name)] == pytest.approx(value, abs=tolerance), (key, name)


def test_shared_oracles_are_found() -> None:
    if not _CAPTIONS.is_dir():
        pytest.skip(f"no oracle bundles at {_CAPTIONS}; set VLM_ORACLES to their folder")
    assert _BUNDLES


@bundles
def test_scores_of_tokenised_captions_equal_the_official_ones(bundle: Path) -> None:
    tokens = _read(bundle / "tokenized.json")
    found = caption_scores(tokens["cands"], tokens["refs"], tokenizer="whitespace")
    assert list(found) == list(DEFAULT_METRICS)
    _check(found, _read(bundle / "expected.json"), 1e-9)


@bundles
def test_scores_of_raw_captions_are_within_5e_4_with_our_tokeniser(bundle: Path) -> None:
    expected = _read(bundle / "expected.json")
    candidates, references = _raw(bundle)
    _check(caption_scores(candidates, references, tokenizer=expected["tokenizer"]), expected, 5e-4)


@needs_java
@bundles
def test_scores_with_java_are_the_official_ones(bundle: Path) -> None:
    expected = _read(bundle / "expected.json")
    candidates, references = _raw(bundle)
    tokenizer = "java" if expected["tokenizer"] == "ptb" else expected["tokenizer"]
    found = caption_scores(candidates, references, [*DEFAULT_METRICS, "METEOR"], tokenizer)
    assert "METEOR" in found
    _check(found, expected, 1e-6)


def _tokenised() -> list[list[str]]:
    file = ORACLES / "ptb" / "captions.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"no {file}; set VLM_ORACLES to the folder of the oracles")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_words_are_corenlps_on_nearly_every_caption() -> None:
    rows = _tokenised()
    wrong = [(caption, final, ptb_tokenize(caption)) for caption, _, final in rows if ptb_tokenize(caption) != final]
    assert len(wrong) <= len(rows) // 1000, wrong[:10]


def test_words_are_corenlps_on_every_edge_case() -> None:
    file = ORACLES / "ptb" / "edge_cases.json"
    if not file.is_file():
        pytest.skip(f"no {file}; set VLM_ORACLES to the folder of the oracles")
    cases = _read(file)
    assert {case["input"]: ptb_tokenize(case["input"]) for case in cases} == {c["input"]: c["final"] for c in cases}


def test_the_signs_dropped_are_the_official_ones_that_can_occur() -> None:
    file = ORACLES / "ptb" / "punctuations.json"
    if not file.is_file():
        pytest.skip(f"no {file}; set VLM_ORACLES to the folder of the oracles")
    assert {sign for sign in _read(file) if not sign.endswith("B-")} == PUNCTUATION


@needs_java
def test_the_java_tokeniser_keeps_captions_apart_whatever_breaks_their_lines() -> None:
    captions = ["a\u2028b", "c\x85d\x0be", "", "f\rg\nh", "  ", "a dog's \U0001f355 bone.", "last"]
    assert java_ptb_tokenize(captions) == ["a b", "c d e", "", "f g h", "", "a dog 's bone", "last"]


@needs_java
def test_the_next_caption_decides_on_a_last_letter() -> None:
    captions = ["a sign reads K.", "A dog", "on lane S.", "two", "at a.", "The cat", "a b.", "A"]
    ours = [ptb_tokenize(text, following) for text, following in zip(captions, [*captions[1:], ""])]
    assert ours == java_ptb_tokenize(captions)
    assert ours[0] == "a sign reads k"


@needs_java
def test_ours_is_javas_on_captions_with_noise() -> None:
    """One line after each caption starts lower-case, so that no last period depends on the next caption."""
    noise = ["don't", "U.S.", "p.m.", "St.", "No. 5", "1/2", "$5", "50%", "(in)", '"said"', "black/white", "t-shirt"]
    noise += [
        "dogs'",
        "'80s",
        "TV's",
        "cannot",
        "gonna",
        "AT&T",
        "a&b",
        "3:30pm",
        "...",
        "--",
        "!!",
        "word.Word",
        "c++",
    ]
    captions = [f"a {one} man {two} here" for one in noise for two in noise] + [f"the {one}" for one in noise]
    lines = [line for caption in captions for line in (caption, "x")]
    assert [ptb_tokenize(caption) for caption in captions] == java_ptb_tokenize(lines)[::2]
