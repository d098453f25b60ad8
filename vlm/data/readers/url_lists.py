"""Lists of addresses and captions whose pictures img2dataset fetched: Conceptual Captions, SBU, LAION.

The lists come as tables, most without a header (Conceptual Captions: caption, address; CC12M: address, caption), as
SBU's JSON `{image_urls, captions}`, or as parquet (LAION: URL, TEXT). `img2dataset --output_format files` puts row
20,003 of a list that it is given alone at `00002/000020003.jpg`; rows whose picture it did not get are left out.
"""

import csv
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from vlm.data.parsing import PICTURE_SUFFIXES, BrokenRecord, Entry, Malformed, checked_text, file_of, read_json
from vlm.data.records import Record
from vlm.errors import VlmError

SHARD_ROWS = 10_000  # img2dataset's --number_sample_per_shard
_URL_COLUMNS = ("url", "URL", "image_url", "image_urls")
_CAPTION_COLUMNS = ("caption", "TEXT", "text", "captions", "title")


def read_url_list(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """The rows whose picture is there; `meta["url"]` is where it came from.

    images: the folder img2dataset wrote to, by default the list's own. Raises VlmError for another layout, or if it
    holds no picture of the list.
    """
    file = file_of(path, split, (".tsv", ".json", ".parquet"))
    folder = images or file.parent
    found = False
    for shard, rows in groupby(enumerate(_rows(file)), key=lambda numbered: numbered[0] // SHARD_ROWS):
        names = _pictures(folder / f"{shard:05d}")
        for number, (url, caption) in rows:
            key = f"{shard:05d}{number % SHARD_ROWS:04d}"
            if key not in names:
                continue
            found = True
            try:
                text = checked_text(caption, "`caption`").strip()
                yield Record(id=key, images=(names[key],), captions=(text,), meta={"url": url})
            except Malformed as error:
                yield BrokenRecord(f"{file}: row {number + 1}", str(error))
    if not found:
        raise VlmError(
            f"{folder}: no picture of {file.name} (as 00000/000000000.jpg); fetch them with: "
            "img2dataset --output_format files"
        )


def _pictures(folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        return {}
    return {p.stem: str(p) for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES}


def _rows(file: Path) -> Iterator[tuple[Any, Any]]:
    """(address, caption) of every row, in order."""
    if file.suffix == ".parquet":
        yield from _parquet(file)
    elif file.suffix == ".json":
        content = read_json(file)
        told = content if isinstance(content, dict) else {}
        urls, captions = told.get("image_urls"), told.get("captions")
        if not isinstance(urls, list) or not isinstance(captions, list) or len(urls) != len(captions):
            raise VlmError(f"{file}: expected lists `image_urls` and `captions` of one length (SBU)")
        yield from zip(urls, captions, strict=True)
    else:
        with file.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
            # The captions hold quotation marks that quote nothing.
            for number, row in enumerate(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)):
                if number == 0 and {"url", "caption"} <= set(row):
                    header = row
                    yield from _with_header(lines, header)
                    return
                url = next((cell for cell in row if cell.startswith(("http://", "https://"))), None)
                caption = next((cell for cell in row if cell is not url), None)
                yield url, caption


def _with_header(lines: Iterator[str], header: list[str]) -> Iterator[tuple[Any, Any]]:
    for row in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
        cells = dict(zip(header, row))
        yield cells.get("url"), cells.get("caption")


def _parquet(file: Path) -> Iterator[tuple[Any, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise VlmError(f"{file}: parquet is read by pyarrow; run: pip install pyarrow") from error
    with parquet.ParquetFile(file) as table:
        columns = [
            next((name for name in names if name in table.schema_arrow.names), None)
            for names in (_URL_COLUMNS, _CAPTION_COLUMNS)
        ]
        if None in columns:
            raise VlmError(f"{file}: no columns of addresses and captions; it has {table.schema_arrow.names}")
        for batch in table.iter_batches(columns=columns):
            yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
