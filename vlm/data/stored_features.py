"""Looking up what the feature cache keeps of pictures; nothing is written here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.data.content_hash import content_hashes
from vlm.data.feature_cache import FeatureCache, PictureFeatures, open_segments

_STORES = 4  # kept open


def encode_pictures(features: PictureFeatures, images: Sequence[Any]) -> Tensor:
    """Features [B, ...] of images (paths, PIL images or arrays): those of files the cache holds are not computed.

    Raises BrokenImage for a picture that cannot be read.
    """
    kept = _kept(features, images)
    others = [number for number in range(len(images)) if number not in kept]
    rows: dict[int, Tensor] = dict(kept)
    if others:
        encoded = features.encode(torch.stack([features.load(images[number]) for number in others]))
        if not kept:
            return encoded
        rows = {number: row.to(encoded) for number, row in kept.items()}
        rows.update(zip(others, encoded))
    return torch.stack([rows[number] for number in range(len(images))])


def _kept(features: PictureFeatures, images: Sequence[Any]) -> dict[int, Tensor]:
    """Number of an image -> its features, for files whose content the cache holds."""
    paths = {number: str(image) for number, image in enumerate(images) if isinstance(image, (str, Path))}
    # The key costs a look at all weights, so it is made only where this encoder has been cached in some state.
    if not paths or not features.any_kept():
        return {}
    store = _store(features.folder)
    found = {}
    hashes = content_hashes(list(paths.values()))
    for number, path in paths.items():
        if (place := store.rows.get(hashes[path] or "")) is not None:
            found[number] = store.segments[place[0]][place[1]]
    return found


_opened: dict[Path, tuple[list[str], FeatureCache]] = {}


def _store(folder: Path) -> FeatureCache:
    """What a folder holds now; read anew when segments came or went."""
    indexes = sorted(file.name for file in folder.glob("segment-*.json"))
    if folder not in _opened or _opened[folder][0] != indexes:
        store = FeatureCache(folder)
        open_segments(store)
        while len(_opened) >= _STORES:
            _opened.pop(next(iter(_opened)))
        _opened[folder] = (indexes, store)
    return _opened[folder][1]
