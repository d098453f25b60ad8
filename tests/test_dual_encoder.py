"""The dual encoder: pooling, projection, what trains, logits, zero-shot classification, and what cannot be."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from dual_encoder_parts import TEXTS, published_name, tiny_hf_dual
from fake_cuda import on_fake_cuda
from generative_parts import pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import tiny_bert, tiny_hf_image_model, tiny_timm_image_model
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm import UnsupportedTask, VlmError, load_model
from vlm.bridges.dual_tower import AttentionPool, DualTower
from vlm.data.prompts import prompt_templates
from vlm.model_spec import DualEncoderSpec, DualTowerSpec
from vlm.models.build import build_model
from vlm.models.dual_encoder import DualEncoder
from vlm.models.freezing import named_trainable

COLOURS = ["red", "green", "blue"]


def images(count: int = 3) -> list[Image.Image]:
    """Random pictures."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(count)]


def build(tiny_folder: Any, trainable: tuple[str, ...] = (), image: Any = None, **bridge: Any) -> DualEncoder:
    """CLIP's image tower beside a BERT, into 8 numbers."""
    encoder = {"name": f"hf:{tiny_folder(tiny_hf_image_model, 'clip')}", **(image or {})}
    content = {
        "image_encoder": encoder,
        "text_encoder": f"hf:{tiny_folder(tiny_bert)}",
        "bridge": {"width": 8, **bridge},
    }
    model = build_model(DualEncoderSpec.model_validate(content), trainable, device="cpu", precision="fp32")
    assert isinstance(model, DualEncoder)
    return model


# --- pooling and projection ---


@pytest.mark.parametrize("projection", ["linear", "mlp"])
@pytest.mark.parametrize("pool", ["pooled", "cls", "mean", "attention"])
def test_embeddings_are_those_computed_by_hand(tiny_folder: Any, pool: str, projection: str) -> None:
    model = build(
        tiny_folder,
        image={"drop_cls": pool != "cls"},
        image_pool=pool,
        text_pool=pool,
        image_projection=projection,
        text_projection=projection,
    )
    pixels = torch.stack([model.image_encoder.transform.eval(image) for image in images()])
    batch = model.text_encoder.tokenize(TEXTS)
    with torch.no_grad():
        seen, read = model.image_encoder(pixels), model.text_encoder(**batch)
        sides = (
            (model.bridge.image, seen.tokens, seen.pooled, torch.ones(seen.tokens.shape[:2])),
            (model.bridge.text, read.tokens, read.pooled, batch["mask"]),
        )
        for (head, tokens, pooled, mask), mine in zip(sides, (model.encode_image(images()), model.encode_text(TEXTS))):
            for row, one, own, keep in zip(mine, tokens, pooled, mask, strict=True):
                words = one[keep.bool()]  # [T, D] without padding
                vector = {
                    "pooled": lambda own=own: own,
                    "cls": lambda words=words: words[0],
                    "mean": lambda words=words: words.mean(0),
                    "attention": lambda words=words, head=head: _attended(head.attention, words),
                }[pool]()
                expected = head.projection(vector)
                torch.testing.assert_close(row, expected / expected.norm(), atol=1e-5, rtol=1e-5)


def _attended(pool: AttentionPool, tokens: torch.Tensor) -> torch.Tensor:
    """One query over tokens [T,D] without padding, written out: softmax(q k / sqrt(d)) v for each head."""
    attention, width = pool.attention, tokens.shape[1]
    query, key, value = attention.in_proj_weight.chunk(3)
    bias_q, bias_k, bias_v = attention.in_proj_bias.chunk(3)
    states = pool.norm(tokens)
    heads, size = attention.num_heads, width // attention.num_heads
    q = (query @ pool.query[0, 0] + bias_q).view(heads, 1, size)
    k, v = ((states @ w.T + b).view(-1, heads, size).transpose(0, 1) for w, b in ((key, bias_k), (value, bias_v)))
    mixed = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(size), -1) @ v  # [heads, 1, size]
    return attention.out_proj(mixed.reshape(width))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 2**31))
