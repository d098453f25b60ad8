"""What the copies of published data sets are made of: files as their authors write them, in archives."""

import gzip
import io
import json
import tarfile
import zipfile
from dataclasses import dataclass, field
from typing import Any

from PIL import Image


def jpg(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "jpeg")
    return buffer.getvalue()


JPG = jpg()

Members = dict[str, bytes]


@dataclass(frozen=True)
class Copy:
    """files: end of an address -> content, or members of the archive there. by_hand: place -> content.

    records: split -> what `told` says of each record.
    """

    records: dict[str, list[tuple[Any, ...]]]
    files: dict[str, bytes | Members] = field(default_factory=dict)
    by_hand: Members = field(default_factory=dict)


def told(record: Any, folder: str) -> tuple[Any, ...]:
    """(picture in the data folder, its text: label, captions, question or turns, answers)."""
    picture = record.images[0].removeprefix(f"{folder}/") if record.images else None
    if record.messages:
        return (picture, *[message.text for message in record.messages])
    if record.question is not None:
        return picture, record.question, record.answers
    if record.label is not None:
        return picture, record.label
    return picture, record.captions


def packed(address: str, content: bytes | Members) -> bytes:
    """An archive of the kind that the address names."""
    if isinstance(content, bytes):
        return content
    buffer = io.BytesIO()
    if address.endswith(".zip"):
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, data in content.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return gzip.compress(buffer.getvalue()) if address.endswith(".gz") else buffer.getvalue()


def as_json(content: Any) -> bytes:
    return json.dumps(content).encode()


TRAIN_2014 = {"train2014/COCO_train2014_000000000009.jpg": JPG}

VAL_2014 = {"val2014/COCO_val2014_000000000042.jpg": JPG}

TRAIN_2017, VAL_2017, TEST_2017 = (
    {f"{part}/{number:012d}.jpg": JPG} for part, number in (("train2017", 9), ("val2017", 42), ("test2017", 1))
)
