"""The Q-Former's layer: BERT's, with cross-attention to the image and a feed-forward net each for queries and texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.data.text_batch import TextBatch

NORM_EPS = 1e-12  # BERT's

KeysValues: TypeAlias = tuple[Tensor, Tensor]  # each [B, heads, S, D / heads]
Looks: TypeAlias = Sequence[
    tuple[Tensor, Tensor, int]
]  # keys and values of images, and how many texts each of them has


@dataclass(frozen=True)
class QFormerSizes:
    """Everything that decides the shapes of a Q-Former.

    ffn: inner width of the feed-forward nets. cross_attention_every: layers 0, n, 2n, ... look at the image.
    image_width: D of the image tokens. vocabulary: token ids with [DEC], 0 without a text side. positions: tokens that
    a text may have. dropout: on hidden states and attention probabilities.
    """

    width: int
    layers: int
    heads: int
    ffn: int
    num_queries: int
    image_width: int
    vocabulary: int
    positions: int
    cross_attention_every: int = 2
    dropout: float = 0.0

    def looks_at_image(self, layer: int) -> bool:
        """Whether that layer has cross-attention."""
        return layer % self.cross_attention_every == 0


class Attention(nn.Module):
    """BERT's attention block: attention, output projection, residual, norm. width_in: of what keys and values see."""

    def __init__(self, width: int, heads: int, width_in: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width_in, width)
        self.value = nn.Linear(width_in, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def split(self, states: Tensor) -> Tensor:
        """[B,S,D] to [B,heads,S,D/heads]."""
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, states: Tensor) -> KeysValues:
        """Keys and values of states [B,S,D_in]."""
        return self.split(self.key(states)), self.split(self.value(states))

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of heads [B,h,S,d] over keys and values [B,h,K,d], heads joined again [B,S,D].

        mask: True where a query sees a key, broadcast to [B,h,S,K].
        """
        dropout = self.dropout if self.training else 0.0
        if dropout and queries.device.type == "cpu":
            attended = _attention_with_dropout(queries, keys, values, mask, dropout)
        else:
            attended = F.scaled_dot_product_attention(queries, keys, values, mask, dropout)
        return attended.transpose(1, 2).flatten(2)

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """Output projection, dropout, residual and norm."""
        return self.norm(residual + F.dropout(self.output(attended), self.dropout, self.training))


def _attention_with_dropout(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """What torch's attention does on a CPU, which has no fused kernel with dropout, in fewer passes over the scores.

    Every query must see a key.
    """
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-2, -1)  # [B, h, S, K]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return F.dropout(scores.softmax(-1), dropout) @ values


class FeedForward(nn.Module):
    """BERT's feed-forward block: two linear layers with GELU, residual, norm."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, states: Tensor) -> Tensor:
        return self.norm(states + F.dropout(self.down(F.gelu(self.up(states))), self.dropout, self.training))


@dataclass(frozen=True)
class Text:
    """A layer's text states: packed [N,D], and the batch they belong to."""

    states: Tensor
    batch: TextBatch


