"""The generative model over every kind of language model: sharing, padding and batching change nothing."""

import numpy as np
import pytest
import torch
from generative_parts import generative_model, generative_spec, pictures
from PIL import Image
from tiny_models import LANGUAGE_KINDS

from vlm.data.packing import IGNORE, build_row, collate, pack
from vlm.errors import UnsupportedTask, VlmError
from vlm.objectives import ReadOuts
from vlm.objectives.lm import cross_entropy_sum, lm_loss, token_log_probs
from vlm.recipe import ObjectiveSpec

QUESTIONS = ["what color is the shape?", "what shape is it?", "is it red?", "what"]

LM = ObjectiveSpec(name="lm")


@pytest.fixture(params=LANGUAGE_KINDS)
def model(request, tiny_folder):
    return generative_model(tiny_folder, request.param)


def _loss(model, samples, images):
    batch = model.collate(samples).with_images(lambda names: model._pixels([images[n] for n in names]))
    for p in model.parameters():
        p.grad = None
    loss, _ = lm_loss(ReadOuts(model, batch), LM)
    (loss / batch.num_labels).backward()
    return loss.detach(), batch.num_labels, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def _texts(model, questions, answers):
    return [model.tokenize(model.question_messages(q, a)) for q, a in zip(questions, answers)]


def test_questions_that_share_a_picture_train_as_they_would_alone(model, tmp_path):
    paths = pictures(tmp_path, 2)
    images = {p: p for p in paths}
    texts = _texts(model, QUESTIONS, ["red", "a circle", "yes", "nothing at all"])
    shared = [(texts, (paths[0],)), (texts[1:3], (paths[1],))]
    alone = [([t], picture) for group, picture in shared for t in group]
    loss, count, grads = _loss(model, shared, images)
    parts = [_loss(model, [sample], images) for sample in alone]
    assert count == sum(n for _, n, _ in parts)
    torch.testing.assert_close(loss, sum(part for part, _, _ in parts), rtol=1e-5, atol=1e-4)
    for name, grad in grads.items():
        expected = sum(g[name] * n for _, n, g in parts) / count
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)