def test_padding_changes_no_pooled_embedding(length: int, padding: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, length + padding, 16, generator=generator)
    mask = torch.tensor([1] * length + [0] * padding).expand(2, -1)
    for pool in ("cls", "mean", "attention"):
        spec = DualTowerSpec(width=4, image_pool="mean", text_pool=pool)
        head = DualTower(spec, (16, None), (16, None), image_cls=False).text
        whole = head(head.pool(tokens, None, mask), mask)
        cut = head(head.pool(tokens[:, :length], None, mask[:, :length]), mask[:, :length])
        torch.testing.assert_close(whole, cut, atol=1e-5, rtol=1e-5)


def test_an_encoder_without_an_embedding_of_its_own_is_pooled_by_mean(tiny_folder: Any) -> None:
    with pytest.raises(VlmError, match=r"bridge\.image_pool: pooled: .* set it to mean or attention"):
        build(tiny_folder, image={"layer": -2})
    assert build(tiny_folder, image={"layer": -2}, image_pool="mean").encode_image(images()).shape == (3, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_pool": "cls"}, "image_pool: cls: there is no such token; set image_encoder.drop_cls: false"),
        ({"image_projection": "none"}, "image_projection: none: the image embedding has width 24, the joint space 8"),
        ({"text_projection": "none"}, "text_projection: none: the text embedding has width 32, the joint space 8"),
        (
            {"width": None, "image_projection": "none", "text_projection": "none"},
            "the text embedding has width 32, the joint space 24; set it to linear",
        ),
    ],
)
def test_towers_that_do_not_meet_are_told_which_key_to_change(tiny_folder: Any, options: Any, message: str) -> None:
    with pytest.raises(VlmError, match=message):
        build(tiny_folder, **options)


def test_a_text_tower_that_reads_left_to_right_has_no_first_token_to_pool(tiny_folder: Any) -> None:
    spec = {
        "image_encoder": f"hf:{tiny_folder(tiny_hf_image_model, 'clip')}",
        "text_encoder": f"hf:{tiny_folder(tiny_hf_dual, 'clip')}",
        "bridge": {"text_pool": "cls"},
    }
    with pytest.raises(VlmError, match="text_pool: cls: there is no such token; set text_pool: mean"):
        build_model(DualEncoderSpec.model_validate(spec))


def test_the_joint_space_has_the_width_of_the_side_that_is_not_projected(tiny_folder: Any) -> None:
    assert build(tiny_folder, width=None, image_projection="none").encode_text("a").shape == (1, 24)
    assert build(tiny_folder, width=None, text_projection="none").encode_image(images(1)).shape == (1, 32)
    assert build(tiny_folder, width=None).encode_text("a").shape == (1, 512)


# --- what trains ---


