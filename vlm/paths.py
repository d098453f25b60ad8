"""Where things lie: the cache folder, and the YAML folders that travel with the library."""

import os
from pathlib import Path
from typing import Any

import yaml

from vlm.errors import VlmError, did_you_mean

_PACKAGE = Path(__file__).resolve().parent


def cache_dir() -> Path:
    """The folder for converted weights, prepared data and cached features (`VLM_CACHE`, else the user's cache)."""
    if chosen := os.environ.get("VLM_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vlm"


def data_dir() -> Path:
    """The folder for data sets that have to be fetched by hand (`VLM_DATA`, else among the user's data)."""
    if chosen := os.environ.get("VLM_DATA"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_DATA_HOME", "~/.local/share")).expanduser() / "vlm"


def yaml_folder(kind: str) -> Path:
    """The folder `recipes`, `datasets` or `eval`: inside the installed package, or at the root of a checkout."""
    installed = _PACKAGE / "yaml" / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def yaml_names(kind: str) -> list[str]:
    """Names of the YAML files that travel with the library, e.g. `starter/llava_pretrain`."""
    folder = yaml_folder(kind)
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))


def find_yaml(kind: str, name: str) -> Path:
    """The file that `name` means: a path, or the name of a file that travels with the library.

    Raises VlmError with the nearest names if there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    short = name.removeprefix(f"{kind}/").removesuffix(".yaml").removesuffix(".yml")
    shipped = yaml_folder(kind) / f"{short}.yaml"
    if shipped.is_file():
        return shipped
    word = {"recipes": "recipe", "datasets": "data set", "eval": "benchmark"}[kind]
    raise VlmError(f"no {word} {name!r}: neither a file nor a shipped name{did_you_mean(short, yaml_names(kind))}")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping. Objects of Python are refused: a recipe is data, not code."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        where = f"{path}:{mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else str(path)
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise VlmError(f"{where}: not plain YAML: {problem}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise VlmError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise VlmError(f"{path}: expected keys with values, found {type(content).__name__}")
    return content
