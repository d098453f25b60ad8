"""Retrieval with re-ranking by matching, as BLIP-2 is evaluated: 12 pictures, 24 texts, the 16 nearest of each again.

The Q-Former has its published size; both sides start from image tokens and token ids or texts, and embed them as well.
Against LAVIS 1.0.2 in its own environment: both directions, or texts for each picture alone. Texts have the lengths of
COCO's captions, or 30 tokens each; LAVIS pads them to 35. Both sides must give the same scores. LAVIS takes most of a
minute for both directions, so there every side runs once.
"""

from typing import Any

import torch
from harness import Case, Step, main
from peers.blip2 import Lavis, image_tokens, our_model, token_ids

from vlm.data.text_batch import TextBatch
from vlm.evaluation.reranking import OUTSIDE, Pairs, rescored
from vlm.objectives.query_itc import query_similarity

PICTURES, NEAREST = 12, 16
CAPTIONS = "captions of 12 tokens"
TEXTS = {
    CAPTIONS: (9, 10, 10, 11, 12, 12, 14, 18) * 3,  # COCO's: mean 12
    "texts of 30 tokens": (30,) * 24,
}


def ours(lengths: tuple[int, ...], both: bool) -> Step:
    """The library's way: keys and values once a picture, each pair once, texts begun once for all pictures."""
    model = our_model().eval()
    tokens, texts = image_tokens(PICTURES), TextBatch.of(token_ids(lengths))

    @torch.inference_mode()
    def run() -> list[torch.Tensor]:
        image = model.bridge.image(tokens)
        points = model.heads.embed_queries(model.bridge.queries(image).states)
        similarity = query_similarity(points, model.heads.embed_text(model.bridge.first_text_state(texts)))

        pairs = Pairs()
        rescored(similarity, NEAREST, pairs.note)
        if both:
            rescored(similarity.T, NEAREST, lambda rows, columns: pairs.note(columns, rows))
        pictures, wanted = zip(*pairs.by_image())
        for picture, asked, logits in zip(
            pictures, wanted, model.match_logits_each(image.select(pictures), texts, wanted)
        ):
            pairs.tell(picture, asked, logits[:, 1])
        found = [rescored(similarity, NEAREST, pairs.logits)]
        if both:
            found.append(rescored(similarity.T, NEAREST, lambda rows, columns: pairs.logits(columns, rows)))
        return found

    return run


def of_lavis(lengths: tuple[int, ...], both: bool) -> Step:
    """LAVIS' way: a pass over image and text for every pair of every list."""
    lavis = Lavis(image_tokens(PICTURES), token_ids(lengths))
    return lambda: lavis.ask("rerank", k=NEAREST, both=both)


def same(ours: list[torch.Tensor], theirs: dict[str, Any]) -> None:
    """Scores agree: to rounding where both sides scored, and both leave out the same."""
    for found, wanted in zip(ours, map(torch.tensor, theirs.values()), strict=True):
        assert torch.equal(found == OUTSIDE, wanted == OUTSIDE)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def case(lengths: tuple[int, ...], both: bool) -> Case:
    """One kind of texts, one or both directions."""
    return Case(
        ours=lambda: ours(lengths, both),
        theirs=lambda: of_lavis(lengths, both),
        peer="LAVIS 1.0.2",
        amount=PICTURES * NEAREST + (len(lengths) * min(NEAREST, PICTURES) if both else 0),
        unit="ranked pairs",
        repeats=0 if both else 1,
        speed_target=3.0 if both else 2.0,
        check=same,
    )


if __name__ == "__main__":
    main(
        {
            f"{name}, {'both ways' if both else 'one way'}": case(lengths, both)
            for name, lengths in TEXTS.items()
            for both in (True, False)
            if both or name == CAPTIONS
        }
    )
