"""Queries that read the instruction (InstructBLIP): the same answers, scores and losses however questions are put."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generative_parts import generative_spec, pictures
from tiny_models import randomize, tiny_bert
from training_parts import STEADY_EPS, conversations, losses, weights

from vlm import load_model, train
from vlm.data.packing import IGNORE
from vlm.model_spec import GenerativeSpec
from vlm.models.build import build_model
from vlm.models.generative import GenerativeModel
from vlm.recipe import Recipe

QUESTIONS = ["what color is the shape?", "is it a circle?", "what is there in the picture, all in all?"]


def spec_of(tiny_folder: Callable[..., Path], kind: str = "llama", **bridge: Any) -> GenerativeSpec:
    content = generative_spec(tiny_folder, kind, template="blip2_t5" if kind == "t5" else "instructblip").model_dump()
    content["image_encoder"]["drop_cls"] = False
    bridge = {"num_queries": 4, "instruction": True, "dropout": 0.0, **bridge}
    content["bridge"] = {"type": "qformer", "init": f"hf:{tiny_folder(tiny_bert)}", **bridge}
    return GenerativeSpec.model_validate(content)


@pytest.fixture(params=["llama", "t5"])
def model(request: pytest.FixtureRequest, tiny_folder: Callable[..., Path]) -> GenerativeModel:
    built = build_model(spec_of(tiny_folder, request.param), ["bridge.*"], device="cpu", precision="fp32")
    randomize(built.bridge)
    return built


def test_answers_are_the_same_alone_batched_and_about_one_picture(model: GenerativeModel, tmp_path: Path) -> None:
    images = pictures(tmp_path, 3)
    for paths in (images, [images[0]] * 3):
        together = model.answer(paths, QUESTIONS, max_new_tokens=6)
        assert together == [model.answer(p, q, max_new_tokens=6)[0] for p, q in zip(paths, QUESTIONS)]
    scores = model.score(images, ["a", "b cat", "c"], QUESTIONS)
    alone = [model.score(p, t, q) for p, t, q in zip(images, ["a", "b cat", "c"], QUESTIONS)]
    torch.testing.assert_close(scores, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_the_picture_becomes_other_tokens_for_another_question(model: GenerativeModel, tmp_path: Path) -> None:
    (image,) = pictures(tmp_path, 1)
    asked = [model.tokenize(model.question_messages(question, "yes")).instruction for question in QUESTIONS[:2]]
    tokens = model.encode_pictures([image, image], asked)
    assert (tokens[0] - tokens[1]).abs().max() > 1e-3
    torch.testing.assert_close(tokens[:1], model.encode_pictures([image], asked[:1]), rtol=1e-4, atol=1e-4)


def test_each_picture_is_encoded_once(model: GenerativeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = model.encode_pixels
    monkeypatch.setattr(model, "encode_pixels", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    monkeypatch.setattr(model, "picture_features", lambda: None)
    images = pictures(tmp_path, 2)
    model.answer([images[0], images[1], images[0]], QUESTIONS, max_new_tokens=3)
    assert sum(seen) == 2


def test_only_the_answer_carries_loss_and_packed_rows_equal_single_ones(model: GenerativeModel, tmp_path: Path) -> None:
    images = pictures(tmp_path, 2)
    texts = [model.tokenize(model.question_messages(q, a)) for q, a in zip(QUESTIONS, ["red", "no it is not", "cat"])]
    for text, answer in zip(texts, ["red", "no it is not", "cat"]):
        said = [token for token, flag in zip(text.ids, text.trained) if flag]
        assert model.tokenizer.decode(said, skip_special_tokens=True).strip() == answer
    samples = [([texts[0], texts[1]], images[:1]), ([texts[2]], images[1:])]

    def sum_of(parts: list[Any]) -> torch.Tensor:
        batch = model.collate(parts).with_images(lambda names: model._pixels(list(names)))
        states, labels = model.label_states(batch)
        assert (batch.labels != IGNORE).sum() == len(labels)
        return torch.nn.functional.cross_entropy(model.word_logits(states), labels, reduction="sum")

    apart = sum(sum_of([([text], paths)]) for texts_, paths in samples for text in texts_)
    torch.testing.assert_close(sum_of(samples), apart, rtol=1e-4, atol=1e-4)


def test_a_long_instruction_is_cut(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    model = build_model(spec_of(tiny_folder, instruction_length=6), device="cpu", precision="fp32")
    text = model.tokenize(model.question_messages("what color is the shape " * 20, "red"))
    assert len(text.instruction) == 6
    assert model.answer(pictures(tmp_path, 1), "what " * 40, max_new_tokens=2)


def test_training_does_not_depend_on_the_split_and_the_run_is_read_back(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    data = conversations(tmp_path / "data")
    runs = {}
    for name, micro in (("whole", None), ("split", 1)):
        content = {
            "model": spec_of(tiny_folder).model_dump(mode="json"),
            "data": {"train": [{"dataset": str(data), "format": "llava_json", "images": str(data.parent)}]},
            "optimizer": {"lr": 1e-2, "eps": STEADY_EPS},
            "train": {"batch_size": 4, "micro_batch_size": micro, "steps": 3, "log_every": 1},
            "output": str(tmp_path / name),
        }
        train(Recipe.model_validate(content), quiet=True)
        runs[name] = weights(tmp_path / name)
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "split"), abs=1e-4)
    torch.testing.assert_close(runs["whole"], runs["split"], rtol=1e-3, atol=1e-4)
    assert any(key.startswith("bridge.embeddings.") for key in runs["whole"])
    read = load_model(tmp_path / "whole", "cpu", "fp32")
    assert len(read.answer(pictures(tmp_path, 2), QUESTIONS[:2], max_new_tokens=4)) == 2
