"""A few random crops of each picture are encoded once; which is shown depends on seed and step alone."""

import shutil

import pytest
import torch
from dual_parts import captions, dual_recipe
from training_parts import weights

from vlm.data.content_hash import content_hash
from vlm.data.images import load_image
from vlm.errors import VlmError
from vlm.paths import cache_dir
from vlm.training import train
from vlm.training.loop import Trainer
from vlm.training.source import _number


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    return captions(tmp_path / "data")


def recipe_of(tiny_folder, data, output, **section):
    return dual_recipe(tiny_folder, data, output, data={"augment": True, "cached_views": 2, **section})


def test_what_is_shown_is_one_of_the_crops(tiny_folder, data, tmp_path):
    trainer = Trainer(recipe_of(tiny_folder, data, tmp_path / "run"), quiet=True)
    model, source = trainer.model, trainer.source
    path = source.batch(0, 1)[0].sample.images[0]
    crops = []
    for view in range(2):
        generator = torch.Generator().manual_seed(_number(0, view, content_hash(path)))
        crops.append(model.image_encoder.transform.train(load_image(path), generator))
    with torch.no_grad():
        expected = model.image_features(torch.stack(crops))
    shown = [source.load_picture(path, step) for step in range(20)]
    for step, features in enumerate(shown):
        torch.testing.assert_close(features, expected[_number(0, step, path) % 2])
    assert len({tuple(features.tolist()) for features in shown}) == 2


def test_a_run_does_not_depend_on_what_was_kept_before(tiny_folder, data, tmp_path):
    train(recipe_of(tiny_folder, data, tmp_path / "fresh"), quiet=True)
    train(recipe_of(tiny_folder, data, tmp_path / "kept"), quiet=True)
    shutil.rmtree(cache_dir() / "features")
    train(recipe_of(tiny_folder, data, tmp_path / "anew", workers=2), quiet=True)
    for name, tensor in weights(tmp_path / "fresh").items():
        torch.testing.assert_close(weights(tmp_path / "kept")[name], tensor)
        torch.testing.assert_close(weights(tmp_path / "anew")[name], tensor)


@pytest.mark.parametrize("section", [{"augment": None}, {"augment": False}, {"cache_features": False}])
def test_crops_that_would_not_be_kept_are_refused(tiny_folder, data, tmp_path, section):
    with pytest.raises(VlmError, match="cached_views"):
        Trainer(recipe_of(tiny_folder, data, tmp_path / "run", **section), quiet=True)
