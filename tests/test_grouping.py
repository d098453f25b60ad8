"""Batches of one modality: the same samples in another order, which seed and step alone decide."""

import json
from collections import Counter

import pytest
import torch
from generative_parts import pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from training_parts import losses, tiny_recipe, weights

from vlm import VlmError, train
from vlm.data.grouping import WINDOW, GroupedOrder
from vlm.data.mixing import MixtureOrder
from vlm.training.loop import Trainer


def _order(sizes, batch, seed=0, weights=None):
    def shows(pair):
        return (pair[0] * 7 + pair[1]) % 3 > 0

    def length(pair):
        return (pair[1] * 31) % 17

    return GroupedOrder(MixtureOrder(sizes, weights, seed), batch, shows, length, seed)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_a_window_holds_the_samples_it_held_before(sizes, batch, seed, weighted):
    order = _order(sizes, batch, seed, [1.0] * len(sizes) if weighted else None)
    for first in (0, 300):
        steps = order.window(first)
        assert first in steps
        assert len(steps) <= WINDOW
        assert all(order.window(step) == steps for step in (steps[0], steps[-1]))
        batches = [order.batch(step) for step in steps]
        assert all(len(pairs) == batch for pairs in batches)
        before = order.order.places(steps.start * batch, steps.stop * batch)
        assert Counter(pair for pairs in batches for pair in pairs) == Counter(before)
        mixed = [pairs for pairs in batches if len({order.shows_pictures(pair) for pair in pairs}) > 1]
        assert len(mixed) <= 1
        assert all(pairs == sorted(pairs, key=order.length, reverse=True) for pairs in batches)


def test_an_epoch_still_shows_every_sample_once():
    order = _order([90, 30], 4)
    for epoch in range(3):
        pairs = [pair for step in range(epoch * 30, epoch * 30 + 30) for pair in order.batch(step)]
        assert len(set(pairs)) == len(pairs) == 120


def test_seed_and_step_decide_alone():
    through = _order([50, 20], 4)
    asked = [through.batch(step) for step in range(300)]
    assert [_order([50, 20], 4).batch(step) for step in (299, 7, 260)] == [asked[299], asked[7], asked[260]]
    assert [_order([50, 20], 4, seed=1).batch(step) for step in range(20)] != asked[:20]


@pytest.fixture
def mixed(tiny_folder, tmp_path):
    """A recipe over conversations of which every third shows no picture."""
    pictures(tmp_path, 4)
    items = []
    for i in range(12):
        question, shown = "word " * (1 + i % 5) + "?", i % 3 > 0
        item = {"id": str(i), "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]}
        if shown:
            item["image"] = f"picture-0-{i % 4}.png"
            item["conversations"][0]["value"] = "<image>\n" + question
        items.append(item)
    file = tmp_path / "data.json"
    file.write_text(json.dumps(items))

    def recipe(output, **options):
        made = tiny_recipe(tiny_folder, file, tmp_path / output, steps=8, **options)
        alone = made.data.train[0].model_copy(update={"share_image": False})
        section = made.data.model_copy(update={"train": [alone], "group_by_modality_length": True})
        return made.model_copy(update={"data": section})

    return recipe


def test_training_sees_one_modality_a_batch_and_no_split_changes_it(mixed, tmp_path):
    trainer = Trainer(mixed("whole"), quiet=True)
    kinds = [[], [], []]
    for step in range(9):
        batch = trainer.source.batch(step, 4)
        kinds[step // 3].append(len({bool(placed.sample.images) for placed in batch}))
    assert kinds == [[1, 1, 1]] * 3  # 4 without and 8 with a picture an epoch
    assert trainer.train().finished
    train(mixed("parts", micro_batch_size=1), quiet=True)
    torch.testing.assert_close(losses(tmp_path / "whole"), losses(tmp_path / "parts"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(tmp_path / "whole"), weights(tmp_path / "parts"), rtol=1e-4, atol=1e-5)


def test_shards_are_refused(mixed, tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name in ("picture-0-0.png", "picture-0-1.png"):
            tar.add(tmp_path / name, name)
            (tmp_path / "text.txt").write_text("a circle")
            tar.add(tmp_path / "text.txt", name.replace(".png", ".txt"))
    recipe = mixed("run")
    source = recipe.data.train[0].model_copy(
        update={"dataset": str(tmp_path / "train.tar"), "format": "webdataset", "images": None}
    )
    section = recipe.data.model_copy(update={"train": [source]})
    with pytest.raises(VlmError, match="group_by_modality_length"):
        Trainer(recipe.model_copy(update={"data": section}), quiet=True)
