"""Recipes: every shipped one loads, every mistake is one line that says where and what to do."""

import pytest

from vlm.errors import VlmError
from vlm.paths import yaml_names
from vlm.recipe import load_recipe
from vlm.schema import apply_overrides

STARTER = "starter/llava_finetune"


@pytest.mark.parametrize("name", yaml_names("recipes"))
def test_every_shipped_recipe_is_valid(name):
    assert load_recipe(name).output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lern_rate=1", "unknown key 'lern_rate'"),
        ("optimizer.weight_decy=1", "did you mean 'weight_decay'"),
        ("train.batch_size=many", "train.batch_size"),
        ("train.batch_size=0", "greater than or equal to 1"),
        ("train.epochs=1", "either `steps` or `epochs`"),
        ("model.type=generativ", "model.type"),
        ("model.question_prompt=hello", "{question}"),
        ("model.bridge.tokens=null", "give both or neither"),
        ("data.train.7.split=x", "is a list of 1"),
        ("train.batch_size.x=1", "holds a value"),
        ("nonsense", "expected KEY=VALUE"),
        ("train.seed=[", "not plain YAML"),
        ("data.train=[]", "data.train"),
        ("train.steps=true", "train: `steps` is true, expected a number"),
        ("optimizer.lr=.inf", "optimizer.lr"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas"),
        ('optimizer.groups={"bridge.*": -1}', "optimizer.groups"),
        ("train.seed=99999999999999999999", "train.seed"),
        ("objectives=[]", "objectives"),
        ("objectives=[lm, lm]", "named twice"),
    ],
)
def test_a_mistake_names_the_key_and_what_to_do(override, message):
    with pytest.raises(VlmError) as error:
        load_recipe(STARTER, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_reach_into_lists_and_short_forms():
    recipe = load_recipe(
        STARTER, ["data.train.0.weight=2", "model.language_model.lora.rank=4", "train.steps=3", "optimizer.lr=1e-4"]
    )
    assert recipe.data.train[0].weight == 2
    assert recipe.model.language_model.lora.rank == 4
    assert recipe.optimizer.lr == 1e-4
    short = apply_overrides({"language_model": "hf:gpt2"}, ["language_model.precision=bf16"])
    assert short == {"language_model": {"name": "hf:gpt2", "precision": "bf16"}}


def test_a_python_object_in_yaml_is_refused_and_not_made(tmp_path):
    file = tmp_path / "evil.yaml"
    file.write_text("model: !!python/object/apply:os.system ['touch owned']\n")
    with pytest.raises(VlmError, match=r"evil\.yaml:1: not plain YAML"):
        load_recipe(file)


def test_an_unknown_recipe_suggests_the_nearest(tmp_path):
    with pytest.raises(VlmError, match="did you mean 'starter/llava_finetune'"):
        load_recipe("starter/llava_finetun")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(VlmError, match="expected keys with values"):
        load_recipe(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("efficientnet", "expected SOURCE:NAME"),
        ("tim:vit", "did you mean 'timm'"),
        ("timm:vit_base_patch16_clp_224", "vit_base_patch16_clip_224"),
        ("starter:efficientnet_lite1", "efficientnet_lite0"),
    ],
)
def test_an_unknown_image_encoder_suggests_the_nearest(name, message):
    from vlm.backbones.image import build_image_encoder
    from vlm.model_spec import ImageEncoderSpec

    with pytest.raises(VlmError) as error:
        build_image_encoder(ImageEncoderSpec(name=name))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["hf:/no/such/folder", "starter:smollm3", "timm:vit_base_patch16_224"])
def test_an_unknown_language_model_is_an_error_in_words(name):
    from vlm.backbones.language import build_language_model
    from vlm.model_spec import LanguageModelSpec

    with pytest.raises(VlmError):
        build_language_model(LanguageModelSpec(name=name))
