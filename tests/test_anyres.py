"""LLaVA-1.6: pictures cut into tiles give transformers' pixels, tokens, scores and answers; recipes can use them."""

import json

import pytest
import torch
from generative_parts import generative_spec, pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_parts import PINPOINTS, original_llava_next, tiny_llava_next
from llava_reference import QUESTIONS, Theirs, assert_same_answers
from PIL import Image

from vlm import VlmError, load_model
from vlm.data.samples import Sample
from vlm.data.tiling import best_resolution, build_tiling
from vlm.data.transforms import ImageTransform
from vlm.models.build import build_model
from vlm.models.export_llava import export_llava
from vlm.objectives import ReadOuts
from vlm.objectives.lm import lm_loss
from vlm.recipe import ObjectiveSpec

SHAPES = [(32, 32), (70, 32), (31, 90), (40, 41), (200, 90)]
LM = ObjectiveSpec(name="lm")


def _theirs(folder):
    import transformers as t

    model = t.LlavaNextForConditionalGeneration.from_pretrained(folder)
    processor = t.LlavaNextProcessor.from_pretrained(folder)
    processor.image_processor = t.LlavaNextImageProcessorPil.from_pretrained(folder)
    return Theirs(model, processor)


def _llava_next(text, vision, folder):
    return tiny_llava_next(folder, text, vision)


def shaped(folder, shapes):
    """Pictures of these (width, height)."""
    paths = pictures(folder, len(shapes), size=16)
    for path, shape in zip(paths, shapes):
        Image.open(path).resize(shape, Image.Resampling.BICUBIC).save(path)
    return paths


@pytest.mark.parametrize(("text", "vision"), [("llama", "clip"), ("qwen2", "clip"), ("llama", "siglip")])
def test_llava_16_answers_as_transformers(tiny_folder, tmp_path, text, vision):
    folder = tiny_folder(_llava_next, text, vision)
    ours = load_model(folder, "cpu", "fp32")
    ours.spec = ours.spec.model_copy(update={"template": "vicuna_v1"})
    assert_same_answers(ours, _theirs(folder), shaped(tmp_path, SHAPES[1:4]))


def test_the_authors_layout_answers_as_transformers(tiny_folder, tmp_path):
    hf = tiny_folder(_llava_next, "llama", "clip")
    ours = load_model(original_llava_next(hf, tmp_path), "cpu", "fp32")
    assert ours.tiling.pinpoints == tuple(map(tuple, PINPOINTS))
    assert_same_answers(ours, _theirs(hf), shaped(tmp_path, SHAPES[2:5]))


def test_tiles_have_transformers_pixels_and_number_of_tokens(tiny_folder, tmp_path):
    folder = tiny_folder(_llava_next, "llama", "clip")
    ours, theirs = load_model(folder, "cpu", "fp32"), _theirs(folder)
    for path in shaped(tmp_path, SHAPES):
        inputs = theirs.inputs(path, "<image>")
        cut = ours.tiling.cut(path)
        torch.testing.assert_close(cut.pixels, inputs.pixel_values[0], rtol=0, atol=1e-5)
        assert list(cut.size) == inputs.image_sizes[0].tolist()
        count = int((inputs.input_ids == ours.language_model.image_token_id).sum())
        assert ours.count_tokens([path]) == [count]
        assert len(ours.encode_pictures([path])[0]) == count


@settings(max_examples=200, deadline=None)
@given(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), st.lists(st.sampled_from(PINPOINTS), min_size=1))
def test_the_best_resolution_is_transformers(size, pinpoints):
    from transformers.image_processing_utils import select_best_resolution

    assert best_resolution(size, pinpoints) == select_best_resolution(size, pinpoints) or (
        best_resolution(size, pinpoints) == list(select_best_resolution(size, pinpoints))
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([(4, 4), (3, 5), (1, 1)]))
def test_as_many_tokens_come_as_are_counted(height, width, grid):
    tiling = build_tiling(ImageTransform(size=(8, 8)), None, grid)
    picture = Image.new("RGB", (width, height))
    rows, columns = tiling.tiles((height, width))
    tokens = torch.zeros(1 + rows * columns, grid[0] * grid[1], 2)
    (joined,) = tiling.split(tokens, [(height, width)], torch.ones(2))
    assert len(joined) == tiling.count(picture)
    assert len(tiling.cut(picture).pixels) == 1 + rows * columns


def _tiled_model(tiny_folder, **bridge):
    spec = generative_spec(tiny_folder, "llama", bridge=bridge)
    encoder = spec.image_encoder.model_copy(update={"resize": "anyres", "layer": -2})
    return build_model(spec.model_copy(update={"image_encoder": encoder}), ["bridge.*"], "cpu", "fp32")


