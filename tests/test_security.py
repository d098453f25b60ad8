"""Nothing that comes with data, a checkpoint or a model runs, and no network is asked, unless the user says so."""

import json
import pickle
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_parts import caption_benchmark, conversations, tiny_recipe
from typer.testing import CliRunner

from vlm import VlmError, load_model, load_recipe, train
from vlm.backbones.hf_loading import read_scalars
from vlm.backbones.language import build_language_model
from vlm.model_spec import LanguageModelSpec
from vlm.training.checkpoints import newest_checkpoint


class _Hostile:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_a_checkpoint_with_a_hostile_pickle_is_passed_over_and_nothing_runs(
    kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(tiny_folder, conversations(tmp_path / "data"), tmp_path / "run", steps=2, checkpoint_every=1)
    train(recipe, quiet=True)
    touched = tmp_path / "touched"
    newest = tmp_path / "run" / "checkpoints" / "step-00000002" / "optimizer.pt"
    if kind == "torch":
        torch.save({"state": _Hostile(touched)}, newest)
    else:
        newest.write_bytes(pickle.dumps({"state": _Hostile(touched)}))
    with pytest.warns(UserWarning, match="step-00000002"):
        found = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.step == 1
    assert not touched.exists()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "lavis.pth", "scalars"])
def test_weights_of_others_with_a_hostile_pickle_are_refused_and_nothing_runs(
    file: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from tiny_models import tiny_language_model

    touched = tmp_path / "touched"
    if file == "lavis.pth":
        path = tmp_path / file
        torch.save({"model": {"query_tokens": _Hostile(touched)}}, path)
        with pytest.raises(VlmError):
            load_model(path)
    else:
        folder = tiny_language_model("llama", tmp_path / "model")
        (folder / "model.safetensors").unlink()
        torch.save({"model.embed_tokens.weight": _Hostile(touched)}, folder / "pytorch_model.bin")
        if file == "scalars":
            with pytest.raises((VlmError, pickle.UnpicklingError)):
                read_scalars(str(folder), ["model.embed_tokens.weight"])
        else:
            with pytest.raises((VlmError, pickle.UnpicklingError)):
                build_language_model(LanguageModelSpec(name=f"hf:{folder}"))
    assert not touched.exists()


# A model that transformers does not know: Llama under another name, with a mark that says its code ran.
_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({touched!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder with code of its own, and the file that this code makes where it runs."""
    from tiny_models import tiny_language_model

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder, touched = tiny_language_model("llama", tmp_path / "own"), tmp_path / "touched"
    (folder / "own.py").write_text(_CODE.format(touched=str(touched)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, touched


def test_code_beside_a_model_runs_only_where_the_recipe_says_so(
    own: tuple[Path, Path], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, touched = own
    recipe = tiny_recipe(tiny_folder, conversations(tmp_path / "data"), tmp_path / "run", steps=1)
    content = recipe.model_dump(mode="json")
    content["model"]["language_model"]["name"] = f"hf:{folder}"
    refused = type(recipe).model_validate(content)
    with pytest.raises(VlmError, match=r"model\.language_model\.trust_remote_code=true") as error:
        train(refused, quiet=True)
    assert "\n" not in str(error.value)
    assert not touched.exists()
    content["model"]["language_model"]["trust_remote_code"] = True
    with pytest.warns(UserWarning, match="trust_remote_code") as warned:
        assert train(type(recipe).model_validate(content), quiet=True).finished
    assert len([one for one in warned if "trust_remote_code" in str(one.message)]) == 1
    assert touched.exists()

    # A run folder may be somebody else's: its word is not enough.
    touched.unlink()
    with pytest.raises(VlmError, match="trust_remote_code=True"):
        load_model(tmp_path / "run")
    assert not touched.exists()
    picture = str(next((tmp_path / "data").glob("*.png")))
    with pytest.warns(UserWarning, match="trust_remote_code"):
        model: Any = load_model(tmp_path / "run", "cpu", trust_remote_code=True)
    assert isinstance(model.answer(picture, "what is it?", max_new_tokens=2)[0], str)


def test_a_part_that_has_no_code_cannot_be_trusted_with_it() -> None:
    with pytest.raises(VlmError, match=r"trust_remote_code.*hf:"):
        load_recipe("starter/llava_pretrain", ["model.language_model.trust_remote_code=true"])


def test_code_of_images_and_texts_never_runs(own: tuple[Path, Path]) -> None:
    from vlm.backbones.image import build_image_encoder
    from vlm.backbones.text import build_text_encoder
    from vlm.model_spec import ImageEncoderSpec

    folder, touched = own
    with pytest.raises(VlmError):
        build_image_encoder(ImageEncoderSpec(name=f"hf:{folder}"))
    with pytest.raises(VlmError):
        build_text_encoder(f"hf:{folder}")
    assert not touched.exists()


def test_training_and_evaluation_ask_nothing_of_the_network(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the hub may be asked: nothing names it."""

    def refused(*arguments: Any, **options: Any) -> Any:
        raise AssertionError(f"the network is asked: {arguments}")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket.socket, "connect_ex", refused)
    data = conversations(tmp_path / "data")
    assert train(tiny_recipe(tiny_folder, data, tmp_path / "run", steps=2), quiet=True).finished
    benchmark = caption_benchmark(tmp_path, data.parent)
    from vlm.cli.eval import app

    asked = [str(benchmark), "--model", str(tmp_path / "run"), "--output", str(tmp_path / "scored")]
    done = CliRunner().invoke(app, [*asked, "--limit", "4", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output.splitlines()[-1])["count"] == 4
