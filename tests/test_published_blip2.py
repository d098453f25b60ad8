"""Published BLIP-2 and InstructBLIP answer, score, match and embed as transformers' own models do."""

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from blip2_parts import QUERIES, Theirs, tiny_blip2
from generative_parts import pictures
from PIL import Image
from safetensors.torch import load_file, save_file

from vlm import UnsupportedTask, VlmError, load_model
from vlm.backbones.image import build_image_encoder
from vlm.model_spec import ImageEncoderSpec

KINDS = ["opt", "t5", "instruct-llama", "instruct-t5"]
PROMPTS = ["Question: what color is the shape? Answer:", "is it red", "a photo of a"]
TEXTS = ["a red circle", "yes", "no, it is not"]
NO_STOPS = {"stop_strings": None, "eos_token_id": 2}


def tiny_vision(kind: str, folder: Path) -> Path:
    import transformers as t
    from blip2_parts import VISION
    from tiny_models import CLIP_MEAN, CLIP_STD, randomize

    made = {"blip2": (t.Blip2VisionModel, t.Blip2VisionConfig)}
    made["instruct"] = (t.InstructBlipVisionModel, t.InstructBlipVisionConfig)
    model, config = made[kind]
    randomize(model(config(**VISION))).save_pretrained(folder)
    t.BlipImageProcessor(size={"height": 32, "width": 32}, image_mean=CLIP_MEAN, image_std=CLIP_STD).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_scores_are_transformers_own(tiny_folder: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """Scores to 1e-4; greedy and beam answers token by token, single, batched, and several about one picture."""
    folder = tiny_folder(tiny_blip2, kind)
    ours, theirs, images = load_model(folder, "cpu", "fp32"), Theirs(folder), pictures(tmp_path, 3)
    expected = torch.stack([theirs.score(*triple) for triple in zip(images, PROMPTS, TEXTS)])
    torch.testing.assert_close(ours.score(images, TEXTS, PROMPTS), expected, rtol=1e-4, atol=1e-4)
    asked = [ours.spec.question_prompt.removeprefix("<image>").replace("{question}", text) for text in TEXTS]
    for generation in ({}, {"num_beams": 3}):
        told = [theirs.answer(image, prompt, **generation) for image, prompt in zip(images, asked)]
        assert len(set(told)) > 1
        options = {"max_new_tokens": 6, **NO_STOPS, **generation}
        assert ours.answer(images, TEXTS, **options) == told
        assert [ours.answer(image, text, **options)[0] for image, text in zip(images, TEXTS)] == told
        about_one = [theirs.answer(images[0], prompt, **generation) for prompt in asked]
        assert ours.answer(images[0], TEXTS, **options) == about_one
    verbatim = [theirs.answer(image, PROMPTS[2]) for image in images]
    assert ours.caption(images, PROMPTS[2], max_new_tokens=6, **NO_STOPS) == verbatim


def test_a_retrieval_model_embeds_and_matches_as_transformers(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    import transformers as t

    folder = tiny_folder(tiny_blip2, "itm")
    ours, images = load_model(folder, "cpu", "fp32"), pictures(tmp_path, 3)
    theirs = t.Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
    pixels = t.AutoImageProcessor.from_pretrained(folder)(
        [Image.open(image) for image in images], return_tensors="pt"
    ).pixel_values
    texts = t.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    inputs = {"pixel_values": pixels, "input_ids": texts.input_ids, "attention_mask": texts.attention_mask}
    with torch.no_grad():
        apart = theirs(**inputs)
        pairs = theirs(**inputs, use_image_text_matching_head=True).logits_per_image.softmax(-1)[:, 1]
    found = ours.encode_image(images)
    assert found.shape == (3, QUERIES, 8)
    torch.testing.assert_close(found, apart.image_embeds, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.encode_text(TEXTS), apart.text_embeds.flatten(0, -2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.match(images, TEXTS), pairs, rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedTask, match="no head that says words"):
        ours.caption(images)


@pytest.mark.parametrize("kind", ["blip2", "instruct"])
@pytest.mark.parametrize("size", [None, 48])
def test_the_tower_is_an_image_encoder(
    tiny_folder: Callable[..., Path], tmp_path: Path, kind: str, size: int | None
) -> None:
    """Its tokens are those before the norm, which the Q-Former owns; at other sizes positions are interpolated."""
    import transformers as t

    folder = tiny_folder(tiny_vision, kind)
    encoder = build_image_encoder(ImageEncoderSpec(name=f"hf:{folder}", drop_cls=False, image_size=size))
    model = (t.Blip2VisionModel if kind == "blip2" else t.InstructBlipVisionModel).from_pretrained(folder).eval()
    pixels = torch.randn(2, 3, *encoder.transform.size)
    found = encoder(pixels)
    with torch.no_grad():
        expected = model(pixels, interpolate_pos_encoding=size is not None).last_hidden_state
    assert found.pooled is None
    assert encoder.num_tokens == 1 + ((size or 32) // 8) ** 2
    torch.testing.assert_close(model.post_layernorm(found.tokens), expected, rtol=1e-4, atol=1e-4)


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        *product(["opt", "itm", "instruct-llama"], ["vision_model.encoder", "qformer.encoder", "query_tokens"]),
        ("opt", "language_projection"),
        ("instruct-llama", "qformer.embeddings.word"),
        ("itm", "itm_head"),
    ],
)
def test_a_missing_key_is_named(tiny_folder: Callable[..., Path], tmp_path: Path, kind: str, part: str) -> None:
    folder = copy_of(tiny_folder(tiny_blip2, kind), tmp_path / "copy")
    keys = [key for key in load_file(folder / "model.safetensors") if key.startswith(part)]
    changed(folder, lambda state: state.pop(keys[0]))
    with pytest.raises(VlmError, match=r"missing|lacks"):
        load_model(folder, "cpu")


@pytest.mark.parametrize("key", ["qformer.pooler.weight", "vision_model.encoder.layers.9.layer_norm1.bias", "other"])
def test_a_key_left_over_is_named(tiny_folder: Callable[..., Path], tmp_path: Path, key: str) -> None:
    folder = copy_of(tiny_folder(tiny_blip2, "opt"), tmp_path / "copy")
    changed(folder, lambda state: state.update({key: torch.zeros(3)}))
    with pytest.raises(VlmError, match=r"no BLIP-2 has: (qformer\.pooler|other)|left over.*layers\.9"):
        load_model(folder, "cpu")


def edit(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_a_language_model_of_the_other_kind_is_refused(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = edit(copy_of(tiny_folder(tiny_blip2, "t5"), tmp_path / "copy"), use_decoder_only_language_model=True)
    with pytest.raises(VlmError, match="use_decoder_only_language_model: true, but its language model is a 't5'"):
        load_model(folder, "cpu")


@pytest.mark.parametrize(
    ("bridge", "image_encoder", "error"),
    [
        ({"num_queries": 32}, {}, r"bridge\.num_queries: 32: the Q-Former of .* has 5"),
        ({"cross_attention_every": 1}, {}, r"bridge\.cross_attention_every: 1: .* has 2"),
        ({"layers": 2}, {}, r"bridge\.layers: 2: .* has 4"),
        ({"instruction": True}, {}, "keys missing: bridge.embeddings"),
        ({}, {"width": 32}, r"reads image tokens of width 24, those of this image encoder have 32"),
    ],
)
def test_a_published_bridge_of_other_sizes_is_refused(
    tiny_folder: Callable[..., Path], bridge: dict, image_encoder: dict, error: str
) -> None:
    from tiny_models import tiny_hf_image_model

    from vlm.backbones.blip2_checkpoint import read_blip2
    from vlm.models.build import build_model
    from vlm.models.published_blip2 import blip2_spec

    spec = blip2_spec(read_blip2(str(tiny_folder(tiny_blip2, "opt")))).model_dump()
    spec["bridge"] |= bridge
    if image_encoder:
        spec["image_encoder"]["name"] = f"hf:{tiny_folder(tiny_hf_image_model, 'vit')}"
    from vlm.model_spec import GenerativeSpec

    with pytest.raises(VlmError, match=error):
        build_model(GenerativeSpec.model_validate(spec), device="cpu", precision="fp32")


def test_a_vocabulary_projection_of_its_own_is_kept(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Flan-T5 does not tie it to the embeddings."""
    folder = copy_of(tiny_folder(tiny_blip2, "t5"), tmp_path / "copy")
    own = torch.randn(640, 32, generator=torch.Generator().manual_seed(5)) / 4
    changed(folder, lambda state: state.update({"language_model.lm_head.weight": own}))
    ours, (image,) = load_model(folder, "cpu", "fp32"), pictures(tmp_path, 1)
    torch.testing.assert_close(ours.language_model.network.get_output_embeddings().weight, own)
    expected = Theirs(folder).score(image, PROMPTS[0], TEXTS[0])
    torch.testing.assert_close(ours.score(image, TEXTS[0], PROMPTS[0])[0], expected, rtol=1e-4, atol=1e-4)
