"""transformers' own answers of a LLaVA folder, and ours held to them."""

import torch
from PIL import Image

QUESTIONS = ["what color is the shape?", "is it red?", "what is there"]


def prompt_of(question):
    from vlm.data.templates import _VICUNA_SYSTEM

    return f"{_VICUNA_SYSTEM} USER: <image>\n{question} ASSISTANT:"


class Theirs:
    """transformers' model and processor, LLaVA-1.5's or LLaVA-1.6's."""

    def __init__(self, model, processor):
        self.model = model.eval()
        self.processor = processor

    def inputs(self, image, text):
        return self.processor(images=Image.open(image), text=text, return_tensors="pt")

    @torch.no_grad()
    def score(self, image, prompt, text):
        whole, before = self.inputs(image, f"{prompt} {text}"), self.inputs(image, prompt)
        count = whole.input_ids.shape[1] - before.input_ids.shape[1]
        logits = self.model(**whole).logits[0].log_softmax(-1)
        ids = whole.input_ids[0, -count:]
        return logits[-count - 1 : -1].gather(1, ids[:, None]).sum()

    def answer(self, image, prompt):
        inputs = self.inputs(image, prompt)
        ids = self.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs.input_ids.shape[1] :]
        return self.processor.decode(ids, skip_special_tokens=True).strip()


def assert_same_answers(ours, theirs, images):
    """Scores to 1e-4 and the same greedy tokens, single and batched."""
    prompts = [prompt_of(question) for question in QUESTIONS]
    texts = ["a red circle", "yes", "no, it is not"]
    expected = torch.stack([theirs.score(*triple) for triple in zip(images, prompts, texts)])
    torch.testing.assert_close(ours.score(images, texts, prompts), expected, rtol=1e-4, atol=1e-4)
    said = [theirs.answer(image, prompt) for image, prompt in zip(images, prompts)]
    assert len(set(said)) > 1
    assert ours.answer(images, QUESTIONS, max_new_tokens=6) == said
    assert [ours.answer(i, q, max_new_tokens=6)[0] for i, q in zip(images, QUESTIONS)] == said
    one = ours.answer(images[0], QUESTIONS, max_new_tokens=6)  # shared prefix
    assert one == [theirs.answer(images[0], prompt) for prompt in prompts]
