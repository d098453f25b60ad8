"""Questions with choices: ScienceQA, and the tables of MMBench and MME that hold their pictures as base64.

`meta["choices"]` lists the choices, `meta["correct_choice"]` is the index of the right one, `meta["hint"]` what is told
beside the question; the record's answer is the text of the right choice.
"""

import csv
import hashlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from vlm.data.parsing import BrokenRecord, Entry, Malformed, checked_text, need_mapping, read_json
from vlm.data.records import Record
from vlm.data.references import inside
from vlm.errors import VlmError

WITH_PICTURE = "-images"
_LETTERS = "ABCDEFGHIJ"
_SCIENCE_KEYS = ("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
_BASE64 = re.compile(rb"[A-Za-z0-9+/=]{100,}")
_STAND_IN = re.compile(r"<base64 (\d+)-(\d+)>")


def read_scienceqa(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """ScienceQA (Lu et al. 2022): `problems.json`, a mapping from id to question; pictures `SPLIT/ID/image.png`.

    split: `train`, `val`, `test`, or with `-images` behind it those of it that have a picture.
    Raises VlmError for another layout, or a split without questions.
    """
    file = path / "problems.json" if path.is_dir() else path
    folder = images or file.parent / "images"
    content = read_json(file)
    if not isinstance(content, dict):
        raise VlmError(f"{file}: expected questions by their ids (ScienceQA), found {type(content).__name__}")
    part = split.removesuffix(WITH_PICTURE)
    for key, item in content.items():
        try:
            need_mapping(item)
            if item.get("split") != part or (split != part and not item.get("image")):
                continue
            choices, answer = item.get("choices"), item.get("answer")
            if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
                raise Malformed("no list of texts `choices`")
            if not isinstance(answer, int) or not 0 <= answer < len(choices):
                raise Malformed(f"`answer` is {answer!r}, expected the number of one of {len(choices)} choices")
            shown = (str(folder / part / key / str(item["image"])),) if item.get("image") else ()
            yield Record(
                id=key,
                images=shown,
                question=checked_text(item.get("question"), "`question`").strip(),
                answers=(choices[answer],),
                meta={
                    "choices": choices,
                    "correct_choice": answer,
                    **{name: item[name] for name in _SCIENCE_KEYS if item.get(name)},
                },
            )
        except Malformed as error:
            yield BrokenRecord(f"{file}: question {key}", str(error))


def read_base64_tsv(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """A table `index, image, question, answer, A, B, ..., hint, category` with base64 pictures, as MMBench's and MME's.

    `image` may name the row that holds the picture; rows with the same picture share one reference to it. Of MMBench,
    rows whose indices differ by a multiple of 1,000,000 are rotations of one question. Columns without a place in a
    record go to `meta`; test splits have no answers.
    Raises VlmError if a column is missing.
    """
    file = path / f"{split}.tsv" if path.is_dir() else path
    places: dict[str, str] = {}
    with file.open("rb") as content:
        header: list[str] = []
        for number, (row, line) in enumerate(_rows(content)):
            if not header:
                header = row
                if absent := {"index", "image", "question"} - set(header):
                    raise VlmError(f"{file}:1: no column {', '.join(sorted(absent))}; the header has {header}")
                continue
            try:
                if len(row) != len(header):
                    raise Malformed(f"{len(row)} fields, the header has {len(header)}")
                yield _table_record(dict(zip(header, row, strict=True)), file, places)
            except Malformed as error:
                yield BrokenRecord(f"{file}:{line} (row {number})", str(error))


def _table_record(row: dict[str, str], file: Path, places: dict[str, str]) -> Record:
    index = checked_text(row.pop("index"), "`index`")
    picture = row.pop("image").strip()
    if match := _STAND_IN.fullmatch(picture):
        places[index] = inside(file, f"{match[1]}-{match[2]}")
    elif picture in places:
        places[index] = places[picture]
    else:
        raise Malformed("`image` is neither base64 nor the index of an earlier row")
    question = checked_text(row.pop("question"), "`question`").strip()
    answer = row.pop("answer", "").strip()
    letters = [letter for letter in _LETTERS if row.get(letter, "").strip()]
    choices = [row[letter].strip() for letter in letters]
    meta: dict[str, Any] = {key: value for key, value in row.items() if key not in _LETTERS and value.strip()}
    if choices:
        meta["choices"] = choices
        if answer:
            if answer not in letters:
                raise Malformed(f"`answer` is {answer!r}, expected one of {', '.join(letters)}")
            meta["correct_choice"] = letters.index(answer)
            answer = choices[letters.index(answer)]
    return Record(id=index, images=(places[index],), question=question, answers=(answer,) if answer else (), meta=meta)


def _stand_in(seen: dict[bytes, bytes], start: int, match: re.Match[bytes]) -> bytes:
    place = b"<base64 %d-%d>" % (start + match.start(), len(match[0]))
    return seen.setdefault(hashlib.sha256(match[0]).digest(), place)  # one picture has one place


def _rows(content: IO[bytes]) -> Iterator[tuple[list[str], int]]:
    """Rows with the number of their first line; base64 becomes `<base64 FIRST BYTE-LENGTH>` (csv has a limit)."""
    position, lines, first = 0, 0, 1
    seen: dict[bytes, bytes] = {}

    def decoded() -> Iterator[str]:
        nonlocal position, lines
        for line in content:
            start = position
            position += len(line)
            lines += 1
            text = _BASE64.sub(partial(_stand_in, seen, start), line)
            # Bytes that are not UTF-8 become surrogates, which `checked_text` refuses.
            yield text.decode("utf-8-sig" if start == 0 else "utf-8", errors="surrogateescape")

    for row in csv.reader(decoded(), delimiter="\t"):
        if row:
            yield row, first
        first = lines + 1