def _gradients(model: DualEncoder) -> set[str]:
    pixels = torch.stack([model.image_encoder.transform.eval(image) for image in images()])
    image, text = model.embed_pixels(pixels), model.embed_ids(**model.text_encoder.tokenize(TEXTS))
    loss = torch.nn.functional.cross_entropy(model.bridge.logits(image, text), torch.arange(3))
    loss.backward()
    return {name.split(".")[0] for name, p in named_trainable(model) if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize(
    ("trainable", "learning"),
    [
        (("bridge.*",), {"bridge"}),
        (("bridge.*", "text_encoder.*"), {"bridge", "text_encoder"}),  # LiT: the image side is locked
        (("bridge.*", "image_encoder.*"), {"bridge", "image_encoder"}),
        (("*",), {"bridge", "image_encoder", "text_encoder"}),  # CLIP
    ],
)
def test_either_side_is_frozen_or_learns(tiny_folder: Any, trainable: tuple[str, ...], learning: set[str]) -> None:
    model = build(tiny_folder, trainable).train()
    assert model.image_encoder.training == ("image_encoder" in learning)
    assert model.text_encoder.training == ("text_encoder" in learning)
    assert _gradients(model) == learning


def test_both_sides_can_start_from_scratch(tiny_folder: Any) -> None:
    published_name(tiny_folder, "vlm-test-vit")  # makes the architecture known
    name = "open_clip:vlm-test-vit"
    content = {
        "image_encoder": name,
        "text_encoder": name,
        "bridge": {"image_projection": "none", "text_projection": "none"},
    }
    spec = DualEncoderSpec.model_validate(content)
    first, again, other = (build_model(spec, ["*"], device="cpu", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.encode_image(images()), again.encode_image(images()))  # weights depend on the seed alone
    assert not torch.allclose(first.encode_image(images()), other.encode_image(images()), atol=1e-3)
    assert _gradients(first.train()) == {"bridge", "image_encoder", "text_encoder"}
    assert all(p.requires_grad for p in first.parameters())


# --- logits ---


@pytest.mark.parametrize(
    ("options", "scale", "bias"),
    [
        ({}, 1 / 0.07, None),
        ({"logits": "sigmoid"}, 10.0, -10.0),
        ({"logit_scale": 10.0}, 10.0, None),
        ({"logits": "sigmoid", "logit_scale": 5.0, "logit_bias": -3.0}, 5.0, -3.0),
    ],
)
def test_logits_start_where_the_papers_start(options: Any, scale: float, bias: float | None) -> None:
    tower = DualTower(DualTowerSpec(width=4, **options), (16, 16), (16, 16), image_cls=False)
    image, text = (torch.nn.functional.normalize(torch.randn(2, 4), dim=-1) for _ in range(2))
    expected = scale * image @ text.T + (bias or 0.0)
    torch.testing.assert_close(tower.logits(image, text), expected, atol=1e-4, rtol=1e-4)
    assert (tower.logit_bias is None) == (bias is None)


def test_the_scale_is_kept_within_1_and_100() -> None:
    tower = DualTower(DualTowerSpec(width=4), (16, 16), (16, 16), image_cls=False)
    for start, kept in ((9.0, 100.0), (-2.0, 1.0), (2.0, math.exp(2.0))):
        torch.nn.init.constant_(tower.logit_scale, start)
        tower.clamp_scale()
        assert tower.scale.item() == pytest.approx(kept)


@pytest.mark.parametrize(
    "options", [{"logit_bias": -3.0}, {"logits": "sigmoid", "logit_scale": "published", "logit_bias": 1}]
)
def test_a_bias_without_its_place_is_an_error(options: Any) -> None:
    with pytest.raises(ValueError, match="logit_bias"):
        DualTowerSpec(**options)


# --- classification ---


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("templates", [None, "cifar", "imagenet", ["{}", "the {} one"], "only {}"])
def test_classes_are_the_mean_of_their_prompts(tiny_folder: Any, kind: str, templates: Any) -> None:
    model = load_model(published_name(tiny_folder, kind), device="cpu")
    rows = []
    for colour in COLOURS:
        texts = [form.replace("{}", colour) for form in prompt_templates(templates or "simple")]
        mean = model.encode_text(texts).mean(0)
        rows.append(mean / mean.norm())
    logits = model.bridge.logits(model.encode_image(images()), torch.stack(rows))
    expected = logits.softmax(-1) if kind == "clip" else logits.sigmoid()
    found = model.classify(images(), COLOURS, templates)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert found.shape == (3, 3)
    if kind == "clip":
        torch.testing.assert_close(found.sum(1), torch.ones(3))


def test_a_class_may_have_prompts_of_its_own(tiny_folder: Any) -> None:
    model = build(tiny_folder)
    mixed = model.classifier({"red": ["a red thing", "crimson"], "blue": "the sea"})
    mean = model.encode_text(["a red thing", "crimson"]).mean(0)
    torch.testing.assert_close(mixed[0], mean / mean.norm())
    torch.testing.assert_close(mixed[1], model.encode_text("the sea")[0])


def test_a_classifier_is_kept_until_weights_change(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tiny_folder, ("bridge.*",))
    encode, calls = model.encode_text, []
    monkeypatch.setattr(model, "encode_text", lambda texts: calls.append(len(texts)) or encode(texts))
    first = model.classify(images(), COLOURS)
    assert torch.equal(model.classify(images(), COLOURS), first)
    assert calls == [3]
    model.classify(images(), COLOURS, "cifar")
    assert calls == [3, 54]
    with torch.no_grad():
        model.bridge.text.projection[0].weight.mul_(-1)
    assert not torch.allclose(model.classify(images(), COLOURS), first)
    assert calls == [3, 54, 3]


def test_one_picture_and_one_class_are_enough(tiny_folder: Any) -> None:
    model = build(tiny_folder)
    assert model.classify(images(1)[0], ["red"]).tolist() == [[1.0]]
    assert model.encode_image(images(1)[0]).shape == (1, 8)
    assert model.encode_text("red").shape == (1, 8)


def test_pictures_alone_in_chunks_as_paths_or_arrays_are_the_same(
    tiny_folder: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tiny_folder)
    paths = pictures(tmp_path, 5)
    together = model.encode_image(paths)
    monkeypatch.setattr("vlm.models.dual_encoder.IMAGE_CHUNK", 2)
    monkeypatch.setattr("vlm.models.dual_encoder.TEXT_CHUNK", 2)
    torch.testing.assert_close(model.encode_image(paths), together, atol=1e-6, rtol=1e-5)
    arrays = [np.asarray(Image.open(path)) for path in paths]
    torch.testing.assert_close(model.encode_image(arrays), together, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.encode_image(np.stack(arrays)), together, atol=1e-6, rtol=1e-5)
    alone = torch.cat([model.encode_text(text) for text in TEXTS])
    torch.testing.assert_close(model.encode_text(TEXTS), alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        ([], None, "no labels were given"),
        ("red", None, "labels are a list of class names; got the text 'red'"),
        (["red", "blue", "red"], None, "the label 'red' is given twice"),
        (["red", ""], None, "label 1 is ''"),
        (["red", "  "], None, "label 1 is '  '"),
        (["red", 3], None, "label 1 is 3"),
        (["red"], "imagnet", "unknown prompt templates 'imagnet'; did you mean 'imagenet'"),
        (["red"], [], "the list is empty"),
        (["red"], ["a photo"], "'a photo' has no {} for the class name"),
        ({"red": []}, None, "no prompts for the label 'red'"),
        ({"red": "x"}, "cifar", "labels with prompts of their own take no templates"),
    ],
)
def test_labels_that_make_no_classifier_are_errors(tiny_folder: Any, labels: Any, templates: Any, message: str) -> None:
    with pytest.raises(VlmError, match=message):
        build(tiny_folder).classify(images(), labels, templates)


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("encode_image", [], "no images were given"),
        ("encode_text", [], "no texts were given"),
        ("encode_text", ["a", None], "expected text, got NoneType"),
        ("encode_image", ["/no/such/picture.png"], "picture.png"),
    ],
)
def test_what_cannot_be_encoded_is_an_error(tiny_folder: Any, method: str, value: Any, message: str) -> None:
    with pytest.raises((VlmError, FileNotFoundError), match=message):
        getattr(build(tiny_folder), method)(value)


