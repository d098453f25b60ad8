"""The generative model with a Q-Former between its parts (BLIP-2's second stage)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generative_parts import generative_spec, pictures
from tiny_models import tiny_bert

from vlm.data.conversation import IMAGE_SLOT
from vlm.errors import VlmError
from vlm.models.build import build_model, load_model_folder, save_model_folder
from vlm.models.export_llava import export_llava
from vlm.models.generative import GenerativeModel


def model_of(tiny_folder: Callable[..., Path], kind: str = "opt", **options: Any) -> GenerativeModel:
    spec = generative_spec(tiny_folder, kind, **{"template": "blip2_opt", **options})
    bridge = {"type": "qformer", "init": f"hf:{tiny_folder(tiny_bert)}", "num_queries": 5}
    content = spec.model_dump() | {"bridge": bridge}
    return build_model(type(spec).model_validate(content), ["bridge.*"], device="cpu", precision="fp32")


def test_a_caption_stands_behind_picture_and_start_token(tiny_folder: Callable[..., Path]) -> None:
    """The start token carries loss where nothing was asked, as in LAVIS; a prompt carries none."""
    model = model_of(tiny_folder)
    start, line = model.tokenizer.bos_token_id, model.tokenizer("\n", add_special_tokens=False)["input_ids"]
    text = model.tokenize(model.caption_messages("a red chair"))
    words = model.tokenizer("a red chair", add_special_tokens=False)["input_ids"]
    assert list(text.ids) == [*[IMAGE_SLOT] * 5, start, *words, *line]
    assert text.trained == (False,) * 5 + (True,) * (len(text.ids) - 5)
    asked = model.tokenize(model.question_messages("what color?", "blue"))
    assert asked.ids[:6] == (*[IMAGE_SLOT] * 5, start)
    said = [token for token, trained in zip(asked.ids, asked.trained) if trained]
    assert model.tokenizer.decode(said) == " blue\n"


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_run_folder_keeps_the_bridge(tiny_folder: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """Captions alone or together are the same, and so are those of the saved model."""
    options = {} if kind == "opt" else {"template": "plain"}
    model, images = model_of(tiny_folder, kind, **options), pictures(tmp_path, 2)
    torch.nn.init.normal_(model.bridge.language_projection.weight, std=0.3)
    told = model.caption(images, max_new_tokens=6)
    assert told == [model.caption(image, max_new_tokens=6)[0] for image in images]
    scores = model.score(images, ["a cat", "a blue chair"])
    save_model_folder(model, ["bridge.*"], tmp_path / "model")
    again = load_model_folder(tmp_path / "model", "cpu", "fp32")
    assert again.caption(images, max_new_tokens=6) == told
    torch.testing.assert_close(again.score(images, ["a cat", "a blue chair"]), scores)


def test_it_is_no_llava(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(VlmError, match=r"bridge\.type: qformer"):
        export_llava(model_of(tiny_folder), tmp_path)
