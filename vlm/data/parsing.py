"""What readers share: JSON with errors that name file and line, checked text, and malformed entries set aside."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.records import Record
from vlm.errors import VlmError

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
CAPTION_KEYS = ("captions", "caption", "title")  # of an entry; the first that is there counts


@dataclass(frozen=True, slots=True)
class BrokenRecord:
    """A malformed entry: `where` is file and line (or entry number), `reason` what is wrong with it."""

    where: str
    reason: str


Entry = Record | BrokenRecord


class Malformed(Exception):
    """Why one entry cannot be read; becomes a BrokenRecord."""


def each_entry(file: Path, items: list[Any], record: Callable[[int, Any], Record]) -> Iterator[Entry]:
    """`record(number, item)` for each item of a file; what it finds malformed comes out as a BrokenRecord."""
    for number, item in enumerate(items):
        try:
            yield record(number, item)
        except Malformed as error:
            yield BrokenRecord(f"{file}: entry {number + 1}", str(error))


def read_json(file: Path) -> Any:
    """A whole JSON file. Raises VlmError with the line if it is malformed."""
    try:
        return json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise VlmError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or nested without end
        raise VlmError(f"{file}: not valid JSON: {error}") from error


def read_json_list(file: Path) -> list[Any]:
    """A JSON file that holds one list. Raises VlmError if it holds something else."""
    content = read_json(file)
    if not isinstance(content, list):
        raise VlmError(f"{file}: expected a list of entries, found {type(content).__name__}")
    return content


def list_in(content: Any, key: str, file: Path, layout: str) -> list[Any]:
    """The list `key` of a mapping that was read from `file`. Raises VlmError that names the layout if there is none."""
    items = content.get(key) if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise VlmError(f"{file}: expected a list `{key}` in a mapping ({layout})")
    return items


def file_of(path: Path, split: str, suffixes: tuple[str, ...]) -> Path:
    """The file itself, or in a folder the file named after the split. Raises VlmError if the folder has none."""
    if not path.is_dir():
        return path
    for suffix in suffixes:
        if (file := path / f"{split}{suffix}").is_file():
            return file
    names = " or ".join(f"{split}{suffix}" for suffix in suffixes)
    raise VlmError(f"{path}: no {names} in this folder; give the file itself")


def need_mapping(item: Any) -> None:
    """Raises Malformed unless `item` has keys."""
    if not isinstance(item, dict):
        raise Malformed(f"expected keys with values, found {type(item).__name__}")


def checked_text(value: Any, what: str) -> str:
    """`value` if it is text that says something and can be encoded. Raises Malformed."""
    if value is None:
        raise Malformed(f"{what} is missing")
    if not isinstance(value, str):
        raise Malformed(f"{what} is {type(value).__name__}, expected text")
    if not value.strip():
        raise Malformed(f"{what} is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise Malformed(f"{what} is not valid UTF-8")
    return value


def most_frequent_first(answers: list[str], known: Any = None) -> tuple[str, ...]:
    """All humans' answers with one that is `known` to be, or is, the most frequent in front: the one to train on."""
    if not answers:
        return ()
    best = known if known in answers else max(answers, key=answers.count)
    at = answers.index(best)
    return (best, *answers[:at], *answers[at + 1 :])
