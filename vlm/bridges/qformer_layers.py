"""The Q-Former's layer: BERT's, with cross-attention to the image and a feed-forward net each for queries and texts."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.data.text_batch import TextBatch

NORM_EPS = 1e-12  # BERT's

KeysValues: TypeAlias = tuple[Tensor, Tensor]  # each [B, heads, S, D / heads]


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
        attended = F.scaled_dot_product_attention(queries, keys, values, mask, dropout)
        return attended.transpose(1, 2).flatten(2)

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """Output projection, dropout, residual and norm."""
        return self.norm(residual + F.dropout(self.output(attended), self.dropout, self.training))


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
        states = self._look(attention.finish(attended, queries), image)
        return self.query_ffn(states), (keys, values)

    def joint(
        self, queries: Tensor, text: Text, image: KeysValues | None, mask: Tensor | None, text_output: bool = True
    ) -> tuple[Tensor, Text]:
        """Queries [P,Q,D] (or [1,Q,D], the same for all) and P texts, which see each other as `mask` says.

        mask: [P or 1, 1, Q+T, Q+T], True where a row sees a column; without `text_output` only the first Q rows of it
        count, and the text's states stay as they were, for nobody reads them behind the last layer.
        image: keys and values of P / m images; texts m*i to m*i+m-1 go with image i.
        """
        attention, batch = self.self_attention, text.batch
        pairs, count = len(batch), queries.shape[1]
        of_queries = [attention.split(layer(queries)) for layer in (attention.query, attention.key, attention.value)]
        of_text = [
            attention.split(batch.unpack(layer(text.states)))
            for layer in ((attention.query,) if text_output else ()) + (attention.key, attention.value)
        ]
        q, k, v = (part.expand(pairs, -1, -1, -1) for part in of_queries)
        keys, values = torch.cat([k, of_text[-2]], 2), torch.cat([v, of_text[-1]], 2)
        q = torch.cat([q, of_text[0]], 2) if text_output else q
        mask = mask if mask is None else mask[:, :, : q.shape[2]]
        attended = attention.attend(q, keys, values, mask)  # [P, Q(+T), D]
        states = self.query_ffn(self._look(attention.finish(attended[:, :count], queries), image))
        if text_output:
            own = attention.finish(batch.pack(attended[:, count:]), text.states)
            text = Text(self._text_ffn(own), batch)
        return states, text

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

    def _look(self, queries: Tensor, image: KeysValues | None) -> Tensor:
        """Cross-attention to the image: [P,Q,D], where P is a multiple of the number of images."""
        attention = self.cross_attention
        if attention is None:
            return queries
        assert image is not None
        keys, values = image
        images, rows = len(keys), max(len(queries), len(keys))
        q = attention.split(attention.query(queries)).expand(rows, -1, -1, -1)  # [P, h, Q, d]
        each = rows // images
        if each > 1:
            # The queries of an image's texts stand in one row, so that its keys are not repeated.
            q = q.unflatten(0, (images, each)).transpose(1, 2).flatten(2, 3)  # [B, h, m * Q, d]
        attended = attention.attend(q, keys, values)  # [B, m * Q, D]
        return attention.finish(attended.reshape(rows, -1, attended.shape[-1]), queries)

    def _text_ffn(self, states: Tensor) -> Tensor:
        assert self.text_ffn is not None
        return self.text_ffn(states)
