"""Getting what a data set needs into the data folder: what is missing, fetching it, what has to come by hand."""

import hashlib
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from vlm.data.catalogue import DatasetSpec, Download
from vlm.data.download import Progress, fetch
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


def obtain(spec: DatasetSpec, splits: Collection[str], report: Report) -> None:
    """Download and unpack what is missing. Raises VlmError, also where something has to be fetched by hand.

    What can be downloaded is there before the error about what cannot is raised.
    """
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
                _file(download, url, data_dir() / place, report)
    if by_hand:
        raise VlmError(f"data set {spec.name!r} needs what has to be fetched by hand: " + "; ".join(by_hand))


def _archive(download: Download, report: Report) -> None:
    # Many an archive is called images.zip.
    archive = data_dir() / ".downloads" / f"{_short(download.url)}-{_last(download.url)}"
    _file(download, download.url, archive, report)
    with _alone(f"{archive.name}.unpack"):
        if missing(download):
            report(f"unpacking {_last(download.url)}")(0, None)
            try:
                unpack(archive, data_dir() / download.to, download.unpack)
            except BrokenArchive as error:
                archive.unlink()
                raise BrokenArchive(f"{error}; it came from {download.url} and is removed") from error
        archive.unlink(missing_ok=True)


def _file(download: Download, url: str, to: Path, report: Report) -> None:
    with _alone(_short(str(to))):
        if to.exists():
            return
        free = shutil.disk_usage(data_dir()).free
        if download.size and download.size > free:
            raise VlmError(f"{url}: {download.size:,} bytes, and {data_dir()} has room for {free:,}; see VLM_DATA")
        fetch(url, to, download.size, download.sha256, download.md5, report(_last(url)))


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
