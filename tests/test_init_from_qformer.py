"""BLIP-2's second stage starts from a run of the first: what is taken, left out by rule, new, and missing."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dual_parts import captions
from generative_parts import generative_spec, pictures
from safetensors.torch import load_file, save_file
from test_qformer_model import qformer_recipe, qformer_spec
from training_parts import STEADY_EPS, losses, weights

from vlm import VlmError, load_model, train
from vlm.recipe import Recipe
from vlm.training.loop import Trainer


@pytest.fixture
def first(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A run of stage 1."""
    train(qformer_recipe(tiny_folder, captions(tmp_path / "data"), tmp_path / "first", train={"steps": 2}), quiet=True)
    return tmp_path / "first"


def second(
    tiny_folder: Callable[..., Path], first: Path, kind: str = "opt", template: str = "blip2_opt", **bridge: Any
) -> Recipe:
    stage_one = qformer_spec(tiny_folder)
    shared = {key: value for key, value in stage_one["bridge"].items() if key != "embed_width"}
    spec = generative_spec(tiny_folder, kind, template=template).model_dump(mode="json")
    return Recipe.model_validate(
        {
            "model": {
                **spec,
                **{k: stage_one[k] for k in ("image_encoder",)},
                "bridge": {**shared, "type": "qformer", **bridge},
            },
            "data": {"train": [{"dataset": str(first.parent / "data" / "train.jsonl"), "format": "captions_jsonl"}]},
            "optimizer": {"lr": 1e-2, "eps": STEADY_EPS},
            "train": {"batch_size": 4, "steps": 9, "log_every": 1},
            "init_from": str(first),
            "output": str(first.parent / ("second" + "".join(bridge))),
        }
    )


def test_stage_two_takes_the_queries_and_leaves_the_texts(
    tiny_folder: Callable[..., Path], first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(second(tiny_folder, first))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "starting from" in line]
    given = weights(first)
    own = dict(trainer.model.bridge.named_parameters(prefix="bridge"))
    taken = own.keys() & given.keys()
    assert own.keys() - taken == {"bridge.language_projection.weight", "bridge.language_projection.bias"}
    for name in taken:
        torch.testing.assert_close(own[name].detach(), given[name], rtol=0, atol=0)
    assert f"{len(taken)} tensors taken, {len(given) - len(taken)} left out" in line
    for part in ("bridge.embeddings", "bridge.layers.text_ffn", "heads.match", "heads.temperature", "heads.words"):
        assert part in line
    assert line.endswith("new here: bridge.language_projection")
    assert all(
        name.startswith(("heads.", "bridge.embeddings.")) or ".text_ffn." in name for name in given.keys() - taken
    )
    assert trainer.train().finished
    told = losses(trainer.folder.path)
    assert sum(told[-3:]) < sum(told[:3])  # the same pairs in both
    assert load_model(trainer.folder.path).spec.bridge.type == "qformer"


@pytest.mark.parametrize(
    ("kind", "template", "bridge"),
    [
        ("opt", "blip2_opt", {}),
        ("t5", "blip2_t5", {}),
        ("llama", "minigpt4", {}),
        ("llama", "instructblip", {"instruction": True}),
    ],
)
def test_a_second_stage_is_loaded_from_its_model_folder_alone(
    tiny_folder: Callable[..., Path], first: Path, tmp_path: Path, kind: str, template: str, bridge: dict[str, Any]
) -> None:
    """Neither recipe nor checkpoints nor the first stage's run are there any more."""
    trainer = Trainer(second(tiny_folder, first, kind, template, **bridge))
    trainer.train()
    images = pictures(tmp_path, 2)

    def told(model: Any) -> tuple[Any, ...]:
        answers = model.answer(images, ["what color?", "what shape?"], max_new_tokens=5)
        return model.caption(images, max_new_tokens=5), answers, model.score(images, ["a cat", "a red chair"]).tolist()

    wanted = told(trainer.model.eval())
    alone = tmp_path / "elsewhere"
    shutil.move(trainer.folder.path / "model", alone / "model")
    shutil.rmtree(trainer.folder.path)
    shutil.rmtree(first)
    captions, answers, scores = told(load_model(alone, "cpu", "fp32"))
    assert (captions, answers) == wanted[:2]
    assert scores == pytest.approx(wanted[2], abs=1e-4)


def test_another_number_of_queries_is_an_error(tiny_folder: Callable[..., Path], first: Path) -> None:
    with pytest.raises(
        VlmError, match=r"init_from: .*shapes differ for bridge\.query_tokens \(\(1, 4, 32\) there, \(1, 9, 32\)"
    ):
        Trainer(second(tiny_folder, first, num_queries=9), quiet=True)


def test_other_layers_are_an_error(tiny_folder: Callable[..., Path], first: Path) -> None:
    with pytest.raises(VlmError, match=r"the model has no place for bridge\.layers\.1\."):
        Trainer(second(tiny_folder, first, layers=1), quiet=True)
    with pytest.raises(VlmError, match=r"the Q-Former there lacks bridge\.layers\.1\.cross_attention"):
        Trainer(second(tiny_folder, first, cross_attention_every=1), quiet=True)


def test_a_run_that_lacks_a_part_is_an_error(tiny_folder: Callable[..., Path], first: Path) -> None:
    file = first / "model" / "trained.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.startswith("bridge.image_norm.")}, file)
    with pytest.raises(
        VlmError, match=r"the Q-Former there lacks bridge\.image_norm\.bias, bridge\.image_norm\.weight"
    ):
        Trainer(second(tiny_folder, first), quiet=True)


def test_stage_one_does_not_start_from_stage_two(tiny_folder: Callable[..., Path], first: Path) -> None:
    recipe = second(tiny_folder, first)
    train(recipe, quiet=True)
    data = Path(recipe.data.train[0].dataset)
    back = qformer_recipe(tiny_folder, data, first.parent / "third", init_from=str(first.parent / "second"))
    with pytest.raises(VlmError, match=r"lacks bridge\.embeddings"):
        Trainer(back, quiet=True)
