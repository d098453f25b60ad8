"""Readers of annotation formats, in one table. A reader yields records; what is malformed is counted, not fatal."""

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

from vlm.data.cifar import read_cifar
from vlm.data.easy_vqa import read_easy_vqa
from vlm.data.parsing import (
    CAPTION_KEYS,
    PICTURE_SUFFIXES,
    BrokenRecord,
    Entry,
    Malformed,
    checked_text,
    each_entry,
    file_of,
    need_mapping,
    read_json,
    read_json_list,
)
from vlm.data.records import IMAGE_PLACEHOLDER, Message, Record
from vlm.data.webdataset_shards import read_webdataset
from vlm.errors import VlmError, did_you_mean

# (file or folder, split, folder of the pictures or None for the format's own place) -> entries in file order
Reader = Callable[[Path, str, Path | None], Iterator[Entry]]

_IMAGE_KEYS = ("image", "filepath", "file_name")
_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def read_records(
    format: str, path: Path, split: str, images: Path | None = None, limit: int | None = None
) -> tuple[list[Record], list[BrokenRecord]]:
    """The records of a file or folder, at most `limit`, and the malformed entries met on the way.

    Ids that occur again get `#2`, `#3`, ... appended. Raises VlmError for an unknown format, a missing file, or one
    that is malformed as a whole.
    """
    if format not in FORMATS:
        raise VlmError(f"unknown format {format!r}{did_you_mean(format, FORMATS)}")
    if not path.exists() and format != "webdataset":  # whose path may be a pattern
        raise VlmError(f"{path}: no such file or folder")
    if images is not None and not images.is_dir():
        raise VlmError(f"{images}: no such folder of pictures")
    broken: list[BrokenRecord] = []
    try:
        good = _set_aside(FORMATS[format](path, split, images), broken)
        return list(_with_unique_ids(islice(good, limit))), broken
    except OSError as error:
        raise VlmError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error


def _set_aside(entries: Iterator[Entry], broken: list[BrokenRecord]) -> Iterator[Record]:
    for entry in entries:
        if isinstance(entry, BrokenRecord):
            broken.append(entry)
        else:
            yield entry


def _with_unique_ids(records: Iterator[Record]) -> Iterator[Record]:
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            record = replace(record, id=next(i for n in count(2) if (i := f"{record.id}#{n}") not in seen))
        seen.add(record.id)
        yield record


def _llava_json(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
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


def _captions_json(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """COCO's `{images: [{id, file_name}], annotations: [{image_id, caption}]}`, or a list of `{image, caption(s)}`."""
    file = file_of(path, split, (".json",))
    folder = images or file.parent
    content = read_json(file)
    if isinstance(content, list):
        yield from each_entry(file, content, lambda number, item: _caption_record(item, number, folder))
        return
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise VlmError(f"{file}: expected a list, or a mapping with lists `images` and `annotations` (COCO)")
    known = {str(image["id"]) for image in content["images"] if isinstance(image, dict) and "id" in image}
    captions: dict[str, list[str]] = defaultdict(list)
    for number, item in enumerate(content["annotations"]):
        try:
            need_mapping(item)
            image = str(item.get("image_id"))
            if image not in known:
                raise Malformed(f"no image has the id {image}")
            captions[image].append(checked_text(item.get("caption"), "`caption`").strip())
        except Malformed as error:
            yield BrokenRecord(f"{file}: annotation {number + 1}", str(error))

    def record(_: int, item: Any) -> Record:
        need_mapping(item)
        image = str(item.get("id"))
        name = checked_text(item.get("file_name"), "`file_name`")
        if not captions[image]:
            raise Malformed("no caption")
        return Record(id=image, images=(str(folder / name),), captions=tuple(captions[image]), meta={"image_id": image})

    yield from each_entry(file, content["images"], record)


def _captions_jsonl(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """One `{image, caption or captions}` a line."""
    file = file_of(path, split, (".jsonl",))
    folder = images or file.parent
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield _caption_record(json.loads(line), number, folder)
            except (ValueError, RecursionError) as error:
                yield BrokenRecord(f"{file}:{number}", f"not valid JSON: {error}")
            except Malformed as error:
                yield BrokenRecord(f"{file}:{number}", str(error))


def _captions_csv(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """A table with a header; columns `image` or `filepath`, `caption` or `title`; parted by commas or tabs."""
    file = file_of(path, split, (".csv", ".tsv"))
    folder = images or file.parent
    # Bytes that are not UTF-8 become surrogates, which `checked_text` refuses: one bad row does not lose the rest.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        head = lines.readline()
        lines.seek(0)
        rows = csv.DictReader(lines, delimiter="\t" if "\t" in head else ",")
        columns = [(name or "").strip() for name in rows.fieldnames or []]
        rows.fieldnames = columns
        for kind, keys in (("pictures", _IMAGE_KEYS), ("texts", CAPTION_KEYS)):
            if not set(keys) & set(columns):
                raise VlmError(f"{file}:1: no column of {kind} ({' or '.join(keys)}); the header has {columns}")
        while True:
            try:
                row = next(rows)
                if None in row:  # where csv puts what the header has no column for
                    raise Malformed(f"more fields than the {len(columns)} of the header")
                yield _caption_record(dict(row), rows.line_num, folder)
            except StopIteration:
                return
            except (csv.Error, Malformed) as error:
                yield BrokenRecord(f"{file}:{rows.line_num}", str(error))


def _caption_record(item: Any, number: int, folder: Path) -> Record:
    """One row of a list, a JSONL or a CSV file; other keys than id, picture and text go to `meta`."""
    need_mapping(item)
    image = next((item[key] for key in _IMAGE_KEYS if key in item), None)
    texts = next((item[key] for key in CAPTION_KEYS if key in item), None)
    texts = texts if isinstance(texts, list) else [texts]
    if not texts:
        raise Malformed("no caption")
    known = ("id", "", *_IMAGE_KEYS, *CAPTION_KEYS)
    return Record(
        id=str(item.get("id", number)),
        images=(str(folder / checked_text(image, "`image`")),),
        captions=tuple(checked_text(text, "`caption`").strip() for text in texts),
        meta={str(key): value for key, value in item.items() if key not in known},
    )


def _image_folder(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """A folder for each class (in a folder for the split, if there is one); the class is the folder's name."""
    root = images or path
    if (root / split).is_dir() and any(p.is_dir() for p in (root / split).iterdir()):
        root = root / split
    for file in sorted(p for p in root.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES):
        name = file.relative_to(root)
        if any(part.startswith(".") for part in name.parts) or not file.is_file():
            continue
        if len(name.parts) == 1:
            yield BrokenRecord(str(file), "lies in no folder that names its class")
        else:
            yield Record(id=name.as_posix(), images=(str(file),), label=name.parts[0])


# Adding a format is adding one entry here.
FORMATS: dict[str, Reader] = {
    "easy_vqa": read_easy_vqa,
    "llava_json": _llava_json,
    "captions_json": _captions_json,
    "captions_jsonl": _captions_jsonl,
    "captions_csv": _captions_csv,
    "image_folder": _image_folder,
    "cifar": read_cifar,
    "webdataset": read_webdataset,
}
