"""Parameter groups and the learning rate over time."""

import pytest
import torch
from torch import nn

from vlm.errors import VlmError
from vlm.models.freezing import freeze_all_but, logical_name, named_trainable
from vlm.recipe import OptimizerSection, ScheduleSection
from vlm.training.optimiser import build_optimizer, schedule_factor


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.bridge = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.language_model = nn.Linear(4, 4)


def test_norms_and_biases_have_no_decay_and_patterns_set_rates():
    model = _Model()
    section = OptimizerSection(lr=1.0, weight_decay=0.1, groups={"language_model.*": 0.25})
    optimizer = build_optimizer(model, section)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    rates = {name: found[id(p)] for name, p in model.named_parameters()}
    assert rates == {
        "bridge.0.weight": (1.0, 0.1),
        "bridge.0.bias": (1.0, 0.0),
        "bridge.1.weight": (1.0, 0.0),
        "bridge.1.bias": (1.0, 0.0),
        "language_model.weight": (0.25, 0.1),
        "language_model.bias": (0.25, 0.0),
    }
    with pytest.raises(VlmError, match="matches nothing that trains"):
        build_optimizer(model, OptimizerSection(lr=1.0, groups={"langage_model.*": 0.25}))


def test_only_what_a_pattern_names_trains_and_a_pattern_without_effect_is_an_error():
    model = _Model().to(torch.bfloat16)
    freeze_all_but(model, ["bridge.*"])
    assert [n for n, _ in named_trainable(model)] == [
        "bridge.0.weight",
        "bridge.0.bias",
        "bridge.1.weight",
        "bridge.1.bias",
    ]
    assert model.bridge[0].weight.dtype == torch.float32
    assert model.language_model.weight.dtype == torch.bfloat16
    with pytest.raises(VlmError, match=r"did you mean 'bridge\.\*'"):
        freeze_all_but(model, ["brige.*"])


def test_adapters_lie_under_one_logical_prefix():
    name = "language_model.network.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert logical_name(name) == "language_model.lora.model.layers.0.self_attn.q_proj.A.weight"
    base = "language_model.network.model.layers.0.self_attn.q_proj.base_layer.weight"
    assert logical_name(base) == "language_model.network.model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_the_schedule_warms_up_and_comes_down(name):
    section = ScheduleSection(name=name, warmup=10, warmup_start=0.01, min_lr=0.1)
    factors = [schedule_factor(section, step, 100) for step in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[9] == pytest.approx(1.0)
    assert 0.01 < factors[0] < 0.2
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(1.0 if name == "constant" else 0.1, abs=0.02)


def test_warmup_below_one_is_a_share_of_all_steps():
    assert schedule_factor(ScheduleSection(warmup=0.5), 24, 100) == pytest.approx(0.5)
    assert schedule_factor(ScheduleSection(warmup=0), 0, 100) == 1.0


class _Encoder(nn.Module):
    """Names of parameters as an image encoder of transformers has them."""

    def __init__(self):
        super().__init__()
        self.image_encoder = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict({"patch_embedding": nn.Linear(2, 2)}),
                "encoder": nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))}),
                "post_layernorm": nn.LayerNorm(2),
            }
        )
        self.bridge = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})


def test_layers_of_an_image_encoder_learn_the_slower_the_more_stand_behind():
    """BLIP-2's code: .95 to the power of 1 for the last layer, of all layers and one for the embeddings."""
    model = _Encoder()
    optimizer = build_optimizer(model, OptimizerSection(lr=1.0, image_layer_decay=0.5))
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: found[id(p)] for name, p in model.named_parameters() if name.endswith("weight")}
    assert rates == {
        "image_encoder.embeddings.patch_embedding.weight": 0.5**4,
        "image_encoder.encoder.layers.0.weight": 0.5**3,
        "image_encoder.encoder.layers.1.weight": 0.5**2,
        "image_encoder.encoder.layers.2.weight": 0.5,
        "image_encoder.post_layernorm.weight": 0.5,
        "bridge.layers.0.weight": 1.0,
    }
    assert optimizer.param_groups[0]["lr"] == 1.0  # the one that is logged
    model.image_encoder.requires_grad_(False)
    with pytest.raises(VlmError, match="no layer of the image encoder learns"):
        build_optimizer(model, OptimizerSection(lr=1.0, image_layer_decay=0.5))
