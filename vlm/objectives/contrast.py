"""The objectives `itc` and `sigmoid_itc`: the contrastive losses with a model's own scale and bias."""

from typing import Any

from vlm.objectives.itc import itc_loss, sigmoid_itc_loss
from vlm.objectives.objective import Loss, Pairs
from vlm.objectives.processes import num_processes
from vlm.objectives.query_itc import query_itc_loss
from vlm.recipe import ObjectiveSpec


def count_pairs(batch: Any) -> int:
    """Image-text pairs of a batch."""
    return len(batch)


def compare_softmax(model: Any, pairs: Pairs, spec: ObjectiveSpec) -> Loss:
    """This process's share of CLIP's loss over the global batch, and the logit scale."""
    if pairs.image.ndim == 3:
        return _compare_queries(model, pairs, spec)
    scale = model.bridge.scale
    loss = itc_loss(
        pairs.image,
        pairs.text,
        scale,
        image_ids=pairs.together(spec),
        smoothing=spec.smoothing,
        across_processes=num_processes() > 1,
    )
    return loss, {"logit_scale": scale.detach() * len(pairs)}


def _compare_queries(model: Any, pairs: Pairs, spec: ObjectiveSpec) -> Loss:
    """The same where an image is several points, of which the nearest to a text counts (BLIP-2)."""
    scale = model.scale
    loss = query_itc_loss(
        pairs.image, pairs.text, scale, pairs.together(spec), spec.smoothing, across_processes=num_processes() > 1
    )
    return loss, {"logit_scale": scale.detach() * len(pairs)}


def compare_sigmoid(model: Any, pairs: Pairs, spec: ObjectiveSpec) -> Loss:
    """This process's share of SigLIP's loss over the global batch, and the logit scale."""
    bias = model.bridge.logit_bias
    scale = model.bridge.scale
    loss = sigmoid_itc_loss(
        pairs.image,
        pairs.text,
        scale,
        0.0 if bias is None else bias,
        image_ids=pairs.together(spec),
        across_processes=num_processes() > 1,
    )
    return loss, {"logit_scale": scale.detach() * len(pairs)}
