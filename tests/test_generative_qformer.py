"""The generative model with a Q-Former between its parts (BLIP-2's second stage)."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generative_parts import generative_spec, pictures
from tiny_models import tiny_bert

from vlm.data.conversation import IMAGE_SLOT
from vlm.errors import VlmError
from vlm.model_spec import GenerativeSpec
from vlm.models.build import build_model, load_model_folder, save_model_folder
from vlm.models.export_llava import export_llava
from vlm.models.generative import GenerativeModel
from vlm.objectives.lm import lm_loss
from vlm.objectives.objective import ReadOuts
from vlm.recipe import ObjectiveSpec


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


def test_captions_of_one_picture_train_as_they_would_alone(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """The picture's last token predicts the start token, so each caption stands behind a picture of its own."""
    model, (path,) = model_of(tiny_folder, "llama", template="blip2_opt"), pictures(tmp_path, 1)
    texts = [model.tokenize(model.caption_messages(caption)) for caption in ("a red chair", "a cat")]

    def loss(samples: list[Any]) -> torch.Tensor:
        batch = model.collate(samples).with_images(model._pixels)
        return lm_loss(ReadOuts(model, batch), ObjectiveSpec(name="lm"))[0]

    alone = [loss([([text], (path,))]) for text in texts]
    torch.testing.assert_close(loss([(texts, (path,))]), alone[0] + alone[1])


def test_a_language_model_may_be_narrower_than_the_queries(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    folder = shutil.copytree(tiny_folder(tiny_bert), tmp_path / "wide")
    config = BertConfig.from_pretrained(folder)
    config.hidden_size, config.num_attention_heads = 48, 4
    BertModel(config).save_pretrained(folder)
    content = generative_spec(tiny_folder, "opt", template="blip2_opt").model_dump()
    content["bridge"] = {"type": "qformer", "init": f"hf:{folder}", "num_queries": 5}
    model = build_model(GenerativeSpec.model_validate(content), ["bridge.*"], device="cpu", precision="fp32")
    assert model.language_model.width < model.bridge.width
    assert model.encode_pictures(pictures(tmp_path, 2))[0].shape == (5, model.language_model.width)
    assert len(model.caption(pictures(tmp_path, 2), max_new_tokens=3)) == 2
