"""Beam search written out, by either rule of what a sequence's score is divided by and of when to stop.

transformers 4.26, which LAVIS runs on, counts the prompt and not the end token; version 5 what was generated, with the
end token.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Ids = tuple[int, ...]


@torch.no_grad()
def beam_search(
    version: Literal[4, 5],
    logits: Callable[[list[Ids]], Tensor],
    prompt: Ids,
    beams: int,
    longest: int,
    end: int,
    length_penalty: float = 1.0,
    min_length: int = 0,
) -> tuple[Ids, float]:
    """The best sequence, prompt included, and its score, by the rule of that version of transformers.

    logits: of the token behind each sequence, [N,V]. longest, min_length: with the prompt.
    """
    running, finished = [(0.0, prompt)], list[tuple[float, Ids]]()

    def score(total: float, length: int) -> float:
        return total / length**length_penalty

    for size in range(len(prompt), longest):
        ended = size if version == 4 else size + 1 - len(prompt)  # length of what ends now
        said = logits([ids for _, ids in running]).double().log_softmax(-1)
        if size < min_length:
            said[:, end] = -torch.inf
        totals = said + torch.tensor([[total] for total, _ in running], dtype=torch.float64)
        best = totals.flatten().topk(2 * beams)
        running, before = [], running
        for rank, (total, place) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
            row, token = divmod(place, said.shape[1])
            ids = (*before[row][1], token)
            if token != end:
                running.append((total, ids))
            elif rank < beams:
                finished.append((score(total, ended), ids))
        running, finished = running[:beams], sorted(finished, reverse=True)[:beams]
        hope = best.values[0].item() if version == 4 else running[0][0]  # of what goes on
        if len(finished) == beams and finished[-1][0] >= score(hope, ended):
            break
    else:
        finished += [(score(total, longest if version == 4 else longest - len(prompt)), ids) for total, ids in running]
    value, ids = max(finished)
    return ids, value
