"""The Q-Former model: its tasks, its training however a batch is split, and what it says to bad input."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dual_parts import captions
from generative_parts import pictures
from tiny_models import randomize, tiny_bert, tiny_hf_image_model
from training_parts import STEADY_EPS, assert_same_runs, train_in_processes, weights

from vlm import UnsupportedTask, VlmError, load_model, train
from vlm.model_spec import QFormerSpec
from vlm.models.build import build_model
from vlm.models.qformer_model import QFormerModel
from vlm.recipe import ObjectiveSpec, Recipe
from vlm.training.loop import Trainer

STAGE_ONE = [{"name": "itc", "smoothing": 0.1}, "itm", {"name": "lm", "smoothing": 0.1}]


def qformer_spec(tiny_folder: Callable[..., Path], **bridge: Any) -> dict[str, Any]:
    bert = f"hf:{tiny_folder(tiny_bert)}"
    return {
        "type": "qformer",
        "image_encoder": {"name": f"hf:{tiny_folder(tiny_hf_image_model, 'clip')}", "drop_cls": False},
        "bridge": {"init": bert, "num_queries": 4, "embed_width": 8, "dropout": 0.0, **bridge},
    }


def qformer_recipe(tiny_folder: Callable[..., Path], file: Path, output: Path, **options: Any) -> Recipe:
    content: dict[str, Any] = {
        "model": qformer_spec(tiny_folder),
        "objectives": options.pop("objectives", STAGE_ONE),
        "data": {"train": [{"dataset": str(file), "format": "captions_jsonl"}], **options.pop("data", {})},
        "optimizer": {"lr": 3e-3, "eps": STEADY_EPS},
        "train": {"batch_size": 6, "steps": 4, "log_every": 1, "checkpoint_every": 3, **options.pop("train", {})},
        "output": str(output),
        **options,
    }
    return Recipe.model_validate(content)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return captions(tmp_path / "data")


@pytest.fixture
def model(tiny_folder: Callable[..., Path]) -> QFormerModel:
    built = build_model(QFormerSpec.model_validate(qformer_spec(tiny_folder)), device="cpu", precision="fp32")
    randomize(built.bridge)
    randomize(built.heads)
    torch.nn.init.constant_(built.heads.temperature, 0.07)
    return built


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_embeddings_are_of_unit_length_one_a_query(model: QFormerModel, tmp_path: Path) -> None:
    images = pictures(tmp_path, 3)
    assert model.encode_image(images).shape == (3, 4, 8)
    torch.testing.assert_close(model.encode_image(images).norm(dim=-1), torch.ones(3, 4))
    texts = model.encode_text(["a cat", "a photo of a cat sitting on a red chair"])
    torch.testing.assert_close(texts[:1], model.encode_text("a cat"))
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(2))


def test_matches_are_the_same_alone_and_together(model: QFormerModel, tmp_path: Path) -> None:
    images, texts = pictures(tmp_path, 3), ["a cat", "a photo of a red chair", "no"]
    together = model.match(images, texts)
    alone = torch.cat([model.match(image, text) for image, text in zip(images, texts)])
    torch.testing.assert_close(together, alone)
    one = model.match(images[0], texts)
    torch.testing.assert_close(one, torch.cat([model.match(images[0], text) for text in texts]))
    assert together.min() > 0
    assert together.max() < 1


def test_long_texts_are_cut_where_they_are_matched(model: QFormerModel, tmp_path: Path) -> None:
    image, cut = pictures(tmp_path, 1)[0], " ".join(["cat"] * (model.spec.match_length - 2))
    torch.testing.assert_close(model.match(image, "cat " * 200), model.match(image, cut))
    torch.testing.assert_close(model.encode_text("cat " * 200), model.encode_text(cut))


def test_classes_are_judged_by_the_best_query(model: QFormerModel, tmp_path: Path) -> None:
    images = pictures(tmp_path, 2)
    found = model.classify(images, ["cat", "dog", "chair"], templates=["a photo of a {}"])
    texts = model.encode_text([f"a photo of a {name}" for name in ("cat", "dog", "chair")])
    wanted = (model.encode_image(images) @ texts.T).amax(1) / model.heads.temperature
    torch.testing.assert_close(found, wanted.softmax(-1))


def test_captions_are_the_same_alone_and_together(model: QFormerModel, tmp_path: Path) -> None:
    images = pictures(tmp_path, 3)
    for options in ({}, {"num_beams": 1, "max_new_tokens": 6}, {"prompt": "a photo of"}):
        together = model.caption(images, **options)
        assert together == [model.caption(image, **options)[0] for image in images]
    assert all(text.startswith("a photo of") for text in model.caption(images, prompt="a photo of"))
    torch.manual_seed(0)
    assert len(model.caption(images, do_sample=True, top_p=0.9)) == 3


def test_a_caption_is_the_argmax_of_the_trained_distribution(model: QFormerModel, tmp_path: Path) -> None:
    """Greedy steps through the cache choose what the training pass finds most likely."""
    image = pictures(tmp_path, 1)
    from vlm.models.qformer_generation import generate_ids

    with torch.inference_mode():
        queries = model.bridge.queries(model.see(image))
        start = torch.tensor([[model.tokenizer.start]])
        ids = generate_ids(
            model.bridge, model.heads.words, queries, start, model.tokenizer.end, 0, max_new_tokens=8, min_new_tokens=8
        )
        from vlm.data.text_batch import TextBatch

        states = model.bridge.causal(queries, TextBatch(ids, (ids.shape[1],)))
        logits = model.word_logits(states)[:-1].clone()
        logits[:, model.tokenizer.end] = -torch.inf
    assert logits.argmax(-1).tolist() == ids[0, 1:].tolist()


def test_what_it_cannot_do(model: QFormerModel, tmp_path: Path) -> None:
    image = pictures(tmp_path, 1)[0]
    with pytest.raises(UnsupportedTask, match="generative"):
        model.answer(image, "what?")
    with pytest.raises(VlmError, match="2 images for 3 texts"):
        model.match([image, image], ["a", "b", "c"])
    with pytest.raises(VlmError, match="no texts"):
        model.encode_text([])


def test_features_that_are_not_finite_are_an_error_in_words(
    model: QFormerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(tmp_path, 2)
    plain = model._tokens

    def overflowing(pixels: torch.Tensor) -> torch.Tensor:
        tokens = plain(pixels)
        tokens[1, 0, 0] = float("nan")
        return tokens

    monkeypatch.setattr(model, "_tokens", overflowing)
    with pytest.raises(VlmError, match=r"image 1: features of .* are not finite; load the model with dtype bf16"):
        model.encode_image(images)


# --- training ---------------------------------------------------------------------------------------------------------


def test_stage_one_learns_and_the_model_loads(tiny_folder: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    recipe = qformer_recipe(tiny_folder, data, tmp_path / "run", train={"steps": 40, "sample_every": 40})
    train(recipe, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    assert last["loss"] < 0.8 * first["loss"]
    for line in lines:
        assert line["loss"] == pytest.approx(line["itc"] + line["itm"] + line["lm"], rel=1e-4)
    assert {"itm_accuracy", "token_accuracy", "logit_scale"} <= first.keys()
    assert 0.3 < first["itm"] < 1.3  # about .64 for a head that says nothing yet
    names = weights(tmp_path / "run")
    assert "heads.temperature" in names
    assert "bridge.query_tokens" in names
    loaded = load_model(tmp_path / "run")
    assert loaded.match(pictures(tmp_path, 1)[0], "a cat").shape == (1,)


def test_each_objective_has_its_weight_and_a_picture_is_looked_at_once_a_step(
    tiny_folder: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys and values serve contrast, every pair of matching, and captions."""
    weighted = [{"name": "itc", "weight": 2.0}, {"name": "itm", "weight": 0.5}, {"name": "lm", "weight": 3.0}]
    recipe = qformer_recipe(tiny_folder, data, tmp_path / "run", objectives=weighted)
    trainer = Trainer(recipe, quiet=True)
    bridge, seen, pairs = trainer.model.bridge, [], []
    look, match = bridge.image, bridge.pairs
    monkeypatch.setattr(bridge, "image", lambda tokens: seen.append(len(tokens)) or look(tokens))
    monkeypatch.setattr(
        bridge, "pairs", lambda image, slots, texts: pairs.append(len(slots)) or match(image, slots, texts)
    )
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["loss"] == pytest.approx(2 * line["itc"] + 0.5 * line["itm"] + 3 * line["lm"], rel=1e-4)
    assert (len(seen), pairs) == (len(lines), [3 * 6] * len(lines))


