"""Shards made for tests."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from vlm.data.formats import read_records


def picture(kind: str = "png", seed: int = 0, size: int = 12) -> bytes:
    """A random picture as a file of a kind."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def shard_of(path: Path, *files: tuple[str, bytes], **options) -> Path:
    """A tar of files in order."""
    with tarfile.open(path, "w", **options) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def read(path: Path, split: str = "train"):
    return read_records("webdataset", path, split)
