"""Any data set as WebDataset shards: pictures as they are, a caption for other tools, and the whole record as JSON."""

import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from vlm.data.images import BrokenImage, load_image
from vlm.data.parsing import BrokenRecord
from vlm.data.records import Record
from vlm.data.references import open_image_reference, split_reference
from vlm.data.webdataset_shards import record_content
from vlm.errors import VlmError

# Pictures of these kinds are copied byte for byte; all others become PNG, which loses nothing.
_COPIED = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}


@dataclass(frozen=True)
class Written:
    """The shards in order, how many records they hold, and the records left out because a picture is broken."""

    shards: list[Path]
    records: int
    broken: list[BrokenRecord]


def write_shards(
    records: Iterable[Record],
    output: Path,
    size: int = 10_000,
    name: str = "shard",
    notes: str = "",
    advance: Callable[[int], None] = lambda done: None,
) -> Written:
    """Write `NAME-000000.tar`, ... of `size` records each into a new folder, which appears whole or not at all.

    notes: what LICENCE.txt says; without them there is none. sizes.json tells how many records each shard holds.
    Every picture is decoded once, so that the shards hold none that is broken. The same records give the same bytes.
    Raises VlmError if the folder holds something, or no record could be written.
    """
    if size < 1:
        raise VlmError(f"a shard holds at least 1 record, got {size}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise VlmError(f"{output} is there already; choose another folder or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        sizes, broken = _fill(records, aside, size, name, advance)
        if not sizes:
            first = f"; the first: {broken[0].where}: {broken[0].reason}" if broken else ""
            raise VlmError(f"no record could be written, {len(broken)} have broken pictures{first}")
        (aside / "sizes.json").write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
        if notes:
            (aside / "LICENCE.txt").write_text(notes, encoding="utf-8")
        aside.chmod(0o755)  # mkdtemp's folders are the owner's alone
        aside.replace(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Written([output / shard for shard in sizes], sum(sizes.values()), broken)


def _fill(
    records: Iterable[Record], folder: Path, size: int, name: str, advance: Callable[[int], None]
) -> tuple[dict[str, int], list[BrokenRecord]]:
    """Records of each shard written, and what was left out."""
    broken: list[BrokenRecord] = []

    def whole() -> Iterator[list[tuple[str, bytes]]]:
        for record in records:
            advance(1)
            try:
                yield _files(record)
            except BrokenImage as error:
                broken.append(BrokenRecord(record.id, str(error)))

    sizes: dict[str, int] = {}
    samples = whole()
    for first in samples:
        shard = f"{name}-{len(sizes):06d}.tar"
        start = sum(sizes.values())
        with tarfile.open(folder / shard, "w", format=tarfile.USTAR_FORMAT) as archive:
            for number, files in enumerate(chain([first], islice(samples, size - 1))):
                _add(archive, files, start + number)
                sizes[shard] = number + 1
    return sizes, broken


def add_record(archive: tarfile.TarFile, record: Record, number: int) -> None:
    """Add a record to a shard, under its number. Raises BrokenImage, and has added nothing then."""
    _add(archive, _files(record), number)


def _add(archive: tarfile.TarFile, files: list[tuple[str, bytes]], number: int) -> None:
    for suffix, content in files:
        member = tarfile.TarInfo(f"{number:09d}.{suffix}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def _files(record: Record) -> list[tuple[str, bytes]]:
    """Suffix and content of each file of a record; further pictures are `1.jpg`, `2.jpg`, ..."""
    files = []
    for number, image in enumerate(record.images):
        kind, content = _picture(image)
        files.append((kind if number == 0 else f"{number}.{kind}", content))
    if record.captions:
        files.append(("txt", record.captions[0].encode("utf-8", errors="replace")))
    about = {"record": record_content(record)}
    files.append(("json", json.dumps(about, default=str).encode("ascii")))
    return files


def _picture(path: str) -> tuple[str, bytes]:
    """A picture's kind and bytes. Raises BrokenImage."""
    decoded = load_image(path)
    parts = split_reference(path)
    kind = _COPIED.get(Path(parts[1] if parts else path).suffix.lower())
    if kind is not None:
        content = open_image_reference(*parts) if parts else Path(path).read_bytes()
        if isinstance(content, bytes):
            return kind, content
    buffer = io.BytesIO()
    decoded.save(buffer, "png")
    return "png", buffer.getvalue()
