"""What passes of the Q-Former leave behind for others: images' keys and values, queries' states, texts begun."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.bridges.qformer_layers import KeysValues
from vlm.data.text_batch import TextBatch
from vlm.data.unique_rows import take_rows


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

    def select(self, rows: Sequence[int]) -> "ImageKeysValues":
        """The images of these numbers, in this order."""
        if list(rows) == list(range(len(self))):
            return self
        keys = next(layer[0] for layer in self.layers if layer is not None)
        index = torch.tensor(rows, dtype=torch.long, device=keys.device)
        take = take_rows if len(set(rows)) == len(rows) else _select
        return ImageKeysValues(tuple(layer and (take(layer[0], index), take(layer[1], index)) for layer in self.layers))

    def split(self, sizes: Sequence[int]) -> list["ImageKeysValues"]:
        """So many images each, one behind the other."""
        if len(sizes) == 1:
            return [self]
        parts: list[list[KeysValues | None]] = [[] for _ in sizes]
        for layer in self.layers:
            pieces = zip(*(x.split(list(sizes)) for x in layer)) if layer is not None else [None] * len(sizes)
            for part, piece in zip(parts, pieces):
                part.append(piece)
        return [ImageKeysValues(tuple(part)) for part in parts]


@dataclass(frozen=True)
class QueryStates:
    """Output of the queries alone [B,Q,D], and each layer's self-attention keys and values, which texts may see."""

    states: Tensor
    keys_values: tuple[KeysValues, ...]

    def select(self, rows: Sequence[int]) -> "QueryStates":
        """The images of these numbers, in this order. Layers that are the same for all images stay as they are."""
        index = torch.tensor(rows, dtype=torch.long, device=self.states.device)
        several = len(self.states) > 1
        chosen = tuple(
            (_select(keys, index), _select(values, index)) if several and len(keys) > 1 else (keys, values)
            for keys, values in self.keys_values
        )
        return QueryStates(_select(self.states, index), chosen)


@dataclass(frozen=True)
class BegunTexts:
    """Texts and queries that saw each other in the first layer, and no image yet.

    queries: behind the first layer's self-attention [T,Q,D]. states: of the texts behind the first layer [T,L,D].
    """

    texts: TextBatch
    queries: Tensor
    states: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each text."""
        return self.texts.lengths

    @property
    def packed(self) -> Tensor:
        """States of the real tokens alone [N,D]."""
        return self.texts.pack(self.states)

    def select(self, rows: Sequence[int]) -> "BegunTexts":
        """The texts of these numbers, in this order, cut to the longest of them."""
        texts = self.texts.select(rows)
        index = torch.tensor(rows, dtype=torch.long, device=self.queries.device)
        states = _select(self.states, index)[:, : texts.ids.shape[1]]
        return BegunTexts(texts, _select(self.queries, index), states)


def _select(values: Tensor, places: Tensor) -> Tensor:
    return values.index_select(0, places)
