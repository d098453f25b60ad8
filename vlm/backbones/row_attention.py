"""Attention over rows of a batch while all else in a language model runs on its real tokens alone.

A batch of rows [B,T] of unequal length is mostly linear layers, and these need no rows: tokens go through the network
as one sequence [1,N] without padding, and only attention lays them out as rows.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vlm.data.unique_rows import put_rows, take_rows

NAME = "vlm_rows"  # of this attention in transformers' table


@dataclass(frozen=True)
class Rows:
    """Where packed tokens lie: places [N] in the flattened rows [B*T]; who sees whom, [B,1,T,T], or causal if None."""

    places: Tensor
    shape: tuple[int, int]
    mask: Tensor | None

    def pack(self, padded: Tensor) -> Tensor:
        """Rows [B,T,...] to their real tokens as one sequence [1,N,...]."""
        return take_rows(padded.flatten(0, 1), self.places)[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """One sequence [1,N,...] to rows [B,T,...], zeros where there is no token."""
        batch, length = self.shape
        return put_rows(packed[0], self.places, batch * length).unflatten(0, self.shape)


def make_rows(lengths: tuple[int, ...], mask: Tensor) -> Rows:
    """Rows of these lengths. mask: [B,T] of right-padded texts, or [B,1,T,T] boolean."""
    width = mask.shape[-1]
    places = [row * width + column for row, length in enumerate(lengths) for column in range(length)]
    index = torch.tensor(places).to(mask.device, non_blocking=True)
    return Rows(index, (len(lengths), width), mask if mask.ndim == 4 else None)


@cache
def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, row_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def use_row_attention(network: Any) -> bool:
    """Let a decoder of transformers take `rows` in its forward pass, in place; False where it cannot.

    It has to call attention through transformers' table and to pass options on to it.
    """
    config = network.config
    if config._attn_implementation != "sdpa" or not getattr(network, "_supports_attention_backend", False):
        return False
    _register()
    network.set_attn_implementation(NAME)
    return True


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    rows: Rows | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """transformers' SDPA attention; of packed query, key and value [1,H,N,d] where `rows` says how they lie."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    # Padding lies behind the tokens, so causal attention never sees it.
    query, key, value = (rows.unpack(t.transpose(1, 2)).transpose(1, 2) for t in (query, key, value))  # [B,H,T,d]
    attended, _ = sdpa_attention_forward(module, query, key, value, rows.mask, **options)
    return rows.pack(attended), None
