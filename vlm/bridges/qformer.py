"""The Q-Former: learned queries that read an image, and a text encoder and decoder of the same layers.

Li et al. 2023 (BLIP-2), section 3.1. The image's cross-attention keys and values are computed once (`image`) and serve
every pass: queries alone, queries with any number of texts, and texts behind the queries.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.bridges.qformer_layers import NORM_EPS, KeysValues, QFormerLayer, QFormerSizes, Text
from vlm.data.text_batch import TextBatch
from vlm.errors import VlmError

IMAGE_NORM_EPS = 1e-5
INIT_STD = 0.02  # BERT's


@dataclass(frozen=True)
class ImageKeysValues:
    """What the cross-attention of every layer needs of B images; None for layers that do not look at the image."""

    layers: tuple[KeysValues | None, ...]

    def __len__(self) -> int:
        return next(len(layer[0]) for layer in self.layers if layer is not None)

    def joined(self, other: "ImageKeysValues") -> "ImageKeysValues":
        """These images, and those of `other` behind them."""
        both = zip(self.layers, other.layers)
        return ImageKeysValues(
            tuple(one and two and (torch.cat([one[0], two[0]]), torch.cat([one[1], two[1]])) for one, two in both)
        )

    def select(self, rows: Sequence[int] | Tensor | slice) -> "ImageKeysValues":
        """The images of these numbers, in this order."""
        if not isinstance(rows, slice):
            keys = next(layer[0] for layer in self.layers if layer is not None)
            rows = torch.as_tensor(rows, dtype=torch.long, device=keys.device)
        return ImageKeysValues(tuple(layer and (layer[0][rows], layer[1][rows]) for layer in self.layers))


@dataclass(frozen=True)
class QueryStates:
    """Output of the queries alone [B,Q,D], and each layer's self-attention keys and values, which texts may see."""

    states: Tensor
    keys_values: tuple[KeysValues, ...]

    def select(self, rows: Sequence[int] | slice) -> "QueryStates":
        """The images of these numbers, in this order. Layers that are the same for all images stay as they are."""
        index = rows if isinstance(rows, slice) else torch.tensor(rows, device=self.states.device)
        several = len(self.states) > 1
        chosen = tuple(
            (keys[index], values[index]) if several and len(keys) > 1 else (keys, values)
            for keys, values in self.keys_values
        )
        return QueryStates(self.states[index], chosen)


