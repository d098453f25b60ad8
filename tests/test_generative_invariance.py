"""Single, batched and sharing a prefix: the same answers token for token, with LoRA and over several turns."""

import pytest
import torch
from generative_parts import generative_model, generative_spec, pictures
from tiny_models import LANGUAGE_KINDS

from vlm.data.packing import build_row, collate, pack
from vlm.data.records import Message
from vlm.models.build import build_model
from vlm.objectives.lm import lm_loss
from vlm.objectives.objective import ReadOuts
from vlm.recipe import ObjectiveSpec

DECODERS = [kind for kind in LANGUAGE_KINDS if kind != "t5"]
LM = ObjectiveSpec(name="lm")
OPTIONS = {"max_new_tokens": 8}


@pytest.fixture(params=LANGUAGE_KINDS)
def adapted(request, tiny_folder):
    """A model whose adapters do something."""
    model = generative_model(tiny_folder, request.param, language={"lora": {"rank": 2, "alpha": 8, "dropout": 0.5}})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def test_adapters_change_answers_and_batching_does_not(adapted, tiny_folder, tmp_path):
    one, two = pictures(tmp_path, 2)
    images = [one, two, one, one, two]
    questions = ["what color is the shape?", "what?", "what shape is it?", "is there a circle?", "is it red?"]
    together = adapted.answer(images, questions, **OPTIONS)
    assert together == [adapted.answer(i, q, **OPTIONS)[0] for i, q in zip(images, questions)]
    kind = adapted.language_model.network.config.model_type
    plain = generative_model(tiny_folder, kind)
    assert plain.answer(images, questions, **OPTIONS) != together


def _conversations(one, two):
    """Of different lengths and numbers of pictures; three share their first turn, one shows nothing."""
    start = [Message("user", "<image>\nwhat is it?"), Message("assistant", "a red circle")]
    pair = [Message("user", "<image>\n<image>\nwhat differs?"), Message("assistant", "the color")]
    return [
        ([*start, Message("user", "are you sure?")], (one,)),
        ([*start, Message("user", "what color?"), Message("assistant", "red"), Message("user", "why?")], (one,)),
        ([*start, Message("user", "and where?")], (two,)),
        ([*pair, Message("user", "and the shape?")], (one, two)),
        ([*start, Message("user", "and this: <image>")], (one, two)),
        ([Message("user", "what is a circle?")], ()),
    ]


@pytest.mark.parametrize("template", ["compact", "vicuna_v1", "chatml", "llama_2"])
@pytest.mark.parametrize("kind", DECODERS)
def test_turns_of_conversations_are_the_same_alone_and_in_a_batch(tiny_folder, tmp_path, kind, template):
    model = generative_model(tiny_folder, kind, template=template)
    talks = _conversations(*pictures(tmp_path, 2))
    prompts = [model.prompts.asking(turns, images, OPTIONS) for turns, images in talks]
    together = model._generate(prompts, OPTIONS)
    assert together == [model.say(turns, images, **OPTIONS) for turns, images in talks]
    assert together == model._generate(prompts[::-1], OPTIONS)[::-1]
    assert len(set(together)) > 2


def test_chat_is_say_with_the_pictures_in_the_messages(tiny_folder, tmp_path):
    model = generative_model(tiny_folder, "llama", template="vicuna_v1")
    for turns, images in _conversations(*pictures(tmp_path, 2)):
        left = list(images)
        messages = []
        for turn in turns:
            parts = []
            for index, piece in enumerate(turn.text.split("<image>")):
                parts += [{"type": "image", "image": left.pop(0)}] if index else []
                words = piece.removeprefix("\n") if index else piece
                parts += [{"type": "text", "text": words}] if words else []
            messages.append({"role": turn.role, "content": parts})
        assert model.chat(messages, **OPTIONS) == model.say(turns, images, **OPTIONS)


@pytest.mark.parametrize("kind", [kind for kind in DECODERS if kind != "bloom"])  # ALiBi takes no tree masks
def test_packed_and_padded_rows_give_the_same_loss_and_gradients(tiny_folder, tmp_path, kind):
    """Document masks and positions that start anew: projection and adapters learn the same, to 1e-5."""
    spec = generative_spec(tiny_folder, kind, template="vicuna_v1", language={"lora": {"rank": 2, "alpha": 8}})
    model = build_model(spec, ["bridge.*", "language_model.lora.*"], device="cpu", precision="fp32")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    talks = _conversations(*pictures(tmp_path, 2))
    answer = Message("assistant", "because it is round")
    rows = [build_row([model.tokenize([*turns, answer])], images) for turns, images in talks]
    packed = pack(rows, capacity=sum(map(len, rows)))
    assert len(packed) == 1
    assert packed[0].positions.count(0) == len(rows)
    results = []
    for chosen in (rows, packed, pack(rows)):
        model.zero_grad()
        batch = collate(chosen).with_images(model._pixels)
        loss = lm_loss(ReadOuts(model, batch), LM)[0] / batch.num_labels
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for other in results[1:]:
        for one, two in zip(results[0], other):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
