"""Features of a frozen image encoder: computed once per picture, kept on disk, memory-mapped.

A picture is known by the hash of its file's bytes and a store by the encoder's fingerprint (part, options, weights,
transform). So a stale feature cannot be found, and every data set, stage and evaluation shares what any of them
computed. A segment counts once its index lies beside its data; a torn one is not seen.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm.data.images import BrokenImage, load_image
from vlm.errors import VlmError
from vlm.paths import cache_dir

# numpy has no bfloat16: such features are stored as the 16 bits they are.
_STORAGE = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}


@dataclass
class FeatureCache:
    """Image tokens [N,D] by picture. `broken` maps paths that could not be read to the reason."""

    folder: Path
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)  # content hash -> (segment, row)
    segments: list[Tensor] = field(default_factory=list)  # memory-mapped [n, N, D]
    hashes: dict[str, str] = field(default_factory=dict)  # path -> content hash
    broken: dict[str, str] = field(default_factory=dict)

    def __call__(self, path: str) -> Tensor:
        """Tokens [N,D] of a cached picture. Raises BrokenImage if it could not be read."""
        if path in self.broken:
            raise BrokenImage(path, self.broken[path])
        segment, row = self.rows[self.hashes[path]]
        return self.segments[segment][row]


def store_folder(encoder: Any) -> Path:
    """Where an encoder's features are kept."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in encoder.name)
    return cache_dir() / "features" / f"{safe}-{encoder.fingerprint()}"


@torch.inference_mode()
def cache_features(
    encoder: Any, paths: Sequence[str], batch_size: int = 64, announce: Callable[[str], None] | None = None
) -> FeatureCache:
    """The features of all `paths`, computing and storing those that are not kept yet.

    encoder: a frozen image encoder. announce: told the size before anything is written.
    Pictures that cannot be read are listed in `.broken`. Raises VlmError if the disk has no room.
    """
    from filelock import FileLock

    folder = store_folder(encoder)
    folder.mkdir(parents=True, exist_ok=True)
    cache = FeatureCache(folder)
    unique = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(4) as pool:
        for path, digest in zip(unique, pool.map(_content_hash, unique)):
            if digest is None:
                cache.broken[path] = "cannot be read"
            else:
                cache.hashes[path] = digest
    with FileLock(folder / "write.lock"):
        _open_segments(cache)
        missing: dict[str, str] = {}
        for path, digest in cache.hashes.items():
            if digest not in cache.rows:
                missing.setdefault(digest, path)
        if missing:
            _write_segment(cache, encoder, missing, batch_size, announce)
    return cache


def _content_hash(path: str) -> str | None:
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return None


def _open_segments(cache: FeatureCache) -> None:
    for index in sorted(cache.folder.glob("segment-*.json")):
        info = json.loads(index.read_text())
        data = index.with_suffix(".bin")
        dtype = getattr(torch, info["dtype"])
        size = int(np.prod(info["shape"])) * dtype.itemsize
        if not data.is_file() or data.stat().st_size != size:
            index.unlink()  # torn: computed again
            continue
        _map_segment(cache, data, tuple(info["shape"]), dtype, info["keys"])


def _map_segment(cache: FeatureCache, data: Path, shape: tuple[int, ...], dtype: torch.dtype, keys: list[str]) -> None:
    # Copy-on-write: torch wants a writable array, and nobody may change the file.
    array = np.memmap(data, dtype=_STORAGE[dtype], mode="c", shape=shape)
    cache.segments.append(torch.from_numpy(array).view(dtype))
    number = len(cache.segments) - 1
    cache.rows.update({key: (number, row) for row, key in enumerate(keys)})


def _write_segment(
    cache: FeatureCache,
    encoder: Any,
    missing: dict[str, str],
    batch_size: int,
    announce: Callable[[str], None] | None,
) -> None:
    parameter = next(encoder.parameters())
    dtype, device = parameter.dtype, parameter.device
    picture = encoder.num_tokens * encoder.width * dtype.itemsize
    size = picture * len(missing)
    free = shutil.disk_usage(cache.folder).free
    if size > free:
        raise VlmError(
            f"the feature cache needs {size / 1e9:.1f} GB in {cache.folder}, where {free / 1e9:.1f} GB are free: "
            "set VLM_CACHE to a larger disk, or data.cache_features=false"
        )
    if announce:
        announce(f"caching features of {len(missing):,} pictures ({size / 1e6:,.0f} MB) in {cache.folder}")
    number = len(list(cache.folder.glob("segment-*.json")))
    while (cache.folder / f"segment-{number:05d}.json").exists():
        number += 1
    data = cache.folder / f"segment-{number:05d}.bin"
    aside = data.with_suffix(f".partial-{os.getpid()}")
    keys: list[str] = []
    try:
        with aside.open("wb") as file:
            for digests, pixels in _read(cache, encoder, missing, batch_size):
                tokens = encoder(pixels.to(device)).tokens.to(dtype).cpu().contiguous()
                file.write(tokens.view(torch.int16 if dtype == torch.bfloat16 else dtype).numpy().tobytes())
                keys += digests
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, data)
    finally:
        aside.unlink(missing_ok=True)
    if not keys:
        data.unlink()
        return
    shape = (len(keys), encoder.num_tokens, encoder.width)
    info = {"keys": keys, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "encoder": encoder.name}
    index = data.with_suffix(".json")
    index.with_suffix(".tmp").write_text(json.dumps(info))
    os.replace(index.with_suffix(".tmp"), index)
    _map_segment(cache, data, shape, dtype, keys)


def _read(
    cache: FeatureCache, encoder: Any, missing: dict[str, str], batch_size: int
) -> Iterator[tuple[list[str], Tensor]]:
    """Batches of (content hashes, pixels [B,3,H,W]); unreadable pictures are noted and left out."""

    def pixels(path: str) -> Tensor | BrokenImage:
        try:
            return encoder.transform.eval(load_image(path))
        except BrokenImage as error:
            return error

    items = list(missing.items())
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(items), batch_size):
            part = items[start : start + batch_size]
            digests, tensors = [], []
            for (digest, _), result in zip(part, pool.map(pixels, [path for _, path in part])):
                if isinstance(result, BrokenImage):
                    cache.broken.update({p: str(result) for p, d in cache.hashes.items() if d == digest})
                else:
                    digests.append(digest)
                    tensors.append(result)
            if tensors:
                yield digests, torch.stack(tensors)
