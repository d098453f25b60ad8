"""Features of a frozen image encoder: computed once per picture, kept on disk, memory-mapped.

A picture is known by the hash of its content and a store by the encoder's fingerprint (part, options, weights,
transform) and by which of its outputs is kept. So a stale feature cannot be found, and every data set, stage and
evaluation shares what any of them computed. A segment counts once its index lies beside its data; a torn one is not
seen.
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vlm.data.content_hash import content_hashes
from vlm.data.images import BrokenImage, load_image
from vlm.errors import VlmError
from vlm.paths import cache_dir

if TYPE_CHECKING:
    from vlm.backbones.image_encoder import ImageEncoder, ImageFeatures

SEGMENT_BYTES = 1 << 30  # features of a segment; what an interruption loses at most
READERS = min(8, os.cpu_count() or 1)  # threads that decode pictures while the encoder runs

# numpy has no bfloat16: such features are stored as the 16 bits they are.
_STORAGE = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}

_Encoded = tuple[list[str], Tensor]  # content hashes and features [B, ...]


@dataclass(frozen=True)
class PictureFeatures:
    """What is kept of a picture, and what it is known by.

    name, kind: the encoder and which of its outputs, e.g. `tokens`. fingerprint: gives a word that changes with
    whatever else decides the features. load: a path (or another image) -> one picture as `encode` takes it; raises
    BrokenImage. encode: stacked pictures [B, ...], on any device, -> features [B, ...] of one shape and float type.
    encode_many: how many are to come -> the same function, perhaps faster.
    """

    name: str
    kind: str
    fingerprint: Callable[[], str]
    load: Callable[[Any], Tensor]
    encode: Callable[[Tensor], Tensor]
    encode_many: Callable[[int], Callable[[Tensor], Tensor]] | None = None

    @cached_property
    def folder(self) -> Path:
        """Where these features are kept."""
        return _root() / f"{self._stem}-{self.fingerprint()}"

    def any_kept(self) -> bool:
        """Whether features of this name and kind are kept, of these weights or others."""
        return next(_root().glob(f"{self._stem}-*"), None) is not None

    @property
    def _stem(self) -> str:
        safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in self.name)
        return f"{safe}-{self.kind}"


def _root() -> Path:
    return cache_dir() / "features"


def frozen_features(
    encoder: "ImageEncoder", kind: str, select: Callable[["ImageFeatures"], Tensor]
) -> PictureFeatures | None:
    """What `select` takes of a frozen image encoder's output, in the encoder's precision; None if the encoder learns.

    kind: what `select` takes, a word of the key: two that take the same share what is kept.
    """
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        return None
    device = next(encoder.parameters()).device

    def encode_many(pictures: int) -> Callable[[Tensor], Tensor]:
        from vlm.backbones.inference import fast_forward

        forward = fast_forward(encoder, pictures)
        return lambda pixels: select(forward(pixels.to(device, non_blocking=True))).to(encoder.dtype)

    def encode(pixels: Tensor) -> Tensor:
        return select(encoder(pixels.to(device, non_blocking=True))).to(encoder.dtype)

    def load(image: Any) -> Tensor:
        return encoder.transform.eval(load_image(image))

    return PictureFeatures(encoder.name, kind, encoder.fingerprint, load, encode, encode_many)


@dataclass(frozen=True)
class Together:
    """This process among those that fill a cache together. gather: what each of them gives, once all have given it."""

    rank: int = 0
    world: int = 1
    gather: Callable[[Any], list[Any]] = lambda own: [own]


@dataclass
class FeatureCache:
    """Features by picture. `broken` maps paths that could not be read to the reason."""

    folder: Path
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)  # content hash -> (segment, row)
    segments: list[Tensor] = field(default_factory=list)  # memory-mapped [n, ...]
    hashes: dict[str, str] = field(default_factory=dict)  # path -> content hash
    broken: dict[str, str] = field(default_factory=dict)

    def __call__(self, path: str) -> Tensor:
        """Features [...] of a cached picture. Raises BrokenImage if it could not be read."""
        if path in self.broken:
            raise BrokenImage(path, self.broken[path])
        segment, row = self.rows[self.hashes[path]]
        return self.segments[segment][row]


def cache_features(
    features: PictureFeatures,
    paths: Sequence[str],
    batch_size: int = 64,
    announce: Callable[[str], None] = lambda said: None,
    together: Together = Together(),
) -> FeatureCache:
    """The features of all `paths`, computing and storing those that are not kept yet.

    paths: files or references into shards. announce: told the size before anything is written. together: the processes
    that share the work, each asking for the same paths.
    Pictures that cannot be read are listed in `.broken`. Raises VlmError if the disk has no room.
    """
    from filelock import FileLock

    folder = features.folder
    folder.mkdir(parents=True, exist_ok=True)
    cache = FeatureCache(folder)
    unique = list(dict.fromkeys(paths))
    told = together.gather(content_hashes(unique[together.rank :: together.world]))
    digests = {path: digest for hashes in told for path, digest in hashes.items()}
    for path in unique:
        if (digest := digests[path]) is None:
            cache.broken[path] = "cannot be read"
        else:
            cache.hashes[path] = digest
    with FileLock(folder / "write.lock") if together.rank == 0 else nullcontext():
        if together.rank == 0:
            for torn in open_segments(cache):
                torn.unlink()  # computed again
            _forget_unfinished(folder)
        together.gather(None)  # the first one keeps other runs out and has tidied up
        if together.rank:
            open_segments(cache)
        missing = _missing(cache)
        mine = {digest: path for digest, path in missing.items() if int(digest, 16) % together.world == together.rank}
        if mine:
            _write(cache, features, mine, batch_size, announce, len(missing), together.rank)
        if together.world > 1:
            for broken in together.gather(cache.broken):
                cache.broken.update(broken)
            cache = FeatureCache(folder, hashes=cache.hashes, broken=cache.broken)
            open_segments(cache)
    # Where processes do not see each other's disk, each computes the rest for itself.
    return cache if together.world == 1 or not _missing(cache) else cache_features(features, paths, batch_size)


def _missing(cache: FeatureCache) -> dict[str, str]:
    """Content hash -> path of the pictures that could be read as far as is known, and have no features yet."""
    found: dict[str, str] = {}
    for path, digest in cache.hashes.items():
        if digest not in cache.rows and path not in cache.broken:
            found.setdefault(digest, path)
    return found


def open_segments(cache: FeatureCache) -> list[Path]:
    """Map every whole segment of the folder; returns the indexes of those that are torn."""
    torn = []
    for index in sorted(cache.folder.glob("segment-*.json")):
        data = index.with_suffix(".bin")
        try:
            info = json.loads(index.read_text(encoding="utf-8"))
            shape, dtype, keys = tuple(info["shape"]), getattr(torch, info["dtype"]), info["keys"]
            whole = data.stat().st_size == int(np.prod(shape)) * dtype.itemsize and len(keys) == shape[0]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if whole:
            _map_segment(cache, data, shape, dtype, keys)
        else:
            torn.append(index)
    return torn


def _map_segment(cache: FeatureCache, data: Path, shape: tuple[int, ...], dtype: torch.dtype, keys: list[str]) -> None:
    # Copy-on-write: torch wants a writable array, and nobody may change the file.
    array = np.memmap(data, dtype=_STORAGE[dtype], mode="c", shape=shape)
    cache.segments.append(torch.from_numpy(array).view(dtype))
    number = len(cache.segments) - 1
    cache.rows.update({key: (number, row) for row, key in enumerate(keys)})


def _forget_unfinished(folder: Path) -> None:
    """Delete what a killed process left; whoever holds the lock is the only one that writes."""
    for file in folder.glob("segment-*"):
        if ".partial" in file.name or (file.suffix == ".bin" and not file.with_suffix(".json").exists()):
            file.unlink(missing_ok=True)


def _write(
    cache: FeatureCache,
    features: PictureFeatures,
    missing: dict[str, str],
    batch_size: int,
    announce: Callable[[str], None],
    pictures: int,
    rank: int,
) -> None:
    """Encode and store this process's part of `pictures` (content hash -> path), a segment every SEGMENT_BYTES."""
    encode = features.encode if features.encode_many is None else features.encode_many(len(missing))
    with torch.no_grad():
        encoded: Iterator[_Encoded] = (
            (digests, encode(inputs).cpu().contiguous())
            for digests, inputs in _read(cache, features, missing, batch_size)
        )
        said = False
        for first in encoded:
            if not said:
                _check_room(cache.folder, first[1], pictures, announce)
                said = True
            _write_segment(cache, features, chain([first], encoded), rank)


