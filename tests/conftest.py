"""Shared fixtures: the tests' own modules importable, and tiny models built once a session."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails at once
sys.path.insert(0, str(Path(__file__).parent))

from file_server import Server, running

_USERS_CACHE = os.environ.get("VLM_CACHE")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave the user's cache alone, and so do fixtures of a module or session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True)
def _cache_of_starter_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of the starter parts share the user's cache, for a conversion takes half a minute."""
    if request.node.get_closest_marker("starter"):
        if _USERS_CACHE is None:
            monkeypatch.delenv("VLM_CACHE")
        else:
            monkeypatch.setenv("VLM_CACHE", _USERS_CACHE)


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


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of files on 127.0.0.1 that misbehaves as told."""
    with running() as made:
        yield made
