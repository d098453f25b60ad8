"""Projections that start from the canonical correlations of the training pairs, and embeddings of several layers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dual_parts import captions, dual_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_models import tiny_bert, tiny_hf_image_model, tiny_timm_image_model
from training_parts import assert_same_runs, train_in_processes, train_until

from vlm import VlmError, load_model, train
from vlm.backbones.image import build_image_encoder
from vlm.backbones.pair import build_pair
from vlm.bridges.canonical import canonical_projections
from vlm.model_spec import DualTowerSpec, GenerativeSpec, ImageEncoderSpec, TextEncoderSpec
from vlm.training.loop import Trainer


def _pairs(seed: int, count: int = 60, widths: tuple[int, int] = (7, 5)) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    image = torch.randn(count, widths[0], generator=draw)
    noise = torch.randn(count, widths[1], generator=draw)
    return image + 3, image[:, : widths[1]] * torch.arange(1, widths[1] + 1) + noise


def _projected(pairs: tuple[torch.Tensor, torch.Tensor], width: int, ridge: float) -> list[np.ndarray]:
    starts = canonical_projections([pairs], width, ridge)
    return [(side @ start.weight.T + start.bias).numpy() for side, start in zip(pairs, starts)]


def test_without_a_ridge_they_are_the_cosines_of_principal_angles() -> None:
    """Björck and Golub 1973: canonical correlations are the cosines between the spaces that both sides span."""
    pairs = _pairs(0)
    image, text = _projected(pairs, 5, 1e-9)
    found = [np.corrcoef(image[:, i], text[:, i])[0, 1] for i in range(5)]
    bases = [np.linalg.qr((side - side.mean(0)).double().numpy())[0] for side in pairs]
    expected = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    across = image.T @ text / len(image)
    np.testing.assert_allclose(across, np.diag(np.diag(across)), atol=1e-4)  # no direction answers another


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), ridge=st.floats(0.01, 10), cut=st.integers(1, 59))
def test_neither_batches_nor_shifts_nor_scales_matter(seed: int, ridge: float, cut: int) -> None:
    pairs = _pairs(seed)
    image, text = _projected(pairs, 4, ridge)
    for side in (image, text):
        np.testing.assert_allclose(side.mean(0), 0, atol=1e-4)
        assert np.sqrt((side**2).sum(1).mean()) == pytest.approx(1, rel=1e-4)
    cosines = image @ text.T
    moved = (pairs[0] * 100 - 5, pairs[1] / 10 + 2)
    other = _projected(moved, 4, ridge)
    np.testing.assert_allclose(other[0] @ other[1].T, cosines, atol=2e-3)
    halves = [(pairs[0][:cut], pairs[1][:cut]), (pairs[0][cut:], pairs[1][cut:])]
    for whole, parts in zip(canonical_projections([pairs], 4, ridge), canonical_projections(halves, 4, ridge)):
        signs = (whole.weight * parts.weight).sum(1, keepdim=True).sign()
        torch.testing.assert_close(whole.weight, parts.weight * signs, atol=1e-4, rtol=1e-3)


def test_more_directions_than_the_narrower_side_has_are_refused() -> None:
    with pytest.raises(VlmError, match="at most 5 directions"):
        canonical_projections([_pairs(0)], 6, 0.5)


@pytest.mark.parametrize("pairs", [[], [_pairs(0, count=1)]])
def test_too_few_pairs_are_refused(pairs: list[Any]) -> None:
    with pytest.raises(VlmError, match="no correlation"):
        canonical_projections(pairs, 2, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "canonical", "image_projection": "mlp"}, "two linear projections"),
        ({"start": "canonical", "text_pool": "attention"}, "two linear projections"),
        ({"ridge": 1.0}, "goes with `start: canonical`"),
        ({"start": "canonical", "ridge": 0.0}, "greater than 0"),
    ],
)
def test_options_that_do_not_go_together_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DualTowerSpec(**options)


START = {"bridge": {"start": "canonical"}}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return captions(tmp_path / "data")


def test_training_starts_there(tiny_folder, data, tmp_path):
    trainer = Trainer(dual_recipe(tiny_folder, data, tmp_path / "run", model=START), quiet=True)
    model = trainer.model
    samples = [sample for source in trainer.source.sources for sample in source]
    assert len(samples) == 12  # a picture with two captions is two pairs
    with torch.no_grad():
        encoder = model.image_encoder
        pixels = [trainer.source.load_picture(sample.images[0], 0) for sample in samples]
        image = torch.stack(pixels)
        image = image if image.ndim == 2 else model.image_features(image)
        text = model.text_features(**model.text_encoder.tokenize([sample.texts[0] for sample in samples]))
    assert image.shape[1] == encoder.pooled_width
    expected, _ = canonical_projections([(image, text)], 8, 0.5)
    signs = (expected.weight * model.bridge.image.projection[0].weight).sum(1, keepdim=True).sign()
    torch.testing.assert_close(
        model.bridge.image.projection[0].weight.detach(), expected.weight * signs, atol=1e-3, rtol=1e-3
    )


def test_processes_and_interruptions_do_not_change_the_result(tiny_folder, data, tmp_path):
    def few() -> dict[str, Any]:
        """Few directions: later ones have correlations so alike that rounding decides what they are."""
        return {"bridge": {"start": "canonical", "width": 3}}

    train(dual_recipe(tiny_folder, data, tmp_path / "one", model=few()), quiet=True)
    assert load_model(tmp_path / "one").encode_text("a cat").shape == (1, 3)
    train_in_processes(dual_recipe(tiny_folder, data, tmp_path / "two", model=few()), tmp_path, 2)
    assert_same_runs(tmp_path / "one", tmp_path / "two", rtol=1e-3, atol=1e-3)
    stopped = dual_recipe(tiny_folder, data, tmp_path / "stopped", model=few())
    trainer = Trainer(stopped, quiet=True)
    assert not train_until(trainer, 4).finished
    assert train(stopped, resume=True, quiet=True).finished
    assert_same_runs(tmp_path / "one", tmp_path / "stopped", rtol=1e-5, atol=1e-6)


def test_a_second_start_is_refused(tiny_folder, data, tmp_path):
    with pytest.raises(ValidationError, match="give one of them"):
        dual_recipe(tiny_folder, data, tmp_path / "run", model=dict(START), init_from=str(tmp_path / "other"))


# ---- embeddings of several layers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "layers"), [("efficientnet", [-1, -3, -2]), ("vit", [-2, -1]), ("convnext", [-3, -2])]
)
def test_a_pictures_embedding_is_the_means_of_its_layers(tiny_folder, kind, layers):
    import timm

    folder = tiny_folder(tiny_timm_image_model, kind)
    encoder = build_image_encoder(ImageEncoderSpec(name=f"timm:{folder}", pool_layers=layers))
    plain = build_image_encoder(ImageEncoderSpec(name=f"timm:{folder}"))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    pixels = torch.randn(2, 3, *encoder.transform.size)
    with torch.no_grad():
        _, every = model.forward_intermediates(pixels)
        means = [every[layer].mean((2, 3)) for layer in sorted(layers) if layer != -1]
        if -1 in layers:
            means.append(plain(pixels).tokens.mean(1))
        features = encoder(pixels)
    torch.testing.assert_close(features.pooled, torch.cat(means, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.tokens, plain(pixels).tokens, atol=1e-5, rtol=1e-5)
    assert encoder.pooled_width == features.pooled.shape[1]
    assert encoder.fingerprint() != plain.fingerprint()


def test_a_texts_embedding_is_the_means_of_its_layers(tiny_folder):
    bert, timm_folder = tiny_folder(tiny_bert), tiny_folder(tiny_timm_image_model, "efficientnet")
    image = ImageEncoderSpec(name=f"timm:{timm_folder}")
    text = build_pair(image, TextEncoderSpec(name=f"hf:{bert}", pool_layers=[-1, -3])).text
    plain = build_pair(image, TextEncoderSpec(name=f"hf:{bert}")).text
    batch = text.tokenize(["a cat", "a photo of a red cat sitting on a chair"])
    with torch.no_grad():
        hidden = plain.tower.model(batch["ids"], batch["mask"], output_hidden_states=True).hidden_states
        found = text(**batch).pooled
    for row, mask in enumerate(batch["mask"].bool()):
        expected = torch.cat([hidden[layer][row, mask].mean(0) for layer in (0, 2)])
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)
    assert text.fingerprint() != plain.fingerprint()


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (("timm", [-9, -1]), None, "layer: -9"),
        (("clip", [-2, -1]), None, "only timm"),
        (None, ("bert", [-4, -1]), "layer: -4"),
        (None, ("clip", [-2, -1]), "only BERT"),
    ],
)
def test_layers_that_cannot_be_read_are_named(tiny_folder, image, text, message):
    folders = {
        "timm": f"timm:{tiny_folder(tiny_timm_image_model, 'efficientnet')}",
        "clip": f"hf:{tiny_folder(tiny_hf_image_model, 'clip')}",
        "bert": f"hf:{tiny_folder(tiny_bert)}",
    }
    image, text = image or ("timm", None), text or ("bert", None)
    with pytest.raises(VlmError, match=message):
        build_pair(
            ImageEncoderSpec(name=folders[image[0]], pool_layers=image[1]),
            TextEncoderSpec(name=folders[text[0]], pool_layers=text[1]),
        )


def test_a_published_dual_encoder_keeps_its_own_embeddings(tiny_folder):
    name = f"hf:{tiny_folder(tiny_hf_image_model, 'clip')}"
    with pytest.raises(VlmError, match="embeddings of its own"):
        build_pair(ImageEncoderSpec(name=name, pool_layers=[-2, -1]), TextEncoderSpec(name=name))


@pytest.mark.parametrize("layers", [[-1], [0, -1], [-2, -2]])
def test_malformed_layers_are_refused(layers: list[int]) -> None:
    with pytest.raises(ValidationError):
        ImageEncoderSpec(name="timm:resnet18", pool_layers=layers)


def test_layers_that_nobody_would_read_are_refused() -> None:
    with pytest.raises(ValidationError, match="give one of them"):
        ImageEncoderSpec(name="timm:resnet18", layer=-2, pool_layers=[-2, -1])
    with pytest.raises(ValidationError, match="reads tokens"):
        GenerativeSpec(
            image_encoder=ImageEncoderSpec(name="timm:resnet18", pool_layers=[-2, -1]), language_model="hf:x"
        )