def test_the_loss_equals_transformers_own(model, tmp_path):
    """The same embeddings through the network's full forward, with labels shifted by hand."""
    (path,) = pictures(tmp_path, 1)
    (text,) = _texts(model, ["what is it?"], ["a red circle"])
    batch = model.collate([([text], (path,))]).with_images(lambda names: model._pixels(names))
    loss, _ = lm_loss(ReadOuts(model, batch), LM)
    lm = model.language_model
    with torch.no_grad():
        embeddings = model._spliced(batch)
        options = {"decoder_input_ids": batch.decoder_ids} if lm.is_encoder_decoder else {}
        logits = lm.network(inputs_embeds=embeddings, attention_mask=batch.mask, **options).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("generation", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_answers_are_the_same_alone_batched_and_sharing_a_picture(model, tmp_path, generation):
    one, two = pictures(tmp_path, 2)
    images = [one, one, two, one, two]
    questions = [*QUESTIONS, "is it red?"]
    options = {"max_new_tokens": 6, **generation}
    together = model.answer(images, questions, **options)
    apart = [model.answer(image, question, **options)[0] for image, question in zip(images, questions)]
    assert together == apart
    assert len(set(together)) > 1, "a model that always says the same proves nothing"


def test_scores_are_the_sum_of_log_probabilities_of_the_text(model, tmp_path):
    one, two = pictures(tmp_path, 2)
    texts, prompts = ["red circle", "a blue shape is here"], ["<image> it shows", "a picture of "]
    scores = model.score([one, two], texts, prompts)
    lm = model.language_model
    for i, (image, text, prompt) in enumerate(zip([one, two], texts, prompts)):
        opening = prompt if "<image>" in prompt else "<image>" + prompt
        joined = opening + ("" if prompt.endswith(" ") else " ") + text
        ids = model.tokenizer(joined, add_special_tokens=not lm.is_encoder_decoder)["input_ids"]
        spaced = text if prompt.endswith(" ") else " " + text
        rest = model.tokenizer(spaced, add_special_tokens=False)["input_ids"]
        place = ids.index(lm.image_token_id)
        tokens = model.encode_pictures([image])[0]
        head, tail = torch.tensor(ids[:place], dtype=torch.long), torch.tensor(ids[place + 1 :])
        with torch.no_grad():
            if lm.is_encoder_decoder:
                end = torch.tensor([lm.network.config.eos_token_id])
                answer = torch.cat([tail[-len(rest) :], end])
                prompt_ids = torch.cat([tail[: -len(rest)], end])
                embeddings = torch.cat([lm.embed(head), tokens, lm.embed(prompt_ids)])[None]
                out = lm.network(inputs_embeds=embeddings, labels=answer[None]).logits[0]
                expected = out.log_softmax(-1).gather(1, answer[:, None]).sum()
            else:
                embeddings = torch.cat([lm.embed(head), tokens, lm.embed(tail)])[None]
                logits = lm.network(inputs_embeds=embeddings).logits[0].log_softmax(-1)
                words = len(rest)
                expected = logits[-1 - words : -1].gather(1, tail[-words:, None]).sum()
        torch.testing.assert_close(scores[i], expected, rtol=1e-4, atol=1e-4)


def test_packed_rows_equal_padded_rows(tiny_folder, tmp_path):
    model = generative_model(tiny_folder, "llama")
    paths = pictures(tmp_path, 3)
    texts = _texts(model, QUESTIONS[:3], ["red", "a circle of some kind", "yes"])
    rows = [build_row([text], (path,)) for text, path in zip(texts, paths)]
    losses = []
    for chosen in (rows, pack(rows, capacity=200)):
        batch = collate(chosen).with_images(model._pixels)
        losses.append(lm_loss(ReadOuts(model, batch), LM)[0])
    assert len(pack(rows, capacity=200)) == 1
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


def test_the_vocabulary_projection_in_chunks_gives_the_same_loss_and_gradient():
    torch.manual_seed(0)
    states, weight = torch.randn(50, 8, requires_grad=True), torch.randn(30, 8)
    targets = torch.randint(0, 30, (50,))
    results = []
    for chunk in (1000, 7):
        states.grad = None
        loss, right = cross_entropy_sum(states, targets, lambda s: s @ weight.T, chunk)
        loss.backward()
        results.append((loss.detach(), right, states.grad.clone()))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(-token_log_probs(states, targets, lambda s: s @ weight.T, 7).sum(), results[0][0])


def test_a_long_question_is_cut_and_the_picture_is_not(tiny_folder, tmp_path):
    model = generative_model(tiny_folder, "llama")
    (path,) = pictures(tmp_path, 1)
    long = "what color is the shape? " * 400
    assert isinstance(model.answer(path, long, max_new_tokens=4)[0], str)
    prompt = model.prompts.asking(model.question_messages(long), (path,), {"max_new_tokens": 4})
    length = len(prompt.text.ids) + model.image_tokens - 1
    assert length == model.language_model.context_length - 4
    assert prompt.text.num_images == 1


def test_a_question_that_speaks_of_the_placeholder_is_asked_as_it_stands(tiny_folder, tmp_path):
    model = generative_model(tiny_folder, "llama")
    (path,) = pictures(tmp_path, 1)
    asked = "what does <image> mean, and is <image> red?"
    prompt = model.prompts.asking(model.question_messages(asked), (path,), {"max_new_tokens": 4})
    assert prompt.text.num_images == 1
    ids = [i for i in prompt.text.ids if i >= 0]
    assert "".join(asked.split()) in "".join(model.language_model.tokenizer.decode(ids).split())
    assert len(model.answer([path, path], [asked, "is it red?"], max_new_tokens=4)) == 2


def test_every_kind_of_image_input_gives_the_same_answer(tiny_folder, tmp_path):
    model = generative_model(tiny_folder, "llama")
    (path,) = pictures(tmp_path, 1)
    picture = Image.open(path)
    answers = [model.answer(i, "what is it?", max_new_tokens=5) for i in (path, picture, np.asarray(picture), [path])]
    assert all(answer == answers[0] for answer in answers)


def test_captions_take_a_verbatim_prompt_and_chat_takes_messages(tiny_folder, tmp_path):
    model = generative_model(tiny_folder, "llama")
    one, two = pictures(tmp_path, 2)
    assert len(model.caption([one, two], max_new_tokens=4)) == 2
    assert len(model.caption([one, two], prompt="a picture of", max_new_tokens=4)) == 2
    content = [{"type": "image", "image": one}, {"type": "text", "text": "what is it?"}]
    said = model.chat([{"role": "user", "content": content}], max_new_tokens=4)
    assert said == model.answer(one, "what is it?", max_new_tokens=4)[0]


@pytest.mark.parametrize(
    "call",
    [
        lambda m, p: m.answer(p, ""),
        lambda m, p: m.answer([p, p], ["a", "b", "c"]),
        lambda m, p: m.answer([], ["a"]),
        lambda m, p: m.score(p, " "),
        lambda m, p: m.chat([{"role": "user", "content": [{"type": "video"}]}]),
        lambda m, p: m.chat(["what is it?"]),
        lambda m, p: m.answer(p, "what?", max_new_tokens=0),
        lambda m, p: m.answer(p, "what?", max_new_tokens="many"),
        lambda m, p: m.answer(p, "what?", max_new_token=3),
        lambda m, p: m.caption(p, do_sample=True, temperature=-1.0),
        lambda m, p: m.chat([{"role": "user", "content": ["what is it?"]}]),
    ],
)
def test_what_cannot_be_asked_is_an_error_in_words(tiny_folder, tmp_path, call):
    model = generative_model(tiny_folder, "llama")
    with pytest.raises(VlmError):
        call(model, pictures(tmp_path, 1)[0])


def test_tasks_of_other_families_name_who_can(tiny_folder):
    model = generative_model(tiny_folder, "llama")
    with pytest.raises(UnsupportedTask, match="dual encoder, Q-Former"):
        model.classify(["a.png"], ["cat"])


def test_frozen_parts_stay_in_eval_mode_and_get_no_gradient(tiny_folder, tmp_path):
    model = generative_model(tiny_folder, "gpt2", language={"lora": {"rank": 2, "dropout": 0.5}})
    model.train()
    assert model.bridge.training
    assert not model.image_encoder.training
    assert not any(m.training for n, m in model.language_model.named_modules() if "lora" not in n)
    paths = pictures(tmp_path, 1)
    _, _, grads = _loss(model, [(_texts(model, ["what?"], ["red"]), paths)], {p: p for p in paths})
    assert all(name.startswith("bridge.") for name in grads)


@pytest.mark.parametrize("kind", LANGUAGE_KINDS)
def test_a_forward_on_cuda_finds_no_tensor_on_the_cpu(tiny_folder, tmp_path, kind):
    """FakeTensorMode raises where a tensor meets one on another device, without a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    spec = generative_spec(tiny_folder, kind, language={"lora": {"rank": 2}})
    from vlm.models.build import build_model

    model = build_model(spec, ["bridge.*"], device="cpu", precision="fp32")
    paths = pictures(tmp_path, 2)
    batch = model.collate([(_texts(model, QUESTIONS[:2], ["red", "blue"]), (path,)) for path in paths])
    batch = batch.with_images(model._pixels)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.modules():
            for name, tensor in list(module._parameters.items()) + list(module._buffers.items()):
                if tensor is not None:
                    fake = mode.from_tensor(tensor.detach()).to("cuda")
                    store = module._parameters if name in module._parameters else module._buffers
                    store[name] = torch.nn.Parameter(fake, False) if store is module._parameters else fake
        moved = batch.to("cuda")
        with torch.device("cuda"):
            embeddings = model._spliced(moved)
            hidden = model.language_model.hidden_states(embeddings, moved.mask, moved.positions, moved.decoder_ids)
            logits = model.language_model.logits(hidden)
    assert logits.device.type == "cuda"
    assert logits.shape[:2] == batch.labels.shape
