"""A dual encoder's run depends on its recipe alone: negatives span the global batch however it is split."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dual_parts import captions, dual_recipe
from training_parts import assert_same_runs, losses, train_in_processes, train_until

from vlm import UnsupportedTask, VlmError, load_model, train
from vlm.training.loop import Trainer

# The text encoder, a BERT, has dropout, which any split of a batch draws otherwise.
BOTH = ["bridge.*", "image_encoder.*"]


@pytest.fixture
def data(tmp_path):
    return captions(tmp_path / "data")


def _same(one: Path, other: Path, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    assert_same_runs(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("objective", ["itc", "sigmoid_itc"])
def test_training_lowers_the_loss_and_the_model_loads(tiny_folder, data, tmp_path, objective):
    logits = {"itc": "softmax", "sigmoid_itc": "sigmoid"}[objective]
    recipe = dual_recipe(
        tiny_folder,
        data,
        tmp_path / "run",
        model={"bridge": {"logits": logits}},
        objectives=[objective],
        train={"steps": 40},
    )
    train(recipe, quiet=True)
    curve = losses(tmp_path / "run")
    assert curve[-1] < 0.7 * curve[0]
    model = load_model(tmp_path / "run")
    picture = str(data.parent / "picture-0-3.png")
    assert model.encode_image(picture).norm(dim=-1).item() == pytest.approx(1, abs=1e-5)
    assert model.classify(picture, ["cat", "dog"]).shape == (1, 2)


def test_the_loss_is_that_of_the_plain_formula(tiny_folder, data, tmp_path):
    trainer = Trainer(dual_recipe(tiny_folder, data, tmp_path / "run"), quiet=True)
    samples = trainer.source.batch(0, 6)
    texts = [placed.sample.texts[0] for placed in samples]
    images = [placed.sample.images[0] for placed in samples]
    model = trainer.model
    with torch.no_grad():
        scores = model.bridge.logits(model.encode_image(images), model.encode_text(texts))
    mates = torch.tensor([[float(a == b) for b in images] for a in images])
    expected = (
        F.cross_entropy(scores, mates / mates.sum(1, keepdim=True)) + F.cross_entropy(scores.T, mates / mates.sum(1))
    ) / 2
    assert trainer.train_step(samples)["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("trainable", [["bridge.*"], BOTH])
@pytest.mark.parametrize("objective", ["itc", "sigmoid_itc"])
def test_micro_batches_do_not_change_the_result(tiny_folder, data, tmp_path, trainable, objective):
    options = {"trainable": trainable, "objectives": [{"name": objective}]}
    options["model"] = {"bridge": {"logits": "sigmoid" if objective == "sigmoid_itc" else "softmax"}}
    for name, size in (("whole", None), ("one", 1), ("four", 4)):
        chosen = {key: dict(value) if isinstance(value, dict) else value for key, value in options.items()}
        train(dual_recipe(tiny_folder, data, tmp_path / name, train={"micro_batch_size": size}, **chosen), quiet=True)
    _same(tmp_path / "whole", tmp_path / "one")
    _same(tmp_path / "whole", tmp_path / "four")


@pytest.mark.parametrize(("processes", "micro_batch"), [(2, None), (3, 1)])
def test_the_number_of_processes_does_not_change_the_result(tiny_folder, data, tmp_path, processes, micro_batch):
    # Seven samples: processes have unequal shares, and of the last micro-batch some have none.
    section = {"batch_size": 7, "steps": 4}
    train(dual_recipe(tiny_folder, data, tmp_path / "one", trainable=BOTH, train=section), quiet=True)
    many = {**section, "micro_batch_size": micro_batch}
    recipe = dual_recipe(tiny_folder, data, tmp_path / "many", trainable=BOTH, train=many)
    train_in_processes(recipe, tmp_path, processes)
    _same(tmp_path / "one", tmp_path / "many")


def test_a_process_without_a_pair_still_takes_part(tiny_folder, data, tmp_path):
    section = {"batch_size": 2, "steps": 3}
    train(dual_recipe(tiny_folder, data, tmp_path / "one", train=section), quiet=True)
    train_in_processes(dual_recipe(tiny_folder, data, tmp_path / "many", train=section), tmp_path, 3)
    _same(tmp_path / "one", tmp_path / "many")


@pytest.mark.parametrize("pool", ["pooled", "cls", "mean", "attention"])
def test_cached_features_do_not_change_the_result(tiny_folder, data, tmp_path, pool):
    for name, cached in (("cached", True), ("computed", False)):
        model = {"bridge": {"image_pool": pool, "text_pool": pool}}
        if pool == "cls":
            path = dual_recipe(tiny_folder, data, tmp_path).model.image_encoder.name
            model["image_encoder"] = {"name": path, "drop_cls": False}
        recipe = dual_recipe(
            tiny_folder, data, tmp_path / name, model=model, data={"cache_features": cached}, train={"steps": 3}
        )
        train(recipe, quiet=True)
    _same(tmp_path / "cached", tmp_path / "computed")


def test_an_interrupted_run_goes_on_exactly(tiny_folder, data, tmp_path):
    train(dual_recipe(tiny_folder, data, tmp_path / "through", trainable=BOTH), quiet=True)
    recipe = dual_recipe(tiny_folder, data, tmp_path / "halves", trainable=BOTH)
    trainer = Trainer(recipe, quiet=True)
    assert not train_until(trainer, 4).finished
    assert train(recipe, resume=True, quiet=True).finished
    _same(tmp_path / "through", tmp_path / "halves", rtol=0, atol=0)


def test_random_crops_depend_on_seed_and_step_alone(tiny_folder, data, tmp_path):
    recipe = dual_recipe(tiny_folder, data, tmp_path / "run", data={"augment": True})
    source = Trainer(recipe, quiet=True).source
    (first, *_) = source.batch(0, 6)
    path = first.sample.images[0]
    assert torch.equal(source.load_picture(path, 4), source.load_picture(path, 4))
    assert not torch.equal(source.load_picture(path, 4), source.load_picture(path, 5))


def test_the_logit_scale_stays_within_its_bounds(tiny_folder, data, tmp_path):
    trainer = Trainer(dual_recipe(tiny_folder, data, tmp_path / "run"), quiet=True)
    with torch.no_grad():
        trainer.model.bridge.logit_scale.fill_(9.0)
    losses_ = trainer.train_step(trainer.source.batch(0, 6))
    assert losses_
    assert trainer.model.bridge.scale.item() == pytest.approx(100, rel=1e-4)


def test_an_objective_of_another_family_is_an_error_in_words(tiny_folder, data, tmp_path):
    with pytest.raises(VlmError, match="dual encoder model cannot learn 'lm'; it can: itc, sigmoid_itc"):
        train(dual_recipe(tiny_folder, data, tmp_path / "run", objectives=["lm"]), quiet=True)
    with pytest.raises(UnsupportedTask, match="sample_every"):
        train(dual_recipe(tiny_folder, data, tmp_path / "other", train={"sample_every": 1}), quiet=True)


def test_a_sample_without_a_caption_is_no_pair(tiny_folder, tmp_path):
    file = captions(tmp_path / "data", 4)
    file.write_text(file.read_text().replace('["a cat"]', '[" "]'))
    with pytest.raises(VlmError, match="caption"):
        train(dual_recipe(tiny_folder, file, tmp_path / "run"), quiet=True)
