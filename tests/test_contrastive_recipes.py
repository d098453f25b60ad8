"""The contrastive recipes: published sizes to the unit, and the settings that papers and code give."""

from typing import Any

import pytest
import torch

from vlm import load_recipe
from vlm.models.build import build_model
from vlm.models.dual_encoder import DualEncoder
from vlm.paths import yaml_names

RECIPES = ["clip_vit_b32", "siglip_b16", "lit_l16"]


class Tokens:
    """Stands in for SigLIP's tokeniser, which lies on the hub; the number of words is the architecture's."""

    context_length = 64

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return torch.ones(len(texts), 64, dtype=torch.long)


def built(name: str, monkeypatch: pytest.MonkeyPatch) -> DualEncoder:
    if name == "siglip_b16":
        monkeypatch.setattr("open_clip.get_tokenizer", lambda *_, **__: Tokens())
    recipe = load_recipe(name)
    model: DualEncoder = build_model(recipe.model, recipe.trainable, device="cpu", precision="fp32")
    return model


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_clip_is_as_large_as_open_clips_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("clip_vit_b32", monkeypatch)
    assert count(model) == 151_277_313
    assert all(p.requires_grad for p in model.parameters())
    assert model.text_encoder.context_length == 77
    assert model.bridge.width == 512
    transform = model.image_encoder.transform
    assert (transform.size, transform.train_scale, transform.train_flip) == ((224, 224), (0.9, 1.0), 0.0)


def test_siglip_is_as_large_as_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers as t

    model = built("siglip_b16", monkeypatch)
    with torch.device("meta"):
        theirs = t.SiglipModel(t.SiglipConfig())  # its defaults are google/siglip-base-patch16-224
    assert count(model) == count(theirs) == 203_155_970
    assert model.bridge.logit_bias is not None
    assert (model.bridge.scale.item(), model.bridge.logit_bias.item()) == pytest.approx((10.0, -10.0))
    transform = model.image_encoder.transform
    assert (transform.mean, transform.resize) == ((0.5, 0.5, 0.5), "square")


@pytest.mark.parametrize(
    ("name", "batch", "lr", "decay", "betas", "warmup", "objective"),
    [
        ("clip_vit_b32", 32768, 5e-4, 0.2, (0.9, 0.98), 2000, "itc"),
        ("siglip_b16", 32768, 1e-3, 1e-4 / 1e-3, (0.9, 0.95), 10000, "sigmoid_itc"),
        ("lit_l16", 16384, 1e-3, 1e-4 / 1e-3, (0.9, 0.95), 10000, "itc"),
    ],
)
def test_settings_are_the_published_ones(
    name: str, batch: int, lr: float, decay: float, betas: tuple[float, float], warmup: int, objective: str
) -> None:
    # big_vision's weight decay is not multiplied by the learning rate; AdamW's is.
    recipe = load_recipe(name)
    optimizer = recipe.optimizer
    assert (recipe.train.batch_size, optimizer.lr, optimizer.weight_decay) == (batch, lr, decay)
    assert (optimizer.betas, recipe.schedule.warmup) == (betas, warmup)
    assert [one.name for one in recipe.objectives] == [objective]
    assert all(source.dataset in yaml_names("datasets") for source in recipe.data.train)


def test_lit_locks_the_image_side() -> None:
    recipe = load_recipe("lit_l16")
    assert not any(pattern.startswith(("image_encoder", "*")) for pattern in recipe.trainable)
    bridge: Any = recipe.model
    assert bridge.bridge.image_projection == "none"
    assert bridge.bridge.logit_scale == 10.0
