"""Loading transformers parts so that every key of the checkpoint is used or known to be unused."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.errors import VlmError

if TYPE_CHECKING:
    import torch

# Keys that carry no weights: buffers older versions saved.
BUFFERS = (r"(.*\.)?position_ids", r"(.*\.)?num_batches_tracked")


def read_config(reference: str) -> dict[str, Any]:
    """`config.json` of a hub id or local folder as it stands there. Raises VlmError if there is none."""
    from transformers.utils import cached_file

    try:
        path = cached_file(reference, "config.json")
        if path is None:
            raise OSError("it has no config.json")
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise VlmError(f"{reference}: no such folder and no such model on the hub: {_first_line(error)}") from error
    except ValueError as error:
        raise VlmError(f"{reference}: config.json is not JSON: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise VlmError(f"{reference}: config.json holds no mapping")
    return content


def load_config(reference: str) -> Any:
    """The configuration of a hub id or local folder. Raises VlmError if there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(reference, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise VlmError(f"hf:{reference}: no such folder and no such model on the hub: {_first_line(error)}") from error


def needs_code(error: Exception) -> bool:
    """Whether transformers refused a part because its own Python would have to run."""
    return "trust_remote_code" in str(error)


def load_strictly(cls: Any, reference: str, unused: Iterable[str] = (), optional: Iterable[str] = (), **options: Any):  # type: ignore[no-untyped-def]
    """`cls.from_pretrained(reference)` with every key accounted for; returns (model, missing optional keys).

    unused: patterns of checkpoint keys that may be left over (the other tower, a classifier).
    optional: patterns of the model's keys that the checkpoint may lack.
    options: of `from_pretrained`; with `config` and `state_dict`, `reference` only says where these come from.
    Raises VlmError that names the keys.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()  # a bar per part hides what the command itself has to say
    logging.set_verbosity_error()  # its report of left-over keys is replaced by the account below
    try:
        # Shapes that differ are an error below; without this option they are one that does not name the keys.
        source = None if "state_dict" in options else reference
        model, info = cls.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise VlmError(f"hf:{reference}: {_first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = {str(key) for key in info["missing_keys"]}
    absent = {key for key in missing if _any(optional, key)}
    wrong = {
        "missing": missing - absent,
        "left over": {str(k) for k in info["unexpected_keys"] if not _any((*unused, *BUFFERS), str(k))},
        "of another shape": {str(k[0] if isinstance(k, tuple) else k) for k in info["mismatched_keys"]},
    }
    problems = [f"{len(keys)} {what}: {_listed(keys)}" for what, keys in wrong.items() if keys]
    if problems:
        raise VlmError(f"hf:{reference} does not fit {cls.__name__}: keys " + "; ".join(problems))
    return model, absent


def _any(patterns: Iterable[str], key: str) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in patterns)


def _listed(keys: set[str]) -> str:
    return ", ".join(sorted(keys)[:5]) + (", ..." if len(keys) > 5 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Where a checkpoint of transformers keeps its tensors, as it looks for them itself.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_scalars(reference: str, keys: Iterable[str]) -> dict[str, float]:
    """Single numbers of a checkpoint on the hub or in a folder. Raises VlmError that names a missing one."""
    from transformers.utils import cached_file

    def find(file: str) -> Path | None:
        found = cached_file(
            reference,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)

    weights = next((path for file in _WEIGHTS if (path := find(file)) is not None), None)
    values = {}
    for key in keys:
        file = weights
        if file is not None and file.suffix == ".json":
            shard = json.loads(file.read_text(encoding="utf-8"))["weight_map"].get(key)
            file = find(shard) if shard else None
        tensor = None if file is None else _tensor(file, key)
        if tensor is None or tensor.numel() != 1:
            raise VlmError(f"hf:{reference}: the checkpoint lacks the key {key}")
        values[key] = float(tensor)
    return values


def _tensor(path: Path, key: str) -> "torch.Tensor | None":
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return file.get_tensor(key) if key in set(file.keys()) else None
    import torch

    found = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(key)
    return found if isinstance(found, torch.Tensor) else None
