"""Archives made for tests."""

import io
import stat
import tarfile
import zipfile
from pathlib import Path
from typing import Any


def zipped(files: dict[str, bytes], file: Path, **attributes: int) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = attributes.get("mode", stat.S_IFREG | 0o644) << 16
            archive.writestr(info, content)
    return file


def tarred(files: dict[str, bytes], file: Path, **attributes: Any) -> Path:
    mode: Any = {".gz": "w:gz", ".xz": "w:xz"}.get(file.suffix, "w")
    with tarfile.open(file, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return file
