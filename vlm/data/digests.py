"""What was fetched the first time: digests of files whose publisher states none, kept beside the data."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from vlm.data.download import digest
from vlm.errors import VlmError
from vlm.paths import data_dir


def digests_file() -> Path:
    """The record of the data folder: address -> SHA-256; of a file out of an archive, `ADDRESS#NAME`."""
    return data_dir() / "digests.json"


def recorded() -> dict[str, str]:
    """All that is recorded. Raises VlmError where the record cannot be read."""
    try:
        found = json.loads(digests_file().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise VlmError(f"{digests_file()}: cannot be read: {error}; remove it to begin anew") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise VlmError(f"{digests_file()}: expected an address and a SHA-256 in each line; remove it to begin anew")
    return found


def record(digests: Mapping[str, str]) -> None:
    """Add to the record; the caller sees to it that nobody else does. It is whole at any time."""
    new = digests_file().with_name(".digests.json")
    new.write_text(json.dumps(recorded() | dict(digests), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(new, digests_file())


def as_before(url: str, file: Path) -> str:
    """The SHA-256 of what was fetched from `url`.

    Raises VlmError, and removes the file, if something else came from there the first time.
    """
    found = digest(file)
    before = recorded().get(url, found)
    if found != before:
        file.unlink()
        raise VlmError(
            f"{url}: not the file that it was the first time (its SHA-256 was {before}, now {found}); removed. To take "
            f"the new one, delete the line of this address in {digests_file()}"
        )
    return found
