"""Texts as token ids in one batch, of which padding is never computed on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from vlm.data.unique_rows import put_rows, take_rows
from vlm.errors import VlmError


@dataclass(frozen=True)
class TextBatch:
    """Token ids padded on the right to the longest text.

    ids: int64 [B,T]. lengths: tokens of each text, at least 1; known outside the device, so that nothing has to wait
    for it. Tensors over real tokens alone ("packed", [N,D] with N the sum of lengths) go through linear layers; padded
    ones ([B,T,D]) through attention.
    """

    ids: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or len(self.ids) != len(self.lengths):
            raise VlmError(f"token ids {list(self.ids.shape)} do not fit {len(self.lengths)} texts")
        if self.lengths and not (min(self.lengths) >= 1 and max(self.lengths) <= self.ids.shape[1]):
            raise VlmError("a text has no tokens, or more than its row holds")

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], pad: int = 0, device: torch.device | str | None = None) -> "TextBatch":
        """A batch of lists of token ids."""
        longest = max(map(len, texts), default=0)
        rows = [[*text, *[pad] * (longest - len(text))] for text in texts]
        return cls(torch.tensor(rows, dtype=torch.long, device=device), tuple(map(len, texts)))

    @classmethod
    def from_mask(cls, ids: Tensor, mask: Tensor) -> "TextBatch":
        """Ids [B,T] and mask [B,T] (1: a token, 0: padding, on the right), cut to the longest text.

        Raises VlmError for padding elsewhere.
        """
        lengths = tuple(int(n) for n in mask.sum(1).tolist())
        batch = cls(ids[:, : max(lengths, default=0)], lengths)
        if not torch.equal(batch.mask.to(mask.device), mask[:, : batch.ids.shape[1]].bool()):
            raise VlmError("texts must be padded on the right")
        return batch

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str) -> "TextBatch":
        """The same on another device."""
        return TextBatch(self.ids.to(device), self.lengths)

    def select(self, rows: Sequence[int]) -> "TextBatch":
        """The texts of these numbers, in this order, cut to the longest of them."""
        lengths = tuple(self.lengths[row] for row in rows)
        index = torch.tensor(rows, dtype=torch.long, device=self.ids.device)
        return TextBatch(self.ids[index, : max(lengths, default=0)], lengths)

    def with_first(self, token: int) -> "TextBatch":
        """The same texts with another first token."""
        ids = self.ids.clone()
        ids[:, 0] = token
        return TextBatch(ids, self.lengths)

    def without_last(self) -> "TextBatch":
        """The same texts, each of at least two tokens, without its last token."""
        return TextBatch(self.ids[:, :-1], tuple(length - 1 for length in self.lengths))

    def next_tokens(self) -> Tensor:
        """The token behind each of those that `without_last` leaves, packed [N]."""
        return self.without_last().pack(self.ids[:, 1:])

    @property
    def padded(self) -> bool:
        """Whether any text is shorter than the longest."""
        return any(length != self.ids.shape[1] for length in self.lengths)

    @cached_property
    def mask(self) -> Tensor:
        """True where there is a token [B,T]."""
        lengths = torch.tensor(self.lengths, device=self.ids.device)
        return torch.arange(self.ids.shape[1], device=self.ids.device) < lengths[:, None]

    @cached_property
    def places(self) -> Tensor:
        """Where the real tokens lie in the flattened batch [N]."""
        width = self.ids.shape[1]
        places = [row * width + column for row, length in enumerate(self.lengths) for column in range(length)]
        return torch.tensor(places, dtype=torch.long, device=self.ids.device)

    @cached_property
    def starts(self) -> Tensor:
        """Where each text begins in the packed batch [B]."""
        return torch.tensor([0, *accumulate(self.lengths)][:-1], dtype=torch.long, device=self.ids.device)

    @cached_property
    def positions(self) -> Tensor:
        """Place of each real token in its text, from 0 [N]."""
        return self.places % self.ids.shape[1]

    def pack(self, padded: Tensor) -> Tensor:
        """Rows [B,T,...] of the real tokens alone [N,...]."""
        flat = padded.flatten(0, 1)
        return take_rows(flat, self.places) if self.padded else flat

    def unpack(self, packed: Tensor) -> Tensor:
        """Rows [N,...] of real tokens in their places [B,T,...], zeros elsewhere."""
        if not self.padded:
            return packed.unflatten(0, tuple(self.ids.shape))
        return put_rows(packed, self.places, self.ids.numel()).unflatten(0, tuple(self.ids.shape))
