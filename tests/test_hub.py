"""`load_model` with a hub id, against a small server that stands in for the hub."""

import json
import os
import shutil
import subprocess
import sys
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


def ask(server: HubServer, cache: Path, *names: str, offline: bool = False) -> list[dict[str, Any]]:
    """What `load_model` of each name comes to in a fresh process."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps(names), json.dumps(TEXTS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]


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


@pytest.mark.timeout(300)
def test_a_model_is_downloaded_resumed_and_found_again_without_a_network(tiny_folder: Any, tmp_path: Path) -> None:
    folder = _large(tiny_folder(tiny_hf_dual, "clip"), tmp_path / "large")
    expected = load_model(folder).encode_text(TEXTS)
    with hub_server({"tiny/clip": folder}, cut_once=("model.safetensors",)) as server:
        (online,) = ask(server, tmp_path, "tiny/clip")
        torch.testing.assert_close(torch.tensor(online["embeddings"]), expected, atol=1e-5, rtol=1e-5)
        first, second = (start for name, start in server.downloads if name == "model.safetensors")
        assert first == 0
        assert 0 < second <= (folder / "model.safetensors").stat().st_size // 2  # broken off there, gone on from there
        assert len(server.downloads) == len(set(server.downloads))  # nothing twice

        before = len(server.requests)
        offline, missing = ask(server, tmp_path, "tiny/clip", "tiny/other", offline=True)
        assert offline == online
        assert missing["error"].startswith("tiny/other: no such folder and no such model on the hub")
        assert "\n" not in missing["error"]
        assert len(server.requests) == before


@pytest.mark.timeout(300)
def test_what_the_hub_lacks_is_one_line(tiny_folder: Any, tmp_path: Path) -> None:
    whole = tiny_folder(tiny_hf_dual, "siglip")
    places = {}
    for lacking in ("model.safetensors", "preprocessor_config.json", "config.json"):
        folder = Path(shutil.copytree(whole, tmp_path / f"without-{lacking}"))
        (folder / lacking).unlink()
        places[f"tiny/without-{lacking}"] = folder
    with hub_server(places) as server:
        answers = ask(server, tmp_path / "cache", *places, "tiny/nothing")
    for name, answer in zip([*places, "tiny/nothing"], answers, strict=True):
        assert name in answer["error"]
        assert "\n" not in answer["error"]
    assert "model.safetensors" in answers[0]["error"]
    assert "image preprocessor cannot be read" in answers[1]["error"]
    assert "no such model on the hub" in answers[2]["error"]
    assert "no such model on the hub" in answers[3]["error"]
