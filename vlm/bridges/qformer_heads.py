"""Heads of the Q-Former's first stage: into the joint space, match or no match, next word."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.bridges.qformer import init_bert_weights
from vlm.bridges.qformer_layers import NORM_EPS
from vlm.bridges.shared_weights import linear

TEMPERATURE, MIN_TEMPERATURE, MAX_TEMPERATURE = 0.07, 0.001, 0.5


class WordHead(nn.Module):
    """BERT's language-modelling head. Its last layer is tied to the word embeddings, so it owns only the bias."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, states: Tensor, words: Tensor) -> Tensor:
        """States [...,D] and word embeddings [V,D] to logits [...,V]."""
        return linear(self.norm(F.gelu(self.dense(states))), words, self.bias)


class QFormerHeads(nn.Module):
    """What stage 1 puts on the Q-Former (Li et al. 2023, section 3.1).

    temperature divides the cosine; learned from .07, kept within .001 and .5 (ALBEF; LAVIS leaves it free).
    """

    def __init__(self, width: int, vocabulary: int, embed_width: int) -> None:
        super().__init__()
        self.embed_width = embed_width
        self.vision_projection = nn.Linear(width, embed_width)
        self.text_projection = nn.Linear(width, embed_width)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE))
        self.match = nn.Linear(width, 2)
        self.words = WordHead(width, vocabulary)
        self.words.apply(init_bert_weights)

    def embed_queries(self, states: Tensor) -> Tensor:
        """Query states [B,Q,D] to unit-length embeddings [B,Q,E], in fp32 at least."""
        return _unit(self.vision_projection(states))

    def embed_text(self, states: Tensor) -> Tensor:
        """[CLS] states [B,D] to unit-length embeddings [B,E], in fp32 at least."""
        return _unit(self.text_projection(states))

    def match_logits(self, states: Tensor) -> Tensor:
        """Query states of pairs [P,Q,D] to logits of (no match, match) [P,2]: the mean over queries."""
        return self.match(states).mean(1)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the temperature in its bounds; to be called after each optimiser step."""
        self.temperature.clamp_(MIN_TEMPERATURE, MAX_TEMPERATURE)


def _unit(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)
