"""The starter recipes, each a few samples of it, with their real parts: trained and scored without a network."""

import socket
from pathlib import Path
from typing import Any

import pytest

from vlm import VlmError, evaluate, load_recipe, train
from vlm.paths import yaml_names

# Recipes that follow each other, and the benchmark that scores the last one.
CHAINS = {
    "clip": (("starter/clip_openmoji",), "openmoji_retrieval"),
    "llava": (("starter/llava_pretrain", "starter/llava_finetune"), "easy_vqa"),
    "blip2": (("starter/blip2_stage1", "starter/blip2_stage2"), "easy_vqa_captions"),
}


def test_every_starter_recipe_is_in_a_chain() -> None:
    names = [name for chain, _ in CHAINS.values() for name in chain]
    assert sorted(names) == [name for name in yaml_names("recipes") if name.startswith("starter/")]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub may be asked, but nothing answers: whoever looks up a name or connects fails the test."""

    def refused(*arguments: Any, **options: Any) -> Any:
        pytest.fail(f"the network is asked: {arguments}")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refused)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refused)


@pytest.mark.starter
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.usefixtures("no_network")
def test_a_starter_recipe_asks_nothing_of_the_network(chain: str, tmp_path: Path) -> None:
    recipes, benchmark = CHAINS[chain]
    before = None
    for name in recipes:
        recipe = load_recipe(name)
        sources = [source.model_copy(update={"limit": 96}) for source in recipe.data.train]
        changes = {
            "data": recipe.data.model_copy(update={"train": sources}),
            "train": recipe.train.model_copy(update={"steps": 1, "batch_size": 4, "sample_every": 0}),
            "output": str(tmp_path / Path(name).name),
            "init_from": before,
        }
        if chain == "clip":  # fewer pairs than a canonical start of this width needs
            bridge = recipe.model.bridge.model_copy(update={"width": 64})
            changes["model"] = recipe.model.model_copy(update={"bridge": bridge})
        assert train(recipe.model_copy(update=changes), quiet=True).finished
        before = str(tmp_path / Path(name).name)
    assert evaluate(benchmark, before, limit=8, progress=False, cache=False).count >= 8


def test_a_name_of_the_hub_alone_asks_it(no_network: None, tmp_path: Path) -> None:
    """The fixture does find who asks."""
    override = ["model.language_model=hf:nobody/no-such-model", f"output={tmp_path / 'run'}"]
    with pytest.raises((VlmError, pytest.fail.Exception)):
        train(load_recipe("starter/llava_pretrain", override), quiet=True)
