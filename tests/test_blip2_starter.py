"""The starter recipes of BLIP-2: both stages run, the second from the first, and their parts fit each other."""

from collections.abc import Callable
from pathlib import Path

import pytest
from dual_parts import captions
from generative_parts import generative_spec, pictures
from tiny_models import tiny_bert

from vlm import load_model, load_recipe, train
from vlm.evaluation import load_benchmark
from vlm.model_spec import GenerativeSpec, QFormerSpec

STAGES = ("starter/blip2_stage1", "starter/blip2_stage2")


def test_the_second_stage_fits_the_first() -> None:
    first, second = map(load_recipe, STAGES)
    assert isinstance(first.model, QFormerSpec)
    assert isinstance(second.model, GenerativeSpec)
    assert second.init_from == first.output
    assert second.model.image_encoder == first.model.image_encoder
    same = {"init", "num_queries", "layers", "cross_attention_every"}
    assert second.model.bridge.model_dump(include=same) == first.model.bridge.model_dump(include=same)
    assert {spec.name for spec in first.objectives} == {"itc", "itm", "lm"}
    held_out = {"easy_vqa_captions": "test", "openmoji": "test"}
    for spec in (*first.data.train, *second.data.train):
        assert spec.split == "train"
        assert held_out[spec.dataset] != spec.split


@pytest.mark.parametrize("name", ["easy_vqa_matching", "easy_vqa_captions"])
def test_the_benchmarks_score_pictures_that_training_never_saw(name: str) -> None:
    plan = load_benchmark(name)
    assert (plan.dataset.name, plan.dataset.split) == ("easy_vqa_captions", "test")


def test_both_stages_run_on_tiny_parts(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    spec = generative_spec(tiny_folder)
    shared = [
        f"model.image_encoder={{name: '{spec.image_encoder.name}'}}",
        f"model.bridge.init=hf:{tiny_folder(tiny_bert)}",
        f"data.train=[{{dataset: '{captions(tmp_path / 'data')}', format: captions_jsonl}}]",
        "train.steps=2",
        "train.batch_size=4",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    train(load_recipe(STAGES[0], [*shared, f"output={one}"]), quiet=True)
    language = f"model.language_model={{name: '{spec.language_model.name}'}}"
    train(load_recipe(STAGES[1], [*shared, language, f"init_from={one}", f"output={two}"]), quiet=True)
    picture = pictures(tmp_path, 1)[0]
    assert load_model(one).match(picture, ["a cat", "a dog"]).shape == (2,)
    assert len(load_model(two).caption(picture, max_new_tokens=4)) == 1
