"""A picture of what a retrieval model finds: a row for each query text, its best pictures beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.data.images import load_image
from vlm.errors import VlmError

CELL, LABEL, GAP = 112, 260, 8  # pixels


def write_contact_sheet(model: Any, texts: Sequence[str], images: Sequence[str], path: Path, top: int = 5) -> Path:
    """Write a PNG: each text with the `top` of `images` (paths) whose embeddings are nearest, best first.

    model: with `encode_image` and `encode_text` (dual encoder, Q-Former). Where a picture is the text's own is not
    marked: judging is what benchmarks do. Raises VlmError if there are no texts or no pictures.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not texts or not images:
        raise VlmError(f"a contact sheet needs texts and pictures, got {len(texts)} and {len(images)}")
    image, text = model.encode_image(list(images)), model.encode_text(list(texts))  # [N,E] or [N,Q,E], [T,E]
    scores = image @ text.T  # [N, T] or [N, Q, T]
    best = (scores.amax(1) if scores.ndim == 3 else scores).T.topk(min(top, len(images))).indices.tolist()
    height, width = CELL + GAP, LABEL + min(top, len(images)) * (CELL + GAP)
    sheet = Image.new("RGB", (width, height * len(texts) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(16)
    for row, (query, found) in enumerate(zip(texts, best)):
        y = GAP + row * height
        draw.text((GAP, y + CELL // 2), _shortened(query, draw, font), fill="black", font=font, anchor="lm")
        for column, number in enumerate(found):
            picture = load_image(images[number])
            picture.thumbnail((CELL, CELL))
            sheet.paste(picture, (LABEL + column * (CELL + GAP), y))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _shortened(text: str, draw: Any, font: Any) -> str:
    """The text cut to the width of its column."""
    if draw.textlength(text, font=font) <= LABEL - 2 * GAP:
        return text
    while text and draw.textlength(text + "…", font=font) > LABEL - 2 * GAP:
        text = text[:-1]
    return text + "…"
