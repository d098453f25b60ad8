"""Objectives: what is learned. Each is a pure function of what a model reads out of a batch.

An objective returns the *sum* of its loss and says by how many terms (trained tokens, pairs) that sum is to be
divided. The training step divides by the count of the whole global batch, so that the result does not depend on how
the batch was split.
"""

from vlm.objectives.contrast import compare_sigmoid, compare_softmax, count_pairs
from vlm.objectives.lm import lm_count, lm_loss
from vlm.objectives.matching import find_negatives, match_loss
from vlm.objectives.objective import Objective, Pairs, ReadOuts

__all__ = ["OBJECTIVES", "Objective", "Pairs", "ReadOuts"]

OBJECTIVES: dict[str, Objective] = {
    "lm": Objective(lm_count, lm_loss, reads=("label_states",), reports=("token_accuracy",)),
    "itm": Objective(
        count_pairs,
        match_loss,
        prepare=find_negatives,
        needs=("match_logits",),
        reads=("pairs",),
        reports=("itm_accuracy",),
    ),
    "itc": Objective(count_pairs, compare=compare_softmax, reads=("pairs",), reports=("logit_scale",)),
    "sigmoid_itc": Objective(
        count_pairs, compare=compare_sigmoid, needs=("bridge.logit_bias",), reads=("pairs",), reports=("logit_scale",)
    ),
}
