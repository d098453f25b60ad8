"""Records become training samples: a picture (or a few) with the conversations about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vlm.data.records import Message, Record
from vlm.errors import VlmError
from vlm.recipe import DataSpec


@dataclass(frozen=True, slots=True)
class Sample:
    """What one place of a batch holds: pictures by path, and one or more conversations that show them."""

    id: str
    images: tuple[str, ...]
    conversations: tuple[tuple[Message, ...], ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """What the assistant says, turn by turn: of a captioned picture, its captions."""
        return tuple(turn.text for turns in self.conversations for turn in turns if turn.role == "assistant")


class Prompts(Protocol):
    """How a model asks: see `GenerativeModel.question_messages`."""

    def question_messages(self, question: str, answer: str | None = None) -> list[Message]: ...
    def caption_messages(self, caption: str | None = None) -> list[Message]: ...


def make_samples(records: Sequence[Record], spec: DataSpec, prompts: Prompts) -> list[Sample]:
    """Samples of records in their order; with `share_image`, one sample for all said about the same pictures."""
    said: dict[tuple[str, ...], dict[tuple[Message, ...], str]] = {}
    alone: list[Sample] = []
    for record in records:
        for conversation in _conversations(record, spec.use, prompts):
            if spec.share_image and record.images:
                # A caption repeated on every question of its picture is one conversation.
                said.setdefault(record.images, {}).setdefault(conversation, record.id)
            else:
                alone.append(Sample(record.id, record.images, (conversation,)))
    shared = [Sample(next(iter(texts.values())), images, tuple(texts)) for images, texts in said.items()]
    return shared + alone


def caption_samples(records: Sequence[Record], spec: DataSpec) -> list[Sample]:
    """One sample for each caption of a picture, as models that learn from pairs want it.

    Raises VlmError where the recipe asks for another use of the records.
    """
    if spec.use not in ("auto", "captions"):
        raise VlmError(f"data.train: use: {spec.use} is for generative models; this one learns from captions")
    return [
        Sample(record.id, record.images, ((Message("assistant", caption),),))
        for record in records
        for caption in record.captions
    ]


def only_caption(sample: Sample) -> str:
    """The caption of a pair. Raises VlmError for one that is empty, or does not go with exactly one picture."""
    if len(sample.images) != 1 or len(sample.texts) != 1:
        raise VlmError(f"expected one picture and one caption, got {len(sample.images)} and {len(sample.texts)}")
    if not sample.texts[0].strip():
        raise VlmError("the caption is empty")
    return sample.texts[0]


def _conversations(record: Record, use: str, prompts: Prompts) -> list[tuple[Message, ...]]:
    if use == "auto":
        use = "conversation" if record.messages else "vqa" if record.question else "captions"
    if use == "conversation" and record.messages:
        return [record.messages]
    if use == "vqa" and record.question and record.answers:
        return [tuple(prompts.question_messages(record.question, record.answers[0]))]
    if use == "captions":
        return [tuple(prompts.caption_messages(caption)) for caption in record.captions]
    return []
