"""Compiled layers train what uncompiled ones train, and where no compiler works training goes on without."""

import pytest
import torch
from generative_parts import generative_model
from tiny_models import tiny_timm_image_model
from training_parts import conversations, losses, tiny_recipe, weights

from vlm import VlmError, train
from vlm.backbones.image import build_image_encoder
from vlm.model_spec import ImageEncoderSpec
from vlm.training.compiling import compile_layers


def test_a_compiled_run_is_the_run_without(tiny_folder, tmp_path, caplog):
    data = conversations(tmp_path / "data")
    for name, on in (("without", False), ("with", True)):
        # One sample at a time: no padding, so there is one form of a layer to wait for.
        recipe = tiny_recipe(tiny_folder, data, tmp_path / name, compile=on, micro_batch_size=1, steps=3)
        lora = recipe.model.language_model.lora.model_copy(update={"dropout": 0.3})
        language_model = recipe.model.language_model.model_copy(update={"lora": lora})
        model = recipe.model.model_copy(update={"language_model": language_model})
        train(recipe.model_copy(update={"model": model}), quiet=True)
    assert "uncompiled" not in caplog.text
    torch.testing.assert_close(losses(tmp_path / "with"), losses(tmp_path / "without"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights(tmp_path / "with"), weights(tmp_path / "without"), rtol=1e-4, atol=1e-5)


def test_without_a_compiler_training_goes_on_after_one_warning(tiny_folder, tmp_path, caplog, monkeypatch):
    data = conversations(tmp_path / "data")
    train(tiny_recipe(tiny_folder, data, tmp_path / "without"), quiet=True)

    def broken(forward, **options):
        def fails(*arguments, **named):
            raise RuntimeError("no C++ compiler\nlong report")

        return fails

    monkeypatch.setattr(torch, "compile", broken)
    train(tiny_recipe(tiny_folder, data, tmp_path / "with", compile=True), quiet=True)
    assert caplog.text.count("training uncompiled: no C++ compiler") == 1
    torch.testing.assert_close(weights(tmp_path / "with"), weights(tmp_path / "without"), rtol=1e-6, atol=1e-7)


def test_what_is_wrong_with_a_batch_is_not_taken_for_the_compiler(tiny_folder, monkeypatch):
    model = generative_model(tiny_folder, "llama")
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    assert compile_layers(model) >= 2
    layer = model.language_model.network.model.layers[0]
    with pytest.raises(RuntimeError, match="must match the size"):
        layer(torch.zeros(1, 2, 3))


def test_a_model_without_such_layers_refuses_to_be_compiled(tiny_folder):
    encoder = build_image_encoder(ImageEncoderSpec(name=f"timm:{tiny_folder(tiny_timm_image_model, 'convnext')}"))
    with pytest.raises(VlmError, match=r"train\.compile"):
        compile_layers(encoder)
