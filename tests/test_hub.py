"""`load_model` with a hub id, against a small server that stands in for the hub."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dual_encoder_parts import TEXTS, tiny_hf_dual
from hub_server import HubServer, hub_server

from vlm import load_model

# huggingface_hub reads its variables when it is imported, so each of these is a process of its own.
PROGRAM = """
import json, sys
from vlm import VlmError, load_model
for name in json.loads(sys.argv[1]):
    try:
        answer = {"embeddings": load_model(name).encode_text(json.loads(sys.argv[2])).tolist()}
    except VlmError as error:
        answer = {"error": str(error)}
    print("ANSWER " + json.dumps(answer))
"""


def ask(server: HubServer, cache: Path, *names: str, offline: bool = False) -> dict[str, dict[str, Any]]:
    """Name -> what `load_model` of it comes to, in a fresh process."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps(names), json.dumps(TEXTS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    return dict(zip(names, answers, strict=True))


def _large(source: Path, folder: Path) -> Path:
    """The same CLIP with many more words: huggingface_hub goes on in steps of 10 MiB."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 200_000
    (folder / "config.json").write_text(json.dumps(config))
    state, key = load_file(folder / "model.safetensors"), "text_model.embeddings.token_embedding.weight"
    state[key] = torch.cat([state[key], torch.zeros(200_000 - len(state[key]), state[key].shape[1])])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass
class Asked:
    """What came of asking online, then offline; `large` is the folder behind tiny/clip."""

    server: HubServer
    large: Path
    online: dict[str, dict[str, Any]]
    requests: int  # until then
    offline: dict[str, dict[str, Any]]


LACKING = ("model.safetensors", "preprocessor_config.json", "config.json")


@pytest.fixture(scope="module")
def asked(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """One process that asks a hub, and one that has no network: starting them is what takes long."""
    folder = tmp_path_factory.mktemp("hub")
    places = {"tiny/clip": _large(tiny_folder(tiny_hf_dual, "clip"), folder / "large")}
    for lacking in LACKING:
        place = Path(shutil.copytree(tiny_folder(tiny_hf_dual, "siglip"), folder / f"without-{lacking}"))
        (place / lacking).unlink()
        places[f"tiny/without-{lacking}"] = place
    with hub_server(places, cut_once=("model.safetensors",)) as server:
        online = ask(server, folder / "cache", *places, "tiny/nothing")
        requests = len(server.requests)
        offline = ask(server, folder / "cache", "tiny/clip", "tiny/other", offline=True)
        yield Asked(server, places["tiny/clip"], online, requests, offline)


def test_a_broken_download_goes_on_where_it_broke(asked: Asked) -> None:
    expected = load_model(asked.large).encode_text(TEXTS)
    found = torch.tensor(asked.online["tiny/clip"]["embeddings"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    downloads = [(name, start) for repository, name, start in asked.server.downloads if repository == "tiny/clip"]
    first, second = (start for name, start in downloads if name == "model.safetensors")
    assert first == 0
    assert 0 < second <= (asked.large / "model.safetensors").stat().st_size // 2  # broken off there, gone on from there
    assert len(downloads) == len(set(downloads))  # nothing twice


def test_without_a_network_what_was_downloaded_is_found_and_the_rest_is_one_line(asked: Asked) -> None:
    assert asked.offline["tiny/clip"] == asked.online["tiny/clip"]
    missing = asked.offline["tiny/other"]["error"]
    assert missing.startswith("tiny/other: no such folder and no such model on the hub")
    assert "\n" not in missing
    assert len(asked.server.requests) == asked.requests


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny/without-model.safetensors", "model.safetensors"),
        ("tiny/without-preprocessor_config.json", "image preprocessor cannot be read"),
        ("tiny/without-config.json", "no such model on the hub"),
        ("tiny/nothing", "no such model on the hub"),
    ],
)
def test_what_the_hub_lacks_is_one_line(asked: Asked, name: str, message: str) -> None:
    error = asked.online[name]["error"]
    assert name in error
    assert message in error
    assert "\n" not in error
