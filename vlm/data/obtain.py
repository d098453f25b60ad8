"""Getting what a data set needs into the data folder: what is missing, fetching it, what has to come by hand."""

import hashlib
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from vlm.data.catalogue import DatasetSpec, Download
from vlm.data.digests import as_before, digests_file, record, recorded
from vlm.data.download import Progress, digest, fetch
from vlm.data.unpack import BrokenArchive, unpack
from vlm.data.webdataset_shards import expand_braces
from vlm.errors import VlmError
from vlm.paths import data_dir

# what is being done -> where to report how far it is
Report = Callable[[str], Progress]


def needed(spec: DatasetSpec, splits: Collection[str]) -> list[Download]:
    """The files that some of the splits need; all splits' where none are named."""
    return [d for d in spec.downloads if not splits or not d.splits or set(d.splits) & set(splits)]


def missing(download: Download) -> list[Path]:
    """What of it is not in the data folder."""
    return [path for place in download.places() if not (path := data_dir() / place).exists()]


def how_to_get(download: Download) -> str:
    """One line for what is missing and has to be fetched by hand."""
    absent = ", ".join(map(str, missing(download)[:3]))
    return f"{absent}: {download.by_hand.rstrip('.')} ({download.url})"


def obtain(
    spec: DatasetSpec, splits: Collection[str], report: Report, say: Callable[[str], None] = lambda line: None
) -> None:
    """Download and unpack what is missing. Raises VlmError, also where something has to be fetched by hand.

    What can be downloaded is there before the error about what cannot is raised. Of a file without a published digest
    its own is recorded, and must be the same whenever it is fetched again; `say` is told so in a line.
    """
    before = recorded()
    try:
        _obtain(spec, splits, report)
    finally:
        addresses = [url for d in needed(spec, splits) if not _published(d) for url in expand_braces(d.url)]
        if new := [_last(url) for url in addresses if url in recorded().keys() - before.keys()]:
            more = f" and {len(new) - 3:,} more" if len(new) > 3 else ""
            say(
                f"{spec.name}: no checksum is published of {', '.join(new[:3])}{more}: trusted as fetched now, "
                f"compared with {digests_file()} from now on"
            )


def recorded_digests(download: Download) -> dict[Path, str]:
    """The SHA-256 of each of its files in the data folder, as recorded when it was fetched and where one is."""
    known = recorded()
    if download.unpack:
        keys = {f"{download.url}#{name}": name for name in download.unpack}
        return {data_dir() / download.to / name: known[key] for key, name in keys.items() if key in known}
    if _published(download) or download.by_hand:
        return {}
    pairs = zip(expand_braces(download.url), expand_braces(download.to), strict=True)
    return {data_dir() / place: known[url] for url, place in pairs if url in known}


def _published(download: Download) -> bool:
    return bool(download.sha256 or download.md5)


def _obtain(spec: DatasetSpec, splits: Collection[str], report: Report) -> None:
    by_hand = []
    for download in needed(spec, splits):
        if not missing(download):
            continue
        if download.by_hand:
            by_hand.append(how_to_get(download))
        elif download.unpack:
            _archive(download, report)
        else:
            for url, place in zip(expand_braces(download.url), expand_braces(download.to), strict=True):
                to = data_dir() / place
                if _file(download, url, to, report) and not _published(download):
                    _record({url: as_before(url, to)})
    if by_hand:
        raise VlmError(f"data set {spec.name!r} needs what has to be fetched by hand: " + "; ".join(by_hand))


def _archive(download: Download, report: Report) -> None:
    # Many an archive is called images.zip.
    archive = data_dir() / ".downloads" / f"{_short(download.url)}-{_last(download.url)}"
    _file(download, download.url, archive, report)
    with _alone(f"{archive.name}.unpack"):
        if missing(download):
            # Recorded once it is known to be no damaged archive.
            digests = {} if _published(download) else {download.url: as_before(download.url, archive)}
            report(f"unpacking {_last(download.url)}")(0, None)
            try:
                unpack(archive, data_dir() / download.to, download.unpack)
            except BrokenArchive as error:
                archive.unlink()
                raise BrokenArchive(f"{error}; it came from {download.url} and is removed") from error
            unpacked = {name: data_dir() / download.to / name for name in download.unpack}
            digests |= {f"{download.url}#{name}": digest(file) for name, file in unpacked.items() if file.is_file()}
            _record(digests)
        archive.unlink(missing_ok=True)


def _file(download: Download, url: str, to: Path, report: Report) -> bool:
    """Whether it was fetched, and not there already."""
    with _alone(_short(str(to))):
        if to.exists():
            return False
        free = shutil.disk_usage(data_dir()).free
        if download.size and download.size > free:
            raise VlmError(f"{url}: {download.size:,} bytes, and {data_dir()} has room for {free:,}; see VLM_DATA")
        fetch(url, to, download.size, download.sha256, download.md5, report(_last(url)))
        return True


def _record(digests: dict[str, str]) -> None:
    if digests:
        with _alone("digests"):
            record(digests)


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Two commands that want the same file take turns."""
    from filelock import FileLock

    folder = data_dir() / ".downloads"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            yield
    except OSError as error:
        raise VlmError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from error


def _last(url: str) -> str:
    return PurePosixPath(url.partition("?")[0]).name


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
