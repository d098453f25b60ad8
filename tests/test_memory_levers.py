"""Memory levers change memory and nothing else, and say where they cannot work."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from generative_parts import generative_model, generative_spec, pictures
from tiny_models import tiny_timm_image_model
from training_parts import conversations, losses, tiny_recipe, weights

from vlm import VlmError, train
from vlm.models.build import build_model
from vlm.objectives.lm import lm_loss
from vlm.objectives.objective import ReadOuts
from vlm.recipe import ObjectiveSpec
from vlm.training.memory import activations_on_cpu, checkpoint_layers

KINDS = ["llama", "qwen2", "opt", "gpt2", "t5"]


def _loss(model, paths):
    """Loss, gradients, and bytes that the forward pass keeps for the backward pass."""
    questions = ["what color is the shape?", "what is it?"]
    texts = [[model.tokenize(model.question_messages(q, "a red circle"))] for q in questions]
    batch = model.collate([(text, (path,)) for text, path in zip(texts, paths)]).with_images(model._pixels)
    kept = []
    model.zero_grad()
    torch.manual_seed(0)  # dropout
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss, _ = lm_loss(ReadOuts(model, batch), ObjectiveSpec(name="lm"))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, sum(kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainable", [["bridge.*"], ["bridge.*", "language_model.lora.*"]], ids=["bridge", "lora"])
def test_checkpointing_keeps_less_and_changes_nothing(tiny_folder, tmp_path, kind, trainable):
    spec = generative_spec(tiny_folder, kind, language={"lora": {"rank": 2, "alpha": 8, "dropout": 0.3}})
    model = build_model(spec, trainable, device="cpu", precision="fp32").train()
    paths = pictures(tmp_path, 2)
    loss, gradients, kept = _loss(model, paths)
    assert checkpoint_layers(model) >= 2
    again, others, less = _loss(model, paths)
    torch.testing.assert_close(loss, again, rtol=0, atol=0)
    torch.testing.assert_close(gradients, others, rtol=1e-6, atol=1e-7)
    assert less < 0.6 * kept


def test_checkpointing_leaves_answers_as_they_are(tiny_folder, tmp_path):
    model = generative_model(tiny_folder, "llama")
    paths = pictures(tmp_path, 2)
    said = model.answer(paths, ["what?", "is it red?"], max_new_tokens=6)
    checkpoint_layers(model)
    assert model.answer(paths, ["what?", "is it red?"], max_new_tokens=6) == said


def test_a_run_with_checkpointing_is_the_run_without(tiny_folder, tmp_path):
    data = conversations(tmp_path / "data")
    for name, on in (("without", False), ("with", True)):
        train(tiny_recipe(tiny_folder, data, tmp_path / name, gradient_checkpointing=on), quiet=True)
    torch.testing.assert_close(losses(tmp_path / "with"), losses(tmp_path / "without"), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights(tmp_path / "with"), weights(tmp_path / "without"), rtol=1e-5, atol=1e-6)


def test_a_model_without_such_layers_refuses_checkpointing(tiny_folder):
    from vlm.backbones.image import build_image_encoder
    from vlm.model_spec import ImageEncoderSpec

    encoder = build_image_encoder(ImageEncoderSpec(name=f"timm:{tiny_folder(tiny_timm_image_model, 'convnext')}"))
    with pytest.raises(VlmError, match="gradient_checkpointing"):
        checkpoint_layers(encoder)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_that_wait_elsewhere_come_back_as_they_were(tiny_folder, tmp_path, kind):
    spec = generative_spec(tiny_folder, kind, language={"lora": {"rank": 2, "alpha": 8}})
    model = build_model(spec, ["bridge.*", "language_model.lora.*"], device="cpu", precision="fp32").train()
    (path,) = pictures(tmp_path, 1)
    text = model.tokenize(model.question_messages("what?", "a red circle"))
    batch = model.collate([([text], (path,))]).with_images(model._pixels)
    results = []
    for on in (False, True):
        model.zero_grad()
        with activations_on_cpu(on, pinned=False):
            loss, _ = lm_loss(ReadOuts(model, batch), ObjectiveSpec(name="lm"))
        loss.backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_offload_without_a_gpu_is_one_line(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = tiny_recipe(tiny_folder, conversations(tmp_path / "data"), tmp_path / "run", cpu_offload=True)
    with pytest.raises(VlmError, match=r"train\.cpu_offload: training runs on cpu"):
        train(recipe, quiet=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offload needs a CUDA device")
def test_a_run_with_offload_is_the_run_without(tiny_folder, tmp_path):
    data = conversations(tmp_path / "data")
    for name, on in (("without", False), ("with", True)):
        train(tiny_recipe(tiny_folder, data, tmp_path / name, cpu_offload=on, precision="fp32"), quiet=True)
    torch.testing.assert_close(losses(tmp_path / "with"), losses(tmp_path / "without"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantization_without_a_gpu_is_one_line(tiny_folder, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(VlmError, match=rf"quantization: {kind}: .* CUDA device") as raised:
        generative_model(tiny_folder, "llama", language={"quantization": kind})
    assert "\n" not in str(raised.value)


def test_quantization_without_bitsandbytes_says_what_to_install(monkeypatch):
    import vlm.backbones.quantization as quantization

    monkeypatch.setattr(quantization.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VlmError, match="pip install bitsandbytes"):
        quantization.quantization_options("4bit", "hf:x", torch.bfloat16)


def test_quantized_weights_do_not_learn():
    from vlm.models.freezing import freeze_all_but

    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(VlmError, match="weight is quantized and cannot learn"):
        freeze_all_but(model, ["*"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes needs a CUDA device")
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantized_language_model_trains_its_adapters(tiny_folder, tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    spec = generative_spec(tiny_folder, "llama", language={"lora": {"rank": 2}, "quantization": kind})
    model = build_model(spec, ["bridge.*", "language_model.lora.*"], device="cuda", precision="bf16")
    batch = model.collate([([model.tokenize(model.question_messages("what?", "red"))], tuple(pictures(tmp_path, 1)))])
    batch = batch.with_images(model._pixels).to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = lm_loss(ReadOuts(model, batch), ObjectiveSpec(name="lm"))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


FAULTS = """
import resource, sys
import torch
from vlm.training.memory import keep_freed_memory

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    made = [torch.ones(4_000_000) for _ in range(8)] + [torch.ones(24_000_000)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory()
print(kept, step(), step(), step())
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc only")
@pytest.mark.parametrize("told", [{}, {"MALLOC_TRIM_THRESHOLD_": "65536"}], ids=["free", "told by the environment"])
def test_a_step_on_the_cpu_finds_the_memory_of_the_step_before(told):
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=plain | told, capture_output=True, text=True, check=True)
    kept, first, *later = done.stdout.split()
    assert kept == str(not told)
    if not told:
        assert max(map(int, later)) < int(first) / 2, "memory was given back and fetched again"
