"""Chat templates: a conversation as text, with the spans of what the assistant says."""

import re
from collections.abc import Sequence
from typing import Any

from vlm.data.records import IMAGE_PLACEHOLDER, Message
from vlm.errors import VlmError, did_you_mean

_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def _quoted(text: str) -> str:
    """`text` as a string of jinja."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


# Name -> jinja text in the manner of transformers' chat templates; `{% generation %}` encloses what is trained.
# A new template is one entry. Tokens that a tokeniser puts in front of every text are added to these.
TEMPLATES: dict[str, str] = {
    # LLaVA stage 1: the user's words are dropped, the caption and its line break are trained.
    "plain": (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '\n' }}{% endgeneration %}"
        "{% elif m.role == 'user' %}{{ '<image>' * m.content.count('<image>') }}{% endif %}{% endfor %}"
    ),
    # BLIP-2 with OPT: picture, start token, text, line break. The start token carries loss where nothing was asked.
    "blip2_opt": (
        "{% set ns = namespace(words='') %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.words = m.content.replace('<image>', '').strip() %}{{ '<image>' * m.content.count('<image>') }}"
        "{% if ns.words or add_generation_prompt %}{{ (bos_token or '') + ns.words }}{% endif %}"
        "{% elif m.role == 'assistant' %}{% generation %}"
        "{{ (' ' if ns.words else bos_token or '') + m.content + '\n' }}{% endgeneration %}{% endif %}{% endfor %}"
    ),
    # BLIP-2 with T5: picture and user's words for the encoder, the answer for the decoder with its own end token.
    "blip2_t5": (
        "{% set ns = namespace(words='') %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.words = m.content.replace('<image>', '').strip() %}"
        "{{ '<image>' * m.content.count('<image>') + ns.words }}"
        "{% elif m.role == 'assistant' %}{% generation %}"
        "{{ (' ' if ns.words else '') + m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    ),
    # InstructBLIP with Vicuna: picture, start token, instruction, answer, end token.
    "instructblip": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<image>' * m.content.count('<image>') }}"
        "{{ (bos_token or '') if loop.first else ' ' }}{{ m.content.replace('<image>', '').strip() }}"
        "{% elif m.role == 'assistant' %}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}"
        "{% endif %}{% endfor %}"
    ),
    # MiniGPT-4, second stage: Vicuna v0's turns without its instructions, marks around the picture.
    "minigpt4": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "{{ ('###' if loop.first or messages[loop.index0 - 1].role == 'system' else '') + 'Human: ' }}"
        "{{ m.content.replace('<image>\n', '<image>').replace('<image>', '<Img><image></Img> ') + ' ###' }}"
        "{% else %}{{ 'Assistant: ' }}{% generation %}{{ m.content + '###' }}{% endgeneration %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    # Vicuna v0, of the first LLaVA, MiniGPT-4 and Multimodal-GPT: every turn ends in `###`.
    "vicuna_v0": (
        "{% if messages[0].role != 'system' %}{{ "
        + _quoted(_VICUNA_SYSTEM.replace("user", "human") + "###")
        + " }}{% endif %}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '###' }}"
        "{% elif m.role == 'user' %}{{ 'Human: ' + m.content + '###' }}"
        "{% else %}{{ 'Assistant: ' }}{% generation %}{{ m.content + '###' }}{% endgeneration %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    # LLaVA-1.5 (Vicuna v1.1).
    "vicuna_v1": (
        "{% if messages[0].role != 'system' %}{{ " + _quoted(_VICUNA_SYSTEM + " ") + " }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}"
        "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    # LLaVA with Llama 2 chat: the instructions stand inside the first user turn, each exchange is its own sequence.
    "llama_2": (
        "{% set ns = namespace(system="
        + _quoted(_LLAMA_2_SYSTEM)
        + ", first=true) %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}"
        "{% elif m.role == 'user' %}{% if ns.first %}"
        "{{ '[INST] <<SYS>>\n' + ns.system + '\n<</SYS>>\n\n' + m.content + ' [/INST]' }}{% set ns.first = false %}"
        "{% else %}{{ (bos_token or '') + '[INST] ' + m.content + ' [/INST]' }}{% endif %}"
        "{% else %}{{ ' ' }}{% generation %}{{ m.content + ' ' + eos_token }}{% endgeneration %}{% endif %}"
        "{% endfor %}"
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


def check_turns(messages: Sequence[Message], add_generation_prompt: bool = False) -> None:
    """Raises VlmError unless user and assistant take turns, the user first, behind at most one system message.

    add_generation_prompt: the assistant is to speak next, so the user must have spoken last.
    """
    for message in messages:
        if not message.text.strip():
            raise VlmError(f"a message of role {message.role!r} is empty")
    roles = [message.role for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if "system" in spoken:
        raise VlmError("a conversation has its one system message in front of all others")
    if not spoken or spoken[0] == "assistant":
        raise VlmError("a conversation starts with the user" + (", not with the assistant" if spoken else ""))
    for number, (before, after) in enumerate(zip(spoken, spoken[1:]), 2):
        if before == after:
            raise VlmError(f"turn {number} of a conversation is the {after}'s again: roles take turns")
    if add_generation_prompt and spoken[-1] != "user":
        raise VlmError("the assistant spoke last: there is nothing to answer")


def image_in_front(message: Message) -> Message:
    """A message's only picture moves to its front, as `<image>` and a line break (LLaVA); several stay in place."""
    if message.text.count(IMAGE_PLACEHOLDER) != 1 or message.text.startswith(IMAGE_PLACEHOLDER):
        return message
    words = message.text.replace(IMAGE_PLACEHOLDER, "").strip()
    return Message(message.role, f"{IMAGE_PLACEHOLDER}\n{words}".strip())


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


def answer_end(template: str, tokenizer: Any) -> str:
    """What a template puts behind an answer, as far as it is trained: `</s>`, `<|im_end|>`, `###`, a line break."""
    said = "Said."
    text, spans = render([Message("user", said), Message("assistant", said)], template, tokenizer)
    start, end = spans[-1]
    return text[start:end].rpartition(said)[2].lstrip(" ")
