"""LAVIS' `.pth` files: a model written in their keys is the same model when read, and every key is accounted for."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dual_parts import captions
from generative_parts import generative_spec, pictures
from lavis_bundles import bundles
from safetensors.torch import load_file
from test_published_blip2 import tiny_vision
from test_qformer_model import qformer_spec
from tiny_models import randomize, tiny_bert
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from vlm import VlmError, load_model
from vlm.backbones.lavis_checkpoint import LavisCheckpoint, read_lavis
from vlm.bridges.qformer_keys import to_lavis
from vlm.model_spec import GenerativeSpec, QFormerSpec
from vlm.models.build import build_model
from vlm.models.published_lavis import lavis_spec
from vlm.recipe import Recipe
from vlm.training.loop import Trainer

# transformers' key of the tower -> LAVIS'.
_VISION = (
    (r"embeddings\.class_embedding", "cls_token"),
    (r"embeddings\.position_embedding", "pos_embed"),
    (r"embeddings\.patch_embedding\.(.*)", r"patch_embed.proj.\1"),
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.(.*)", r"blocks.\1.norm\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn\.projection\.(.*)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.qkv\.weight", r"blocks.\1.attn.qkv.weight"),
    (r"encoder\.layers\.(\d+)\.mlp\.(.*)", r"blocks.\1.mlp.\2"),
)


def vision_keys(model: Any) -> dict[str, Tensor]:
    """The image encoder's weights as LAVIS writes them; the keys' bias, which EVA has not, is set to zero."""
    result = {}
    for key, value in model.image_encoder.tower.model.state_dict().items():
        if key.endswith("qkv.bias"):
            width = len(value) // 3
            with torch.no_grad():
                value[width : 2 * width] = 0
            layer = key.split(".")[2]
            result[f"visual_encoder.blocks.{layer}.attn.q_bias"] = value[:width].clone()
            result[f"visual_encoder.blocks.{layer}.attn.v_bias"] = value[-width:].clone()
            continue
        (name,) = [re.sub(pattern, new, key) for pattern, new in _VISION if re.fullmatch(pattern, key)]
        result[f"visual_encoder.{name}"] = value.clone()
    return result


def lavis_keys(model: Any, family: str = "opt") -> dict[str, Tensor]:
    """The trained side of a model as LAVIS writes it."""
    state = {k: v.detach().clone() for k, v in model.named_parameters() if k.startswith(("bridge.", "heads."))}
    return {key.replace("opt_proj.", f"{family}_proj."): value for key, value in to_lavis(state).items()}


def written(path: Path, state: dict[str, Tensor], spec: Any = None) -> Path:
    torch.save({"model": state, "epoch": 1}, path)
    if spec is not None:
        path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": spec.model_dump(mode="json")}))
    return path


def stage_one(tiny_folder: Callable[..., Path], **bridge: Any) -> Any:
    content = qformer_spec(tiny_folder, **bridge)
    content["image_encoder"]["name"] = f"hf:{tiny_folder(tiny_vision, 'blip2')}"
    model = build_model(QFormerSpec.model_validate(content), device="cpu", precision="fp32")
    for part in (model.bridge, model.heads, model.image_encoder.tower):
        randomize(part, seed=1)
    with torch.no_grad():
        model.heads.temperature.fill_(0.2)
    return model


def stage_two(tiny_folder: Callable[..., Path], kind: str, **bridge: Any) -> Any:
    template = {"t5": "blip2_t5", "opt": "blip2_opt", "llama": "instructblip"}[kind]
    content = generative_spec(tiny_folder, kind, template=template).model_dump(mode="json")
    content["bridge"] = {"type": "qformer", "init": f"hf:{tiny_folder(tiny_bert)}", "num_queries": 5, **bridge}
    content["image_encoder"] |= {"name": f"hf:{tiny_folder(tiny_vision, 'blip2')}", "drop_cls": False}
    model = build_model(GenerativeSpec.model_validate(content), device="cpu", precision="fp32")
    randomize(model.bridge, seed=1)
    return model


@pytest.mark.parametrize("with_vision", [True, False])
def test_a_first_stage_goes_round(tiny_folder: Callable[..., Path], tmp_path: Path, with_vision: bool) -> None:
    model, images = stage_one(tiny_folder), pictures(tmp_path, 2)
    state = lavis_keys(model) | vision_keys(model)
    if not with_vision:  # frozen, so LAVIS wrote none: the encoder is that of its name
        state = {key: value for key, value in state.items() if not key.startswith("visual_encoder.")}
        model.image_encoder = stage_one(tiny_folder).image_encoder
        model.image_encoder.tower.load_state_dict(
            build_model(model.spec, device="cpu", precision="fp32").image_encoder.tower.state_dict()
        )
    read = load_model(written(tmp_path / "blip2.pth", state, model.spec), "cpu", "fp32")
    texts = ["a red chair", "a cat"]
    torch.testing.assert_close(read.encode_image(images), model.encode_image(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(read.encode_text(texts), model.encode_text(texts), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(read.match(images, texts), model.match(images, texts), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        read.classify(images, texts), model.classify(images, texts), rtol=1e-4, atol=1e-4
    )  # the temperature too
    assert read.caption(images) == model.caption(images)


@pytest.mark.parametrize(
    ("kind", "family", "instruction"), [("opt", "opt", False), ("t5", "t5", False), ("llama", "llm", True)]
)
def test_a_second_stage_goes_round(
    tiny_folder: Callable[..., Path], tmp_path: Path, kind: str, family: str, instruction: bool
) -> None:
    model, images = stage_two(tiny_folder, kind, instruction=instruction), pictures(tmp_path, 2)
    randomize(model.language_model.network, seed=3)
    language = {
        f"{family}_model.{key}": value.clone() for key, value in model.language_model.network.state_dict().items()
    }
    state = lavis_keys(model, family) | vision_keys(model) | language
    read = load_model(written(tmp_path / "stage2.pth", state, model.spec), "cpu", "fp32")
    texts, prompts = ["a cat", "yes"], ["what is it?", "is it red?"]
    torch.testing.assert_close(
        read.score(images, texts, prompts), model.score(images, texts, prompts), rtol=1e-4, atol=1e-4
    )
    assert read.answer(images, prompts, max_new_tokens=6) == model.answer(images, prompts, max_new_tokens=6)


@pytest.mark.parametrize("change", ["missing", "left over", "shape", "tied"])
def test_every_key_is_accounted_for(tiny_folder: Callable[..., Path], tmp_path: Path, change: str) -> None:
    model = stage_one(tiny_folder)
    state = lavis_keys(model)
    key = "Qformer.bert.encoder.layer.1.output_query.dense.weight"
    if change == "missing":
        del state[key]
    elif change == "left over":
        state["Qformer.bert.pooler.dense.weight"] = torch.zeros(2)
    elif change == "shape":
        state["query_tokens"] = torch.zeros(1, 7, 32)
    else:
        state["Qformer.cls.predictions.decoder.bias"] = torch.ones(3)
    words = {"missing": r"lacks bridge\.layers\.1\.query_ffn\.down", "left over": r"no place for the key Qformer\.bert"}
    words |= {"shape": r"shapes differ for bridge\.query_tokens \(\(1, 7, 32\) there, \(1, 4, 32\)"}
    words |= {"tied": "should be a copy of"}
    with pytest.raises(VlmError, match=words[change]):
        load_model(written(tmp_path / "blip2.pth", state, model.spec), "cpu", "fp32")


def test_files_that_are_none_of_lavis(tmp_path: Path) -> None:
    torch.save({"model": re.compile}, tmp_path / "code.pth")
    torch.save({"weights": {}}, tmp_path / "other.pth")
    torch.save({"model": {"head.weight": torch.zeros(2)}}, tmp_path / "resnet.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 torn")
    for name, error in (
        ("code", "cannot be read as tensors alone"),
        ("other", "expected tensors under the key `model`"),
        ("resnet", "holds no Q-Former"),
        ("torn", "cannot be read"),
    ):
        with pytest.raises(VlmError, match=error) as raised:
            load_model(tmp_path / f"{name}.pth", "cpu")
        assert "\n" not in str(raised.value)


def file_of_sizes(
    tmp_path: Path, width: int, projection: tuple[str, int] | None, text: bool = False
) -> LavisCheckpoint:
    state = {"query_tokens": torch.zeros(1, 32, 768), "ln_vision.weight": torch.zeros(width)}
    if projection:
        state[f"{projection[0]}_proj.bias"] = torch.zeros(projection[1])
    if text:
        state["Qformer.bert.embeddings.word_embeddings.weight"] = torch.zeros(1, 1)
    return read_lavis(written(tmp_path / "sizes.pth", state))


@pytest.mark.parametrize(
    ("width", "projection", "encoder", "language", "template"),
    [
        (1408, None, "hf:Salesforce/blip2-itm-vit-g", None, None),
        (1024, None, "hf:openai/clip-vit-large-patch14", None, None),
        (1408, ("opt", 2560), "hf:Salesforce/blip2-itm-vit-g", "hf:facebook/opt-2.7b", "blip2_opt"),
        (1408, ("opt", 4096), "hf:Salesforce/blip2-itm-vit-g", "hf:facebook/opt-6.7b", "blip2_opt"),
        (1408, ("t5", 4096), "hf:Salesforce/blip2-itm-vit-g", "hf:google/flan-t5-xxl", "blip2_t5"),
        (1408, ("llm", 4096), "hf:Salesforce/blip2-itm-vit-g", "hf:lmsys/vicuna-7b-v1.1", "instructblip"),
    ],
)
def test_published_files_are_known_by_their_sizes(
    tmp_path: Path, width: int, projection: Any, encoder: str, language: str | None, template: str | None
) -> None:
    spec = lavis_spec(file_of_sizes(tmp_path, width, projection, text=template == "instructblip"))
    assert spec.image_encoder.name == encoder
    assert not spec.image_encoder.drop_cls
    if language:
        assert (spec.language_model.name, spec.template) == (language, template)
        assert spec.bridge.instruction == (template == "instructblip")


@pytest.mark.parametrize(("width", "projection"), [(768, None), (1408, ("opt", 32))])
def test_other_sizes_ask_for_a_file_beside(tmp_path: Path, width: int, projection: Any) -> None:
    with pytest.raises(VlmError, match=r"say what it is in sizes\.yaml"):
        lavis_spec(file_of_sizes(tmp_path, width, projection))


# --- init_from --------------------------------------------------------------------------------------------------------


def starting(tiny_folder: Callable[..., Path], tmp_path: Path, model: Any, source: Any, **options: Any) -> Trainer:
    data = captions(tmp_path / "data")
    content = {
        "model": model.spec.model_dump(mode="json"),
        "data": {"train": [{"dataset": str(data), "format": "captions_jsonl"}]},
        "optimizer": {"lr": 1e-3},
        "train": {"batch_size": 4, "steps": 1},
        "init_from": source if isinstance(source, list) else str(source),
        "output": str(tmp_path / "run"),
        **options,
    }
    return Trainer(Recipe.model_validate(content), quiet=True)


def test_a_second_stage_starts_from_a_file_of_the_first(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    one, two = stage_one(tiny_folder, num_queries=5), stage_two(tiny_folder, "opt")
    trainer = starting(tiny_folder, tmp_path, two, written(tmp_path / "stage1.pth", lavis_keys(one)))
    own = dict(trainer.model.bridge.named_parameters())
    for name, value in one.bridge.named_parameters():
        if name in own:
            torch.testing.assert_close(own[name].detach(), value.detach(), rtol=0, atol=0)
    assert trainer.train().finished


def test_instruction_aware_queries_take_the_text_side_of_stage_one(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """A file of the second stage lacks it; both together have all, the later one counting."""
    one, two = stage_one(tiny_folder, num_queries=5), stage_two(tiny_folder, "llama")
    aware = stage_two(tiny_folder, "llama", instruction=True)
    files = [
        str(written(tmp_path / "stage1.pth", lavis_keys(one))),
        str(written(tmp_path / "stage2.pth", lavis_keys(two, "llm"))),
    ]
    with pytest.raises(VlmError, match=r"the Q-Former there lacks bridge\.embeddings"):
        starting(tiny_folder, tmp_path, aware, files[1])
    trainer = starting(tiny_folder, tmp_path, aware, files, output=str(tmp_path / "both"))
    own = dict(trainer.model.bridge.named_parameters())
    later, earlier = dict(two.bridge.named_parameters()), dict(one.bridge.named_parameters())
    for name, value in own.items():
        torch.testing.assert_close(value.detach(), (later.get(name, earlier.get(name))).detach(), rtol=0, atol=0)
    assert trainer.train().finished


@pytest.mark.parametrize(
    ("kind", "bridge", "family", "error"),
    [
        ("t5", {}, "opt", r"was trained for a decoder-only model, but hf:.* is an encoder-decoder"),
        ("opt", {}, "t5", r"was trained for an encoder-decoder \(T5\), but hf:.* is a decoder-only model"),
        (
            "opt",
            {"num_queries": 3},
            "opt",
            r"shapes differ for bridge\.query_tokens \(\(1, 5, 32\) there, \(1, 3, 32\)",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tiny_folder: Callable[..., Path], tmp_path: Path, kind: str, bridge: dict, family: str, error: str
) -> None:
    file = written(tmp_path / "stage2.pth", lavis_keys(stage_two(tiny_folder, "opt"), family))
    with pytest.raises(VlmError, match=error):
        starting(tiny_folder, tmp_path, stage_two(tiny_folder, kind, **bridge), file)


def test_a_file_for_another_image_encoder_is_refused(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    state = lavis_keys(stage_two(tiny_folder, "opt"))
    state["ln_vision.weight"], state["ln_vision.bias"] = torch.ones(48), torch.zeros(48)
    with pytest.raises(VlmError, match=r"shapes differ for bridge\.image_norm.*\(\(48,\) there, \(24,\)"):
        starting(tiny_folder, tmp_path, stage_two(tiny_folder, "opt"), written(tmp_path / "wide.pth", state))


def test_what_was_taken_and_stays_frozen_is_kept_in_the_run(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """MiniGPT-4 over a Q-Former of one's own: one linear layer learns, and the run holds the rest too."""
    two = stage_two(tiny_folder, "opt")
    file = written(tmp_path / "stage2.pth", lavis_keys(two))
    trainer = starting(tiny_folder, tmp_path, two, file, trainable=["bridge.language_projection.*"])
    trainer.train()
    read = load_model(tmp_path / "run", "cpu", "fp32")
    own = dict(read.bridge.named_parameters())
    for name, value in two.bridge.named_parameters():
        same = torch.equal(own[name].detach(), value.detach())
        assert same == ("language_projection" not in name), name


