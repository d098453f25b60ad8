"""Published LLaVA checkpoints, in every layout, answer and score as transformers' own model does."""

import json
import shutil

import pytest
import torch
from generative_parts import pictures
from llava_parts import lora_matrices, original_llava, tiny_llava
from llava_reference import Theirs, assert_same_answers
from PIL import Image
from safetensors.torch import load_file, save_file

from vlm import VlmError, load_model

LAYOUTS = [("merged", True), ("merged", False), ("projector", True), ("lora", True)]
KINDS = [("llama", "clip"), ("qwen2", "clip"), ("llama", "siglip")]


def _llava(text, vision, folder):
    return tiny_llava(folder, text, vision)


def _padding_llava(folder):
    return tiny_llava(folder, pad=True)


def _theirs(folder):
    import transformers as t

    model = t.LlavaForConditionalGeneration.from_pretrained(folder)
    return Theirs(model, t.LlavaProcessor.from_pretrained(folder))


@pytest.mark.parametrize(("text", "vision"), KINDS)
def test_transformers_layout_answers_as_transformers(tiny_folder, tmp_path, text, vision):
    folder = tiny_folder(_llava, text, vision)
    ours = load_model(folder, "cpu", "fp32")
    ours.spec = ours.spec.model_copy(update={"template": "vicuna_v1"})
    assert_same_answers(ours, _theirs(folder), pictures(tmp_path, 3))


def test_padding_is_taken_from_the_processor(tiny_folder, tmp_path):
    folder = tiny_folder(_padding_llava)
    ours, theirs = load_model(folder, "cpu", "fp32"), _theirs(folder)
    picture = tmp_path / "wide.png"
    Image.open(pictures(tmp_path, 1)[0]).resize((70, 32)).save(picture)
    expected = theirs.processor.image_processor(Image.open(picture), return_tensors="pt").pixel_values[0]
    assert ours.image_encoder.transform.resize == "pad"
    torch.testing.assert_close(ours._pixels([str(picture)])[0], expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("old", [True, False], ids=["old-keys", "new-keys"])
def test_both_spellings_of_transformers_keys_are_read(tiny_folder, tmp_path, old):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder(_llava, "llama", "clip"), folder)
    state = load_file(folder / "model.safetensors")
    renamed = {}
    for key, tensor in state.items():
        key = key.removeprefix("model.").replace("language_model.model.", "language_model.")
        key = key.replace("vision_tower.vision_model.", "vision_tower.").removeprefix("language_model.lm_head")
        if not key.startswith(("language_model", "vision_tower", "multi_modal")):
            key = "lm_head.weight"
        if old:
            key = key.replace("language_model.", "language_model.model.").replace("lm_head", "language_model.lm_head")
            key = key.replace("vision_tower.", "vision_tower.vision_model.")
        elif key != "lm_head.weight":
            key = f"model.{key}"
        renamed[key] = tensor
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    one, two = load_model(tiny_folder(_llava, "llama", "clip"), "cpu", "fp32"), load_model(folder, "cpu", "fp32")
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("pickled", [True, False], ids=["bin", "safetensors"])
@pytest.mark.parametrize(
    ("layout", "tower"), [("merged", True), ("merged", False), ("projector", True), ("lora", True)]
)
def test_the_authors_layouts_answer_as_transformers(tiny_folder, tmp_path, layout, tower, pickled):
    hf = tiny_folder(_llava, "llama", "clip")
    ours = load_model(original_llava(hf, tmp_path, layout, pickled, tower), "cpu", "fp32")
    theirs = _theirs(hf)
    if layout == "lora":
        with torch.no_grad():
            for layer, (a, b) in lora_matrices().items():
                weight = theirs.model.get_submodule(layer.replace("model.", "model.language_model.", 1)).weight
                weight += 4 / 2 * b @ a
    assert ours.image_encoder.transform.resize == "pad"
    assert_same_answers(ours, theirs, pictures(tmp_path, 3))


def _edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"vision_feature_layer": [-2, -1]}, "several layers"),
        ({"vision_feature_layer": -1}, "without its norm"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias"),
    ],
)
def test_what_is_not_llava_15_is_refused_in_one_line(tiny_folder, tmp_path, changes, error):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder(_llava, "llama", "clip"), folder)
    _edit(folder, **changes)
    with pytest.raises(VlmError, match=error) as raised:
        load_model(folder, "cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"mm_projector_type": "resampler"}, "mlpNx_gelu"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"model_type": "llava_mpt"}, "llava_mpt"),
    ],
)
def test_what_the_authors_also_tried_is_refused_in_one_line(tiny_folder, tmp_path, changes, error):
    folder = original_llava(tiny_folder(_llava, "llama", "clip"), tmp_path, "merged")
    _edit(folder, **changes)
    with pytest.raises(VlmError, match=error):
        load_model(folder, "cpu")


@pytest.mark.parametrize("change", ["left over", "missing", "projector", "shape"])
def test_every_key_is_accounted_for(tiny_folder, tmp_path, change):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder(_llava, "llama", "clip"), folder)
    state = load_file(folder / "model.safetensors")
    norm = next(key for key in state if key.endswith("layers.1.input_layernorm.weight"))
    if change == "left over":
        state["model.image_newline"] = torch.zeros(32)
    elif change == "missing":
        del state[norm]
    elif change == "projector":
        del state[next(key for key in state if key.endswith("linear_2.bias"))]
    else:
        state[norm] = torch.zeros(7)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    words = {"left over": "no place for bridge.newline", "projector": "layers.2.bias"}
    with pytest.raises(VlmError, match=words.get(change, r"layers\.1\.input_layernorm")):
        load_model(folder, "cpu")


def test_a_pickle_that_holds_more_than_tensors_is_not_loaded(tiny_folder, tmp_path):
    folder = original_llava(tiny_folder(_llava, "llama", "clip"), tmp_path, "projector", pickled=True)
    torch.save({"model.mm_projector.0.weight": shutil.rmtree}, folder / "mm_projector.bin")
    with pytest.raises(VlmError, match="other things than tensors"):
        load_model(folder, "cpu")


def test_adapters_of_another_language_model_are_refused(tiny_folder, tmp_path):
    folder = original_llava(tiny_folder(_llava, "llama", "clip"), tmp_path, "lora")
    state = load_file(folder / "adapter_model.safetensors")
    moved = {key.replace("layers.1", "layers.9"): tensor for key, tensor in state.items()}
    save_file(moved, folder / "adapter_model.safetensors")
    with pytest.raises(VlmError, match=r"no place for the adapter .*layers\.9"):
        load_model(folder, "cpu")
