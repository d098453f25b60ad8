"""Pictures that lie inside another file: `SHARD.tar::MEMBER`, `BATCH.bin::OFFSET` for CIFAR's rows of pixels, and
`TABLE.tsv::OFFSET-LENGTH` for base64.

A reference stands wherever a path of a picture may stand; `vlm.data.images.load_image` opens all.
"""

import base64
import os
from pathlib import Path

import numpy as np

from vlm.errors import VlmError

INSIDE = "::"
CIFAR_SIDE = 32  # pixels
CIFAR_BYTES = 3 * CIFAR_SIDE * CIFAR_SIDE
_CONTAINERS = (".tar", ".bin", ".tsv")


def inside(container: Path, member: str | int) -> str:
    """The reference to a file of a tar archive, the pixels from a byte of a CIFAR batch on, or a table's base64."""
    return f"{container}{INSIDE}{member}"


def split_reference(path: str) -> tuple[Path, str] | None:
    """(container, member) of a reference, None for the path of a file."""
    for suffix in _CONTAINERS:
        container, mark, member = path.partition(suffix + INSIDE)
        if mark and member and not os.path.lexists(path):
            return Path(container + suffix), member
    return None


def open_image_reference(container: Path, member: str) -> bytes | np.ndarray:
    """The file that a reference means: its bytes, or a uint8 array [H,W,3]. Raises VlmError if it cannot be read."""
    if container.suffix == ".tar":
        from vlm.data.tar_index import read_member

        return read_member(container, member)
    if container.suffix == ".tsv":
        return _base64(container, member)
    offset = int(member) if member.isdecimal() else -1
    try:
        with container.open("rb") as file:
            file.seek(max(offset, 0))
            pixels = file.read(CIFAR_BYTES)
    except OSError as error:
        raise VlmError(error.strerror or str(error)) from error
    if offset < 0 or len(pixels) != CIFAR_BYTES:
        raise VlmError(f"no {CIFAR_BYTES} bytes of pixels from byte {member} on")
    return np.frombuffer(pixels, dtype=np.uint8).reshape(3, CIFAR_SIDE, CIFAR_SIDE).transpose(1, 2, 0)


def _base64(table: Path, member: str) -> bytes:
    first, _, length = member.partition("-")
    if not (first.isdecimal() and length.isdecimal()):
        raise VlmError(f"no base64 at {member!r}, expected OFFSET-LENGTH")
    try:
        with table.open("rb") as file:
            file.seek(int(first))
            return base64.b64decode(file.read(int(length)), validate=True)
    except OSError as error:
        raise VlmError(error.strerror or str(error)) from error
    except ValueError as error:
        raise VlmError(f"no base64 of {length} letters from byte {first} on") from error


def picture_bytes(path: str) -> bytes:
    """What a picture's content is told apart by: the bytes of its file, wherever that lies.

    Raises OSError or VlmError if it cannot be read.
    """
    parts = split_reference(path)
    if parts is None:
        return Path(path).read_bytes()
    content = open_image_reference(*parts)
    return content if isinstance(content, bytes) else content.tobytes()


def picture_exists(path: str) -> bool:
    """Whether the file, or the file that holds it, is there. The picture itself is not looked at."""
    parts = split_reference(path)
    return (parts[0] if parts else Path(path)).is_file()
