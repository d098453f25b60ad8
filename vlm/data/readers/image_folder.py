"""Pictures in a folder for each class."""

from collections.abc import Iterator
from pathlib import Path

from vlm.data.parsing import PICTURE_SUFFIXES, BrokenRecord, Entry
from vlm.data.records import Record


def read_image_folder(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
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
