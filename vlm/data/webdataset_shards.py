"""WebDataset shards: tar archives whose files of one sample share a name, e.g. `0001.jpg`, `0001.txt`, `0001.json`.

A sample is read as any other record; its pictures are references into the shard. What stands in the files:
`.txt` one caption; `.cls` the class; `.json` keys, of which `caption` (or `captions`, `title`) serves where there is
no `.txt`, `label` where there is no `.cls`, and the rest becomes `meta`. Under its key `record` lies a whole record of
ours, as `vlm data shard` writes it, and then it alone counts.
"""

import hashlib
import json
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from vlm.data.parsing import (
    CAPTION_KEYS,
    PICTURE_SUFFIXES,
    BrokenRecord,
    Entry,
    Malformed,
    checked_text,
    need_mapping,
)
from vlm.data.records import Message, Record
from vlm.data.references import inside
from vlm.data.tar_index import TarIndex, read_member, tar_index
from vlm.errors import VlmError
from vlm.paths import cache_dir

_PIPE = "pipe:"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_SHARDS = 1_000_000
_MAX_TEXT = 16 << 20  # bytes of a text file in a shard; more is no caption
_ONE_AT_A_TIME = threading.Lock()  # threads that ask for the same shard wait for the one that groups its files
_TEXTS = ("txt", "json", "cls")


@dataclass(frozen=True, slots=True)
class ShardSample:
    """One sample of a shard: its key, and the names of its pictures and of its text files by suffix."""

    key: str
    pictures: tuple[str, ...]
    texts: dict[str, str]


_samples: WeakKeyDictionary[TarIndex, list[ShardSample]] = WeakKeyDictionary()  # of the indexes kept in memory


def has_braces(path: Path) -> bool:
    """Whether a path is a pattern for several shards."""
    return _BRACES.search(str(path)) is not None


def expand_shards(patterns: str | Path | Sequence[str | Path], allow_pipes: bool = False) -> list[Path]:
    """The shards that patterns name, in order: `{000..127}` counts (zeros in front kept), `{a,b}` lists.

    allow_pipes: `pipe:COMMAND` runs the command in a shell once and keeps what it prints as a shard in the cache. It is
    off unless asked for, since whoever writes the pattern then runs programs here.
    Raises VlmError for a shard that is missing, an address, a pipe that is not allowed or fails, or no shards.
    """
    shards: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, (str, Path)) else patterns:
        for name in expand_braces(str(pattern)):
            if name.startswith(_PIPE):
                shards.append(_piped(name, allow_pipes))
            elif re.match(r"[a-z][a-z0-9+.-]+:/", name):
                raise VlmError(f"shards are read from local files; fetch {name} first and give the path")
            else:
                shards.append(Path(name).expanduser())
    if not shards:
        raise VlmError("no shards: give at least one .tar file or pattern")
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise VlmError(f"{len(missing)} of {len(shards)} shards are missing, the first: {missing[0]}")
    return shards


def expand_braces(pattern: str) -> list[str]:
    """Every name that a pattern stands for; the rightmost braces count fastest."""
    # In a command braces belong to the shell, as long as they are no range of numbers.
    groups = [m for m in _BRACES.finditer(pattern) if not pattern.startswith(_PIPE) or _RANGE.fullmatch(m[1])]
    if not groups:
        return [pattern]
    first = groups[0]
    if (bounds := _RANGE.fullmatch(first[1])) is not None:
        low, high = int(bounds[1]), int(bounds[2])
        if not 0 <= high - low < _MAX_SHARDS:
            raise VlmError(f"{pattern}: {{{first[1]}}} must count upwards, over fewer than {_MAX_SHARDS:,} shards")
        width = len(bounds[1]) if bounds[1].startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(low, high + 1)]
    else:
        choices = first[1].split(",")
    rest = expand_braces(pattern[first.end() :])
    if len(choices) * len(rest) > _MAX_SHARDS:
        raise VlmError(f"{pattern}: more than {_MAX_SHARDS:,} shards")
    return [pattern[: first.start()] + choice + end for choice in choices for end in rest]


def _piped(name: str, allowed: bool) -> Path:
    """The output of a `pipe:` command, kept in the cache."""
    command = name.removeprefix(_PIPE)
    if not allowed:
        raise VlmError(
            f"{name!r} would run a program, which data may not do: fetch the shard first and give its path, or pass "
            "allow_pipes=True where you trust the pattern"
        )
    shard = cache_dir() / "shards" / "pipes" / f"{hashlib.sha256(command.encode()).hexdigest()[:32]}.tar"
    if shard.is_file():
        return shard
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=shard.parent, prefix=f"{shard.name}.", delete=False) as aside:
        try:
            done = subprocess.run(command, shell=True, stdout=aside, stderr=subprocess.PIPE, check=False)
            if done.returncode:
                reason = done.stderr.decode(errors="replace").strip().splitlines()
                raise VlmError(f"{name!r} ended with status {done.returncode}" + (f": {reason[-1]}" if reason else ""))
            Path(aside.name).replace(shard)
        finally:
            Path(aside.name).unlink(missing_ok=True)
    return shard