class QFormerLayer(nn.Module):
    """One layer. Which parts of it run depends on what is given; only query positions look at the image.

    Li et al. 2023 (BLIP-2), section 3.1.
    """

    def __init__(self, sizes: QFormerSizes, number: int) -> None:
        super().__init__()
        width, dropout = sizes.width, sizes.dropout
        self.self_attention = Attention(width, sizes.heads, width, dropout)
        self.cross_attention = (
            Attention(width, sizes.heads, sizes.image_width, dropout) if sizes.looks_at_image(number) else None
        )
        self.query_ffn = FeedForward(width, sizes.ffn, dropout)
        self.text_ffn = FeedForward(width, sizes.ffn, dropout) if sizes.vocabulary else None

    def forward(self, queries: Tensor, image: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """Queries [B,Q,D] alone, and the keys and values that texts may see.

        image: keys and values of B images, where this layer looks at them. Queries may still be [1,Q,D], the same for
        all images, until then.
        """
        attention = self.self_attention
        keys, values = attention.keys_values(queries)
        attended = attention.attend(attention.split(attention.query(queries)), keys, values)
        states = self._look(attention.finish(attended, queries), image and [(*image, 1)])
        return self.query_ffn(states), (keys, values)

    def joint(
        self, queries: Tensor, text: Text, image: Looks | None, mask: Tensor | None, text_output: bool = True
    ) -> tuple[Tensor, Text]:
        """Queries [P,Q,D] (or [1,Q,D], the same for all) and P texts, which see each other as `mask` says.

        mask: [P or 1, 1, Q+T, Q+T], True where a row sees a column; without `text_output` only the first Q rows of it
        count, and the text's states stay as they were, for nobody reads them behind the last layer.
        image: groups of images, each with the number m of texts that every image of the group has: the first texts go
        with the first group, of them the first m with its first image, and so on.
        """
        attention, batch = self.self_attention, text.batch
        pairs, count = len(batch), queries.shape[1]
        # Queries and texts go through a projection as rows of one product.
        rows = torch.cat([queries.flatten(0, 1), text.states])  # [P * Q + N, D], or [Q + N, D]

        def project(layer: nn.Linear) -> Tensor:
            of_queries, of_text = layer(rows).tensor_split([len(rows) - len(text.states)])
            split = attention.split(of_queries.unflatten(0, (-1, count))).expand(pairs, -1, -1, -1)
            return torch.cat([split, attention.split(batch.unpack(of_text))], 2)  # [P, h, Q + T, d]

        keys, values = project(attention.key), project(attention.value)
        if not text_output:
            q = attention.split(attention.query(queries)).expand(pairs, -1, -1, -1)
            attended = attention.attend(q, keys, values, mask if mask is None else mask[:, :, :count])  # [P, Q, D]
            return self.query_ffn(self._look(attention.finish(attended, queries), image)), text
        attended = attention.attend(project(attention.query), keys, values, mask)  # [P, Q + T, D]
        if len(queries) < pairs:
            rows = torch.cat([queries.expand(pairs, -1, -1).flatten(0, 1), text.states])
        attended = torch.cat([attended[:, :count].flatten(0, 1), batch.pack(attended[:, count:])])
        states, own = attention.finish(attended, rows).tensor_split([pairs * count])
        states = self.query_ffn(self._look(states.unflatten(0, (pairs, count)), image))
        return states, Text(self._text_ffn(own), batch)

    def text(
        self,
        text: Text,
        mask: Tensor | None,
        prefix: KeysValues | None = None,
        first_only: bool = False,
    ) -> tuple[Tensor, KeysValues]:
        """Texts alone, or behind the keys and values of queries (`prefix`): packed states [N,D], their keys and values.

        mask: [B or 1, 1, T, (Q+)T]. first_only: only the states of each text's first token, [B,D].
        """
        attention, batch = self.self_attention, text.batch
        own_keys, own_values = (
            attention.split(batch.unpack(layer(text.states))) for layer in (attention.key, attention.value)
        )
        keys, values = own_keys, own_values
        if prefix is not None:
            keys, values = (
                torch.cat([before.expand(len(batch), -1, -1, -1), own], 2)
                for before, own in zip(prefix, (own_keys, own_values))
            )
        if first_only:
            states = batch.unpack(text.states)[:, :1]  # [B, 1, D]
            q = attention.split(attention.query(states))
            attended = attention.attend(q, keys, values, mask if mask is None else mask[:, :, :1])
            return self._text_ffn(attention.finish(attended, states)[:, 0]), (own_keys, own_values)
        q = attention.split(batch.unpack(attention.query(text.states)))
        attended = batch.pack(attention.attend(q, keys, values, mask))
        return self._text_ffn(attention.finish(attended, text.states)), (own_keys, own_values)

    def _look(self, queries: Tensor, image: Looks | None) -> Tensor:
        """Cross-attention to images, [P,Q,D]: queries [P,Q,D] in the order of the images' texts, or [1,Q,D] for all."""
        attention = self.cross_attention
        if attention is None:
            return queries
        assert image is not None
        rows = [len(keys) * each for keys, _, each in image]
        q = attention.split(attention.query(queries)).expand(sum(rows), -1, -1, -1)  # [P, h, Q, d]
        parts = []
        for (keys, values, each), part in zip(image, q.split(rows)):
            if each > 1:
                # The queries of an image's texts stand in one row, so that its keys are not repeated.
                part = part.unflatten(0, (len(keys), each)).transpose(1, 2).flatten(2, 3)  # [B, h, m * Q, d]
            attended = attention.attend(part, keys, values)  # [B, m * Q, D]
            parts.append(attended.reshape(len(part) * each, -1, attended.shape[-1]))
        return attention.finish(torch.cat(parts) if len(parts) > 1 else parts[0], queries)

    def _text_ffn(self, states: Tensor) -> Tensor:
        assert self.text_ffn is not None
        return self.text_ffn(states)
