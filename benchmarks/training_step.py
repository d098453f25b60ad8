"""A training step of CLIP on a batch, ours against open_clip's own `train_one_epoch`: same weights, batch, optimiser.

A ViT of 12 layers and width 192 over 224 pixels beside a text transformer of 12 layers and width 128. `CLIP`: both
learn from scratch. `locked image`: the image tower is frozen (LiT); ours reads its features from the cache, theirs
computes them. Both sides get the batch ready: decoding and tokenising are no part of the step. Texts are of some
twelve tokens: theirs are padded to the context of 77, as open_clip's tokeniser gives them, ours to the longest of the
batch. Our loop keeps freed memory for the process, which shortens their steps here as well.
"""

import json
import math
import os
import tempfile
from argparse import Namespace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from harness import Case, Step, main
from PIL import Image

PAIRS = 32
ARCH = "vlm-benchmark-vit"
CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 192, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 12},
}
LR, BETAS, EPS, DECAY = 5e-4, (0.9, 0.98), 1e-6, 0.2  # open_clip's
WORDS = ("a", "dog", "cat", "on", "the", "red", "grass", "boat", "under", "two", "trees", "in", "front", "of", "house")
_folder = tempfile.TemporaryDirectory()


@cache
def folder() -> Path:
    """Weights, pictures and captions that both sides share."""
    import open_clip

    made = Path(_folder.name)
    (made / f"{ARCH}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(made / f"{ARCH}.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model(ARCH).state_dict(), made / "weights.pt")
    random = np.random.default_rng(0)
    lines = []
    for number in range(PAIRS):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((224, 224)).save(made / f"{number}.png")
        lines.append({"image": f"{number}.png", "caption": f"{number} " + " ".join(random.choice(WORDS, 8))})
    (made / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.environ["VLM_CACHE"] = str(made / "cache")
    return made


def trainer(locked: bool) -> Any:
    """Our training loop over the batch."""
    from vlm.recipe import Recipe
    from vlm.training.loop import Trainer

    part = f"open_clip:{ARCH}/{folder() / 'weights.pt'}"
    heads = {"image_projection": "none", "text_projection": "none", "logit_scale": "published"}
    content = {
        "model": {"type": "dual_encoder", "image_encoder": part, "text_encoder": part, "bridge": heads},
        "trainable": ["text_encoder.*", "bridge.*"] if locked else ["*"],
        "objectives": ["itc"],
        "data": {"train": [{"dataset": str(folder() / "train.jsonl"), "format": "captions_jsonl"}], "augment": False},
        "optimizer": {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "clip_grad": None},
        "schedule": {"name": "constant", "warmup": 0},
        "train": {"batch_size": PAIRS, "steps": 1_000_000, "precision": "fp32"},
        "output": tempfile.mkdtemp(dir=folder()),
    }
    made = Trainer(Recipe.model_validate(content), quiet=True)
    made.model.train()
    return made


def ours(locked: bool) -> Step:
    """A step of our training loop; returns its loss."""
    loop = trainer(locked)
    samples = loop.source.batch(0, PAIRS)
    prepared = loop.source.prepare(samples)
    batch = loop._collate(prepared)
    loop.source.prepare = lambda *_: prepared
    loop._collate = lambda _: batch
    return lambda: loop.train_step(samples)["loss"]


def theirs(locked: bool) -> Step:
    """One batch through open_clip's `train_one_epoch`; returns its loss."""
    import open_clip
    from open_clip_train.train import train_one_epoch

    model = open_clip.create_model(ARCH, pretrained=str(folder() / "weights.pt"), output_dict=True)
    if locked:
        model.lock_image_tower()
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": DECAY}, {"params": groups[False], "weight_decay": 0.0}],
        lr=LR,
        betas=BETAS,
        eps=EPS,
    )
    loss = open_clip.ClipLoss()
    found: list[float] = []

    def noted(**outputs: Any) -> Any:
        losses = loss(**outputs)
        found.append(float(losses["contrastive_loss"].detach()))
        return losses

    batch = their_batch()
    loader = _Loader([batch])
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
    args = Namespace(
        device="cpu",
        precision="fp32",
        distill=False,
        accum_freq=1,
        skip_scheduler=True,
        horovod=False,
        grad_clip_norm=None,
        rank=0,
        local_rank=0,
        log_local=False,
        world_size=1,
        batch_size=PAIRS,
        log_every_n_steps=1_000_000,
        wandb=False,
    )

    def run() -> float:
        train_one_epoch(model, data, noted, 0, optimizer, None, None, None, args)
        return found[-1]

    return run


class _Loader(list[Any]):
    """A loader of one batch, with what open_clip asks of it."""

    num_batches, num_samples = 1, PAIRS


def their_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Our first batch as open_clip wants it: pixels [B,3,H,W] and token ids [B,77], in the same order.

    Ours are as long as the batch's longest text, open_clip's as its context.
    """
    loop = trainer(locked=False)
    batch = loop._collate(loop.source.prepare(loop.source.batch(0, PAIRS)))
    context = CONFIG["text_cfg"]["context_length"]  # type: ignore[index]
    return batch.image_inputs[batch.image_index], torch.nn.functional.pad(batch.ids, (0, context - batch.ids.shape[1]))


def same(ours: float, theirs: float) -> None:
    """The first step's losses agree to single precision."""
    assert math.isclose(ours, theirs, rel_tol=1e-4), f"losses differ: {ours} and {theirs}"


def case(locked: bool, target: float) -> Case:
    """Both sides' step, with the image tower locked or not."""
    return Case(
        ours=lambda: ours(locked),
        theirs=lambda: theirs(locked),
        peer="open_clip train_one_epoch",
        amount=PAIRS,
        unit="pairs",
        repeats=7,
        speed_target=target,
        keeps_memory=True,
        check=same,
    )


if __name__ == "__main__":
    main({"CLIP": case(False, 1.0), "locked image": case(True, 2.0)}, ["open_clip_torch"])
