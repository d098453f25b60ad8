"""The one record type that every reader yields and every objective and benchmark reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

IMAGE_PLACEHOLDER = "<image>"
# Stands for the word "<image>" in a message that only speaks of it: a private code point, so that nobody writes it.
QUOTED_PLACEHOLDER = "\U0010fffd"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `<image>` in the text marks where the next picture of the record goes."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """One sample. A reader fills what its format holds and leaves the rest empty.

    id: unique within its data set (VQA: the question id).
    images: paths of the pictures, in the order of the placeholders.
    captions: texts that each describe the first picture.
    question, answers: VQA; `answers` holds every human answer, the one to train on first.
    messages: a conversation, to be trained on its assistant turns.
    label: class name.
    meta: whatever else the format says and a metric may group by (`question_type`, `answer_type`, `image_id`, ...).
    """

    id: str
    images: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    question: str | None = None
    answers: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()
    label: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
