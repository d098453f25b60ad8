"""Unpacking an archive that somebody else made: nothing outside the folder, no links, no bombs, whole or not at all."""

import glob
import lzma
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from vlm.errors import VlmError

# Annotations shrink to a tenth or so, pictures not at all; a bomb grows a thousandfold.
GROWTH = 200
_ROOM = 100 << 20  # bytes that any archive may hold
_PIECE = 1 << 20
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError)


class BrokenArchive(VlmError):
    """An archive that is damaged, or made to do harm; fetching it again is all that may help."""


@dataclass(frozen=True)
class _Member:
    """An entry of an archive. kind: `file`, `folder`, or what else it is; stream: the content of a file."""

    name: str
    kind: str
    stream: IO[bytes] | None = None


def unpack(archive: Path, folder: Path, members: Iterable[str]) -> None:
    """Put files and folders of a zip or tar archive (of any compression) into `folder`; what is there stays.

    members: names in the archive, of files or of whole folders, with or without the folder that the archive holds all
    in; all must be in it, others are left out. `.` is all that
    is in it, and `folder` must not be there yet.
    Raises BrokenArchive for a damaged archive, one without a member, a name that leads out of the folder, a link or
    device, or more than 200 times the archive's size; VlmError for a full disk. Nothing is left behind then.
    """
    wanted = [PurePosixPath(name) for name in members]
    try:
        room = GROWTH * archive.stat().st_size + _ROOM
        everything = PurePosixPath() in wanted
        beside = folder.parent if everything else folder
        beside.mkdir(parents=True, exist_ok=True)
        mark = f".unpacking-{archive.name}-"
        for left in beside.glob(f"{glob.escape(mark)}*"):  # by one that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=mark, dir=beside) as scratch:
            aside = Path(scratch) / "content"
            aside.mkdir()
            for member in _entries(archive):
                path = _wanted(_checked(member.name, archive), wanted)
                if path is None:
                    continue
                if member.kind not in ("file", "folder"):
                    raise BrokenArchive(
                        f"{archive}: {member.name!r} is a {member.kind}; only files and folders are unpacked"
                    )
                if member.kind == "folder":
                    (aside / path).mkdir(parents=True, exist_ok=True)
                    continue
                (aside / path).parent.mkdir(parents=True, exist_ok=True)
                room -= _copy(member.stream, aside / path, room, archive)
            for name in wanted:
                if not (aside / name).exists():
                    raise BrokenArchive(f"{archive}: {name} is not in this archive; it is cut off or another version")
            if everything:
                aside.replace(folder)
                return
            for name in wanted:
                if not (folder / name).exists():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (aside / name).replace(folder / name)
    except _DAMAGE as error:
        raise BrokenArchive(f"{archive}: damaged archive: {error or 'it ends too early'}") from error
    except OSError as error:
        raise VlmError(f"{error.filename or folder}: cannot be unpacked: {error.strerror or error}") from error


def _entries(archive: Path) -> Iterator[_Member]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                kind = _zip_kind(info)
                if info.flag_bits & 1:
                    raise BrokenArchive(f"{archive}: {info.filename!r} is encrypted")
                if kind != "file":
                    yield _Member(info.filename, kind)
                    continue
                with file.open(info) as stream:
                    yield _Member(info.filename, kind, stream)
        return
    if archive.suffix == ".zip":
        raise zipfile.BadZipFile("the directory of a zip file is missing, it ends too early")
    with tarfile.open(archive, "r:*") as tar:
        for entry in tar:
            kind = "file" if entry.isreg() else "folder" if entry.isdir() else "link or device"
            content = tar.extractfile(entry) if entry.isreg() else None
            if content is None:
                yield _Member(entry.name, kind)
                continue
            with closing(content):
                yield _Member(entry.name, kind, content)


def _zip_kind(info: zipfile.ZipInfo) -> str:
    mode = info.external_attr >> 16
    if info.is_dir():
        return "folder"
    # Only Unix keeps a kind there; 0 is a plain file of another system.
    return "file" if stat.S_IFMT(mode) in (0, stat.S_IFREG) else "link or device"


def _checked(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or name[1:2] == ":":
        raise BrokenArchive(f"{archive}: the name {name!r} leads out of the folder; nothing is unpacked")
    return path


def _wanted(path: PurePosixPath, wanted: list[PurePosixPath]) -> PurePosixPath | None:
    """Where a member goes, None if nobody wants it."""
    for place in (path, PurePosixPath(*path.parts[1:])):
        if path.parts[:1] != ("__MACOSX",) and any(place == name or name in place.parents for name in wanted):
            return place
    return None


def _copy(stream: IO[bytes] | None, to: Path, room: int, archive: Path) -> int:
    """Copies and counts; what the archive says about its sizes is not believed."""
    assert stream is not None
    written = 512  # an empty file takes room too
    with to.open("wb") as file:
        while piece := stream.read(_PIECE):
            written += len(piece)
            if written > room:
                raise BrokenArchive(f"{archive}: grows to more than {GROWTH} times its size; nothing is unpacked")
            file.write(piece)
    return written
