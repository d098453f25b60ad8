"""Files of a checkpoint in transformers' layout: which there are, and the tensors in them."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vlm.errors import VlmError

# Where a merged checkpoint keeps its tensors, as transformers looks for them.
MERGED = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def file_of(reference: str, name: str) -> Path | None:
    """A file of a hub id or local folder; None if it is not there."""
    from transformers.utils import cached_file

    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(reference, name, **options)
    return None if found is None else Path(found)


def tensors_of(reference: str, names: tuple[str, ...], optional: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Keys and tensors of the first of these files that is there, or of the shards that it names.

    Raises VlmError if none is there, unless they are `optional`, and for a file that cannot be read.
    """
    for name in names:
        if path := file_of(reference, name):
            files = [path]
            if path.name.endswith(".index.json"):
                shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
                found = [file_of(reference, shard) for shard in shards]
                if lacking := [shard for shard, file in zip(shards, found) if file is None]:
                    raise VlmError(f"{reference}: {path.name} names {lacking[0]}, which is not there")
                files = [file for file in found if file is not None]
            for file in files:
                yield from read_tensors(file)
            return
    if not optional:
        raise VlmError(f"{reference}: holds none of {', '.join(names)}")


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Keys and tensors of a file of safetensors or of a pickle that holds nothing else. Raises VlmError otherwise."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                    yield key, tensors.get_tensor(key)
        else:
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
    except (SafetensorError, RuntimeError, EOFError, AttributeError) as error:
        raise VlmError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from error
    except Exception as error:  # pickle.UnpicklingError: something else than tensors is in there
        if type(error).__name__ != "UnpicklingError":
            raise
        raise VlmError(f"{file}: holds other things than tensors, which are not loaded") from error
