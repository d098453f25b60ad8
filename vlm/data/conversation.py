"""Conversations as token ids: chat templates, exact loss masks, the picture's place."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vlm.data.records import IMAGE_PLACEHOLDER, Message
from vlm.errors import VlmError, did_you_mean

IMAGE_SLOT = -1  # stands in a list of token ids where one picture's tokens go

_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# Name -> jinja text in the manner of transformers' chat templates; `{% generation %}` encloses what is trained.
# A new template is one entry. Tokens that a tokeniser puts in front of every text are added to these.
TEMPLATES: dict[str, str] = {
    # LLaVA stage 1: the user's words are dropped, the caption and its line break are trained.
    "plain": (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '\n' }}{% endgeneration %}"
        "{% elif m.role == 'user' %}{{ '<image>' * m.content.count('<image>') }}{% endif %}{% endfor %}"
    ),
    # LLaVA-1.5 (Vicuna v1.1).
    "vicuna_v1": (
        "{% if messages[0].role != 'system' %}{{ '" + _VICUNA_SYSTEM.replace("'", "\\'") + " ' }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}"
        "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # The fewest tokens around a question: start token, text, line break, answer, end token.
    "compact": (
        "{{ bos_token or '' }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + '\n' }}{% endif %}"
        "{% endfor %}"
    ),
}


@dataclass(frozen=True)
class TokenizedText:
    """Token ids with `IMAGE_SLOT` at each picture's place; `trained[i]` says whether token i carries loss."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    @property
    def num_images(self) -> int:
        """How many pictures the text shows."""
        return self.ids.count(IMAGE_SLOT)


def resolve_template(template: str, tokenizer: Any) -> str:
    """The jinja text that `template` means: a name of TEMPLATES, `tokenizer`, or jinja text itself.

    Raises VlmError for an unknown name, or if the tokeniser has no chat template of its own.
    """
    if template in TEMPLATES:
        return TEMPLATES[template]
    if template == "tokenizer":
        if not tokenizer.chat_template:
            raise VlmError(f"template `tokenizer`: this tokeniser has no chat template; name one of {list(TEMPLATES)}")
        return str(tokenizer.chat_template)
    if "{%" in template or "{{" in template:
        return template
    raise VlmError(f"unknown template {template!r}{did_you_mean(template, [*TEMPLATES, 'tokenizer'])}")


def render(
    messages: Sequence[Message], template: str, tokenizer: Any, add_generation_prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, with the character spans [start, end) of what the assistant says.

    Spans come from the template's `{% generation %}` blocks. A template without them is rendered turn by turn, each
    rendering being a prefix of the next; the span then ends with the end token. Raises VlmError if that fails.
    """
    jinja = resolve_template(template, tokenizer)
    if re.search(r"\{%-?\s*generation\s*-?%\}", jinja):
        return _render(messages, jinja, tokenizer, add_generation_prompt, spans=True)
    text, _ = _render(messages, jinja, tokenizer, add_generation_prompt)
    spans = []
    for turn, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before, _ = _render(messages[:turn], jinja, tokenizer, add_generation_prompt=True)
        until, _ = _render(messages[: turn + 1], jinja, tokenizer, add_generation_prompt=False)
        if not (until.startswith(before) and text.startswith(until)):
            raise VlmError(
                "this chat template rewrites earlier turns, so what the assistant said cannot be told from its text: "
                "give `template` as jinja with {% generation %} blocks"
            )
        end_token = tokenizer.eos_token or ""
        cut = until.rfind(end_token, len(before)) if end_token else -1
        spans.append((len(before), cut + len(end_token) if cut >= 0 else len(until)))
    return text, spans


def _render(
    messages: Sequence[Message], jinja: str, tokenizer: Any, add_generation_prompt: bool, spans: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, indices = render_jinja_template(
            conversations=[[{"role": m.role, "content": m.text} for m in messages]],
            chat_template=jinja,
            return_assistant_tokens_mask=spans,
            add_generation_prompt=add_generation_prompt,
            **{k: getattr(tokenizer, k) or "" for k in ("bos_token", "eos_token", "pad_token", "unk_token")},
        )
    except TemplateError as error:
        raise VlmError(f"the chat template refuses this conversation: {error}") from error
    return texts[0], [tuple(span) for span in indices[0]] if spans else []


def tokenize_conversation(
    messages: Sequence[Message],
    template: str,
    tokenizer: Any,
    add_generation_prompt: bool = False,
) -> TokenizedText:
    """A conversation as token ids; the assistant's tokens, end token included, are marked as trained.

    The tokeniser reads the whole rendered text at once, so that ids are those of inference.
    Raises VlmError if a message is empty or nothing is left to train on.
    """
    for message in messages:
        if not message.text.strip():
            raise VlmError(f"a message of role {message.role!r} is empty")
    text, spans = render(messages, template, tokenizer, add_generation_prompt)
    tokens = _tokenize(text, tokenizer, spans)
    if template != "tokenizer":
        tokens = _with_prefix(tokens, tokenizer)
    return tokens


def tokenize_prompt_and_text(prompt: str, text: str, tokenizer: Any) -> TokenizedText:
    """A verbatim prompt and what follows it as one string, the tokens of `text` marked as trained.

    One space stands between the two unless the prompt is empty or ends in white space. `<image>` marks the picture's
    place, in front where absent. The tokeniser adds its own special tokens.
    """
    if IMAGE_PLACEHOLDER not in prompt:
        prompt = IMAGE_PLACEHOLDER + prompt
    bare = prompt.endswith((IMAGE_PLACEHOLDER, " ", "\n", "\t"))
    joined = prompt + (text if bare or not text else " " + text)
    span = (len(prompt), len(joined))
    return _with_prefix(_tokenize(joined, tokenizer, [span] if text else []), tokenizer)


def _tokenize(text: str, tokenizer: Any, spans: Sequence[tuple[int, int]]) -> TokenizedText:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    ids = tuple(IMAGE_SLOT if i == image_id else i for i in encoded["input_ids"])
    # A token that overlaps a span is trained: a tokeniser may glue the space before the answer to its first word.
    trained = tuple(
        end > start and any(start < b and end > a for a, b in spans) for start, end in encoded["offset_mapping"]
    )
    return TokenizedText(ids, trained)


def _with_prefix(tokens: TokenizedText, tokenizer: Any) -> TokenizedText:
    prefix = special_prefix(tokenizer)
    if not prefix or tokens.ids[: len(prefix)] == prefix:
        return tokens
    return TokenizedText(prefix + tokens.ids, (False,) * len(prefix) + tokens.trained)


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
    return TokenizedText(tokens.ids[:start] + tokens.ids[stop:], tokens.trained[:start] + tokens.trained[stop:])