@pytest.mark.parametrize("folder", bundles("stage1"))
def test_a_file_with_lavis_own_weights_gives_its_numbers(tmp_path: Path, folder: Path) -> None:
    """The first stage's bundle as the `.pth` it came from; its image tokens go past the image encoder."""
    import transformers as t

    config = json.loads((folder / "config.json").read_text())
    sizes = {key: config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    sizes |= {key: config[key] for key in ("intermediate_size", "max_position_embeddings")}
    words = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "cat"])}
    t.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), pad_token="[PAD]", sep_token="[SEP]"
    ).save_pretrained(tmp_path / "bert")
    randomize(t.BertModel(t.BertConfig(**sizes, vocab_size=config["vocab_size"] - 1))).save_pretrained(
        tmp_path / "bert"
    )
    vision = t.Blip2VisionConfig(
        hidden_size=config["encoder_width"],
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
    )
    t.Blip2VisionModel(vision).save_pretrained(tmp_path / "vision")
    t.BlipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vision")
    spec = QFormerSpec.model_validate(
        {
            "image_encoder": {"name": f"hf:{tmp_path / 'vision'}", "drop_cls": False},
            "bridge": {
                "init": f"hf:{tmp_path / 'bert'}",
                "num_queries": config["num_query_tokens"],
                "cross_attention_every": config["cross_attention_freq"],
                "embed_width": config["embed_dim"],
            },
            "text_length": min(32, config["max_position_embeddings"]),
            "match_length": min(35, config["max_position_embeddings"]),
        }
    )
    file = written(tmp_path / "lavis.pth", load_file(folder / "qformer_lavis.safetensors"), spec)
    model = load_model(file, "cpu", "fp32")
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    with torch.no_grad():
        found = model.heads.embed_queries(model.bridge.queries(model.bridge.image(inputs["image_tokens"])).states)
    torch.testing.assert_close(found, expected["image_feats"], atol=1e-4, rtol=0)