def _check_room(folder: Path, encoded: Tensor, pictures: int, announce: Callable[[str], None]) -> None:
    size = pictures * encoded[0].numel() * encoded.dtype.itemsize
    free = shutil.disk_usage(folder).free
    if size > free:
        raise VlmError(
            f"the feature cache needs {size / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free: "
            "set VLM_CACHE to a larger disk, or data.cache_features=false"
        )
    announce(f"caching features of {pictures:,} pictures ({size / 1e6:,.0f} MB) in {folder}")


def _write_segment(cache: FeatureCache, features: PictureFeatures, batches: Iterator[_Encoded], rank: int) -> None:
    """Write batches until the segment is full; it is seen once its index is in place."""
    numbers = [int(file.stem.split("-")[1]) for file in cache.folder.glob("segment-*.json")]
    own = f"-{rank}" if rank else ""  # of the processes that write at the same time
    data = cache.folder / f"segment-{max(numbers, default=-1) + 1:05d}{own}.bin"
    aside = data.with_suffix(f".partial-{os.getpid()}")
    keys: list[str] = []
    try:
        with aside.open("wb") as file:
            for digests, encoded in batches:
                dtype, shape = encoded.dtype, tuple(encoded.shape[1:])
                file.write((encoded.view(torch.int16) if dtype == torch.bfloat16 else encoded).numpy().data)
                keys += digests
                if file.tell() >= SEGMENT_BYTES:
                    break
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, data)
    finally:
        aside.unlink(missing_ok=True)
    info = {"keys": keys, "shape": [len(keys), *shape], "dtype": str(dtype).removeprefix("torch."), "of": features.name}
    index = data.with_suffix(".partial-index")
    index.write_text(json.dumps(info), encoding="utf-8")
    os.replace(index, data.with_suffix(".json"))
    _map_segment(cache, data, (len(keys), *shape), dtype, keys)


def _read(
    cache: FeatureCache, features: PictureFeatures, missing: dict[str, str], batch_size: int
) -> Iterator[tuple[list[str], Tensor]]:
    """Batches of (content hashes, pictures [B,...]), decoded ahead; unreadable ones are noted and left out."""

    def load(path: str) -> Tensor | BrokenImage:
        try:
            return features.load(path)
        except BrokenImage as error:
            return error

    items = iter(missing.items())
    with ThreadPoolExecutor(READERS) as pool:
        begun: deque[tuple[str, Future[Tensor | BrokenImage]]] = deque()

        def begin(count: int) -> None:
            begun.extend((digest, pool.submit(load, path)) for digest, path in islice(items, count))

        begin(2 * batch_size)
        while begun:
            digests, pictures = [], []
            for digest, future in [begun.popleft() for _ in range(min(batch_size, len(begun)))]:
                result = future.result()
                if isinstance(result, BrokenImage):
                    cache.broken.update({p: result.reason for p, d in cache.hashes.items() if d == digest})
                else:
                    digests.append(digest)
                    pictures.append(result)
            begin(batch_size)  # read while the encoder works on what is yielded
            if pictures:
                yield digests, torch.stack(pictures)
