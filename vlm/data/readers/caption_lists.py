"""Pictures and their captions in a list: JSON, JSONL, CSV or TSV."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.data.parsing import (
    CAPTION_KEYS,
    BrokenRecord,
    Entry,
    Malformed,
    checked_text,
    each_entry,
    file_of,
    list_in,
    need_mapping,
    read_json,
)
from vlm.data.readers.coco import coco_entries
from vlm.data.records import Record
from vlm.errors import VlmError

_IMAGE_KEYS = ("image", "filepath", "file_name")


def read_captions_json(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """COCO's files (`read_coco_captions`), or a list of `{image, caption(s)}`: a record for each entry."""
    file = file_of(path, split, (".json",))
    folder = images or file.parent
    content = read_json(file)
    if isinstance(content, list):
        yield from each_entry(file, content, lambda number, item: _caption_record(item, number, folder))
        return
    yield from coco_entries(file, content, split, folder)


def read_textcaps(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """TextCaps (Sidorov et al. 2020): `{data: [{image_id, caption_str}]}`, an entry a caption; a record a picture.

    Raises VlmError for another layout.
    """
    file = file_of(path, split, (".json",))
    folder = images or file.parent
    items = list_in(read_json(file), "data", file, "TextCaps")
    captions: dict[str, list[str]] = {}
    for number, item in enumerate(items, 1):
        try:
            need_mapping(item)
            own = captions.setdefault(checked_text(item.get("image_id"), "`image_id`"), [])
            if "caption_str" in item:
                own.append(checked_text(item["caption_str"], "`caption_str`").strip())
        except Malformed as error:
            yield BrokenRecord(f"{file}: entry {number}", str(error))
    for image, own in captions.items():
        path_of = str(folder / f"{image}.jpg")
        yield Record(id=image, images=(path_of,), captions=tuple(dict.fromkeys(own)), meta={"image_id": image})


def read_captions_jsonl(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
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


def read_captions_csv(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
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
