"""What a picture's content is known by, worked out once: a picture that did not change is not read again to be told."""

import hashlib
import os
import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache
from pathlib import Path

from vlm.data.references import picture_bytes, split_reference
from vlm.errors import VlmError
from vlm.paths import cache_dir

_READERS = min(8, os.cpu_count() or 1)
_SETTLED = 2.0  # seconds: a file that is younger may change again without its time of change telling
_PART = 500  # paths asked for at once

_State = tuple[int, int]  # size in bytes and time of change in nanoseconds, of the file or of what holds the picture


def content_hash(path: str) -> str | None:
    """The hash of a picture's content, wherever it lies; None if it cannot be read."""
    try:
        return hashlib.blake2b(picture_bytes(path), digest_size=16).hexdigest()
    except (OSError, ValueError, VlmError):  # ValueError: a null byte in the name
        return None


def content_hashes(paths: Sequence[str]) -> dict[str, str | None]:
    """`content_hash` of each path; those of files that did not change since they were last asked for are remembered."""
    states = _states(paths)
    hashes: dict[str, str | None] = dict(_remembered(states))
    unknown = [path for path in states if path not in hashes]
    with ThreadPoolExecutor(_READERS) as pool:
        hashes.update(zip(unknown, pool.map(content_hash, unknown)))
    _remember([(path, *state, digest) for path in unknown if (state := states[path]) and (digest := hashes[path])])
    return {path: hashes[path] for path in paths}


def _states(paths: Sequence[str]) -> dict[str, _State | None]:
    @cache
    def state(file: str) -> _State | None:
        try:
            stat = os.stat(file)
        except (OSError, ValueError):
            return None
        return stat.st_size, stat.st_mtime_ns

    def of(path: str) -> _State | None:
        parts = split_reference(path)
        return state(str(parts[0])) if parts else state(path)

    return {path: of(path) for path in paths}


def _file() -> Path:
    return cache_dir() / "features" / "pictures" / "hashes.sqlite"


def _open() -> sqlite3.Connection:
    file = _file()
    file.parent.mkdir(parents=True, exist_ok=True)
    memory = sqlite3.connect(file, timeout=30)
    columns = "path TEXT PRIMARY KEY, size INTEGER, changed INTEGER, hash TEXT"
    memory.execute(f"CREATE TABLE IF NOT EXISTS hashes ({columns}) WITHOUT ROWID")
    return memory


def _key(path: str) -> str:
    # Relative paths mean another file elsewhere; bytes that are no text have no place in the table.
    return os.path.abspath(path).encode(errors="surrogateescape").decode("latin-1")


def _remembered(states: dict[str, _State | None]) -> dict[str, str]:
    keys = {_key(path): path for path, state in states.items() if state}
    found = {}
    try:
        with closing(_open()) as memory:
            names = list(keys)
            for start in range(0, len(names), _PART):
                part = names[start : start + _PART]
                marks = ",".join("?" * len(part))
                for key, size, changed, digest in memory.execute(f"SELECT * FROM hashes WHERE path IN ({marks})", part):
                    if states[keys[key]] == (size, changed):
                        found[keys[key]] = digest
    except (sqlite3.Error, OSError):
        return {}  # a memory that cannot be read is none
    return found


def _remember(rows: list[tuple[str, int, int, str]]) -> None:
    settled = (time.time() - _SETTLED) * 1e9
    lasting = [(_key(path), size, changed, digest) for path, size, changed, digest in rows if changed < settled]
    if not lasting:
        return
    try:
        with closing(_open()) as memory, memory:
            memory.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?)", lasting)
    except sqlite3.DatabaseError as error:
        if not isinstance(error, sqlite3.OperationalError):  # damaged, not locked or full: begun anew next time
            _file().unlink(missing_ok=True)
    except OSError:
        pass  # nothing can be written there: hashes are worked out again