def shard_samples(shard: Path) -> tuple[list[ShardSample], list[BrokenRecord]]:
    """The samples of a shard in its order, by the names alone, and what had to be left out.

    Files of one sample share everything up to the first dot of the file's name. Names that begin with a dot or with
    `__` belong to no sample. Raises VlmError if the shard cannot be read at all.
    """
    index = tar_index(shard)
    with _ONE_AT_A_TIME:
        if (samples := _samples.get(index)) is None:
            samples = _samples[index] = _grouped(index)
    return samples, [BrokenRecord(str(shard), problem) for problem in index.problems]


def _grouped(index: TarIndex) -> list[ShardSample]:
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in index.members:
        folder, slash, file = name.removeprefix("./").rpartition("/")
        stem, _, suffix = file.partition(".")
        if stem and suffix and not stem.startswith("__"):
            groups.setdefault(f"{folder}{slash}{stem}", []).append((suffix.lower(), name))
    samples = []
    for key, files in groups.items():
        pictures = tuple(name for suffix, name in files if f".{suffix.rpartition('.')[2]}" in PICTURE_SUFFIXES)
        texts = {suffix: name for suffix, name in files if suffix in _TEXTS}
        samples.append(ShardSample(key, pictures, texts))
    return samples


def read_sample(shard: Path, sample: ShardSample) -> Record:
    """The record of a sample; its pictures are references. Raises Malformed if it says nothing, or nothing readable."""
    content: dict[str, Any] = {}
    if name := sample.texts.get("json"):
        try:
            loaded = json.loads(_text(shard, name))
        except (ValueError, RecursionError) as error:
            raise Malformed(f"{name}: not valid JSON: {error}") from error
        need_mapping(loaded)
        content = loaded
    pictures = tuple(inside(shard, name) for name in sample.pictures)
    if isinstance(content.get("record"), dict):
        return _own_record(content["record"], pictures)
    if not pictures:
        raise Malformed("no picture")
    label = content.get("label")
    if name := sample.texts.get("cls"):
        label = checked_text(_text(shard, name), f"`{name}`").strip()
    if name := sample.texts.get("txt"):
        captions = [checked_text(_text(shard, name), f"`{name}`").strip()]
    else:
        given: Any = next((content[key] for key in CAPTION_KEYS if content.get(key) is not None), [])
        texts = given if isinstance(given, list) else [given]
        captions = [checked_text(text, "`caption`").strip() for text in texts]
    if not captions and label is None:
        raise Malformed("no caption and no class")
    return Record(
        id=sample.key,
        images=pictures,
        captions=tuple(captions),
        label=None if label is None else str(label),
        meta={str(key): value for key, value in content.items() if key not in (*CAPTION_KEYS, "label")},
    )


def _text(shard: Path, name: str) -> str:
    try:
        if tar_index(shard).members[name][1] > _MAX_TEXT:
            raise Malformed(f"{name}: more than {_MAX_TEXT >> 20} MB of text")
        return read_member(shard, name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"{name}: not valid UTF-8") from error
    except VlmError as error:
        raise Malformed(str(error)) from error


def record_content(record: Record) -> dict[str, Any]:
    """What a shard's JSON file keeps of a record: everything but its pictures; `_own_record` is the way back."""
    messages = [{"role": message.role, "text": message.text} for message in record.messages]
    content = {
        "id": record.id,
        "captions": list(record.captions),
        "question": record.question,
        "answers": list(record.answers),
        "messages": messages,
        "label": record.label,
        "meta": dict(record.meta),
    }
    return {key: value for key, value in content.items() if value not in (None, [], {})}


def _own_record(content: dict[str, Any], pictures: tuple[str, ...]) -> Record:
    try:
        messages = tuple(
            Message(turn["role"], checked_text(turn["text"], "`text`")) for turn in content.get("messages", [])
        )
        if any(message.role not in ("system", "user", "assistant") for message in messages):
            raise Malformed("a message of an unknown role")
        question, label = content.get("question"), content.get("label")
        return Record(
            id=checked_text(content.get("id"), "`id`"),
            images=pictures,
            captions=tuple(checked_text(text, "`captions`") for text in content.get("captions", [])),
            question=None if question is None else checked_text(question, "`question`"),
            answers=tuple(str(answer) for answer in content.get("answers", [])),
            messages=messages,
            label=None if label is None else str(label),
            meta=dict(content.get("meta", {})),
        )
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise Malformed(f"`record` is not as `vlm data shard` writes it: {error!r}") from error


def read_webdataset(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """The records of shards: a .tar file, a pattern of them, or a folder (those in SPLIT/, or named SPLIT*, or all)."""
    if images is not None:
        raise VlmError("pictures of the format webdataset lie in the shards; leave `images` out")
    for shard in shards_of(path, split):
        yield from read_shard(shard)


def read_shard(shard: Path) -> Iterator[Entry]:
    """The records of one shard, and what is wrong with the members that make none."""
    samples, broken = shard_samples(shard)
    yield from broken
    for sample in samples:
        try:
            yield read_sample(shard, sample)
        except Malformed as error:
            yield BrokenRecord(f"{shard}: {sample.key}", str(error))


def shards_of(path: Path, split: str) -> list[Path]:
    """The shards that a path stands for: see `read_webdataset`. Raises VlmError if there are none."""
    if not path.is_dir():
        return expand_shards(path)
    everything = sorted(path.glob("*.tar"))
    for found in (
        sorted((path / split).glob("*.tar")),
        [p for p in everything if p.name.startswith(split)],
        everything,
    ):
        if found:
            return found
    raise VlmError(f"{path}: no .tar files in this folder or in {split}/")
