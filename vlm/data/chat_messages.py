"""Messages as users write them, `[{role, content: [{type: image, image: ...}, {type: text, text: ...}]}]`."""

from typing import Any

from vlm.data.records import IMAGE_PLACEHOLDER, Message
from vlm.errors import VlmError


def read_message(message: dict[str, Any]) -> tuple[Message, list[Any]]:
    """One message as text with a placeholder for each picture, and its pictures. Raises VlmError for anything else."""
    if not isinstance(message, dict):
        raise VlmError(f"chat: a message is {{role: ..., content: ...}}, got {type(message).__name__}")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or message.get("role") not in ("system", "user", "assistant"):
        raise VlmError("chat: a message is {role: system|user|assistant, content: text or a list of parts}")
    text, pictures = "", []
    for part in parts:
        if not isinstance(part, dict):
            raise VlmError(f"chat: a part is {{type: image|text, ...}}, got {type(part).__name__}")
        if part.get("type") == "image" and "image" in part:
            text += IMAGE_PLACEHOLDER + "\n"
            pictures.append(part["image"])
        elif part.get("type") == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        else:
            raise VlmError("chat: a part is {type: image, image: ...} or {type: text, text: ...}")
    return Message(message["role"], text), pictures
