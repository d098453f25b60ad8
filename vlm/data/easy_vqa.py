"""easy-VQA (Zhou 2019): its reader, and what questions and answers tell about a picture: shape, colour, a caption."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vlm.data.parsing import Entry, Malformed, checked_text, each_entry, read_json_list
from vlm.data.records import Record

SHAPES = frozenset({"circle", "rectangle", "triangle"})
COLOURS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})


def question_type(question: str, answer: str) -> str:
    """`yes/no`, `color` or `shape`."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "color" if question.startswith("what color") or "the color of" in question else "shape"


def derive_caption(pairs: Iterable[tuple[str, str]]) -> str | None:
    """ "a blue circle" from all (question, answer) pairs of one picture; None if they leave colour or shape open.

    A picture holds one shape in one colour, so: an answer that is no yes or no is true of it, as is what such a
    question takes for granted ("what is the blue shape?"); yes/no answers confirm or rule out what they ask about; and
    the last one standing is true. Pairs that contradict each other give None.
    """
    possible = SHAPES | COLOURS
    for question, answer in pairs:
        words = set(re.findall(r"[a-z]+", question.lower()))
        named = words & (SHAPES | COLOURS)
        if answer in ("yes", "no"):
            negated = bool(words & {"no", "not"})
            holds = (answer == "yes") != negated
        else:
            named |= {answer} & (SHAPES | COLOURS)
            holds = True
        for word in named:
            kind = SHAPES if word in SHAPES else COLOURS
            possible -= (kind - {word}) if holds else {word}
    shapes, colours = possible & SHAPES, possible & COLOURS
    return f"a {min(colours)} {min(shapes)}" if len(shapes) == len(colours) == 1 else None


def read_easy_vqa(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """`SPLIT/questions.json`: [question, answer, image id] each, pictures in `SPLIT/images/ID.png`."""
    file = path / split / "questions.json"
    folder = images or path / split / "images"
    items = read_json_list(file)
    captions = _captions(items)

    def record(number: int, item: Any) -> Record:
        if not _is_triple(item):
            raise Malformed("expected [question, answer, image id]")
        question, answer, image = checked_text(item[0], "the question"), checked_text(item[1], "the answer"), item[2]
        caption = captions[image]
        return Record(
            id=f"{split}-{number}",
            images=(str(folder / f"{image}.png"),),
            captions=(caption,) if caption else (),
            question=question,
            answers=(answer,),
            meta={
                "question_type": question_type(question, answer),
                "answer_type": "yes/no" if answer in ("yes", "no") else "other",
                "image_id": image,
            },
        )

    yield from each_entry(file, items, record)


def read_easy_vqa_captions(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """The same files, a record a picture, of the pictures whose questions leave neither colour nor shape open."""
    folder = images or path / split / "images"
    for image, caption in _captions(read_json_list(path / split / "questions.json")).items():
        if caption is not None:
            yield Record(id=f"{split}-{image}", images=(str(folder / f"{image}.png"),), captions=(caption,))


def _captions(items: Iterable[Any]) -> dict[int, str | None]:
    """The caption of each picture, by its number."""
    pairs: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for item in items:
        if _is_triple(item):
            pairs[item[2]].append((item[0], item[1]))
    return {image: derive_caption(told) for image, told in pairs.items()}


def _is_triple(item: Any) -> bool:
    return isinstance(item, list) and [type(part) for part in item] == [str, str, int]