def _same(one: Path, other: Path) -> None:
    assert_same_runs(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_do_not_change_the_result(
    tiny_folder: Callable[..., Path], data: Path, tmp_path: Path, size: int
) -> None:
    """The same negatives of the global batch, whichever micro-batch they lie in."""
    train(qformer_recipe(tiny_folder, data, tmp_path / "whole"), quiet=True)
    train(qformer_recipe(tiny_folder, data, tmp_path / "parts", train={"micro_batch_size": size}), quiet=True)
    _same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(("processes", "batch", "micro_batch"), [(2, 7, 2), (3, 2, None)])
def test_the_number_of_processes_does_not_change_the_result(
    tiny_folder: Callable[..., Path], data: Path, tmp_path: Path, processes: int, batch: int, micro_batch: int | None
) -> None:
    section = {"batch_size": batch, "steps": 3}
    train(qformer_recipe(tiny_folder, data, tmp_path / "one", train=section), quiet=True)
    many = {**section, "micro_batch_size": micro_batch}
    train_in_processes(qformer_recipe(tiny_folder, data, tmp_path / "many", train=many), tmp_path, processes)
    _same(tmp_path / "one", tmp_path / "many")


def test_a_batch_of_one_turns_matching_off(tiny_folder: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    recipe = qformer_recipe(tiny_folder, data, tmp_path / "run", train={"batch_size": 1, "steps": 1})
    with pytest.warns(UserWarning, match="itm is off"):
        train(recipe, quiet=True)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["itm"] == 0
    assert line["lm"] > 0


def test_captions_of_one_picture_are_no_negatives(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A batch of one picture's captions has none; with a second picture only that one is drawn."""
    file = captions(tmp_path / "data", count=2, twice=2)
    trainer = Trainer(qformer_recipe(tiny_folder, file, tmp_path / "run", train={"batch_size": 4}), quiet=True)
    trainer.model.train()
    batch = trainer._collate(trainer.source.prepare(trainer.source.batch(0, 4)))
    from vlm.objectives.matching import find_negatives
    from vlm.objectives.objective import ReadOuts, make_pairs

    image, text = ReadOuts(trainer.model, batch)("pairs")
    drawn = find_negatives(
        trainer.model, make_pairs(image, text, [batch], 3).detached(), [batch], ObjectiveSpec(name="itm")
    )
    assert drawn is not None
    for row, (wrong_image, wrong_text) in enumerate(zip(drawn.images, drawn.texts)):
        for place in (wrong_image, wrong_text):
            assert batch.picture_ids[place] != batch.picture_ids[row]
    one = captions(tmp_path / "single", count=1, twice=1)
    with pytest.warns(UserWarning, match="one picture"):
        train(qformer_recipe(tiny_folder, one, tmp_path / "other", train={"batch_size": 2, "steps": 1}), quiet=True)


def test_pictures_that_share_a_caption_are_no_negatives_where_the_recipe_says_so(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """`equal_texts`: of a batch in which all but one picture have the same caption, only that one is wrong for them."""
    file = captions(tmp_path / "data", count=5, twice=0)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines[:4]:
        line["captions"] = ["a red chair"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    objectives = [{"name": "itc", "equal_texts": True}, {"name": "itm", "equal_texts": True}, "lm"]
    recipe = qformer_recipe(tiny_folder, file, tmp_path / "run", objectives=objectives, train={"batch_size": 5})
    trainer = Trainer(recipe, quiet=True)
    batch = trainer._collate(trainer.source.prepare(trainer.source.batch(0, 5)))
    from vlm.objectives.matching import find_negatives
    from vlm.objectives.objective import ReadOuts, make_pairs

    image, text = ReadOuts(trainer.model, batch)("pairs")
    pairs = make_pairs(image, text, [batch], 3).detached()
    (odd,) = [row for row, ids in enumerate(batch.text_ids.tolist()) if batch.text_ids.tolist().count(ids) == 1]
    drawn = find_negatives(trainer.model, pairs, [batch], recipe.objectives[1])
    assert drawn is not None
    for row, places in enumerate(zip(drawn.images, drawn.texts)):
        assert (odd in places) == (row != odd)
        assert row == odd or set(places) == {odd}
    ever: set[int] = set()
    for _ in range(20):  # any of them may draw it by chance
        plain = find_negatives(trainer.model, pairs, [batch], ObjectiveSpec(name="itm"))
        assert plain is not None
        ever |= {int(place) for row, place in enumerate(plain.texts) if row != odd}
    assert ever - {odd}
    groups = pairs.together(recipe.objectives[0])
    assert len(groups.unique()) == 2
    assert trainer.train().finished


def test_groups_join_over_pictures_and_texts_in_turn() -> None:
    from vlm.objectives.objective import joined_groups

    pictures, texts = torch.tensor([7, 7, 8, 9, 5]), torch.tensor([1, 2, 2, 3, 4])
    assert joined_groups(pictures, texts).tolist() == [0, 0, 0, 3, 4]
    chain = torch.arange(20)
    assert joined_groups(chain // 2, (chain + 1) // 2).tolist() == [0] * 20


def test_long_captions_are_cut(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    file = captions(tmp_path / "data", 4)
    file.write_text(file.read_text().replace("a cat", "a cat " * 100))
    trainer = Trainer(qformer_recipe(tiny_folder, file, tmp_path / "run"), quiet=True)
    batch = trainer._collate(trainer.source.prepare(trainer.source.batch(0, 4)))
    assert batch.ids.shape[1] == 32
    assert (batch.ids == trainer.model.tokenizer.end).sum(1).tolist() == [1] * 4


def test_features_that_are_not_finite_skip_the_step(
    tiny_folder: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    trainer = Trainer(qformer_recipe(tiny_folder, data, tmp_path / "run", data={"cache_features": False}), quiet=True)
    good = trainer.source.load_picture
    trainer.source.load_picture = lambda path, step: good(path, step) * float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trainer.train_step(trainer.source.batch(0, 6)) == {}


def test_every_tensor_is_on_the_models_device(model: QFormerModel) -> None:
    """FakeTensorMode raises where a tensor meets one on another device, without a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from vlm.data.text_batch import TextBatch

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for name, value in store.items():
                    if value is not None:
                        fake = mode.from_tensor(value.detach()).to("cuda")
                        store[name] = torch.nn.Parameter(fake) if store is module._parameters else fake  # type: ignore
        texts = TextBatch.of([[2, 7, 8, 3], [2, 7, 3]], device="cuda")
        image = model.image_keys_values(torch.empty(2, 3, 32, 32, device="cuda"))
        queries = model.bridge.queries(image)
        points = model.heads.embed_queries(queries.states)
        words = model.heads.embed_text(model.bridge.first_text_state(texts))
        said = texts.with_first(9).without_last()
        logits = model.word_logits(model.bridge.causal(queries, said))
        match = model.heads.match_logits(
            model.bridge.pairs(image, [0, 1, 0, 1], TextBatch.of([[2, 3]] * 4, device="cuda"))
        )
        for value in (points, words, logits, match, texts.next_tokens()):
            assert value.device.type == "cuda"
