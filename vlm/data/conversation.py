"""Conversations as token ids: exact loss masks, the picture's place."""

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from vlm.data.records import IMAGE_PLACEHOLDER, QUOTED_PLACEHOLDER, Message
from vlm.data.templates import check_turns, image_in_front, render
from vlm.errors import VlmError

IMAGE_SLOT = -1  # stands in a list of token ids where one picture's tokens go
_SENTINELS = 0x100000  # private code points: one stands for each special token's text that a message holds


@dataclass(frozen=True)
class TokenizedText:
    """Token ids with `IMAGE_SLOT` at each picture's place; `trained[i]` says whether token i carries loss.

    instruction: what a Q-Former that follows instructions reads of it, as its own tokeniser's ids.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    instruction: tuple[int, ...] = ()

    @property
    def num_images(self) -> int:
        """How many pictures the text shows."""
        return self.ids.count(IMAGE_SLOT)


def tokenize_conversation(
    messages: Sequence[Message],
    template: str,
    tokenizer: Any,
    add_generation_prompt: bool = False,
) -> TokenizedText:
    """A conversation as token ids; the assistant's tokens, end token included, are marked as trained.

    The tokeniser reads the whole rendered text at once, so that ids are those of inference. A picture's place never
    carries loss. What a message says of special tokens (`</s>` in an answer) stays text: only the template sets them.
    Raises VlmError if roles do not take turns or a message is empty.
    """
    check_turns(messages, add_generation_prompt)
    moved, literals = _with_sentinels([image_in_front(message) for message in messages], tokenizer)
    text, spans = render(moved, template, tokenizer, add_generation_prompt)
    tokens = _tokenize(text, tokenizer, spans, literals)
    if template != "tokenizer":
        tokens = _with_prefix(tokens, tokenizer)
    return tokens


def _with_sentinels(messages: Sequence[Message], tokenizer: Any) -> tuple[list[Message], dict[str, str]]:
    """Messages with a private character for each special token's text, and what each of these stands for."""
    pattern = _special_texts(tokenizer)
    quoted = any(QUOTED_PLACEHOLDER in message.text for message in messages)
    literals = {QUOTED_PLACEHOLDER: IMAGE_PLACEHOLDER} if quoted else {}
    if pattern is None or not any(pattern.search(message.text) for message in messages):
        return list(messages), literals
    taken = set().union({QUOTED_PLACEHOLDER}, *(message.text for message in messages))
    free = (c for c in map(chr, range(_SENTINELS, 0x110000)) if c not in taken)

    def sentinel(found: re.Match[str]) -> str:
        character = next(free)
        literals[character] = found[0]
        return character

    return [Message(message.role, pattern.sub(sentinel, message.text)) for message in messages], literals


@lru_cache(maxsize=16)
def _special_texts(tokenizer: Any) -> re.Pattern[str] | None:
    """What a tokeniser would read as a special token, `<image>` aside."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts = (added | set(tokenizer.all_special_tokens)) - {IMAGE_PLACEHOLDER}
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None


def tokenize_prompt_and_text(prompt: str, text: str, tokenizer: Any, picture_first: bool = False) -> TokenizedText:
    """A verbatim prompt and what follows it as one string, the tokens of `text` marked as trained.

    One space stands between the two unless the prompt is empty or ends in white space. `<image>` marks the picture's
    place, in front where absent. The tokeniser adds its own special tokens, with
    `picture_first` behind the picture.
    """
    if IMAGE_PLACEHOLDER not in prompt:
        prompt = IMAGE_PLACEHOLDER + prompt
    bare = prompt.endswith((IMAGE_PLACEHOLDER, " ", "\n", "\t"))
    joined = prompt + (text if bare or not text else " " + text)
    span = (len(prompt), len(joined))
    return _with_prefix(_tokenize(joined, tokenizer, [span] if text else []), tokenizer, picture_first)


@lru_cache(maxsize=16)
def _literal_reader(tokenizer: Any) -> Any:
    """A copy that reads special tokens as text: the switch lies in the tokeniser, which threads share."""
    return deepcopy(tokenizer)


def _tokenize(
    text: str, tokenizer: Any, spans: Sequence[tuple[int, int]], literals: dict[str, str] | None = None
) -> TokenizedText:
    """Token ids of a text, trained where they overlap a span; `literals` says what sentinel characters stand for."""
    literals = literals or {}
    pieces = re.split(f"([{''.join(literals)}])", text) if literals else [text]
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    ids: list[int] = []
    trained: list[bool] = []
    start = 0
    for piece in pieces:
        literal = literals.get(piece)
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "return_attention_mask": False}
        options["verbose"] = False  # no warning of texts longer than the context: those are cut later
        if literal is None:
            encoded = tokenizer(piece, **options)
        else:
            encoded = _literal_reader(tokenizer)(literal, split_special_tokens=True, **options)
        for token, (a, b) in zip(encoded["input_ids"], encoded["offset_mapping"]):
            # A token that overlaps a span is trained: a tokeniser may glue the space before the answer to its first
            # word. All of a literal lies where its sentinel lies.
            first, last = (start, start + 1) if literal else (start + a, start + b)
            inside = b > a and any(first < end and last > begin for begin, end in spans)
            ids.append(IMAGE_SLOT if token == image_id else token)
            trained.append(inside and token != image_id)
        start += len(piece)
    return TokenizedText(tuple(ids), tuple(trained))


def _with_prefix(tokens: TokenizedText, tokenizer: Any, picture_first: bool = False) -> TokenizedText:
    prefix = special_prefix(tokenizer)
    start = next((i for i, token in enumerate(tokens.ids) if token != IMAGE_SLOT), 0)
    if not prefix or tokens.ids[start : start + len(prefix)] == prefix:  # also behind the picture: BLIP-2 with OPT
        return tokens
    at = start if picture_first else 0
    trained = (*tokens.trained[:at], *(False,) * len(prefix), *tokens.trained[at:])
    return TokenizedText((*tokens.ids[:at], *prefix, *tokens.ids[at:]), trained)


def stands_behind_picture(template: str, tokenizer: Any) -> bool:
    """Whether a template puts the tokeniser's start token behind the picture (BLIP-2) rather than in front of all."""
    prefix = special_prefix(tokenizer)
    ids = tokenize_conversation([Message("user", f"{IMAGE_PLACEHOLDER}\na")], template, tokenizer, True).ids
    return bool(prefix) and ids[: 1 + len(prefix)] == (IMAGE_SLOT, *prefix)


@lru_cache(maxsize=16)
def special_prefix(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that a tokeniser puts in front of every text: () for GPT-2, (bos,) for Llama, ..."""
    probe = "a"
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return ()


def fit_prompt(tokens: TokenizedText, limit: int, tail: int) -> TokenizedText:
    """`tokens` cut to `limit` ids by leaving out the end of the user's text, never a picture or the last `tail` ids.

    Raises VlmError if the pictures alone do not fit.
    """
    excess = len(tokens.ids) - limit
    if excess <= 0:
        return tokens
    last_slot = max((i for i, t in enumerate(tokens.ids) if t == IMAGE_SLOT), default=-1)
    stop = max(len(tokens.ids) - tail, last_slot + 1)
    start = stop - excess
    if start <= last_slot:
        raise VlmError(f"the pictures of a prompt do not fit into {limit} tokens: use fewer image tokens")
    ids, trained = tokens.ids, tokens.trained
    return replace(tokens, ids=ids[:start] + ids[stop:], trained=trained[:start] + trained[stop:])
