"""Prefix language modelling: a random first part of a text is given, the rest learned (BLIP-2 with T5, section 3.2)."""

import hashlib
from dataclasses import replace
from typing import Any

from vlm.data.conversation import IMAGE_SLOT, TokenizedText

_WORD_MARKS = (
    "\N{LOWER ONE EIGHTH BLOCK}",
    "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}",
)  # sentencepiece, byte-level BPE


def split_text(text: TokenizedText, tokenizer: Any, draw: tuple[int, int]) -> TokenizedText:
    """`text` with the words before a random one no longer trained; `draw` alone decides which.

    Left as it is where words stand before the answer (something was asked) and where it has one word alone.
    """
    first = text.trained.index(True)
    if any(token != IMAGE_SLOT for token in text.ids[:first]):
        return text
    pieces = tokenizer.convert_ids_to_tokens(list(text.ids[first:]))
    starts = [first + i for i, piece in enumerate(pieces) if i and str(piece).startswith(_WORD_MARKS)]
    if not starts:
        return text
    digest = hashlib.blake2b(repr(draw).encode(), digest_size=8).digest()
    cut = starts[int.from_bytes(digest, "big") % len(starts)]
    trained = tuple(flag and i >= cut for i, flag in enumerate(text.trained))
    return replace(text, trained=trained)
