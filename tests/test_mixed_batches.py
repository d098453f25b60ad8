"""Conversations of every shape in one batch: several turns, several pictures, none; bad ones are left out."""

import json

import pytest
import torch
from generative_parts import generative_model, pictures
from tiny_models import LANGUAGE_KINDS
from training_parts import tiny_recipe

from vlm import train
from vlm.data.records import Message
from vlm.data.samples import Sample
from vlm.errors import VlmError
from vlm.objectives.lm import lm_loss
from vlm.objectives.objective import ReadOuts
from vlm.recipe import ObjectiveSpec
from vlm.training.loop import Trainer

LM = ObjectiveSpec(name="lm")


def sample(name, images, *turns):
    roles = ("user", "assistant")
    return Sample(name, tuple(images), (tuple(Message(roles[i % 2], text) for i, text in enumerate(turns)),))


def loss_and_gradients(model, samples):
    batch = model.collate([(model.prepare_texts(s), s.images) for s in samples]).with_images(model._pixels)
    model.zero_grad()
    loss, _ = lm_loss(ReadOuts(model, batch), LM)
    if loss.requires_grad:  # text alone reaches no projection
        loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


# An encoder-decoder answers once: what comes before the answer goes into the encoder.
@pytest.mark.parametrize("kind", [kind for kind in LANGUAGE_KINDS if kind != "t5"])
def test_turns_pictures_and_text_alone_share_a_batch(tiny_folder, tmp_path, kind):
    model = generative_model(tiny_folder, kind, template="vicuna_v1")
    one, two = pictures(tmp_path, 2)
    samples = [
        sample("turns", [one], "<image>\nwhat color is it?", "red", "and the shape?", "a circle"),
        sample("two", [one, two], "<image>\n<image>\nwhat differs?", "the color of the shape"),
        sample("later", [two, one], "here: <image>", "a square", "and <image>?", "a circle"),
        sample("text", [], "what is a circle?", "a round shape"),
    ]
    loss, gradients = loss_and_gradients(model, samples)
    alone = [loss_and_gradients(model, [s]) for s in samples]
    torch.testing.assert_close(loss, sum(part for part, _ in alone), rtol=1e-5, atol=1e-4)
    shown = [grads for _, grads in alone if grads]
    assert len(shown) == 3
    for together, *apart in zip(gradients, *shown):
        torch.testing.assert_close(together, sum(apart), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (sample("orphan", [], "<image>\nwhat?", "red"), "1 time.* for 0 pictures"),
        (sample("unseen", ["a.png"], "what?", "red"), "0 time.* for 1 picture"),
        (sample("silent", ["a.png"], "<image>\nwhat?", " "), "empty"),
        (sample("twice", ["a.png"], "<image>\nwhat is <image>?", "red"), "2 time.* for 1 picture"),
    ],
)
def test_samples_that_cannot_be_trained_on_say_why(tiny_folder, bad, error):
    with pytest.raises(VlmError, match=error) as raised:
        generative_model(tiny_folder, "llama").prepare_texts(bad)
    assert "\n" not in str(raised.value)


def test_bad_conversations_are_skipped_and_counted(tiny_folder, tmp_path):
    paths = pictures(tmp_path, 2)
    good = [_item(i, "picture-0-0.png", ("human", "<image>\nwhat?"), ("gpt", "red")) for i in range(8)]
    bad = [
        _item("empty", "picture-0-0.png", ("human", "<image>\nwhat?"), ("gpt", "")),
        _item("repeats", "picture-0-0.png", ("human", "<image>\na"), ("human", "b"), ("gpt", "red")),
        _item("orphan", None, ("human", "<image>\nwhat?"), ("gpt", "red")),
        _item("long", paths[1], ("human", "<image>\n" + "what? " * 900), ("gpt", "red")),
        _item("answers first", None, ("gpt", "a cat"), ("gpt", "red")),
        _item("unseen", ["picture-0-0.png"] * 2, ("human", "<image>\nwhat?"), ("gpt", "red")),
    ]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(good + bad))
    recipe = tiny_recipe(tiny_folder, file, tmp_path / "run", steps=4)
    alone = recipe.data.train[0].model_copy(update={"share_image": False})
    section = recipe.data.model_copy(update={"max_broken": 0.6, "train": [alone]})
    trainer = Trainer(recipe.model_copy(update={"data": section}), quiet=True)
    assert trainer.train().finished
    broken = " | ".join(f"{name}: {reason}" for name, reason in trainer.source.broken.items())
    assert len(trainer.source.broken) == len(bad), broken
    for reason in (
        "is empty",
        "user's again",
        "for 0 picture",
        "for 2 picture",
        "longer than 512 tokens",
        "starts with the user",
    ):
        assert reason in broken
    with pytest.raises(VlmError, match=r"more than data\.max_broken"):
        train(recipe.model_copy(update={"output": str(tmp_path / "strict")}), quiet=True)  # max_broken is .2


def _item(name, image, *turns):
    item = {"id": str(name), "conversations": [{"from": role, "value": text} for role, text in turns]}
    return {**item, "image": image} if image else item


def test_an_answer_ends_with_what_the_template_trains(tiny_folder):
    ends = {}
    for template in ("plain", "vicuna_v0", "vicuna_v1", "chatml"):
        model = generative_model(tiny_folder, "llama", template=template)
        ends[template] = model.prompts.stops
    end_token, im_end = (model.tokenizer.convert_tokens_to_ids(t) for t in ("</s>", "<|im_end|>"))
    assert ends["plain"] == {"stop_strings": ["\n"]}
    assert ends["vicuna_v0"] == {"stop_strings": ["###"]}
    assert ends["vicuna_v1"] == {"eos_token_id": [end_token]}
    assert ends["chatml"] == {"eos_token_id": [end_token, im_end]}
