"""Writing a published file and reading it back, for tests of readers."""

import json
from pathlib import Path
from typing import Any

from vlm.data.formats import read_records
from vlm.data.records import Record


def write(file: Path, content: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def read(format: str, path: Path, split: str = "val", **options: Any) -> list[Record]:
    records, broken = read_records(format, path, split, **options)
    assert broken == []
    return records


def reasons(format: str, path: Path, split: str = "val") -> list[str]:
    return [f"{Path(b.where.partition(' (')[0]).name}: {b.reason}" for b in read_records(format, path, split)[1]]
