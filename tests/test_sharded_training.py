"""Training on shards: samples stay in them until they are used, and nothing of that changes the result."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from dual_parts import dual_recipe
from generative_parts import pictures
from training_parts import losses, tiny_recipe, weights

from vlm.data.catalogue import find_shards
from vlm.data.records import Record
from vlm.data.shard_writer import write_shards
from vlm.data.sharded_samples import ShardedSamples, Unread, shard_sizes
from vlm.errors import VlmError
from vlm.recipe import DataSection
from vlm.training import train
from vlm.training.loop import Trainer


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of 5, 5 and 3 captioned pictures."""
    paths = pictures(tmp_path, 13)
    records = [Record(id=str(n), images=(path,), captions=(f"shape number {n}",)) for n, path in enumerate(paths)]
    write_shards(records, tmp_path / "shards", size=5, name="train")
    return tmp_path / "shards"


@pytest.fixture
def ragged(tmp_path: Path) -> Path:
    """Three shards of 5, 5 and 3 pictures with one to three captions."""
    records = [
        Record(id=str(n), images=(path,), captions=tuple(f"shape {n} take {k}" for k in range(1 + n % 3)))
        for n, path in enumerate(pictures(tmp_path, 13))
    ]
    write_shards(records, tmp_path / "ragged", size=5, name="train")
    return tmp_path / "ragged"


def dual_recipe_of(tiny_folder, shards, output, **options):
    """A tiny dual encoder, trained on shards."""
    data = {"train": [{"dataset": str(shards), "format": "webdataset"}], "shuffle_buffer": 5, **options.pop("data", {})}
    return dual_recipe(tiny_folder, shards, output, data=data, **options)


def recipe_of(tiny_folder, shards, output, data=None, **options):
    """The tiny recipe, trained on shards."""
    recipe = tiny_recipe(tiny_folder, shards / "none", output, **options)
    source = {"dataset": str(shards), "format": "webdataset", **(data or {}).pop("source", {})}
    section = {"train": [source], "max_broken": 0.2, "shuffle_buffer": 5, **(data or {})}
    return recipe.model_copy(update={"data": DataSection.model_validate(section)})


def samples_of(shards: Path) -> ShardedSamples:
    paths = sorted(shards.glob("*.tar"))
    return ShardedSamples(paths, shard_sizes(paths), lambda record: [record])


def test_samples_are_those_of_the_reader_by_number(shards):
    samples = samples_of(shards)
    assert len(samples) == 13
    assert [sample.captions[0] for sample in samples] == [f"shape number {n}" for n in range(13)]
    assert [Path(path).name for path in samples.pictures()] == [Path(s.images[0]).name for s in samples]
    assert samples.place(7) == (1, 2)
    assert Unread(samples, 7).id == f"{samples.shards[1]}: sample 3"
    assert samples[2:4] == [samples[2], samples[3]]


def test_nothing_is_read_of_a_batch_until_it_is_prepared(tiny_folder, shards, tmp_path, monkeypatch):
    trainer = Trainer(recipe_of(tiny_folder, shards, tmp_path / "run", {"cache_features": False}), quiet=True)
    monkeypatch.setattr("vlm.data.sharded_samples.shard_samples", lambda shard: pytest.fail("read"))
    batch = trainer.source.batch(0, 4)
    assert all(isinstance(placed.sample, Unread) for placed in batch)
    monkeypatch.undo()
    assert len(trainer.source.prepare(batch)) == 4


def test_an_epoch_trains_on_every_sample_once(tiny_folder, shards, tmp_path):
    trainer = Trainer(recipe_of(tiny_folder, shards, tmp_path / "run", steps=4), quiet=True)
    drawn = [placed.sample.read().id for step in range(4) for placed in trainer.source.batch(step, 4)]
    assert sorted(drawn[:13], key=int) == [str(n) for n in range(13)]


