"""Records become training samples: a picture (or a few) with the conversations about it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from vlm.data.records import Message, Record
from vlm.errors import VlmError
from vlm.recipe import DataSpec


@dataclass(frozen=True, slots=True)
class Sample:
    """What one place of a batch holds: pictures by path, and one or more conversations that show them.

    wordings: other texts of the user, of which one is drawn for each conversation (`DataSpec.prompts`); asked: the
    question, or the answer, that goes into them.
    """

    id: str
    images: tuple[str, ...]
    conversations: tuple[tuple[Message, ...], ...]
    wordings: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()

    def worded(self, draw: int) -> "Sample":
        """The same with the wordings that `draw` decides; its own where there are none to choose from."""
        if not self.wordings:
            return self
        chosen = []
        for number, (asked, turns) in enumerate(zip(self.asked, self.conversations)):
            digest = hashlib.blake2b(f"{draw} {number}".encode(), digest_size=8).digest()
            wording = self.wordings[int.from_bytes(digest, "big") % len(self.wordings)]
            chosen.append((Message("user", _fill(wording, asked)), *turns[1:]))
        return replace(self, conversations=tuple(chosen))

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
    said: dict[tuple[str, ...], dict[tuple[Message, ...], tuple[str, str]]] = {}
    alone: list[Sample] = []
    for record in records:
        for conversation, asked in _conversations(record, spec, prompts):
            if spec.share_image and record.images:
                # A caption repeated on every question of its picture is one conversation.
                said.setdefault(record.images, {}).setdefault(conversation, (record.id, asked))
            else:
                alone.append(Sample(record.id, record.images, (conversation,), spec.prompts, (asked,)))
    shared = [
        Sample(next(iter(texts.values()))[0], images, tuple(texts), spec.prompts, tuple(a for _, a in texts.values()))
        for images, texts in said.items()
    ]
    return shared + alone


def caption_samples(records: Sequence[Record], spec: DataSpec) -> list[Sample]:
    """One sample for each caption of a picture, as models that learn from pairs want it.

    Raises VlmError where the recipe asks for another use of the records.
    """
    if spec.use not in ("auto", "captions"):
        raise VlmError(f"data.train: use: {spec.use} is for generative models; this one learns from captions")
    if spec.prompts:
        raise VlmError("data.train: prompts: are for generative models; this one is asked nothing")
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


def _conversations(record: Record, spec: DataSpec, prompts: Prompts) -> list[tuple[tuple[Message, ...], str]]:
    """Conversations about a record, each with what goes into the wordings of `spec`."""
    use = spec.use
    if use == "auto":
        use = "conversation" if record.messages else "vqa" if record.question else "captions"
    if use == "conversation" and record.messages:
        return [(record.messages, "")]
    pairs: list[tuple[str, str]] = []  # what is asked with, and what is said
    if use == "captions":
        pairs = [("", caption) for caption in record.captions]
    elif use == "vqa" and record.question and record.answers:
        pairs = [(record.question, record.answers[0])]
    elif use == "questions" and record.question and record.answers:
        pairs = [(record.answers[0], record.question)]

    def messages(asked: str, said: str) -> tuple[Message, ...]:
        if spec.prompts:
            return Message("user", _fill(spec.prompts[0], asked)), Message("assistant", said)
        return tuple(prompts.question_messages(asked, said) if use == "vqa" else prompts.caption_messages(said))

    return [(messages(asked, said), asked) for asked, said in pairs]


def _fill(wording: str, asked: str) -> str:
    return wording.replace("{question}", asked).replace("{answer}", asked)