@pytest.mark.parametrize("bridge", [{}, {"reduce": "pool", "tokens": 4}, {"reduce": "pixel_shuffle", "factor": 2}])
def test_a_recipe_trains_on_tiles_packed_as_padded(tiny_folder, tmp_path, bridge):
    """Loss and gradients, the newline's among them, are those of each sample alone."""
    model = _tiled_model(tiny_folder, **bridge)
    paths = shaped(tmp_path, SHAPES[:3])
    turns = [tuple(model.question_messages(q, a)) for q, a in zip(QUESTIONS, ["red", "a circle of some kind", "no"])]
    samples = [Sample(path, (path,), (turn,)) for path, turn in zip(paths, turns)]
    prepared = [(model.prepare_texts(sample), sample.images) for sample in samples]

    def trained(chosen):
        batch = model.collate(chosen).with_images(model._pixels)
        model.zero_grad()
        loss, _ = lm_loss(ReadOuts(model, batch), LM)
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    loss, grads = trained(prepared)
    parts = [trained([one]) for one in prepared]
    torch.testing.assert_close(loss, sum(part for part, _ in parts), rtol=1e-5, atol=1e-5)
    assert float(grads["bridge.newline"].abs().sum()) > 0
    for name, grad in grads.items():
        torch.testing.assert_close(grad, sum(g[name] for _, g in parts), rtol=1e-3, atol=1e-5)


def test_answers_over_tiles_are_the_same_alone_batched_and_sharing_a_picture(tiny_folder, tmp_path):
    model = _tiled_model(tiny_folder)
    one, two, three = shaped(tmp_path, SHAPES[:3])
    images, questions = [one, two, two, three], ["what?", *QUESTIONS]
    together = model.answer(images, questions, max_new_tokens=5)
    assert together == [model.answer(i, q, max_new_tokens=5)[0] for i, q in zip(images, questions)]


def test_tiles_count_against_the_context_and_the_length(tiny_folder, tmp_path):
    model = _tiled_model(tiny_folder)
    (path,) = shaped(tmp_path, SHAPES[3:4])
    sample = Sample("a", (path,), (tuple(model.question_messages("what?", "red")),))
    with pytest.raises(VlmError, match="pictures do not fit"):
        model.prepare_texts(sample, limit=20)
    prompt = model.prompts.asking(model.question_messages("what color is it? " * 400), (path,), {"max_new_tokens": 4})
    length = len(prompt.text.ids) + model.count_tokens([path])[0] - 1
    assert length == model.language_model.context_length - 4


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"image_aspect_ratio": "anyres_max_9"}, "only anyres with spatial_unpad"),
        ({"mm_patch_merge_type": "flat"}, "only anyres with spatial_unpad"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "no list of sizes"),
        ({"image_grid_pinpoints": [[48, 32]]}, "no multiple of a tile's 32 x 32"),
    ],
)
def test_other_ways_of_cutting_are_refused_in_one_line(tiny_folder, tmp_path, changes, error):
    folder = original_llava_next(tiny_folder(_llava_next, "llama", "clip"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(VlmError, match=error) as raised:
        load_model(folder, "cpu")
    assert "\n" not in str(raised.value)


def test_a_checkpoint_without_its_newline_is_refused(tiny_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder(_llava_next, "llama", "clip"), folder)
    state = {k: v for k, v in load_file(folder / "model.safetensors").items() if "newline" not in k}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VlmError, match="newline"):
        load_model(folder, "cpu")


def test_where_tiles_have_no_place_they_are_refused(tiny_folder, tmp_path):
    from vlm.model_spec import DualEncoderSpec, GenerativeSpec

    encoder = {"name": "hf:x", "resize": "anyres"}
    with pytest.raises(ValueError, match="generative model with a projection"):
        DualEncoderSpec.model_validate({"image_encoder": encoder, "text_encoder": "hf:y"})
    with pytest.raises(ValueError, match="generative model with a projection"):
        GenerativeSpec(image_encoder=encoder, bridge={"type": "qformer"}, language_model="hf:y")
    with pytest.raises(ValueError, match="goes with `resize: anyres`"):
        GenerativeSpec(image_encoder={"name": "hf:x", "grid_pinpoints": [[8, 8]]}, language_model="hf:y")
    with pytest.raises(VlmError, match="form no grid"):
        build_tiling(ImageTransform(), None, None)
    with pytest.raises(VlmError, match="anyres"):
        export_llava(_tiled_model(tiny_folder), tmp_path / "export")


def test_a_run_over_tiles_goes_through_and_keeps_no_features(tiny_folder, tmp_path, monkeypatch):
    """How many tokens a picture becomes depends on its shape, so the feature cache, on by default, stays empty."""
    from training_parts import conversations, tiny_recipe

    from vlm import train

    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    data = conversations(tmp_path / "data", count=4)
    for number, path in enumerate(sorted(data.parent.glob("*.png"))):
        Image.open(path).resize(SHAPES[1 + number]).save(path)
    recipe = tiny_recipe(tiny_folder, data, tmp_path / "run", steps=2)
    encoder = recipe.model.image_encoder.model_copy(update={"resize": "anyres", "layer": -2})
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"image_encoder": encoder})})
    assert recipe.data.cache_features
    assert train(recipe, quiet=True).finished
    assert not list(tmp_path.glob("cache/features/*"))
    model = load_model(tmp_path / "run", "cpu", "fp32")
    assert model.picture_features() is None
    assert model.answer(str(path), "what is it?", max_new_tokens=4) == model.answer(
        [path], ["what is it?"], max_new_tokens=4
    )