class TextEmbeddings(nn.Module):
    """Word and position embeddings; their norm belongs to the Q-Former, for queries pass it too."""

    def __init__(self, vocabulary: int, positions: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Ids [N] at their positions [N] to [N,D]."""
        return self.words(ids) + self.positions(positions)


class QFormer(nn.Module):
    """The bridge. Image tokens [B,N,D_image] in any float type; states have the Q-Former's width D.

    Three mask regimes (section 3.1): uni-modal, `queries` and `text` apart; bi-directional, `joint`; and
    multimodal-causal, `causal`, where a text sees all queries and its own past, and queries see no text.
    Raises VlmError for sizes that make no Q-Former, and where a text pass is asked of one without a text side.
    """

    def __init__(self, sizes: QFormerSizes) -> None:
        super().__init__()
        _check(sizes)
        self.sizes = sizes
        self.num_queries, self.width = sizes.num_queries, sizes.width
        self.image_norm = nn.LayerNorm(sizes.image_width, eps=IMAGE_NORM_EPS)
        self.query_tokens = nn.Parameter(torch.empty(1, sizes.num_queries, sizes.width))
        self.embeddings = TextEmbeddings(sizes.vocabulary, sizes.positions, sizes.width) if sizes.vocabulary else None
        self.norm = nn.LayerNorm(sizes.width, eps=NORM_EPS)
        self.layers = nn.ModuleList(QFormerLayer(sizes, number) for number in range(sizes.layers))
        self.apply(init_bert_weights)
        nn.init.normal_(self.query_tokens, std=INIT_STD)

    def image(self, tokens: Tensor) -> ImageKeysValues:
        """Keys and values of image tokens [B,N,D_image] for every layer that looks at the image; normed in fp32."""
        if tokens.ndim != 3 or tokens.shape[-1] != self.sizes.image_width:
            raise VlmError(f"Q-Former: expected image tokens [B,N,{self.sizes.image_width}], got {list(tokens.shape)}")
        norm = self.image_norm
        wide = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            weight, bias = norm.weight.to(wide), norm.bias.to(wide)
            normed = F.layer_norm(tokens.to(wide), norm.normalized_shape, weight, bias, norm.eps)
        normed = normed.to(self.query_tokens.dtype)
        return ImageKeysValues(
            tuple(layer.cross_attention and layer.cross_attention.keys_values(normed) for layer in self.layers)
        )

    def queries(self, image: ImageKeysValues) -> QueryStates:
        """The queries alone, about each image."""
        states = self._start(len(image))
        kept = []
        for layer, seen in zip(self.layers, image.layers):
            states, keys_values = layer(states, seen)
            kept.append(keys_values)
        return QueryStates(states, tuple(kept))

    def text(self, texts: TextBatch) -> Tensor:
        """Texts alone, every token seeing all others: padded states [B,T,D], zeros at padding."""
        text, mask = Text(self._embed(texts), texts), _padding(texts)
        for layer in self.layers:
            text = Text(layer.text(text, mask)[0], texts)
        return texts.unpack(text.states)

    def first_text_state(self, texts: TextBatch) -> Tensor:
        """The last state of each text's first token ([CLS]) as `text` gives it, [B,D]."""
        text, mask = Text(self._embed(texts), texts), _padding(texts)
        for layer in self.layers[:-1]:
            text = Text(layer.text(text, mask)[0], texts)
        return self.layers[-1].text(text, mask, first_only=True)[0]

    def joint(self, image: ImageKeysValues, texts: TextBatch) -> Tensor:
        """Queries and texts that see each other in both directions: the queries' states [P,Q,D].

        P texts, a multiple m of the images; texts m*i to m*i+m-1 go with image i. InstructBLIP's instruction-aware
        queries (Dai et al. 2023, section 2.3) are this with the instruction as text.
        """
        return self._joint(self._alike(image, texts), texts, self._joint_mask(texts), text_output=False)[0]

    def pairs(self, image: ImageKeysValues, slots: Sequence[int], texts: TextBatch) -> Tensor:
        """As `joint` for any pairs: text i goes with the image of number `slots[i]`. The queries' states [P,Q,D].

        Keys and values of an image are never repeated, however many texts it has.
        """
        counts = Counter(slots)
        # Images with as many texts stand together; each of these groups looks at its images in one go.
        images = sorted(counts, key=lambda slot: (counts[slot], slot))
        place = {slot: number for number, slot in enumerate(images)}
        order = sorted(range(len(slots)), key=lambda i: place[slots[i]])
        groups = []
        for each, group in groupby(images, key=lambda slot: counts[slot]):
            own = list(group)
            groups.append((image if own == list(range(len(image))) else image.select(own), each))
        asked = texts if order == list(range(len(slots))) else texts.select(order)
        states = self._joint(groups, asked, self._joint_mask(asked), text_output=False)[0]
        if asked is texts:
            return states
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return states[back.to(states.device)]

    def joint_with_text(
        self, image: ImageKeysValues, texts: TextBatch, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `joint`, and the texts' states [P,T,D].

        mask: who sees whom, [P or 1, 1, Q+T, Q+T] over queries and then text; by default all but padding.
        """
        mask = self._joint_mask(texts) if mask is None else mask
        queries, text = self._joint(self._alike(image, texts), texts, mask, text_output=True)
        return queries, texts.unpack(text.states)

    def causal(self, queries: QueryStates, texts: TextBatch) -> Tensor:
        """Texts behind the queries, each token seeing all queries and the text up to itself: packed states [N,D].

        The queries' keys and values are those of `queries`, with gradient; text i goes with image i.
        """
        length, device = texts.ids.shape[1], texts.ids.device
        past = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        mask = F.pad(past, (self.num_queries, 0), value=True)[None, None]  # [1, 1, T, Q + T]
        text = Text(self._embed(texts), texts)
        for layer, prefix in zip(self.layers, queries.keys_values):
            text = Text(layer.text(text, mask, prefix)[0], texts)
        return text.states

    def next_states(
        self, ids: Tensor, position: int, prefixes: Sequence[KeysValues]
    ) -> tuple[Tensor, list[KeysValues]]:
        """One more token of each text: its state [B,D] and its keys and values in every layer.

        ids: [B]. position: how many tokens stand before it. prefixes: each layer's keys and values of the queries and
        of the text so far.
        """
        batch = TextBatch(ids[:, None], (1,) * len(ids))
        text = Text(self._embed(batch, position), batch)
        kept = []
        for layer, prefix in zip(self.layers, prefixes):
            states, keys_values = layer.text(text, None, prefix)
            text = Text(states, batch)
            kept.append(keys_values)
        return text.states, kept

    def _alike(self, image: ImageKeysValues, texts: TextBatch) -> list[tuple[ImageKeysValues, int]]:
        """Images with the same number of texts each."""
        if not len(texts) or len(texts) % len(image):
            raise VlmError(f"Q-Former: {len(texts)} texts for {len(image)} images; expected a multiple of them")
        return [(image, len(texts) // len(image))]

    def _joint(
        self, groups: Sequence[tuple[ImageKeysValues, int]], texts: TextBatch, mask: Tensor | None, text_output: bool
    ) -> tuple[Tensor, Text]:
        """groups: images, and how many texts each of them has."""
        states, text = self._start(len(texts)), Text(self._embed(texts), texts)
        for number, layer in enumerate(self.layers):
            last = number == len(self.layers) - 1
            seen = [(*kv, each) for image, each in groups if (kv := image.layers[number]) is not None]
            states, text = layer.joint(states, text, seen, mask, text_output or not last)
        return states, text

    def _start(self, count: int) -> Tensor:
        """Embedded queries: [1,Q,D], or [count,Q,D] where dropout makes them differ."""
        states = self.norm(self.query_tokens)
        if self.training and self.sizes.dropout:
            states = F.dropout(states.expand(count, -1, -1), self.sizes.dropout)
        return states

    def _embed(self, texts: TextBatch, start: int = 0) -> Tensor:
        """Embedded texts, packed [N,D]."""
        if self.embeddings is None:
            raise VlmError("this Q-Former was built without its text side, which only stage 2 can do without")
        if start + texts.ids.shape[1] > self.sizes.positions:
            raise VlmError(f"Q-Former: a text of {start + texts.ids.shape[1]} tokens; it takes {self.sizes.positions}")
        states = self.norm(self.embeddings(texts.pack(texts.ids), texts.positions + start))
        return F.dropout(states, self.sizes.dropout, self.training)

    def _joint_mask(self, texts: TextBatch) -> Tensor | None:
        if not texts.padded:
            return None
        return F.pad(texts.mask, (self.num_queries, 0), value=True)[:, None, None]  # [P, 1, 1, Q + T]


def _padding(texts: TextBatch) -> Tensor | None:
    """Which tokens others may see [B,1,1,T]; None where all."""
    return texts.mask[:, None, None] if texts.padded else None


def init_bert_weights(module: nn.Module) -> None:
    """BERT's initialisation: N(0, .02) weights, zero biases, unit norms."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _check(sizes: QFormerSizes) -> None:
    if sizes.num_queries < 1:
        raise VlmError(f"num_queries: {sizes.num_queries}: a Q-Former needs at least one query")
    if sizes.layers < 1 or sizes.cross_attention_every < 1:
        raise VlmError("a Q-Former needs at least one layer, and cross-attention in every n-th with n at least 1")
    if sizes.heads < 1 or sizes.width % sizes.heads:
        raise VlmError(f"a Q-Former of width {sizes.width} cannot have {sizes.heads} heads")