@pytest.mark.parametrize(
    "data", [{"cache_features": False}, {"workers": 3}, {"workers": 3, "cache_features": False}], ids=str
)
def test_caching_and_workers_do_not_change_the_result(tiny_folder, shards, tmp_path, data):
    train(recipe_of(tiny_folder, shards, tmp_path / "plain"), quiet=True)
    train(recipe_of(tiny_folder, shards, tmp_path / "other", data), quiet=True)
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_an_interrupted_run_goes_on_exactly(tiny_folder, shards, tmp_path):
    train(recipe_of(tiny_folder, shards, tmp_path / "whole"), quiet=True)
    recipe = recipe_of(tiny_folder, shards, tmp_path / "cut")
    trainer = Trainer(recipe, quiet=True)
    for step in range(3):
        trainer.train_step(trainer.source.batch(step, 4))
        trainer.step += 1
    trainer.save()
    train(recipe, resume=True, quiet=True)
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "cut")[name], tensor)


def test_the_number_of_processes_does_not_change_the_result(tiny_folder, ragged, tmp_path):
    data = {"cache_features": False, "workers": 2}
    one, two = (dual_recipe_of(tiny_folder, ragged, tmp_path / name, data=dict(data)) for name in ("one", "two"))
    train(one, quiet=True)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(two.model_dump(mode="json")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "vlm.cli.train", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-4, atol=1e-5)


def test_one_of_several_captions_is_drawn_each_time(tiny_folder, ragged, tmp_path):
    source = Trainer(dual_recipe_of(tiny_folder, ragged, tmp_path / "run"), quiet=True).source
    assert source.num_samples == 13
    batches = [source.batch(step, 13) for step in range(20)]
    drawn = [[placed.sample.read() for placed in batch] for batch in batches]
    for epoch in drawn:  # one sample a record
        assert sorted(sample.id for sample in epoch) == sorted(str(n) for n in range(13))
    texts = {text for epoch in drawn for sample in epoch for text in sample.texts}
    assert texts == {f"shape {n} take {k}" for n in range(13) for k in range(1 + n % 3)}
    again = [[placed.sample.read() for placed in source.batch(step, 13)] for step in (7, 3)]
    assert again == [drawn[7], drawn[3]]
    other = Trainer(dual_recipe_of(tiny_folder, ragged, tmp_path / "other", train={"seed": 1}), quiet=True).source
    captions = [{p.sample.read().id: p.sample.read().texts for p in s.batch(0, 13)} for s in (source, other)]
    assert captions[0] != captions[1]


