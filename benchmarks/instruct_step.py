"""A training step of a LLaVA on one batch of instructions of mixed length, against transformers' model with labels.

Forward, loss, backward and AdamW (fused on both sides) on the same samples from the same weights, the frozen image
encoder included; the same parameters learn: the projection, and LoRA of rank 16 in or all of SmolLM2-135M. transformers
gets what its collators make: samples padded to the longest.

`python benchmarks/instruct_step.py peak` prints which share of the measured matrix-multiply peak a step of the
starter's second stage reaches; changes to its recipe may follow, such as `train.batch_size=16 train.compile=true`.
"""

import sys
from typing import Any

import torch
from harness import Case, Step, main
from small_llava import exported, fill_bridge, specification
from torch import Tensor

# Tokens of (question, answer) in each sample, as instruction data mixes them; the last one shows no picture.
LENGTHS = [(12, 3), (15, 90), (30, 120), (14, 2), (16, 8), (10, 1), (22, 30)]
TEXT_ONLY = 1
LORA = {"rank": 16, "alpha": 32}


def samples(image_tokens: int) -> list[tuple[list[int], int]]:
    """Token ids (a picture's are -1) and how many of them come before the answer."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, (question, answer) in enumerate(LENGTHS):
        words = torch.randint(100, 49000, (question + answer,), generator=generator).tolist()
        picture = [-1] * image_tokens if number < len(LENGTHS) - TEXT_ONLY else []
        made.append(([1, *picture, *words], 1 + len(picture) + question))
    return made


def pixels(image_tokens: int) -> Tensor:
    """A picture [3,H,W] for each sample that shows one."""
    edge = 32 * int(image_tokens**0.5)
    return torch.randn(len(LENGTHS) - TEXT_ONLY, 3, edge, edge, generator=torch.Generator().manual_seed(1))


def ours(image_tokens: int, lora: bool) -> Step:
    """Our step: packed, logits at labels only."""
    from vlm.data.conversation import TokenizedText
    from vlm.model_spec import GenerativeSpec
    from vlm.models.build import build_model
    from vlm.recipe import ObjectiveSpec, OptimizerSection
    from vlm.training.optimiser import build_optimizer
    from vlm.training.task import Task

    trainable = ["bridge.*", "language_model.lora.*" if lora else "language_model.*"]
    spec = GenerativeSpec.model_validate(specification(image_tokens, lora))
    model = fill_bridge(build_model(spec, trainable, device="cpu", precision="fp32")).train()
    task = Task(model, [ObjectiveSpec(name="lm")])
    optimizer = build_optimizer(model, OptimizerSection(lr=1e-5))
    texts = [
        TokenizedText(tuple(ids), tuple(place >= start for place in range(len(ids))))
        for ids, start in samples(image_tokens)
    ]
    pictures = pixels(image_tokens)

    def step() -> Tensor:
        names = [(str(number),) if number < len(pictures) else () for number in range(len(texts))]
        batch = model.collate([([text], shown) for text, shown in zip(texts, names)])
        batch = batch.with_images(lambda wanted: pictures[[int(name) for name in wanted]])
        optimizer.zero_grad(set_to_none=False)
        loss, _ = task(batch, task.counts([batch]))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def theirs(image_tokens: int, lora: bool) -> Step:
    """transformers' step: padded to the longest, labels -100 where nothing is learned."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import LlavaForConditionalGeneration

    from vlm.model_spec import GenerativeSpec
    from vlm.models.build import build_model

    spec = GenerativeSpec.model_validate(specification(image_tokens))
    same = fill_bridge(build_model(spec, device="cpu", precision="fp32"))
    folder = exported(same, f"hf-{image_tokens}")
    del same
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.requires_grad_(False)
    if lora:
        layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules=layers)
        inject_adapter_in_model(config, model.model.language_model)
    else:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    model.model.multi_modal_projector.requires_grad_(True)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    made = samples(image_tokens)
    longest = max(len(ids) for ids, _ in made)
    image_token = model.config.image_token_id
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids, start in made:
        rest = longest - len(ids)
        shown = [image_token if token < 0 else token for token in ids]
        batch["input_ids"].append(shown + [0] * rest)
        batch["labels"].append([-100] * start + shown[start:] + [-100] * rest)
        batch["attention_mask"].append([1] * len(ids) + [0] * rest)
    tensors = {key: torch.tensor(value) for key, value in batch.items()}
    tensors["pixel_values"] = pixels(image_tokens)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = model(**tensors, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def same(one: Tensor, other: Tensor) -> None:
    """Both sides' first loss."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def case(image_tokens: int, lora: bool) -> Case:
    """Trained tokens a second, and memory above weights, gradients and optimiser."""
    return Case(
        ours=lambda: ours(image_tokens, lora),
        theirs=lambda: theirs(image_tokens, lora),
        peer="transformers LlavaForConditionalGeneration",
        amount=sum(answer for _, answer in LENGTHS),
        unit="trained tokens",
        repeats=2,
        speed_target=1.5,
        memory_target=0.5,
        measure_memory=True,
        keeps_memory=True,
        check=same,
    )


def print_peak_share(changes: list[str], warm_up: int = 8, steps: int = 8) -> None:
    """The share of the matrix-multiply peak in steps of the starter's second stage, caches warm."""
    import tempfile
    import time

    from vlm.recipe import load_recipe
    from vlm.training.loop import Trainer
    from vlm.training.meter import matmul_peak

    with tempfile.TemporaryDirectory() as folder:
        own = [f"output={folder}/run", "init_from=null", "train.steps=100"]
        trainer = Trainer(load_recipe("starter/llava_finetune", own + changes), quiet=True)
        trainer.model.train()
        device = torch.device("cpu")
        matmul_peak(device, torch.float32)  # before and after, lest another's work during one of them count
        for number, batch in enumerate([trainer._samples(step) for step in range(warm_up + steps)]):
            if number == warm_up:
                trainer.meter.reset()
                start = time.perf_counter()
            trainer.train_step(batch)
            trainer.step += 1
        seconds = time.perf_counter() - start
        peak = matmul_peak(device, torch.float32)
        share = trainer.meter.operations / seconds / peak
        rate, a_step = trainer.meter.tokens / seconds, seconds / steps
        print(f"starter/llava_finetune: {rate:,.0f} tokens/s, {a_step:.3f} s a step, {share:.0%} of the peak", end="")
        print(f" of {peak / 1e9:,.0f} GFLOP/s that a matrix product reaches")


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        print_peak_share(sys.argv[2:])
    else:
        cases = {f"projection and LoRA, {count} image tokens": case(count, lora=True) for count in (64, 16)}
        cases["projection and language model, 64 image tokens"] = case(64, lora=False)
        main(cases, ["transformers", "peft"])
