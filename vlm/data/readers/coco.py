"""COCO captions in the layouts they are passed around in, and pictures where COCO's archives put them.

- official (Chen et al. 2015): `{images: [{id, file_name}], annotations: [{image_id, caption}]}`; test files have no
  annotations
- Karpathy's `dataset_coco.json`, `dataset_flickr30k.json` (Karpathy and Fei-Fei 2015): `{images: [{filename, split,
  sentences: [{raw}], filepath?, cocoid?}]}`
- BLIP's and LAVIS's lists: `[{image, caption, image_id?}]`, in training files an entry for each caption
- MiniGPT-4's `filter_cap.json`: `{annotations: [{image_id, caption}]}`, with the picture in `IMAGE_ID.jpg`
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from vlm.data.parsing import BrokenRecord, Entry, Malformed, checked_text, each_entry, file_of, need_mapping, read_json
from vlm.data.records import Record
from vlm.errors import VlmError, did_you_mean

_COCO_NAME = re.compile(r"COCO_(\w+?)_(\d{12})\.\w+$")


def read_coco_captions(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """A record for each picture with all its captions; its id is COCO's, else the picture's own name.

    images: the folder of pictures, or the one that holds `train2014/`, `val2014/`, ... Of Karpathy's file, `train`
    means his train and restval together, as everyone trains. Pictures of a file without annotations have no captions.
    Raises VlmError for another layout, or a split that Karpathy's file lacks.
    """
    file = file_of(path, split, (".json",))
    yield from coco_entries(file, read_json(file), split, images or file.parent)


def coco_entries(file: Path, content: Any, split: str, folder: Path) -> Iterator[Entry]:
    """The same of a file that is already read."""
    place = picture_place(folder)
    if isinstance(content, dict) and "images" not in content and isinstance(content.get("annotations"), list):
        content = [_minigpt4(item) for item in content["annotations"]]
    if isinstance(content, list):
        yield from _list(file, content, place)
        return
    pictures = content.get("images") if isinstance(content, dict) else None
    if not isinstance(pictures, list) or not isinstance(content.get("annotations", []), list):
        raise VlmError(f"{file}: expected a list, or a mapping with lists `images` and `annotations` (COCO)")
    if any(isinstance(item, dict) and "sentences" in item for item in pictures[:1]):
        yield from _karpathy(file, pictures, split, place)
    else:
        yield from _official(file, pictures, content.get("annotations"), place)


def _minigpt4(item: Any) -> Any:
    return {**item, "image": f"{item['image_id']}.jpg"} if isinstance(item, dict) and "image_id" in item else item


def coco_number(name: str) -> int | None:
    """The id in a name like `COCO_val2014_000000391895.jpg`, None if it is none of COCO's."""
    match = _COCO_NAME.search(name)
    return int(match[2]) if match else None


def picture_place(folder: Path) -> Callable[[str, str], str]:
    """(name of a picture, its part of COCO such as `val2014` or "") -> its path.

    The archives of COCO hold a folder for each part; `folder` is that one, or the one above.
    """

    @cache
    def base(part: str) -> str:
        return str(folder / part if part and (folder / part).is_dir() else folder)

    def place(name: str, part: str = "") -> str:
        if not part and "/" not in name and (match := _COCO_NAME.search(name)):
            part = match[1]
        return os.path.join(base(part), name)

    return place


def _official(
    file: Path, pictures: list[Any], annotations: list[Any] | None, place: Callable[[str, str], str]
) -> Iterator[Entry]:
    known = {str(picture["id"]) for picture in pictures if isinstance(picture, dict) and "id" in picture}
    captions: dict[str, list[str]] = defaultdict(list)
    for number, item in enumerate(annotations or []):
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
        image = item.get("id")
        if not isinstance(image, (int, str)):
            raise Malformed("`id` is missing")
        if annotations is not None and not captions[str(image)]:
            raise Malformed("no caption")
        # NoCaps scores its domains apart.
        meta = {"image_id": image, **{key: item[key] for key in ("domain",) if key in item}}
        shown: tuple[str, ...] = ()
        if "file_name" in item:  # files for scoring alone leave it out
            part = PurePosixPath(str(item.get("coco_url") or "")).parent.name
            shown = (place(checked_text(item["file_name"], "`file_name`"), part),)
        return Record(id=str(image), images=shown, captions=tuple(captions[str(image)]), meta=meta)

    yield from each_entry(file, pictures, record)


def _karpathy(file: Path, pictures: list[Any], split: str, place: Callable[[str, str], str]) -> Iterator[Entry]:
    parts = {str(item.get("split")) for item in pictures if isinstance(item, dict)}
    chosen = {"train", "restval"} if split == "train" else {split}
    if not chosen & parts:
        raise VlmError(f"{file}: no split {split!r}{did_you_mean(split, parts)}")

    def record(_: int, item: Any) -> Record:
        need_mapping(item)
        name = checked_text(item.get("filename"), "`filename`")
        sentences = item.get("sentences")
        if not isinstance(sentences, list) or not sentences:
            raise Malformed("no caption")
        captions = []
        for sentence in sentences:
            need_mapping(sentence)
            captions.append(checked_text(sentence.get("raw"), "`raw`").strip())
        image = item.get("cocoid", PurePosixPath(name).stem)
        path = place(name, str(item.get("filepath") or ""))
        return Record(id=str(image), images=(path,), captions=tuple(captions), meta={"image_id": image})

    for number, item in enumerate(pictures):
        if not isinstance(item, dict) or str(item.get("split")) in chosen:
            try:
                yield record(number, item)
            except Malformed as error:
                yield BrokenRecord(f"{file}: entry {number + 1}", str(error))


def _list(file: Path, items: list[Any], place: Callable[[str, str], str]) -> Iterator[Entry]:
    """Entries about one picture become one record, where its first one stands."""
    captions: dict[str, list[str]] = {}
    first: dict[str, dict[str, Any]] = {}
    for number, item in enumerate(items):
        try:
            need_mapping(item)
            name = checked_text(item.get("image"), "`image`")
            told = item.get("caption", [])
            texts = [checked_text(text, "`caption`").strip() for text in (told if isinstance(told, list) else [told])]
        except Malformed as error:
            yield BrokenRecord(f"{file}: entry {number + 1}", str(error))
            continue
        first.setdefault(name, item)
        captions.setdefault(name, []).extend(texts)
    for name, item in first.items():
        image = _list_id(item, name)
        meta = {key: value for key, value in item.items() if key not in ("image", "caption")}
        yield Record(
            id=str(image), images=(place(name, ""),), captions=tuple(captions[name]), meta={**meta, "image_id": image}
        )


def _list_id(item: dict[str, Any], name: str) -> int | str:
    """The id under which official results know a picture; BLIP's training files count pictures as "coco_57870"."""
    for key in ("img_id", "image_id"):
        if isinstance(item.get(key), int):
            return int(item[key])
    number = coco_number(name)
    return number if number is not None else str(item.get("image_id", PurePosixPath(name).stem))
