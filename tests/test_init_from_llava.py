"""A stage starts from a published projector as it starts from a run."""

import pytest
import torch
from llava_parts import original_llava, tiny_llava
from safetensors.torch import save_file
from training_parts import conversations, tiny_recipe

from vlm import VlmError
from vlm.training.loop import Trainer


def _llava(folder):
    return tiny_llava(folder)


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    data = conversations(tmp_path / "data")
    return lambda source: tiny_recipe(tiny_folder, data, tmp_path / "run", steps=1).model_copy(
        update={"init_from": str(source)}
    )


@pytest.mark.parametrize("form", ["projector", "file", "lora", "merged", "transformers"])
def test_the_projector_of_every_layout_is_taken(tiny_folder, tmp_path, recipe, form):
    hf = tiny_folder(_llava)
    source = hf if form == "transformers" else None
    if source is None:
        source = original_llava(hf, tmp_path, "projector" if form == "file" else form, pickled=True)
    trainer = Trainer(recipe(source / "mm_projector.bin" if form == "file" else source), quiet=True)
    import transformers as t

    theirs = t.LlavaForConditionalGeneration.from_pretrained(hf).model.multi_modal_projector
    ours = trainer.model.bridge.layers
    torch.testing.assert_close(ours[0].weight.detach().cpu(), theirs.linear_1.weight.detach(), rtol=0, atol=0)
    torch.testing.assert_close(ours[2].bias.detach().cpu(), theirs.linear_2.bias.detach(), rtol=0, atol=0)
    assert trainer.train().finished


def test_a_published_model_is_trained_on_as_a_whole(tiny_folder, recipe):
    """Its tower and its language model are parts by its name, its projector is where the bridge starts."""
    from vlm import load_model
    from vlm.models.published_llava import llava_spec, read_llava

    folder = tiny_folder(_llava)
    made = recipe(folder)
    made = made.model_copy(update={"model": llava_spec(read_llava(str(folder))), "trainable": ["bridge.*"]})
    trainer = Trainer(made, quiet=True)
    published = load_model(folder, "cpu", "fp32")
    torch.testing.assert_close(trainer.model.state_dict(), published.state_dict(), rtol=0, atol=0)
    assert trainer.train().finished
    assert load_model(trainer.folder.path, "cpu", "fp32").spec.template == "vicuna_v1"


def test_a_projector_for_another_language_model_is_refused(tmp_path, recipe):
    state = {"model.mm_projector.0.weight": torch.zeros(48, 32), "model.mm_projector.0.bias": torch.zeros(48)}
    save_file(state, tmp_path / "mm_projector.safetensors")
    with pytest.raises(VlmError, match=r"shapes differ for bridge\.layers\.0"):
        Trainer(recipe(tmp_path), quiet=True)


def test_a_folder_without_weights_says_what_is_expected(tmp_path, recipe):
    (tmp_path / "empty").mkdir()
    with pytest.raises(VlmError, match=r"no trained model .* and no LLaVA's projector"):
        Trainer(recipe(tmp_path / "empty"), quiet=True)
