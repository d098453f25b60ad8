"""Where each file of a tar archive begins, so that any of them can be read without reading what lies before it.

An archive is scanned once; the index is kept in the cache folder and made anew when the archive changes. Nothing is
ever unpacked: names in an archive are labels, never paths.
"""

import gzip
import hashlib
import json
import os
import tarfile
import tempfile
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from vlm.errors import VlmError
from vlm.paths import cache_dir

_FORMAT = 1  # of the kept index; another number makes all of them anew
_BLOCK = 512
_MAX_OPENED = 1_000_000  # files of the indexes kept in memory, about a gigabyte with what is made of them
_ONE_AT_A_TIME = threading.Lock()  # threads that ask for the same index wait for the one that makes it


@dataclass(frozen=True, eq=False)  # known by identity, so that what is made of it can be kept beside it
class TarIndex:
    """`members`: name -> (offset, size) in bytes, in the archive's order. `problems`: what had to be left out."""

    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


_opened: OrderedDict[tuple[str, int, int], TarIndex] = OrderedDict()


def tar_index(path: Path) -> TarIndex:
    """The index of an archive. A damaged one gives what is whole, and says so in `problems`.

    Raises VlmError if it is missing, compressed or no archive at all.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise VlmError(f"{path}: the archive cannot be read: {error.strerror or error}") from error
    key = (str(path.absolute()), stat.st_size, stat.st_mtime_ns)
    with _ONE_AT_A_TIME:
        if key not in _opened:
            _opened[key] = _index(*key)
            left = sum(len(index.members) for index in _opened.values())
            while left > _MAX_OPENED and len(_opened) > 1:
                left -= len(_opened.popitem(last=False)[1].members)
        _opened.move_to_end(key)
        return _opened[key]


def read_member(path: Path, name: str) -> bytes:
    """The content of a file in an archive. Raises VlmError if there is none of that name or it cannot be read."""
    members = tar_index(path).members
    if name not in members:
        raise VlmError(f"{path} holds no file {name!r} that is whole")
    offset, size = members[name]
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise VlmError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(content) != size:
        raise VlmError(f"{path}: {name!r} is cut off")
    return content


def _index(path: str, size: int, changed: int) -> TarIndex:
    key = hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()[:32]
    kept = cache_dir() / "shards" / "index" / f"{key}.json.gz"
    facts = [_FORMAT, path, size, changed]
    try:
        content = json.loads(gzip.decompress(kept.read_bytes()))
        if content["of"] == facts:
            members = {str(name): (int(offset), int(length)) for name, offset, length in content["members"]}
            return TarIndex(members, [str(problem) for problem in content["problems"]])
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError):
        pass  # not there, or not whole: made anew
    index = _scan(Path(path), size)
    members_list = [[name, *place] for name, place in index.members.items()]
    content = json.dumps({"of": facts, "members": members_list, "problems": index.problems})
    _keep(kept, gzip.compress(content.encode(), compresslevel=1))
    return index


def _keep(file: Path, content: bytes) -> None:
    """Write a file whole or not at all; where nothing can be written, the index is made again next time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.")
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(content)
        os.replace(aside, file)
    except OSError:
        Path(aside).unlink(missing_ok=True)


def _scan(path: Path, size: int) -> TarIndex:
    with path.open("rb") as file:
        head = file.read(_BLOCK)
    if head[:2] == b"\x1f\x8b" or head[:3] == b"BZh" or head[:6] == b"\xfd7zXZ\x00" or head[:4] == b"\x28\xb5\x2f\xfd":
        raise VlmError(f"{path} is compressed, so its files cannot be read one by one; decompress it to a plain .tar")
    index = TarIndex()
    end = 0
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
            while (member := archive.next()) is not None:
                end = archive.offset
                if problem := _problem(member, size, index):
                    index.problems.append(problem)
                elif member.isreg():
                    index.members[member.name] = (member.offset_data, member.size)
            end = archive.offset
    # Damaged headers make tarfile raise nearly anything.
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError) as error:
        if not end:
            raise VlmError(f"{path} is not a tar archive: {error}") from error
        index.problems.append(f"cut off or damaged at byte {end:,}: {error}")
        return index
    if not _ends_at(path, end):
        index.problems.append(f"cut off or damaged at byte {end:,}")
    return index


def _problem(member: tarfile.TarInfo, size: int, index: TarIndex) -> str | None:
    """Why a member is left out; None for a good one, and for folders."""
    name = member.name
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        return f"{name!r} is a link or a special file"
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or "\0" in name or (len(parts[0]) == 2 and parts[0][1] == ":"):
        return f"{name!r} names a place outside the archive"
    if member.offset_data < 0 or member.size < 0 or member.offset_data + member.size > size:
        return f"{name!r} is cut off"
    if name in index.members:
        return f"a second file {name!r}"
    return None


def _ends_at(path: Path, offset: int) -> bool:
    """Whether the end mark, a block of zeros, stands there: tarfile takes a broken header and a cut for the end too."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(_BLOCK) == bytes(_BLOCK)
