"""Conversations about pictures: LLaVA's JSON."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from vlm.data.parsing import Entry, Malformed, checked_text, each_entry, file_of, need_mapping, read_json_list
from vlm.data.records import IMAGE_PLACEHOLDER, Message, Record

_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def read_llava_json(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """LLaVA's `[{id, image?, conversations: [{from, value}]}]`; `image` is a name or a list of names."""
    file = file_of(path, split, (".json",))
    folder = images or file.parent

    def record(number: int, item: Any) -> Record:
        need_mapping(item)
        names = item.get("image") or []
        names = names if isinstance(names, list) else [names]
        pictures = tuple(str(folder / checked_text(name, "`image`")) for name in names)
        turns = item.get("conversations")
        if not isinstance(turns, list):
            raise Malformed("no list `conversations`")
        messages = [_message(turn) for turn in turns]
        # As LLaVA does: a conversation starts with the human; what the assistant said before answers nothing.
        first = next((i for i, m in enumerate(messages) if m.role != "system"), 0)
        if messages and messages[first].role == "assistant":
            del messages[first]
        if not any(m.role == "assistant" for m in messages):
            raise Malformed("the assistant says nothing")
        marks = sum(m.text.count(IMAGE_PLACEHOLDER) for m in messages)
        if pictures and not marks:
            human = next((i for i, m in enumerate(messages) if m.role == "user"), None)
            if human is None:
                raise Malformed("no human turn to put the picture in")
            text = f"{IMAGE_PLACEHOLDER}\n" * len(pictures) + messages[human].text
            messages[human] = Message("user", text)
        elif marks != len(pictures):
            raise Malformed(f"{marks} placeholder(s) {IMAGE_PLACEHOLDER} for {len(pictures)} picture(s)")
        meta = {key: value for key, value in item.items() if key not in ("id", "image", "conversations")}
        return Record(id=str(item.get("id", number)), images=pictures, messages=tuple(messages), meta=meta)

    yield from each_entry(file, read_json_list(file), record)


def _message(turn: Any) -> Message:
    need_mapping(turn)
    role = turn.get("from")
    if not isinstance(role, str) or role not in _ROLES:
        raise Malformed(f"unknown speaker {role!r}; known: {', '.join(_ROLES)}")
    return Message(_ROLES[role], checked_text(turn.get("value"), f"what {role} says"))
