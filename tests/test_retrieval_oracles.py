"""Our retrieval scores against what the field's own code answers, over every bundle found."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import ORACLES

from vlm.evaluation.retrieval import RetrievalScores, retrieval_recall

_SHARED = ORACLES / "retrieval"
_BUNDLES = sorted(_SHARED.glob("*.npz")) if _SHARED.is_dir() else []
bundles = pytest.mark.parametrize("bundle", _BUNDLES, ids=[b.stem for b in _BUNDLES])

_BLIP = {"txt_r1": "TR@1", "txt_r5": "TR@5", "txt_r10": "TR@10", "img_r1": "IR@1", "img_r5": "IR@5", "img_r10": "IR@10"}
_TOLERANCE = 1e-4  # per cent; CLIP_benchmark answers in float32


def _official(bundle: Path) -> dict[str, dict[str, float]]:
    """Whose code -> our name of the score -> per cent."""
    expected: dict[str, dict[str, Any]] = json.loads((_SHARED / "expected.json").read_text())[bundle.stem]
    found: dict[str, dict[str, float]] = {}
    if blip := expected.get("blip_itm_eval"):
        found["blip"] = {ours: blip[theirs] for theirs, ours in _BLIP.items()}
        ours = found["blip"]
        assert blip["txt_r_mean"] == pytest.approx(sum(v for k, v in ours.items() if k.startswith("TR")) / 3)
    if clip := expected.get("clip_benchmark"):
        found["clip_benchmark"] = {
            key.replace("text_retrieval_recall", "TR").replace("image_retrieval_recall", "IR"): 100 * value
            for key, value in clip.items()
        }
    return found


def _scores(bundle: Path, **options: Any) -> RetrievalScores:
    with np.load(bundle) as data:
        return retrieval_recall(data["image_embeds"], data["text_embeds"], data["text_to_image"], **options)


def test_shared_oracles_are_found() -> None:
    if not _SHARED.is_dir():
        pytest.skip(f"no oracle bundles at {_SHARED}; set VLM_ORACLES to their folder")
    assert _BUNDLES


@bundles
def test_what_the_official_code_answers_lies_between_the_tie_rules(bundle: Path) -> None:
    """It leaves ties to an unstable sort: without ties it must be equal to ours, with ties between best and worst."""
    low, middle, high = (_scores(bundle, tie_rule=rule) for rule in ("pessimistic", "expected", "optimistic"))
    official = _official(bundle)
    assert official
    for whose, wanted in official.items():
        assert wanted
        for key, value in wanted.items():
            assert low[key] - _TOLERANCE <= value <= high[key] + _TOLERANCE, (whose, key)
            assert low[key] <= middle[key] + 1e-9, key
            assert middle[key] <= high[key] + 1e-9, key


def test_on_the_bundle_full_of_ties_blip_answers_as_expected_and_clip_benchmark_as_pessimistic() -> None:
    bundle = _SHARED / "duplicate_captions_ties_150x5.npz"
    if not bundle.is_file():
        pytest.skip(f"no {bundle}")
    official = _official(bundle)
    for whose, rule in (("blip", "expected"), ("clip_benchmark", "pessimistic")):
        ours = _scores(bundle, tie_rule=rule)
        for key, value in official[whose].items():
            assert ours[key] == pytest.approx(value, abs=_TOLERANCE), (whose, key)


@bundles
@pytest.mark.parametrize("block", [1, 997, 1 << 24])
def test_blocks_change_nothing(bundle: Path, block: int) -> None:
    assert dict(_scores(bundle, block=block)) == dict(_scores(bundle))
