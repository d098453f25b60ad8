"""What a generative model is asked: messages, or a text taken as it is, as token ids with room for the answer."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

from vlm.backbones.language import LanguageModel
from vlm.bridges.qformer_init import QFormerTokenizer
from vlm.data.conversation import (
    TokenizedText,
    fit_prompt,
    stands_behind_picture,
    tokenize_conversation,
    tokenize_prompt_and_text,
)
from vlm.data.records import IMAGE_PLACEHOLDER, QUOTED_PLACEHOLDER, Message
from vlm.data.templates import answer_end
from vlm.errors import VlmError
from vlm.model_spec import GenerativeSpec, QFormerProjectionSpec
from vlm.models.generation import Prompt


class _Model(Protocol):
    spec: GenerativeSpec
    language_model: LanguageModel
    instruction_tokenizer: QFormerTokenizer | None

    def count_tokens(self, images: Sequence[Any]) -> list[int]: ...


class PromptWriter:
    """Prompts in a model's template, as long as its context allows."""

    def __init__(self, model: _Model) -> None:
        self._model = model

    def asking(self, turns: Sequence[Message], pictures: tuple[Any, ...], generation: dict[str, Any]) -> Prompt:
        """The prompt for the assistant's next turn; what is too long of it is cut, never through a picture."""
        spec, tokenizer = self._model.spec, self._model.language_model.tokenizer
        text = tokenize_conversation(turns, spec.template, tokenizer, add_generation_prompt=True)
        text = self.instructed(text, turns)
        check_places(text, len(pictures))
        return Prompt(self.fitted(text, pictures, generation, tail=self._tail), pictures)

    def verbatim(self, prompt: str, text: str) -> TokenizedText:
        """A prompt that is taken as it is, and what follows it; the prompt is the instruction."""
        tokenizer = self._model.language_model.tokenizer
        return self.instructed(
            tokenize_prompt_and_text(prompt, text, tokenizer, self._picture_first), [Message("user", prompt)]
        )

    def instructed(self, text: TokenizedText, messages: Sequence[Message]) -> TokenizedText:
        """`text` with what the user says as the instruction, where the bridge reads one."""
        if self._model.instruction_tokenizer is None:
            return text
        said = "\n".join(message.text for message in messages if message.role == "user")
        words = " ".join(said.replace(IMAGE_PLACEHOLDER, " ").replace(QUOTED_PLACEHOLDER, IMAGE_PLACEHOLDER).split())
        bridge = self._model.spec.bridge
        assert isinstance(bridge, QFormerProjectionSpec)
        (ids,) = self._model.instruction_tokenizer.ids([words], bridge.instruction_length)
        return replace(text, instruction=tuple(ids))

    def fitted(
        self, text: TokenizedText, pictures: Sequence[Any], generation: dict[str, Any], tail: int
    ) -> TokenizedText:
        """`text` cut in front of its last `tail` tokens, so that pictures and answer have room in the context."""
        room = self._model.language_model.context_length - int(generation.get("max_new_tokens") or 64)
        return fit_prompt(text, room - sum(self._model.count_tokens(pictures)) + text.num_images, tail)

    @cached_property
    def stops(self) -> dict[str, Any]:
        """What ends an answer: the end token that the template trains, or the text (plain: a line break)."""
        tokenizer: Any = self._model.language_model.tokenizer
        end = answer_end(self._model.spec.template, tokenizer)
        ids = tokenizer(end, add_special_tokens=False)["input_ids"] if end else []
        if len(ids) == 1 and ids[0] in tokenizer.all_special_ids:
            return {"eos_token_id": sorted({*self._model.language_model.stop_ids, *ids})}
        return {"stop_strings": [end]} if end else {}

    @cached_property
    def _picture_first(self) -> bool:
        """Whether the start token stands behind the picture, as this model learned it."""
        return stands_behind_picture(self._model.spec.template, self._model.language_model.tokenizer)

    @cached_property
    def _tail(self) -> int:
        """Tokens that the template puts behind the user's text: what two prompts with other texts end in alike."""
        spec, tokenizer = self._model.spec, self._model.language_model.tokenizer
        one, other = (
            tokenize_conversation([Message("user", word)], spec.template, tokenizer, True).ids for word in ("a", "b")
        )
        count = 0
        while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
            count += 1
        return count


def check_places(text: TokenizedText, pictures: int) -> None:
    """Raise VlmError unless `<image>` stands once for each picture."""
    if text.num_images != pictures:
        raise VlmError(f"`<image>` stands {_number(text.num_images, 'time')} for {_number(pictures, 'picture')}")


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
