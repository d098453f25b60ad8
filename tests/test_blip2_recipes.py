"""The published recipes of the Q-Former family: sizes from configurations alone, settings of papers and code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlm import VlmError, load_recipe
from vlm.backbones.known_configs import find_config
from vlm.models.meta import build_on_meta, part_sizes, trained_sizes

EVA_WITH_NORM, IMAGE_NORM = 985_952_256, 2 * 1408
QFORMER_STAGE_1, TRAINED_STAGE_1 = 186_282_811, 186_705_470
QFORMER_STAGE_2 = 105_137_664
QUERIES = 32 * 768
NAMES = (
    "blip2_stage1",
    "blip2_stage1_vit_l",
    "blip2_stage2_opt",
    "blip2_stage2_t5",
    "blip2_caption_coco",
    "blip2_retrieval_coco",
    "instructblip",
    "minigpt4_stage1",
    "minigpt4_stage2",
)


@pytest.fixture(scope="module")
def meta() -> Callable[..., Any]:
    made: dict[Any, Any] = {}

    def build(name: str, *overrides: str) -> Any:
        if (name, overrides) not in made:
            recipe = load_recipe(name, overrides)
            made[name, overrides] = build_on_meta(recipe.model, recipe.trainable)
        return made[name, overrides]

    return build


def test_stage_one_is_counted_to_the_unit(meta: Callable[..., Any]) -> None:
    model = meta("blip2_stage1")
    counts = part_sizes(model)
    assert counts["image_encoder"] + IMAGE_NORM == EVA_WITH_NORM
    assert counts["bridge"] + counts["heads"] == sum(trained_sizes(model).values()) == TRAINED_STAGE_1
    around = {"query_tokens": QUERIES, "image_norm": IMAGE_NORM}
    around |= {"vision_projection": 196_864, "text_projection": 196_864, "match": 1_538, "temperature": 1}
    assert TRAINED_STAGE_1 - sum(around.values()) == QFORMER_STAGE_1
    assert model.image_encoder.num_tokens == 257
    assert (model.bridge.num_queries, model.bridge.width) == (32, 768)


def test_stage_one_over_clip_differs_by_what_reads_the_image(meta: Callable[..., Any]) -> None:
    """Keys and values of six layers, and the norm: 1,024 wide instead of 1,408."""
    large = meta("blip2_stage1_vit_l")
    assert sum(trained_sizes(large).values()) == TRAINED_STAGE_1 - (1408 - 1024) * (6 * 2 * 768 + 2)
    assert (large.image_encoder.width, large.image_encoder.num_tokens) == (1024, 257)
    assert len(large.image_encoder.tower.model.encoder.layers) == 23


@pytest.mark.parametrize(
    ("name", "language_model", "trained"),
    [
        ("blip2_stage2_opt", None, 107_133_696),
        ("blip2_stage2_opt", "hf:facebook/opt-6.7b", 108_314_880),
        ("blip2_stage2_t5", None, 106_739_968),
        ("blip2_stage2_t5", "hf:google/flan-t5-xxl", 108_314_880),
    ],
)
def test_stage_two_is_counted_to_the_unit(
    meta: Callable[..., Any], name: str, language_model: str | None, trained: int
) -> None:
    model = meta(name, *([f"model.language_model={language_model}"] if language_model else []))
    assert trained_sizes(model) == {"bridge": trained}
    projection = sum(p.numel() for p in model.bridge.language_projection.parameters())
    assert trained - projection - QUERIES - IMAGE_NORM == QFORMER_STAGE_2
    assert model.bridge.num_tokens == 32


def test_fine_tuning_trains_the_image_encoder_too(meta: Callable[..., Any]) -> None:
    tower = EVA_WITH_NORM - IMAGE_NORM
    assert trained_sizes(meta("blip2_caption_coco")) == {"bridge": 107_133_696, "image_encoder": tower}
    trained = trained_sizes(meta("blip2_retrieval_coco"))
    assert trained["image_encoder"] == tower
    assert trained["bridge"] + trained["heads"] == TRAINED_STAGE_1
    assert meta("blip2_caption_coco").image_encoder.num_tokens == 26 * 26 + 1


def test_instructblip_is_counted_to_the_unit(meta: Callable[..., Any]) -> None:
    (trained,) = trained_sizes(meta("instructblip")).values()
    projection = 768 * 4096 + 4096
    assert trained == 188_837_376
    assert trained - projection - QUERIES - IMAGE_NORM == 185_660_160


@pytest.mark.parametrize("name", ["minigpt4_stage1", "minigpt4_stage2"])
def test_minigpt4_trains_one_linear_layer(meta: Callable[..., Any], name: str) -> None:
    assert trained_sizes(meta(name)) == {"bridge": 3_149_824}
    larger = meta(name, "model.language_model=hf:lmsys/vicuna-13b-v1.3")
    assert trained_sizes(larger) == {"bridge": 3_937_280}


def test_whole_models_of_transformers_have_their_published_size(meta: Callable[..., Any]) -> None:
    import transformers as t

    with torch.device("meta"):
        generative = t.Blip2ForConditionalGeneration(find_config("Salesforce/blip2-opt-2.7b"))
        retrieval = t.Blip2ForImageTextRetrieval(find_config("Salesforce/blip2-itm-vit-g"))
    whole = sum(p.numel() for p in generative.parameters())
    assert whole == sum(part_sizes(meta("blip2_stage2_opt")).values()) == 3_744_679_936
    assert sum(p.numel() for p in retrieval.parameters()) == 1_172_032_258
    counts = part_sizes(meta("blip2_stage1"))
    unpublished = {
        name: p for name, p in meta("blip2_stage1").heads.named_parameters() if name.startswith(("words", "temp"))
    }
    assert sum(counts.values()) - sum(p.numel() for p in unpublished.values()) == 1_172_032_258


@pytest.mark.parametrize(
    ("name", "batch", "lr", "lowest", "warmup", "start", "length"),
    [
        ("blip2_stage1", 16 * 100, 1e-4, 1e-5, 5000, 1e-6, {"epochs": 10}),
        ("blip2_stage1_vit_l", 16 * 100, 1e-4, 1e-5, 5000, 1e-6, {"epochs": 10}),
        ("blip2_stage2_opt", 16 * 64, 1e-4, 1e-5, 2000, 1e-6, {"epochs": 10}),
        ("blip2_stage2_t5", 16 * 64, 1e-4, 1e-5, 2000, 1e-6, {"epochs": 10}),
        ("blip2_caption_coco", 16 * 16, 1e-5, 0, 1000, 1e-8, {"epochs": 5}),
        ("blip2_retrieval_coco", 16 * 14, 1e-5, 0, 1000, 1e-8, {"epochs": 5}),
        ("instructblip", 128, 1e-5, 0, 1000, 1e-8, {"steps": 60000}),
        ("minigpt4_stage1", 4 * 64, 1e-4, 8e-5, 5000, 1e-6, {"steps": 20000}),
        ("minigpt4_stage2", 12, 3e-5, 1e-5, 200, 1e-6, {"steps": 1000}),
    ],
)
def test_settings_are_the_published_ones(
    name: str, batch: int, lr: float, lowest: float, warmup: int, start: float, length: dict[str, int]
) -> None:
    recipe = load_recipe(name)
    schedule, optimizer = recipe.schedule, recipe.optimizer
    assert (recipe.train.batch_size, optimizer.lr, schedule.warmup, schedule.name) == (batch, lr, warmup, "cosine")
    assert lr * schedule.min_lr == pytest.approx(lowest, rel=1e-3)
    assert lr * schedule.warmup_start == pytest.approx(start, rel=1e-2)
    assert {key: getattr(recipe.train, key) for key in length} == length
    assert (optimizer.weight_decay, optimizer.betas, optimizer.clip_grad) == (0.05, (0.9, 0.999), None)
    assert recipe.model.bridge.num_queries == 32
    assert not recipe.model.image_encoder.drop_cls
    fine_tuned = "image_encoder.*" in recipe.trainable
    assert (recipe.model.image_encoder.image_size == 364) == fine_tuned == recipe.train.gradient_checkpointing
    assert recipe.data.augment or fine_tuned  # an encoder that learns sees crops without being asked


def test_special_settings() -> None:
    for name in ("blip2_stage1", "blip2_stage1_vit_l", "blip2_retrieval_coco"):
        recipe = load_recipe(name)
        told = {objective.name: (objective.weight, objective.smoothing) for objective in recipe.objectives}
        assert told == {"itc": (1, 0.1), "itm": (1, 0), "lm": (1, 0.1)}
    assert load_recipe("blip2_retrieval_coco").optimizer.image_layer_decay == 0.95
    assert load_recipe("blip2_stage2_t5").model.split_captions
    assert load_recipe("instructblip").data.sampling == "sqrt"
    assert [s.weight for s in load_recipe("minigpt4_stage1").data.train if s.dataset == "laion400m"] == [115]
    assert sum(s.weight or 0 for s in load_recipe("minigpt4_stage1").data.train) == pytest.approx(115 + 14)


@pytest.mark.parametrize("name", NAMES)
def test_data_sets_of_the_recipes_are_known(name: str) -> None:
    from vlm.data.catalogue import load_spec

    for source in load_recipe(name).data.train:
        assert source.split in load_spec(source.dataset)[0].splits


@pytest.mark.parametrize("name", NAMES)
def test_a_header_says_source_differences_and_hardware(name: str) -> None:
    from vlm.paths import find_yaml

    header = "".join(line for line in find_yaml("recipes", name).read_text().splitlines() if line.startswith("#"))
    for word in ("arXiv:", "Paper and code", "Hardware:", "Data:"):
        assert word in header, word


def test_embed_width_belongs_to_the_first_stage() -> None:
    with pytest.raises(VlmError, match=r"embed_width"):
        load_recipe("blip2_stage2_opt", ["model.bridge.embed_width=256"])
