"""The published LLaVA recipes: sizes from configurations alone, and the settings that papers and code give."""

import pytest
import torch

from vlm import VlmError, load_recipe
from vlm.backbones.known_configs import find_config, known_names
from vlm.models.meta import build_on_meta, part_sizes, trained_sizes

CLIP_LAYER = 12_596_224  # 4 x 1024 x 1025 + 2 x 2 x 1024 + 1024 x 4096 + 4096 + 4096 x 1024 + 1024
VICUNA_7B, VICUNA_13B = 6_738_415_616, 13_015_864_320
SMOLLM2_360M = 361_821_120
LORA_7B = 128 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))


@pytest.fixture(scope="module")
def meta():
    made = {}

    def build(name):
        if name not in made:
            recipe = load_recipe(name)
            made[name] = build_on_meta(recipe.model, recipe.trainable)
        return made[name]

    return build


@pytest.mark.parametrize(
    ("name", "bridge", "language", "trained"),
    [
        ("llava_pretrain", 4_198_400, VICUNA_7B, {"bridge": 4_198_400}),
        ("llava_finetune", 4_198_400, VICUNA_7B, {"bridge": 4_198_400, "language_model": VICUNA_7B}),
        ("llava15_pretrain", 20_979_712, VICUNA_7B, {"bridge": 20_979_712}),
        ("llava15_finetune", 20_979_712, VICUNA_7B, {"bridge": 20_979_712, "language_model": VICUNA_7B}),
        (
            "llava15_finetune_lora",
            20_979_712,
            VICUNA_7B + LORA_7B,
            {"bridge": 20_979_712, "language_model.lora": LORA_7B},
        ),
        ("llava_scienceqa", 1024 * 5120 + 5120, VICUNA_13B, {"bridge": 5_248_000, "language_model": VICUNA_13B}),
        ("siglip2_smollm2", 768 * 16 * 960 + 960, SMOLLM2_360M, {"bridge": 11_797_440, "language_model": SMOLLM2_360M}),
    ],
)
def test_parameters_are_counted_to_the_unit(meta, name, bridge, language, trained):
    model = meta(name)
    counts = part_sizes(model)
    assert counts["bridge"] == bridge
    assert counts["language_model"] == language
    told = trained_sizes(model)
    assert {key: told[key] for key in trained} == trained
    assert ("image_encoder" in told) == (name == "siglip2_smollm2")


def test_llava_15_is_as_large_as_transformers_own(meta):
    """What is dropped at load is the layer behind the one that is read, and the norm behind all."""
    import transformers as t

    clip, vicuna = find_config("openai/clip-vit-large-patch14-336"), find_config("lmsys/vicuna-7b-v1.5")
    with torch.device("meta"):
        theirs = t.LlavaForConditionalGeneration(t.LlavaConfig(vision_config=clip.vision_config, text_config=vicuna))
    whole = sum(p.numel() for p in theirs.parameters())
    assert whole == 7_062_902_784
    assert sum(part_sizes(meta("llava15_finetune")).values()) == whole - CLIP_LAYER - 2 * 1024
    projector = sum(p.numel() for p in theirs.model.multi_modal_projector.parameters())
    assert part_sizes(meta("llava15_finetune"))["bridge"] == projector


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("llava_finetune", 256), ("llava15_finetune", 576), ("siglip2_smollm2", 64), ("llava_scienceqa", 256)],
)
def test_a_picture_takes_the_published_number_of_tokens(meta, name, tokens):
    assert meta(name).bridge.num_tokens == tokens


@pytest.mark.parametrize(
    ("name", "batch", "lr", "epochs", "template", "resize"),
    [
        ("llava_pretrain", 128, 2e-3, 1, "plain", None),
        ("llava_finetune", 32, 2e-5, 3, "vicuna_v1", None),
        ("llava15_pretrain", 256, 1e-3, 1, "plain", None),
        ("llava15_finetune", 128, 2e-5, 1, "vicuna_v1", "pad"),
        ("llava15_finetune_lora", 128, 2e-4, 1, "vicuna_v1", "pad"),
        ("llava_scienceqa", 128, 2e-5, 12, "vicuna_v1", None),
    ],
)
def test_settings_are_the_published_ones(name, batch, lr, epochs, template, resize):
    recipe = load_recipe(name)
    assert (recipe.train.batch_size, recipe.optimizer.lr, recipe.train.epochs) == (batch, lr, epochs)
    assert (recipe.model.template, recipe.model.image_encoder.resize) == (template, resize)
    assert recipe.model.image_encoder.layer == -2
    assert recipe.model.image_encoder.drop_cls
    assert (recipe.schedule.name, recipe.schedule.warmup, recipe.optimizer.weight_decay) == ("cosine", 0.03, 0.0)
    assert recipe.data.max_length == 2048
    assert recipe.train.gradient_checkpointing
    assert recipe.train.fsdp == ("language_model.*" in recipe.trainable)


@pytest.mark.parametrize("name", ["llava15_finetune", "llava15_finetune_lora"])
def test_batches_are_grouped_where_the_code_groups_them(name):
    assert load_recipe(name).data.group_by_modality_length


def test_data_sets_of_the_recipes_are_known():
    from vlm.data.catalogue import load_spec

    for name in ("llava_finetune", "llava15_pretrain", "llava15_finetune", "llava15_finetune_lora", "siglip2_smollm2"):
        for source in load_recipe(name).data.train:
            assert source.split in load_spec(source.dataset)[0].splits


@pytest.mark.parametrize("name", known_names())
def test_known_configurations_are_whole(name):
    config = find_config(name)
    assert config.model_type in ("clip", "siglip", "llama", "qwen2", "bert", "opt", "t5", "blip-2")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008), ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768)],
)
def test_known_language_models_have_their_published_size(name, parameters):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(find_config(name))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_an_unknown_part_names_the_nearest_known_one():
    with pytest.raises(VlmError, match=r"did you mean 'lmsys/vicuna-7b-v1\.5'"):
        find_config("lmsys/vicuna-7b-v1.4")
