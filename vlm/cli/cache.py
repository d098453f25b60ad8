"""`vlm cache`: what the library keeps on disk so as not to do it twice, and deleting it."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from vlm.cli.data import AsJson
from vlm.errors import VlmError, did_you_mean
from vlm.paths import cache_dir

app = typer.Typer(help="Show and delete what is kept on disk.", no_args_is_help=True)

# Folder of the cache -> what lies there. Nothing outside these is ever listed or deleted.
KINDS = {
    "features": "cached image features",
    "models": "converted models",
    "data": "prepared data",
    "shards": "indexes of shards",
    "responses": "answers of evaluated models",
}


@dataclass(frozen=True)
class Entry:
    """One thing that is kept: `name` is its path inside the cache, `size` in bytes."""

    name: str
    path: Path
    size: int

    @property
    def kind(self) -> str:
        """The folder of KINDS it lies in."""
        return self.name.partition("/")[0]


def entries() -> list[Entry]:
    """Everything that is kept, by name."""
    root = cache_dir()
    folders = [path for kind in KINDS if (root / kind).is_dir() for path in sorted((root / kind).iterdir())]
    kept = [path for path in folders if path.is_dir() or path.suffix == ".jsonl"]  # beside them lie lock files
    return [Entry(path.relative_to(root).as_posix(), path, _size(path)) for path in kept]


@app.command("list")
def list_cache(as_json: AsJson = False) -> None:
    """Cached features, converted models and prepared data, with sizes."""
    found = entries()
    if as_json:
        rows = [{"name": e.name, "kind": e.kind, "bytes": e.size, "path": str(e.path)} for e in found]
        typer.echo(json.dumps({"folder": str(cache_dir()), "entries": rows}, indent=2))
        return
    if not found:
        typer.echo(f"{cache_dir()} holds nothing")
        return
    for entry in found:
        typer.echo(f"{_megabytes(entry.size)}  {entry.name}  ({KINDS[entry.kind]})")
    typer.echo(f"{_megabytes(sum(entry.size for entry in found))}  in {cache_dir()}; $VLM_CACHE chooses another folder")


@app.command()
def clear(
    name: Annotated[
        str | None,
        typer.Argument(help=f"An entry of `vlm cache list`, or a kind: {', '.join(KINDS)}."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete an entry, all of a kind, or everything. It is made again when it is needed; no run may be using it."""
    chosen = _chosen(entries(), name)
    if not chosen:
        typer.echo(f"{cache_dir()} holds nothing" + (f" of kind {name}" if name else ""))
        return
    for entry in chosen:
        typer.echo(f"{_megabytes(entry.size)}  {entry.path}")
    total = _megabytes(sum(entry.size for entry in chosen)).strip()
    if not yes:
        typer.confirm(f"delete {total}?", abort=True)
    for entry in chosen:
        # A link is somebody's own arrangement: it goes, what it points to stays.
        shutil.rmtree(entry.path) if entry.path.is_dir() and not entry.path.is_symlink() else entry.path.unlink()
    typer.echo(f"deleted {total}")


def _chosen(found: list[Entry], name: str | None) -> list[Entry]:
    """The entries that `name` means. Raises VlmError if it means none."""
    if name is None or name in KINDS:
        return [entry for entry in found if name in (None, entry.kind)]
    matching = [entry for entry in found if name in (entry.name, entry.path.name)]
    if not matching:
        raise VlmError(f"the cache holds no {name!r}{did_you_mean(name, [*KINDS, *(e.name for e in found)])}")
    if len(matching) > 1:
        raise VlmError(f"{name!r} is more than one entry: {', '.join(e.name for e in matching)}; give one in full")
    return matching


def _size(folder: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    total = folder.stat().st_size if folder.is_file() else 0
    for parent, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.lstat(os.path.join(parent, file)).st_size
            except FileNotFoundError:  # deleted meanwhile
                continue
    return total


def _megabytes(size: int) -> str:
    return f"{size / 1e6:10,.1f} MB"