def test_what_it_cannot_do_names_the_models_that_can(tiny_folder: Any) -> None:
    with pytest.raises(UnsupportedTask, match="a dual encoder model cannot `answer`; these can: generative"):
        build(tiny_folder).answer(images(1), ["what?"])


# --- devices ---


@pytest.mark.parametrize("kind", ["clip", "siglip", "vlm-test-vit", "vlm-test-siglip-map", "bert", "timm"])
def test_no_tensor_is_left_on_the_cpu(tiny_folder: Any, kind: str) -> None:
    if kind == "bert":
        model = build(tiny_folder, image_pool="attention", text_pool="attention", logits="sigmoid")
    elif kind == "timm":
        model = build(tiny_folder, image={"name": f"timm:{tiny_folder(tiny_timm_image_model, 'convnext')}"})
    else:
        model = load_model(published_name(tiny_folder, kind), device="cpu")
    pixels = torch.zeros(2, 3, *model.image_encoder.transform.size)
    batch = model.text_encoder.tokenize(TEXTS)
    mode = FakeTensorMode()
    fake = on_fake_cuda(model, mode)
    with mode, torch.device("cuda"):
        image = fake.embed_pixels(torch.zeros(pixels.shape))
        text = fake.embed_ids(*(torch.zeros(batch[key].shape, dtype=torch.long) for key in ("ids", "mask")))
        scores = fake.bridge.probabilities(image, text)
    assert scores.device.type == "cuda"
    assert scores.shape == (2, 3)
