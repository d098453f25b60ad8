"""Running a frozen encoder fast changes nothing but the time."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_timm_image_model
from torch import nn

from vlm.backbones import inference
from vlm.backbones.image import ImageEncoder, build_image_encoder
from vlm.backbones.inference import fast_forward, fold_batch_norms
from vlm.model_spec import ImageEncoderSpec


@pytest.fixture
def build(tiny_folder: Callable[..., Path]) -> Callable[[str], ImageEncoder]:
    return lambda kind: build_image_encoder(ImageEncoderSpec(name=f"timm:{tiny_folder(tiny_timm_image_model, kind)}"))


def convolutional(build: Callable[[str], ImageEncoder]) -> ImageEncoder:
    """An encoder with batch norms whose statistics are not those of a fresh model."""
    encoder = build("efficientnet")
    torch.manual_seed(0)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return encoder


def pixels_for(encoder: ImageEncoder, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, *encoder.transform.size, generator=torch.Generator().manual_seed(1))


def assert_same_features(one, other):
    for name in ("tokens", "pooled"):
        wanted, found = getattr(one, name), getattr(other, name)
        assert (wanted - found).abs().max() <= 1e-5 * wanted.abs().max()


def test_folded_batch_norms_give_the_same_features_and_leave_the_encoder_alone(build):
    encoder = convolutional(build)
    before = encoder.fingerprint()
    folded = fold_batch_norms(encoder)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert_same_features(encoder(pixels_for(encoder)), folded(pixels_for(encoder)))
    assert encoder.fingerprint() == before


def test_a_norm_whose_convolution_is_read_elsewhere_too_is_not_folded_wrongly(build):
    encoder = convolutional(build)
    stem = encoder.tower.model.conv_stem
    made = []
    stem.register_forward_hook(lambda module, inputs, output: made.append(output))
    encoder.tower.model.bn1.register_forward_hook(lambda module, inputs, output: output + made[-1])
    assert fold_batch_norms(encoder) is encoder


def test_few_pictures_a_learning_encoder_and_half_precision_run_as_they_are(build):
    encoder = convolutional(build)
    assert fast_forward(encoder, 1) is encoder
    assert fast_forward(encoder.bfloat16(), 1000) is encoder
    learning = convolutional(build)
    learning.tower.requires_grad_(True)
    assert fast_forward(learning, 1000) is learning
    transformer = build("vit")
    assert fast_forward(transformer, 1000) is transformer, "there is nothing to fold"


@pytest.mark.parametrize("compiler_works", [True, False])
def test_compiled_or_not_the_features_are_the_same(build, monkeypatch, compiler_works):
    monkeypatch.setattr(inference, "COMPILE_FROM", 0.0)

    def compiled(tower, **options):
        def run(pixels):
            if not compiler_works:
                raise RuntimeError("no C++ compiler")
            return tower(pixels)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    encoder = convolutional(build)
    forward = fast_forward(encoder, 1000)
    assert isinstance(forward, inference._Compiled)
    for count in (3, 2, 3):
        pixels = pixels_for(encoder, count)
        assert_same_features(encoder(pixels), forward(pixels))


def test_pieces_of_a_batch_give_the_features_of_the_whole(build):
    encoder = convolutional(build)
    count = 2 * torch.get_num_threads() * 2 + 1
    pixels = pixels_for(encoder, count)
    whole = encoder.read(encoder.tower, pixels)
    with torch.no_grad():
        pieces = encoder(pixels)
    assert pieces.tokens.shape[0] == count
    assert_same_features(whole, pieces)
