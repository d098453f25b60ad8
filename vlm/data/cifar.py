"""CIFAR-10 and CIFAR-100 in their binary version, the one without pickles.

Layout (cs.toronto.edu/~kriz/cifar.html): rows of one label byte (CIFAR-10) or a coarse and a fine one (CIFAR-100), then
3,072 bytes of pixels [3,32,32]. Names of the classes stand in a text file beside them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm.data.parsing import BrokenRecord, Entry
from vlm.data.records import Record
from vlm.data.references import CIFAR_BYTES, inside
from vlm.errors import VlmError


@dataclass(frozen=True)
class _Layout:
    """label_bytes: before the pixels; the last one is the class. files: pattern of a split's files."""

    folder: str
    names: str
    label_bytes: int
    files: dict[str, str]


_LAYOUTS = (
    _Layout("cifar-10-batches-bin", "batches.meta.txt", 1, {"train": "data_batch_*.bin", "test": "test_batch.bin"}),
    _Layout("cifar-100-binary", "fine_label_names.txt", 2, {"train": "train.bin", "test": "test.bin"}),
)


def read_cifar(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """The pictures of `train` or `test`, by class name. Raises VlmError unless the folder holds the binary version."""
    layout, folder = _find(images or path)
    if split not in layout.files:
        raise VlmError(f"{folder}: no split {split!r}; CIFAR has train and test")
    names = (folder / layout.names).read_text(encoding="utf-8").split()
    files = sorted(folder.glob(layout.files[split]))
    if not files:
        raise VlmError(f"{folder}: no {layout.files[split]}")
    row = layout.label_bytes + CIFAR_BYTES
    for file in files:
        with file.open("rb") as rows:
            number = 0
            while head := rows.read(layout.label_bytes):
                start = number * row + layout.label_bytes
                rows.seek(start + CIFAR_BYTES - 1)
                if len(head) < layout.label_bytes or not rows.read(1):
                    yield BrokenRecord(f"{file}: row {number + 1}", "cut off")
                    break
                if head[-1] < len(names):
                    name = f"{file.stem}/{number}"
                    yield Record(id=name, images=(inside(file, start),), label=names[head[-1]])
                else:
                    yield BrokenRecord(f"{file}: row {number + 1}", f"class {head[-1]} of {len(names)}")
                number += 1


def _find(path: Path) -> tuple[_Layout, Path]:
    for layout in _LAYOUTS:
        for folder in (path, path / layout.folder):
            if (folder / layout.names).is_file():
                return layout, folder
    wanted = " or ".join(layout.names for layout in _LAYOUTS)
    raise VlmError(
        f"{path}: no {wanted}; expected the unpacked binary version of CIFAR (the Python version is made of pickles, "
        "which are not read because they can run code)"
    )