def test_several_captions_train_the_same_split_cached_or_resumed(tiny_folder, ragged, tmp_path):
    train(dual_recipe_of(tiny_folder, ragged, tmp_path / "whole"), quiet=True)
    train(dual_recipe_of(tiny_folder, ragged, tmp_path / "split", train={"micro_batch_size": 4}), quiet=True)
    train(dual_recipe_of(tiny_folder, ragged, tmp_path / "computed", data={"cache_features": False}), quiet=True)
    cut = dual_recipe_of(tiny_folder, ragged, tmp_path / "cut")
    trainer = Trainer(cut, quiet=True)
    for step in range(3):
        trainer.train_step(trainer.source.batch(step, 6))
        trainer.step += 1
    trainer.save()
    train(cut, resume=True, quiet=True)
    for other in ("split", "computed", "cut"):
        for name, tensor in weights(tmp_path / "whole").items():
            torch.testing.assert_close(weights(tmp_path / other)[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_record_without_a_caption_is_skipped_by_name(tiny_folder, tmp_path):
    records = [Record(str(n), (path,), ("a",) if n else (), label="x") for n, path in enumerate(pictures(tmp_path, 4))]
    write_shards(records, tmp_path / "some", size=4, name="train")
    recipe = dual_recipe_of(tiny_folder, tmp_path / "some", tmp_path / "run", data={"max_broken": 0.5})
    trainer = Trainer(recipe, quiet=True)
    assert trainer.train().finished
    assert list(trainer.source.broken.values()) == ["000000000: nothing to train on"]


def test_shards_mix_with_a_source_in_memory(tiny_folder, shards, tmp_path):
    other = tmp_path / "train.jsonl"
    other.write_text("\n".join(json.dumps({"image": p, "caption": "x"}) for p in pictures(tmp_path, 4, seed=1)))
    recipe = recipe_of(tiny_folder, shards, tmp_path / "run", steps=2)
    section = recipe.data.model_dump()
    section["train"].append({"dataset": str(other), "format": "captions_jsonl"})
    recipe = recipe.model_copy(update={"data": DataSection.model_validate(section)})
    trainer = Trainer(recipe, quiet=True)
    assert trainer.source.num_samples == 17
    drawn = trainer.source.batch(0, 17)
    assert sum(isinstance(placed.sample, Unread) for placed in drawn) == pytest.approx(13, abs=1)
    assert trainer.train().finished


def test_a_cut_shard_loses_only_what_is_cut(tiny_folder, shards, tmp_path):
    last = sorted(shards.glob("*.tar"))[-1]
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    data = {"cache_features": False, "max_broken": 0.5}
    trainer = Trainer(recipe_of(tiny_folder, shards, tmp_path / "run", dict(data), steps=4), quiet=True)
    assert trainer.train().finished
    assert 0 < len(trainer.source.broken) <= 3
    assert any("were counted" in reason for reason in trainer.source.broken.values())
    strict = recipe_of(tiny_folder, shards, tmp_path / "strict", {**data, "max_broken": 0.01}, steps=4)
    with pytest.raises(VlmError, match="are broken"):
        train(strict, quiet=True)


def test_sizes_come_from_sizes_json_or_img2dataset_or_counting(shards):
    paths = sorted(shards.glob("*.tar"))
    said = []
    assert shard_sizes(paths, log=said.append) == [5, 5, 3]
    assert not said
    assert shard_sizes(paths, limit=7) == [5, 2, 0]
    (shards / "sizes.json").unlink()
    paths[0].with_name(f"{paths[0].stem}_stats.json").write_text('{"count": 9, "successes": 4}')
    assert shard_sizes(paths, log=said.append) == [4, 5, 3]
    assert len(said) == 1
    for nonsense in ("[", "[1]", json.dumps(dict.fromkeys((p.name for p in paths), -1))):
        (shards / "sizes.json").write_text(nonsense)
        assert shard_sizes(paths, log=said.append) == [4, 5, 3]


def test_shards_without_a_sample_are_an_error(tmp_path):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(VlmError, match="no samples in 1 shards"):
        shard_sizes([tmp_path / "empty.tar"], log=lambda _: None)


def test_too_many_pictures_to_cache_say_so(tiny_folder, shards, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm.training.source.MAX_CACHED", 12)
    with pytest.raises(VlmError, match="cache_features"):
        Trainer(recipe_of(tiny_folder, shards, tmp_path / "run"), quiet=True)


def test_a_folder_of_pictures_beside_shards_is_refused(tiny_folder, shards, tmp_path):
    data = {"source": {"images": str(tmp_path)}}
    with pytest.raises(VlmError, match="leave `images` out"):
        Trainer(recipe_of(tiny_folder, shards, tmp_path / "run", data), quiet=True)


def test_a_data_set_names_its_shards(shards, tmp_path, monkeypatch):
    spec = tmp_path / "mine.yaml"
    place = "{path: 'shards/train-{000000..000002}.tar'}"
    spec.write_text(f"name: mine\nlicence: CC0\nformat: webdataset\nsplits:\n  train: {place}\n")
    assert find_shards(str(spec), "train") == sorted(shards.glob("*.tar"))
    by_hand = tmp_path / "by_hand.yaml"
    by_hand.write_text(spec.read_text().replace("shards/", "data:shards/"))
    monkeypatch.setenv("VLM_DATA", str(tmp_path))
    assert find_shards(str(by_hand), "train") == sorted(shards.glob("*.tar"))
