"""Retrieval in two steps: the nearest by embedding, scored again by a model that looks at both (BLIP-2)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

OUTSIDE = -100.0  # score of what is not among the nearest


def rerank(
    similarity: "Tensor", score: Callable[[int, list[int]], "Tensor"], k: int = 128
) -> tuple["Tensor", "Tensor"]:
    """Scores of texts for each image [M,N] and of images for each text [N,M] in two steps.

    similarity: cosine of M images and N texts. score(image, texts): matching logits of one image with several texts.
    k: candidates of each query that are scored again: their logit plus cosine; all others get OUTSIDE.
    Each image is asked about once, each pair scored once, also where it stands in both directions' lists.
    """
    import torch

    images, texts = similarity.shape
    of_images = torch.zeros(images, texts, dtype=torch.bool, device=similarity.device)
    of_images.scatter_(1, similarity.topk(min(k, texts), 1).indices, True)
    of_texts = torch.zeros_like(of_images).scatter_(0, similarity.topk(min(k, images), 0).indices, True)
    scores = torch.full_like(similarity, OUTSIDE)
    for image, row in enumerate((of_images | of_texts).cpu()):
        if wanted := row.nonzero()[:, 0].tolist():
            scores[image, wanted] = score(image, wanted).to(scores) + similarity[image, wanted]
    outside = torch.full_like(scores, OUTSIDE)
    return torch.where(of_images, scores, outside), torch.where(of_texts, scores, outside).T
