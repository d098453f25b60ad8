"""The Q-Former's layer: BERT's, with cross-attention to the image and a feed-forward net each for queries and texts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.bridges.dropout import add_dropped, attention_with_dropout
from vlm.bridges.shared_weights import Linear
from vlm.data.text_batch import TextBatch
from vlm.data.unique_rows import take_rows

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


@dataclass(frozen=True)
class Rows:
    """Sets of as many rows each, packed [B*count,D] or in their places [B,count,D], as `TextBatch` is of texts."""

    count: int

    def pack(self, padded: Tensor) -> Tensor:
        """[B,count,...] to [B*count,...]."""
        return padded.flatten(0, 1)

    def unpack(self, packed: Tensor) -> Tensor:
        """[B*count,...] to [B,count,...]."""
        return packed.unflatten(0, (-1, self.count))


@dataclass(frozen=True)
class Part:
    """Queries or texts that take part in a pass over the layers, where the rows of all parts share linear layers.

    layout: between packed rows [N,D], which go through linear layers, and padded ones, which attend. sees: the parts
    whose keys and values it attends to, in their order. queries: whether its rows look at the image. mask: True where
    it sees a key, [B or 1,1,S or 1,K]. slots: whose queries each text sees [B]; those of image i by default.
    read: what is read behind the last layer: every row, the first of each text, or nothing.
    """

    layout: Rows | TextBatch
    sees: tuple[int, ...]
    queries: bool = False
    mask: Tensor | None = None
    slots: Tensor | None = None
    read: Literal["all", "first", "none"] = "all"

    def end(self, states: Tensor) -> "tuple[Part, Tensor] | None":
        """What is read of states [N,D] behind the last layer, None for nothing."""
        if self.read == "none":
            return None
        if self.read == "all" or isinstance(self.layout, Rows):
            return self, states
        mask = None if self.mask is None else self.mask[:, :, :1]
        return replace(self, layout=Rows(1), mask=mask), take_rows(states, self.layout.starts)


class Attention(nn.Module):
    """BERT's attention block: attention, output projection, residual, norm. width_in: of what keys and values see."""

    def __init__(self, width: int, heads: int, width_in: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = Linear(width, width)
        self.key = Linear(width_in, width)
        self.value = Linear(width_in, width)
        self.output = Linear(width, width)
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
            attended = attention_with_dropout(queries, keys, values, mask, dropout)
        else:
            attended = F.scaled_dot_product_attention(queries, keys, values, mask, dropout)
        return attended.transpose(1, 2).flatten(2)

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """Output projection, dropout, residual and norm."""
        return self.norm(add_dropped(residual, self.output(attended), self.dropout if self.training else 0.0))


class FeedForward(nn.Module):
    """BERT's feed-forward block: two linear layers with GELU, residual, norm."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.up = Linear(width, inner)
        self.down = Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, states: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return self.norm(add_dropped(states, self.down(F.gelu(self.up(states))), dropout))


class QFormerLayer(nn.Module):
    """One layer over any parts: only queries look at the image, and queries and texts have a feed-forward net each.

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

    def forward(
        self,
        states: Sequence[Tensor],
        parts: Sequence[Part],
        image: Looks = (),
        prefix: KeysValues | None = None,
        last: bool = False,
    ) -> tuple[list[Tensor], list[KeysValues]]:
        """Packed states [N,D] of every part to its states behind this layer, and each part's keys and values.

        Queries, if any, are the first part; theirs may be [Q,D], the same for all images, until they differ.
        image: groups of images, each with the number m of texts that every image of the group has: the first queries go
        with the first group, of them the first m with its first image, and so on.
        prefix: keys and values that every part sees in front of its own. last: give what is read behind the last layer.
        """
        rows, sizes, kept = self.attend(states, parts, prefix, last)
        if not parts[0].queries:
            return self._read_texts(rows, sizes), kept
        queries, texts = rows.split([sizes[0], len(rows) - sizes[0]])
        read = self.read_image(parts[0].layout.unpack(queries), image)
        return [read, *self._read_texts(texts, sizes[1:])], kept

    def attend(
        self,
        states: Sequence[Tensor],
        parts: Sequence[Part],
        prefix: KeysValues | None = None,
        last: bool = False,
    ) -> tuple[Tensor, list[int], list[KeysValues]]:
        """Self-attention of `forward`: joined states of the parts that are read on, their rows, keys and values."""
        attention = self.self_attention
        rows, sizes = _join(states), [len(x) for x in states]
        keys, values = (
            [attention.split(part.layout.unpack(x)) for part, x in zip(parts, layer(rows).split(sizes))]
            for layer in (attention.key, attention.value)
        )
        kept = list(zip(keys, values))
        asking = list(zip(parts, states))
        if last and any(part.read != "all" for part in parts):
            asking = [end for part, x in asking if (end := part.end(x))]
            rows = _join([x for _, x in asking])
        attended, residuals = [], []
        joined: dict[Any, KeysValues] = {}  # what several parts see alike is put together once
        for (part, x), own in zip(asking, attention.query(rows).split([len(x) for _, x in asking])):
            what = part.sees, id(part.slots)
            if what not in joined:
                joined[what] = _seen(part, parts, kept, prefix)
            seen_keys, seen_values = joined[what]
            count = len(seen_keys)
            heads = attention.split(part.layout.unpack(own)).expand(count, -1, -1, -1)  # [B, h, S, d]
            attended.append(part.layout.pack(attention.attend(heads, seen_keys, seen_values, part.mask)))
            if len(x) < len(attended[-1]):  # queries that were alike until now
                x = x.expand(count, -1, -1).flatten(0, 1)
            residuals.append(x)
        if any(x is not before for x, (_, before) in zip(residuals, asking)):
            rows = _join(residuals)
        return attention.finish(_join(attended), rows), [len(x) for x in attended], kept

    def read_image(self, queries: Tensor, image: Looks) -> Tensor:
        """What queries [P,Q,D] do behind self-attention: they look at the images, and pass their feed-forward net."""
        return self.query_ffn(self._look(queries, image)).flatten(0, 1)

    def _read_texts(self, rows: Tensor, sizes: list[int]) -> list[Tensor]:
        """The feed-forward net of texts over all of their rows, split into these sizes."""
        if not sizes:
            return []
        assert self.text_ffn is not None
        return list(self.text_ffn(rows).split(sizes))

    def _look(self, queries: Tensor, image: Looks) -> Tensor:
        """Cross-attention to images, [P,Q,D]: queries [P,Q,D] in the order of the images' texts, or [1,Q,D] for all."""
        attention = self.cross_attention
        if attention is None:
            return queries
        rows = [len(keys) * each for keys, _, each in image]
        q = attention.split(attention.query(queries)).expand(sum(rows), -1, -1, -1)  # [P, h, Q, d]
        parts = []
        for (keys, values, each), part in zip(image, q.split(rows)):
            if each > 1:
                # The queries of an image's texts stand in one row, so that its keys are not repeated.
                part = part.unflatten(0, (len(keys), each)).transpose(1, 2).flatten(2, 3)  # [B, h, m * Q, d]
            attended = attention.attend(part, keys, values)  # [B, m * Q, D]
            parts.append(attended.reshape(len(part) * each, -1, attended.shape[-1]))
        return attention.finish(_join(parts), queries)


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


def _seen(part: Part, parts: Sequence[Part], kept: Sequence[KeysValues], prefix: KeysValues | None) -> KeysValues:
    """Keys and values of all that a part sees [B,h,K,d]."""
    chosen = [] if prefix is None else [prefix]
    for number in part.sees:
        keys, values = kept[number]
        if part.slots is not None and parts[number].queries and len(keys) > 1:
            keys, values = keys.index_select(0, part.slots), values.index_select(0, part.slots)
        chosen.append((keys, values))
    if len(chosen) == 1:
        return chosen[0]
    count = max(len(keys) for keys, _ in chosen)
    keys, values = (torch.cat([pair[side].expand(count, -1, -1, -1) for pair in chosen], 2) for side in (0, 1))
    return keys, values
