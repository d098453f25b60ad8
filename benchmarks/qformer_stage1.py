"""A training step of BLIP-2's first stage at its published size: forward and backward pass of ITC, ITM and LM together.

12 layers of width 768, 32 queries, 8 pictures of 257 x 1408 image tokens with a text each: of the lengths of COCO's
captions, and of the full 32 tokens. Against LAVIS 1.0.2 in its own environment, which pads every text to 32 tokens, and
against a plain implementation on transformers' Q-Former, which pads to the longest. All train with dropout .1; without
it, the losses on the same weights and negatives are compared.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from harness import Case, main
from peers.blip2 import DROPOUT, EMBED_WIDTH, Lavis, image_tokens, lavis_state, our_model, sizes, token_ids
from peers.transformers_stage1 import PlainStage1

from vlm.data.pairs import PairBatch
from vlm.objectives import OBJECTIVES, ReadOuts
from vlm.objectives.matching import HardNegatives
from vlm.objectives.objective import make_pairs
from vlm.recipe import ObjectiveSpec
from vlm.training.task import Task

TEXTS = {
    "captions of 12 tokens": (9, 10, 10, 11, 12, 12, 14, 18),  # COCO's: mean 12
    "texts of 32 tokens": (32,) * 8,
}
OBJECTIVE_SPECS = [
    ObjectiveSpec(name="itc", smoothing=0.1),
    ObjectiveSpec(name="itm"),
    ObjectiveSpec(name="lm", smoothing=0.1),
]


class Ours:
    """The library's step, as training runs it."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.model = our_model()
        ids = token_ids(lengths)
        samples = [(row, [f"picture {number}"]) for number, row in enumerate(ids)]
        self.batch: PairBatch = replace(
            self.model.collate(samples, range(len(ids))), image_inputs=image_tokens(len(ids))
        )
        self.task = Task(self.model, OBJECTIVE_SPECS)
        self.counts = self.task.counts([self.batch])

    def __call__(self) -> "Ours":
        self.task.train()
        self.task.zero_grad()
        loss, _ = self.task(self.batch, self.counts)
        loss.backward()
        return self

    @torch.no_grad()
    def losses(self, wrong_images: list[int], wrong_texts: list[int]) -> dict[str, float]:
        """The losses without dropout and with given negatives."""
        self.task.eval()
        count = len(wrong_images)
        read = ReadOuts(self.model, self.batch)
        pairs = make_pairs(*read("pairs"), [self.batch], 0)
        read.prepared = {"itm": HardNegatives(0, wrong_images, wrong_texts, 1 / 3, {}, {})}
        found = {}
        for spec, terms in zip(OBJECTIVE_SPECS, self.counts.tolist()):
            objective = OBJECTIVES[spec.name]
            loss = objective.loss(read, spec) if objective.loss else objective.compare(self.model, pairs, spec)  # type: ignore[misc]
            found[spec.name] = float(loss[0]) / terms
        assert count == len(self.batch)
        return found


class OfLavis:
    """LAVIS' step."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lavis = Lavis(image_tokens(len(lengths)), token_ids(lengths))
        self.pid = self.lavis.pid

    def __call__(self) -> "OfLavis":
        self.lavis.ask("step")
        return self

    def losses(self) -> dict[str, Any]:
        """The losses without dropout, and the negatives."""
        return self.lavis.ask("losses")


class OfTransformers:
    """The plain implementation's step."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        ours = Ours(lengths)
        batch = ours.batch
        self.inputs = batch.image_inputs, batch.ids, batch.mask, ours.model.tokenizer.start
        self.model = PlainStage1(sizes(DROPOUT), lavis_state(ours.model), EMBED_WIDTH)

    def __call__(self) -> "OfTransformers":
        self.model.train()
        self.model.zero_grad()
        losses, _ = self.model(*self.inputs)
        sum(losses.values()).backward()
        return self

    @torch.no_grad()
    def losses(self) -> dict[str, Any]:
        """The losses without dropout, and the negatives."""
        losses, negatives = self.model.eval()(*self.inputs)
        wrong_images, wrong_texts = negatives.tolist()
        return {"losses": {n: float(x) for n, x in losses.items()}, "images": wrong_images, "texts": wrong_texts}


def same(ours: Ours, theirs: Any) -> None:
    """Both sides give the same three losses."""
    wanted = theirs.losses()
    found = ours.losses(wanted["images"], wanted["texts"])
    for name, value in wanted["losses"].items():
        if abs(found[name] - value) > 1e-5 * max(1.0, abs(value)):
            raise AssertionError(f"{name}: {found[name]} against {value}")


def case(lengths: tuple[int, ...], side: Callable[[tuple[int, ...]], Any], peer: str, target: float | None) -> Case:
    """One kind of texts against one peer."""
    return Case(
        ours=lambda: Ours(lengths),
        theirs=lambda: side(lengths),
        peer=peer,
        amount=len(lengths),
        unit="pictures",
        repeats=3,
        speed_target=target,
        measure_memory=True,
        keeps_memory=True,
        check=same,
        operations=lambda step: step.model.operations(step.batch),
        peak_target=0.7,
    )


if __name__ == "__main__":
    targets = dict(zip(TEXTS, (2.0, 1.4)))
    main(
        {f"{name}, LAVIS": case(lengths, OfLavis, "LAVIS 1.0.2", targets[name]) for name, lengths in TEXTS.items()}
        | {
            f"{name}, transformers": case(lengths, OfTransformers, "transformers' Q-Former", None)
            for name, lengths in TEXTS.items()
        },
        ["transformers"],
    )
