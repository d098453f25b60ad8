"""Questions to answer with yes or no: POPE, and MME as its authors pass it on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.data.parsing import PICTURE_SUFFIXES, BrokenRecord, Entry, Malformed, checked_text, need_mapping
from vlm.data.readers.coco import picture_place
from vlm.data.records import Record
from vlm.errors import VlmError

POPE_CATEGORIES = ("random", "popular", "adversarial")


def read_pope(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """POPE (Li et al. 2023): a line `{question_id, image, text, label}` a question, a file for each category.

    path: one file, or the folder of `coco_pope_random.json`, `..._popular.json`, `..._adversarial.json`. split: a
    category; of the folder, any other takes all three, with ids `random-1`.
    """
    if not path.is_dir():
        category = next((name for name in POPE_CATEGORIES if name in path.stem), split)
        yield from _pope_file(path, category, "", images)
        return
    for category in (split,) if split in POPE_CATEGORIES else POPE_CATEGORIES:
        files = sorted(path.glob(f"*pope_{category}.json*"))
        if not files:
            raise VlmError(f"{path}: no file like coco_pope_{category}.json")
        yield from _pope_file(files[0], category, "" if split == category else f"{category}-", images)


def _pope_file(file: Path, category: str, prefix: str, images: Path | None) -> Iterator[Entry]:
    place = picture_place(images or file.parent)
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                item: Any = json.loads(line)
                need_mapping(item)
                label = item.get("label")
                if label not in ("yes", "no", None):
                    raise Malformed(f"`label` is {label!r}, expected yes or no")
                yield Record(
                    id=f"{prefix}{item.get('question_id', number)}",
                    images=(place(checked_text(item.get("image"), "`image`"), ""),),
                    question=checked_text(item.get("text"), "`text`").strip(),
                    answers=(label,) if label else (),
                    meta={"category": category},
                )
            except (ValueError, RecursionError) as error:
                yield BrokenRecord(f"{file}:{number}", f"not valid JSON: {error}")
            except Malformed as error:
                yield BrokenRecord(f"{file}:{number}", str(error))


def read_mme(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """MME (Fu et al. 2023): a folder for each category, with a picture and a text of two lines QUESTION<tab>ANSWER.

    Some categories keep both in `images/` and `questions_answers_YN/`. Ids are `CATEGORY/PICTURE/LINE`.
    Raises VlmError if there are no categories.
    """
    root = images or path
    folders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    if not any(_texts_of(folder) for folder in folders):
        raise VlmError(f"{root}: no folders of categories (artwork, color, ...) with texts in them (MME)")
    for folder in folders:
        for file in _texts_of(folder):
            yield from _mme_picture(folder, file)


def _texts_of(category: Path) -> list[Path]:
    apart = category / "questions_answers_YN"
    return sorted((apart if apart.is_dir() else category).glob("*.txt"))


def _mme_picture(category: Path, file: Path) -> Iterator[Entry]:
    folder = category / "images" if (category / "images").is_dir() else file.parent
    picture = next((p for p in sorted(folder.glob(f"{file.stem}.*")) if p.suffix.lower() in PICTURE_SUFFIXES), None)
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), 1):
        if not line.strip():
            continue
        question, tab, answer = line.partition("\t")
        try:
            if not tab or answer.strip().lower() not in ("yes", "no"):
                raise Malformed("expected a question, a tab, and Yes or No")
            yield Record(
                id=f"{category.name}/{file.stem}/{number}",
                images=(str(picture or folder / f"{file.stem}.jpg"),),
                question=checked_text(question, "the question").strip(),
                answers=(answer.strip(),),
                meta={"category": category.name, "image_id": file.stem},
            )
        except Malformed as error:
            yield BrokenRecord(f"{file}:{number}", str(error))
