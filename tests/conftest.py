"""Shared fixtures: the tests' own modules importable, and tiny models built once a session."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails at once
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _own_cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests leave the user's cache alone; those of the starter parts share it, for a conversion takes half a minute."""
    if not request.node.get_closest_marker("starter"):
        monkeypatch.setenv("VLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_folder(builder, *arguments)`: the folder `builder(*arguments, folder)` wrote, built once a session."""
    made: dict[tuple, Path] = {}

    def folder_of(builder: Callable, *arguments: object) -> Path:
        key = (builder, *arguments)
        if key not in made:
            folder = tmp_path_factory.mktemp("-".join([builder.__name__, *map(str, arguments)]))
            builder(*arguments, folder)
            made[key] = folder
        return made[key]

    return folder_of
