"""One protocol for every image encoder, whichever library it comes from."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from fake_cuda import on_fake_cuda
from PIL import Image
from tiny_models import (
    HF_IMAGE_KINDS,
    TIMM_IMAGE_MODELS,
    tiny_hf_image_model,
    tiny_open_clip_model,
    tiny_timm_image_model,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm.backbones.image import ImageEncoder, build_image_encoder
from vlm.errors import VlmError
from vlm.model_spec import ImageEncoderSpec

KINDS = [*(f"hf-{k}" for k in HF_IMAGE_KINDS), *(f"timm-{k}" for k in TIMM_IMAGE_MODELS), "open_clip"]
VITS = ["hf-clip", "hf-clip_vision", "hf-siglip", "hf-siglip_vision", "hf-vit", "hf-dinov2", "timm-vit", "open_clip"]
WITH_CLS = [kind for kind in VITS if "siglip" not in kind]


@pytest.fixture(scope="module")
def name_of(tiny_folder: Callable[..., Path]) -> Callable[[str], str]:
    def name(kind: str) -> str:
        source, _, which = kind.partition("-")
        if source == "hf":
            return f"hf:{tiny_folder(tiny_hf_image_model, which)}"
        if source == "timm":
            return f"timm:{tiny_folder(tiny_timm_image_model, which)}"
        return f"open_clip:vlm-test-ViT/{tiny_folder(tiny_open_clip_model) / 'open_clip.pt'}"

    return name


@pytest.fixture(scope="module")
def build(name_of: Callable[[str], str]) -> Callable[..., ImageEncoder]:
    return lambda kind, **options: build_image_encoder(ImageEncoderSpec(name=name_of(kind), **options))


def noise(encoder: ImageEncoder, batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, *encoder.transform.size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_as_announced(build, kind, layer):
    encoder = build(kind, layer=layer)
    features = encoder(noise(encoder))
    assert features.tokens.shape == (3, encoder.num_tokens, encoder.width)
    assert encoder.grid is not None
    assert encoder.num_tokens == encoder.grid[0] * encoder.grid[1]
    assert encoder.num_prefix_tokens == 0
    if layer == -1:
        assert features.pooled.shape == (3, encoder.pooled_width)
    else:
        assert features.pooled is None
        assert encoder.pooled_width is None
    assert features.tokens.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_alone_or_in_a_batch_is_the_same(build, kind):
    encoder = build(kind)
    pixels = noise(encoder)
    together = encoder(pixels)
    alone = [encoder(pixels[i : i + 1]) for i in range(len(pixels))]
    torch.testing.assert_close(together.tokens, torch.cat([f.tokens for f in alone]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.pooled, torch.cat([f.pooled for f in alone]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_when_built_and_stays_in_eval_mode(build, kind):
    encoder = build(kind)
    assert not any(p.requires_grad for p in encoder.parameters())
    nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules())
    assert not encoder(noise(encoder)).tokens.requires_grad
    next(encoder.parameters()).requires_grad_(True)
    assert encoder.train().training


@pytest.mark.parametrize("kind", WITH_CLS)
def test_prefix_tokens_are_kept_or_dropped(build, kind):
    kept, dropped = build(kind, drop_cls=False), build(kind)
    pixels = noise(kept)
    assert kept.num_prefix_tokens == 1
    assert kept.grid is None
    assert kept.num_tokens == dropped.num_tokens + 1
    torch.testing.assert_close(kept(pixels).tokens[:, 1:], dropped(pixels).tokens)


@pytest.mark.parametrize("layer", [-2, -3])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("hf-")])
def test_earlier_layers_are_the_hidden_states_of_transformers(build, name_of, kind, layer):
    encoder = build(kind, layer=layer, drop_cls=False)
    pixels = noise(encoder)
    whole = transformers.AutoModel.from_pretrained(name_of(kind).removeprefix("hf:"))
    tower = getattr(whole, "vision_model", whole)
    states = tower(pixels, output_hidden_states=True).hidden_states
    expected = states[layer]
    if expected.ndim == 4:
        expected = expected.flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder(pixels).tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["timm-vit", "timm-convnext", "timm-efficientnet"])
def test_earlier_layers_are_the_intermediates_of_timm(build, name_of, kind):
    import timm

    encoder = build(kind, layer=-2)
    pixels = noise(encoder)
    whole = timm.create_model(f"local-dir:{name_of(kind).removeprefix('timm:')}", pretrained=True).eval()
    (expected,) = whole.forward_intermediates(pixels, indices=[-2], norm=False, intermediates_only=True)
    torch.testing.assert_close(
        encoder(pixels).tokens, expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5
    )  # [B, D, h, w] -> [B, N, D]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_behind_the_one_read_are_dropped(build, kind):
    def size(encoder: ImageEncoder) -> int:
        return sum(p.numel() for p in encoder.parameters())

    assert size(build(kind, layer=-3)) < size(build(kind, layer=-2)) < size(build(kind, layer=-1))


@pytest.mark.parametrize("kind", ["hf-clip", "hf-siglip"])
def test_pooled_is_the_embedding_of_the_whole_checkpoint(build, name_of, kind):
    encoder = build(kind)
    whole = transformers.AutoModel.from_pretrained(name_of(kind).removeprefix("hf:"))
    pixels = noise(encoder)
    expected = whole.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(encoder(pixels).pooled, expected, atol=1e-5, rtol=1e-5)


def test_pooled_is_the_embedding_of_open_clip(build, name_of):
    import open_clip

    encoder = build("open_clip")
    arch, _, checkpoint = name_of("open_clip").removeprefix("open_clip:").partition("/")
    whole = open_clip.create_model(arch, pretrained=checkpoint).eval()
    pixels = noise(encoder)
    torch.testing.assert_close(encoder(pixels).pooled, whole.encode_image(pixels), atol=1e-5, rtol=1e-5)
    whole.visual.output_tokens = True
    torch.testing.assert_close(encoder(pixels).tokens, whole.visual(pixels)[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["hf-siglip", "hf-vit", "hf-dinov2"])
def test_last_layer_has_passed_the_final_norm(build, name_of, kind):
    encoder = build(kind, drop_cls=False)
    whole = transformers.AutoModel.from_pretrained(name_of(kind).removeprefix("hf:"))
    pixels = noise(encoder)
    expected = getattr(whole, "vision_model", whole)(pixels).last_hidden_state
    torch.testing.assert_close(encoder(pixels).tokens, expected, atol=1e-5, rtol=1e-5)


def test_clip_applies_its_final_norm_to_every_token(build, name_of):
    encoder = build("hf-clip", drop_cls=False)
    tower = transformers.CLIPModel.from_pretrained(name_of("hf-clip").removeprefix("hf:")).vision_model
    pixels = noise(encoder)
    expected = tower.post_layernorm(tower(pixels).last_hidden_state)
    torch.testing.assert_close(encoder(pixels).tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("hf-")])
def test_transform_is_the_checkpoints_own(build, name_of, kind):
    encoder = build(kind)
    small = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((97, 71), Image.Resampling.BICUBIC)
    folder = name_of(kind).removeprefix("hf:")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert type(processor).__name__.endswith("Pil")
    expected = processor(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(encoder.transform.eval(image), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_another_image_size_gives_another_grid(build, kind):
    own = build(kind)
    double = build(kind, image_size=2 * own.transform.size[0])
    assert double.grid == (2 * own.grid[0], 2 * own.grid[1])
    assert double.transform.size == (2 * own.transform.size[0],) * 2
    assert double(noise(double)).tokens.shape == (3, 4 * own.num_tokens, own.width)


@pytest.mark.parametrize("kind", ["hf-clip", "timm-efficientnet", "open_clip"])
def test_fingerprint_follows_weights_and_options(build, kind):
    encoder = build(kind)
    assert encoder.fingerprint() == build(kind).fingerprint()
    assert encoder.fingerprint() != build(kind, layer=-2).fingerprint()
    assert encoder.fingerprint() != build(kind, drop_cls=False).fingerprint()
    assert encoder.fingerprint() != build(kind, image_size=64).fingerprint()
    before = encoder.fingerprint()
    with torch.no_grad():
        list(encoder.parameters())[-1].add_(1e-3)
    assert encoder.fingerprint() != before
    assert encoder.to(torch.bfloat16).fingerprint() != before


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_follow_the_weights_type(build, kind):
    encoder = build(kind).to(torch.bfloat16)
    assert encoder(noise(encoder)).tokens.dtype == torch.bfloat16


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_left_on_the_cpu(build, kind, layer):
    real = build(kind, layer=layer)
    mode = FakeTensorMode()
    encoder = on_fake_cuda(real, mode)
    with mode, torch.device("cuda"):
        features = encoder(torch.zeros(2, 3, *real.transform.size))
    assert features.tokens.device.type == "cuda"
    assert features.tokens.shape == (2, real.num_tokens, real.width)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_base_patch16_242", "did you mean 'vit_base_patch16_2"),
        ("timm:resnet50.imagenet", "no weights 'resnet50.imagenet'"),
        ("open_clip:ViT-B-31/openai", "did you mean 'ViT-B-"),
        ("open_clip:ViT-B-32/openia", "did you mean 'openai'"),
        ("open_clip:ViT-B-32-quickgelu/laion2b_s34b_b79k", "no weights|trained without QuickGELU"),
        ("hf:no/such-model", "no such model"),
        ("starter:efficientnet_lite", "did you mean 'efficientnet_lite0'"),
        ("gguf:model.gguf", "unknown source"),
        ("resnet50", "expected SOURCE:NAME"),
    ],
)
def test_unknown_names_are_one_line_with_the_nearest(name, message):
    with pytest.raises(VlmError, match=message) as error:
        build_image_encoder(ImageEncoderSpec(name=name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["hf-clip", "hf-convnext", "timm-vit", "timm-efficientnet", "open_clip"])
@pytest.mark.parametrize("layer", [0, -40])
def test_a_layer_the_model_lacks_is_an_error(build, kind, layer):
    with pytest.raises(VlmError, match=f"layer: {layer}"):
        build(kind, layer=layer)


@pytest.mark.parametrize("change", ["missing", "left over", "of another shape"])
def test_every_key_of_a_checkpoint_is_accounted_for(tmp_path, change):
    from safetensors.torch import load_file, save_file

    folder = tiny_hf_image_model("clip", tmp_path / "clip")
    state = load_file(folder / "model.safetensors")
    key = "vision_model.encoder.layers.1.mlp.fc1.weight"
    if change == "missing":
        del state[key]
    elif change == "left over":
        key = "vision_model.encoder.layers.9.mlp.fc1.weight"
        state[key] = torch.zeros(3)
    else:
        state[key] = torch.zeros(3, 3)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VlmError, match=change) as error:
        build_image_encoder(ImageEncoderSpec(name=f"hf:{folder}"))
    assert "layers." in str(error.value)


def test_a_language_model_is_no_image_encoder(tiny_folder):
    from tiny_models import tiny_language_model

    with pytest.raises(VlmError, match="no image encoder can be made of a 'llama' model"):
        build_image_encoder(ImageEncoderSpec(name=f"hf:{tiny_folder(tiny_language_model, 'llama')}"))


def test_resizing_can_be_overridden(name_of):
    encoder = build_image_encoder(ImageEncoderSpec(name=name_of("hf-clip")), resize="pad")
    assert encoder.transform.resize == "pad"
