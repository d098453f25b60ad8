"""The table of annotation formats. A reader yields records; what is malformed is counted, not fatal."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

from vlm.data.cifar import read_cifar
from vlm.data.easy_vqa import read_easy_vqa, read_easy_vqa_captions
from vlm.data.parsing import BrokenRecord, Entry
from vlm.data.readers.caption_lists import read_captions_csv, read_captions_json, read_captions_jsonl, read_textcaps
from vlm.data.readers.coco import read_coco_captions
from vlm.data.readers.conversations import read_llava_json
from vlm.data.readers.image_folder import read_image_folder
from vlm.data.readers.multiple_choice import read_base64_tsv, read_scienceqa
from vlm.data.readers.url_lists import read_url_list
from vlm.data.readers.visual_genome import read_visual_genome
from vlm.data.readers.vqa_others import read_aokvqa, read_gqa, read_ocr_vqa, read_textvqa, read_vizwiz
from vlm.data.readers.vqa_v2 import read_vqa_v2
from vlm.data.readers.yes_no import read_mme, read_pope
from vlm.data.records import Record
from vlm.data.webdataset_shards import read_webdataset
from vlm.errors import VlmError, did_you_mean

# (file or folder, split, folder of the pictures or None for the format's own place) -> entries in file order.
# One that has a parameter `questions` takes a second file, or None.
Reader = Callable[..., Iterator[Entry]]


def read_records(
    format: str,
    path: Path,
    split: str,
    images: Path | None = None,
    limit: int | None = None,
    questions: Path | None = None,
) -> tuple[list[Record], list[BrokenRecord]]:
    """The records of a file or folder, at most `limit`, and the malformed entries met on the way.

    images: folder of the pictures, None for the format's own place. questions: the second file of formats that part
    questions from answers (`vqa_v2`).
    Ids that occur again get `#2`, `#3`, ... appended. Raises VlmError for an unknown format, a missing file, or one
    that is malformed as a whole.
    """
    if format not in FORMATS:
        raise VlmError(f"unknown format {format!r}{did_you_mean(format, FORMATS)}")
    if not path.exists() and format != "webdataset":  # whose path may be a pattern
        raise VlmError(f"{path}: no such file or folder")
    if images is not None and not images.is_dir():
        raise VlmError(f"{images}: no such folder of pictures")
    if questions is not None and "questions" not in inspect.signature(FORMATS[format]).parameters:
        raise VlmError(f"format {format!r} takes no file of questions")
    if questions is not None and not questions.exists():
        raise VlmError(f"{questions}: no such file of questions")
    second = {} if questions is None else {"questions": questions}
    broken: list[BrokenRecord] = []
    try:
        good = _set_aside(FORMATS[format](path, split, images, **second), broken)
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


# Adding a format is adding one entry here.
FORMATS: dict[str, Reader] = {
    "easy_vqa": read_easy_vqa,
    "easy_vqa_captions": read_easy_vqa_captions,
    "llava_json": read_llava_json,
    "captions_json": read_captions_json,
    "captions_jsonl": read_captions_jsonl,
    "captions_csv": read_captions_csv,
    "coco_captions": read_coco_captions,
    "vqa_v2": read_vqa_v2,
    "aokvqa": read_aokvqa,
    "gqa": read_gqa,
    "textvqa": read_textvqa,
    "ocr_vqa": read_ocr_vqa,
    "textcaps": read_textcaps,
    "vizwiz": read_vizwiz,
    "scienceqa": read_scienceqa,
    "pope": read_pope,
    "mme": read_mme,
    "base64_tsv": read_base64_tsv,
    "visual_genome": read_visual_genome,
    "url_list": read_url_list,
    "image_folder": read_image_folder,
    "cifar": read_cifar,
    "webdataset": read_webdataset,
}
