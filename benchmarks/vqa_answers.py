"""Answers to the questions of easy-VQA, 9 or 10 of them a picture, against transformers' `generate` in batches.

The same weights on both sides, 49 image tokens; both read the picture files. First a LLaVA over a random ViT-B/32 is
taught for a minute to answer shortly (kept under `runs/`), then its export is what transformers loads. Answers have to
agree.
"""

from pathlib import Path
from typing import Any

import torch
from harness import Case, Step, main
from small_llava import FOLDER, exported, specification

PICTURES = 16
BATCH = 32  # questions that go through transformers' generate at once
NEW_TOKENS = 8
RUN = FOLDER / "answers"


def taught() -> Path:
    """The run of a short training, made once."""
    if not (RUN / "model" / "model.yaml").is_file():
        from vlm import train
        from vlm.recipe import Recipe

        recipe = {
            "model": specification(49, lora=True, question_prompt="<image>{question}", caption_prompt="<image>"),
            "trainable": ["bridge.*", "language_model.lora.*"],
            "data": {"train": [{"dataset": "easy_vqa", "use": "vqa", "limit": 1000}]},
            "optimizer": {"lr": 5e-4},
            "train": {"batch_size": 4, "steps": 30, "precision": "fp32"},
            "output": str(RUN),
        }
        train(Recipe.model_validate(recipe))
    return RUN


def questions() -> tuple[list[str], list[str]]:
    """Picture files and questions of the first pictures of the test set, all questions of a picture in a row."""
    from vlm.data.catalogue import load_dataset

    by_picture: dict[str, list[str]] = {}
    for record in load_dataset("easy_vqa", "test").records:
        by_picture.setdefault(record.images[0], []).append(str(record.question))
    chosen = sorted(by_picture.items())[:PICTURES]
    return [p for p, asked in chosen for _ in asked], [question for _, asked in chosen for question in asked]


def ours() -> Step:
    """Our `answer`, all questions in one call."""
    from vlm import load_model

    model: Any = load_model(taught(), device="cpu", dtype="fp32")
    files, asked = questions()
    return lambda: model.answer(files, asked, max_new_tokens=NEW_TOKENS)


def theirs() -> Step:
    """transformers' processor and `generate`, BATCH questions at a time."""
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from vlm import load_model

    folder = exported(load_model(taught(), device="cpu", dtype="fp32"), "answers-hf")
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    files, asked = questions()

    @torch.inference_mode()
    def step() -> list[str]:
        said = []
        for start in range(0, len(asked), BATCH):
            turns = [
                [{"role": "user", "content": [{"type": "text", "text": f"<image>{question}"}]}]
                for question in asked[start : start + BATCH]
            ]
            texts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
            images = [Image.open(file).convert("RGB") for file in files[start : start + BATCH]]
            inputs = processor(images=images, text=texts, padding=True, add_special_tokens=False, return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            rows = ids[:, inputs.input_ids.shape[1] :]
            said += [text.strip() for text in processor.batch_decode(rows, skip_special_tokens=True)]
        return said

    return step


def same(one: list[str], other: list[str]) -> None:
    """Answers agree, but for near ties: pixels pass through another resize there, and rows are padded."""
    differ = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
    assert len(differ) <= len(one) // 50, differ[:5]


def case() -> Case:
    """Questions a second."""
    return Case(
        ours=ours,
        theirs=theirs,
        peer=f"transformers generate, batches of {BATCH}",
        amount=len(questions()[1]),
        unit="questions",
        repeats=3,
        speed_target=2.5,
        check=same,
    )


if __name__ == "__main__":
    main({"easy-VQA, 49 image tokens": case()}, ["transformers"])
