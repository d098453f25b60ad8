"""A checkpoint that holds a whole vision-language model, taken apart by a table of its keys."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlm.errors import VlmError

Part = Literal["vision", "bridge", "language"]

# Buffers that every model computes anew.
_BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|embeddings\.position_ids)")


@dataclass(frozen=True)
class KeyTable:
    """Pattern of a key -> (part, key there); the first that fits counts. model: what has such keys, for messages."""

    model: str
    rows: tuple[tuple[str, Part, str], ...]
    prefix: str = ""  # of a wrapper, left out where a key has it

    def part_of(self, tensors: Iterable[tuple[str, Tensor]], part: Part, where: str) -> dict[str, Tensor]:
        """The tensors of a part by the key that it has there. Raises VlmError that names keys which belong nowhere."""
        state: dict[str, Tensor] = {}
        unknown: list[str] = []
        for key, tensor in tensors:
            if _BUFFERS.fullmatch(key):
                continue
            owner, name = self._place(key)
            if owner is None:
                unknown.append(key)
            if owner == part:
                state[name] = tensor
        if unknown:
            raise VlmError(f"{where}: keys that no {self.model} has: {', '.join(sorted(unknown)[:5])}")
        return state

    def _place(self, key: str) -> tuple[Part | None, str]:
        for pattern, part, name in self.rows:
            if match := re.fullmatch(pattern, key.removeprefix(self.prefix)):
                return part, match.expand(name)
        return None, key
