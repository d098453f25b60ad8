"""The Q-Former: learned queries that read an image, and a text encoder and decoder of the same layers.

Li et al. 2023 (BLIP-2), section 3.1. The image's cross-attention keys and values are computed once (`image`) and serve
every pass: queries alone, queries with any number of texts, and texts behind the queries.
"""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.bridges.dropout import dropout
from vlm.bridges.qformer_layers import NORM_EPS, Attention, KeysValues, Looks, Part, QFormerLayer, QFormerSizes, Rows
from vlm.bridges.qformer_states import BegunTexts, ImageKeysValues, QueryStates
from vlm.bridges.shared_weights import Embedding
from vlm.data.text_batch import TextBatch
from vlm.errors import VlmError

IMAGE_NORM_EPS = 1e-5
INIT_STD = 0.02  # BERT's


class TextEmbeddings(nn.Module):
    """Word and position embeddings; their norm belongs to the Q-Former, for queries pass it too."""

    def __init__(self, vocabulary: int, positions: int, width: int) -> None:
        super().__init__()
        self.words = Embedding(vocabulary, width)
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
        if torch.is_grad_enabled() and norm.weight.requires_grad and not tokens.requires_grad:
            return self._image_of_constants(tokens.to(wide))
        with torch.autocast(tokens.device.type, enabled=False):
            weight, bias = norm.weight.to(wide), norm.bias.to(wide)
            normed = F.layer_norm(tokens.to(wide), norm.normalized_shape, weight, bias, norm.eps)
        normed = normed.to(self.query_tokens.dtype)
        return ImageKeysValues(
            tuple(layer.cross_attention and layer.cross_attention.keys_values(normed) for layer in self.layers)
        )

    def _image_of_constants(self, tokens: Tensor) -> ImageKeysValues:
        """`image` of tokens that need no gradient: none is computed for them, only for the norm's weight and bias.

        K(g * x + b) is (K * g) x + K b: with the norm's weight moved into the layers', a third of the products of
        keys and values is not done.
        """
        norm = self.image_norm
        with torch.autocast(tokens.device.type, enabled=False):
            plain = F.layer_norm(tokens, norm.normalized_shape, eps=norm.eps).to(self.query_tokens.dtype)

        def project(attention: Attention, linear: nn.Linear) -> Tensor:
            with torch.autocast(tokens.device.type, enabled=False):
                weight, bias = linear.weight * norm.weight, torch.addmv(linear.bias, linear.weight, norm.bias)
            return attention.split(F.linear(plain, weight, bias))

        looking = [layer.cross_attention for layer in self.layers]
        return ImageKeysValues(tuple(a and (project(a, a.key), project(a, a.value)) for a in looking))

    def queries(self, image: ImageKeysValues) -> QueryStates:
        """The queries alone, about each image."""
        states, kept = self._run([self._start(len(image))], [self._alone], [(image, 1)], keep=True)
        return QueryStates(states[0].unflatten(0, (-1, self.num_queries)), kept)

    def text(self, texts: TextBatch) -> Tensor:
        """Texts alone, every token seeing all others: padded states [B,T,D], zeros at padding."""
        return texts.unpack(self._run(self._embed(texts), [Part(texts, (0,), mask=_padding(texts))])[0][0])

    def first_text_state(self, texts: TextBatch) -> Tensor:
        """The last state of each text's first token ([CLS]) as `text` gives it, [B,D]."""
        return self._run(self._embed(texts), [Part(texts, (0,), mask=_padding(texts), read="first")])[0][0]

    def apart(
        self, image: ImageKeysValues, texts: TextBatch, said: TextBatch, slots: Sequence[int]
    ) -> tuple[QueryStates, Tensor, Tensor]:
        """`queries`, `first_text_state` of `texts` and `causal` of `said` in one pass, whose large products they share.

        said: texts behind the queries, text i behind those of image `slots[i]`.
        """
        behind = Part(said, (0, 2), mask=self._past(said), slots=torch.tensor(slots, device=said.ids.device))
        parts = [self._alone, Part(texts, (1,), mask=_padding(texts), read="first"), behind]
        start = [self._start(len(image)), *self._embed(texts, said)]
        (states, first, words), kept = self._run(start, parts, [(image, 1)], keep=True)
        return QueryStates(states.unflatten(0, (-1, self.num_queries)), kept), first, words

    def joint(self, image: ImageKeysValues, texts: TextBatch | BegunTexts) -> Tensor:
        """Queries and texts that see each other in both directions: the queries' states [P,Q,D].

        P texts, a multiple m of the images; texts m*i to m*i+m-1 go with image i. InstructBLIP's instruction-aware
        queries (Dai et al. 2023, section 2.3) are this with the instruction as text.
        """
        return self._joint(self._alike(image, texts), texts)[0]

    def begin(self, texts: TextBatch) -> BegunTexts:
        """For `joint`: texts and queries up to where queries first look at an image, to be shared by several images.

        The first layer's self-attention, and all that texts do in that layer. In eval mode: dropout would be shared.
        """
        layer, count = self.layers[0], self.num_queries
        start = [self._start(len(texts)), *self._embed(texts)]
        rows, _, _ = layer.attend(start, self._both(texts))
        queries, states = rows.split([len(texts) * count, len(rows) - len(texts) * count])
        return BegunTexts(texts, queries.unflatten(0, (-1, count)), texts.unpack(layer.text_ffn(states)))

    def pairs(self, image: ImageKeysValues, slots: Sequence[int], texts: TextBatch) -> Tensor:
        """As `joint` for any pairs: text i goes with the image of number `slots[i]`. The queries' states [P,Q,D].

        Keys and values of an image are never repeated, however many texts it has.
        """
        counts = Counter(slots)
        # Images with as many texts stand together; each of these groups looks at its images in one go.
        images = sorted(counts, key=lambda slot: (counts[slot], slot))
        place = {slot: number for number, slot in enumerate(images)}
        order = sorted(range(len(slots)), key=lambda i: place[slots[i]])
        alike = Counter(counts[slot] for slot in images)  # texts of an image -> how many images have as many
        groups = list(zip(image.select(images).split(list(alike.values())), alike))
        asked = texts if order == list(range(len(slots))) else texts.select(order)
        states = self._joint(groups, asked)[0]
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
        queries, text = self._joint(self._alike(image, texts), texts, mask, text_output=True)
        return queries, texts.unpack(text)

    def causal(self, queries: QueryStates, texts: TextBatch) -> Tensor:
        """Texts behind the queries, each token seeing all queries and the text up to itself: packed states [N,D].

        The queries' keys and values are those of `queries`, with gradient; text i goes with image i.
        """
        part = Part(texts, (0,), mask=self._past(texts))
        return self._run(self._embed(texts), [part], prefixes=queries.keys_values)[0][0]

    def next_states(
        self, ids: Tensor, position: int, prefixes: Sequence[KeysValues]
    ) -> tuple[Tensor, list[KeysValues]]:
        """One more token of each text: its state [B,D] and its keys and values in every layer.

        ids: [B]. position: how many tokens stand before it. prefixes: each layer's keys and values of the queries and
        of the text so far.
        """
        batch = TextBatch(ids[:, None], (1,) * len(ids))
        states, kept = self._run(self._embed(batch, start=position), [Part(batch, (0,))], prefixes=prefixes, keep=True)
        return states[0], list(kept)

    def _alike(self, image: ImageKeysValues, texts: TextBatch | BegunTexts) -> list[tuple[ImageKeysValues, int]]:
        """Images with the same number of texts each."""
        if not len(texts) or len(texts) % len(image):
            raise VlmError(f"Q-Former: {len(texts)} texts for {len(image)} images; expected a multiple of them")
        return [(image, len(texts) // len(image))]

    @property
    def _alone(self) -> Part:
        """Queries that see themselves."""
        return Part(Rows(self.num_queries), (0,), queries=True)

    def _both(self, texts: TextBatch, mask: Tensor | None = None, text_output: bool = False) -> list[Part]:
        """Queries and texts that see each other; mask as in `joint_with_text`."""
        count = self.num_queries
        if mask is None and texts.padded:
            mask = F.pad(texts.mask, (count, 0), value=True)[:, None, None]  # [P, 1, 1, Q + T]
        masks = [mask, mask] if mask is None or mask.shape[2] == 1 else [mask[:, :, :count], mask[:, :, count:]]
        return [
            Part(Rows(count), (0, 1), queries=True, mask=masks[0]),
            Part(texts, (0, 1), mask=masks[1], read="all" if text_output else "none"),
        ]

    def _joint(
        self,
        groups: Sequence[tuple[ImageKeysValues, int]],
        texts: TextBatch | BegunTexts,
        mask: Tensor | None = None,
        text_output: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """States of queries [P,Q,D], and of texts [N,D] where wanted.

        groups: images, and how many texts each of them has. mask: as in `joint_with_text`.
        """
        if isinstance(texts, BegunTexts):
            parts, first = self._both(texts.texts), 1
            start = [self.layers[0].read_image(texts.queries, _looks(groups, 0)), texts.packed]
        else:
            parts, first = self._both(texts, mask, text_output), 0
            start = [self._start(len(texts)), *self._embed(texts)]
        states, _ = self._run(start, parts, groups, first=first)
        return states[0].unflatten(0, (-1, self.num_queries)), states[-1]

    def _run(
        self,
        states: list[Tensor],
        parts: Sequence[Part],
        groups: Sequence[tuple[ImageKeysValues, int]] = (),
        prefixes: Sequence[KeysValues] | None = None,
        keep: bool = False,
        first: int = 0,
    ) -> tuple[list[Tensor], tuple[KeysValues, ...]]:
        """All layers over packed states [N,D] of each part; with `keep`, the first part's keys and values in each.

        groups: images, and how many texts each of them has. prefixes: what all see in front of their own in each layer.
        first: the layer that the states stand before.
        """
        kept = []
        for number in range(first, len(self.layers)):
            prefix = prefixes[number] if prefixes is not None else None
            last = number == len(self.layers) - 1
            states, keys_values = self.layers[number](states, parts, _looks(groups, number), prefix, last)
            if keep:
                kept.append(keys_values[0])
        return states, tuple(kept)

    def _start(self, count: int) -> Tensor:
        """Embedded queries, packed: [Q,D], or [count*Q,D] where dropout makes them differ."""
        states = self.norm(self.query_tokens)
        if self.training and self.sizes.dropout:
            states = dropout(states.expand(count, -1, -1), self.sizes.dropout)
        return states.flatten(0, 1)

    def _embed(self, *texts: TextBatch, start: int = 0) -> list[Tensor]:
        """Embedded texts of each batch, packed [N,D]."""
        if self.embeddings is None:
            raise VlmError("this Q-Former was built without its text side, which only stage 2 can do without")
        longest = start + max(batch.ids.shape[1] for batch in texts)
        if longest > self.sizes.positions:
            raise VlmError(f"Q-Former: a text of {longest} tokens; it takes {self.sizes.positions}")
        ids = [batch.pack(batch.ids) for batch in texts]
        states = self.norm(self.embeddings(torch.cat(ids), torch.cat([batch.positions for batch in texts]) + start))
        states = dropout(states, self.sizes.dropout if self.training else 0.0)
        return list(states.split([len(x) for x in ids]))

    def _past(self, texts: TextBatch) -> Tensor:
        """Who sees whom where texts stand behind the queries: [1,1,T,Q+T]."""
        length = texts.ids.shape[1]
        past = torch.ones(length, length, dtype=torch.bool, device=texts.ids.device).tril()
        return F.pad(past, (self.num_queries, 0), value=True)[None, None]


def _looks(groups: Sequence[tuple[ImageKeysValues, int]], number: int) -> Looks:
    """What a layer sees of images that have so many texts each."""
    return [(*kv, each) for image, each in groups if (kv := image.layers[number]) is not None]


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
